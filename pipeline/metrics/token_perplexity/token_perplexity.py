"""Perplexity, bits per byte and accuracy of a causal language model on texts, for `evaluate`.

`evaluate.load` copies this file out of the package, so the arithmetic stays in `pipeline`.
"""

import difflib
import inspect
from collections.abc import Iterable

import datasets
import evaluate

from pipeline.measuring import measure_texts
from pipeline.processes import Processes
from pipeline.recipe import InputError

# Of `measure_texts`, what the metric gives itself.
NOT_OPTIONS = {"texts", "model", "tokenizer", "processes", "bytes_to_read"}

_DESCRIPTION = """\
How well a causal language model predicts texts. Perplexity is exp of the total nats over the total
predicted tokens (the corpus's, not a mean of the texts'); bits per UTF-8 byte can be compared
between tokenizers; every number comes with a 95 % interval (bootstrap over the texts). Texts longer
than the model's window are scored in windows that slide over them, each token exactly once.
"""

_CITATION = """\
@article{jelinek1977perplexity,
  title={Perplexity: a measure of the difficulty of speech recognition tasks},
  author={Jelinek, Fred and Mercer, Robert L. and Bahl, Lalit R. and Baker, James K.},
  journal={The Journal of the Acoustical Society of America},
  volume={62}, number={S1}, year={1977}
}
@article{efron1979bootstrap,
  title={Bootstrap methods: another look at the jackknife},
  author={Efron, Bradley},
  journal={The Annals of Statistics},
  volume={7}, number={1}, pages={1--26}, year={1979}
}
"""

_INPUTS = """\
Args:
    predictions (list of str): texts.
    model: a loaded causal language model, a folder or a Hub name.
    tokenizer (optional): its tokenizer, loaded or by name; by default what lies beside the model.
    block_size (int, optional): tokens in a window; by default the model's positions.
    stride (int, optional): tokens from the start of a window to that of the next, 1 to
        block_size - 1, which is the default; the smaller, the more context each token has.
    batch_size (int): windows in one forward pass (of shorter ones as many as have as many tokens),
        8; it changes no number.
    add_start_token (bool, optional): end-of-text stands before each text, so that its first token
        is predicted, too; by default unless the model was trained without.
    add_end_token (bool): the end-of-text after each text is predicted, too; False.
    joined (bool): lay the texts end to end as held-out text is in training; False: each by itself.
    packed (bool): texts share rows instead of being padded; False. The same numbers; GPT-2 only.
    max_length (int, optional): tokens of a text after which the rest is left out (`truncated`).
    target (str): "all", or "last_word": only the last word of each text is scored (LAMBADA).
    detokenize (str, optional): "wikitext" undoes WikiText's cutting into words before scoring.
    device (str, optional): "cpu", "cuda", ...; by default the model stays where it is.
    distributed (bool): all processes of the group call compute with the same texts and share the
        work; False: each does all that it is given.
Returns:
    perplexity: exp(total nats / total predicted tokens).
    mean_perplexity: the mean of each text's perplexity, what `evaluate`'s own metric returns.
    perplexities: each text's; None where it has nothing to predict.
    nats_per_token, bits_per_byte, word_perplexity (per white-space separated word), accuracy (the
    predicted token was the most likely one), last_word_accuracy (with that target: all its tokens).
    confidence_intervals: of each of them [low, high], or None for fewer than two texts.
    tokens (predicted), bytes and words (of what was predicted), bytes_per_token, documents,
    nothing_to_predict, truncated (at max_length, or a last word's context): counts.
Examples:
    >>> metric = evaluate.load("pipeline/metrics/token_perplexity")
    >>> metric.compute(predictions=texts, model="gpt2")["perplexity"]  # doctest: +SKIP
"""


class TokenPerplexity(evaluate.Metric):
    """Perplexity of a corpus, all numbers from one pass; see the module's description."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            module_type="metric",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://huggingface.co/docs/transformers/perplexity"],
        )

    def compute(self, *, predictions=None, references=None, **options):
        """Check what the library would turn into text, or pass on, whatever it is."""
        if predictions is not None:
            predictions = _checked(predictions)
        if "model" not in options:
            raise InputError("give model: a loaded model, a folder or a Hub name")
        return super().compute(predictions=predictions, references=references, **options)

    def _compute(self, predictions, model, tokenizer=None, distributed=False, **options):
        known = inspect.signature(measure_texts).parameters.keys() - NOT_OPTIONS
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                remedy = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
                raise InputError(f"{name}: unknown option; {remedy}")
        texts = _checked(predictions)
        return measure_texts(
            texts, model, tokenizer, bytes_to_read=sum(len(text.encode()) for text in texts),
            processes=Processes.existing() if distributed else None, **options,
        ).numbers()  # fmt: skip


def _checked(predictions):
    """Return texts as a list.

    Raises:
        InputError: there are none, or what is given is something else.
    """
    if isinstance(predictions, str | bytes | dict) or not isinstance(predictions, Iterable):
        kind = "one text" if isinstance(predictions, str) else f"a {type(predictions).__name__}"
        raise InputError(f"predictions is {kind}; give a list of texts")
    predictions = list(predictions)
    if not predictions:
        raise InputError("there are no texts to score: the list is empty")
    for number, text in enumerate(predictions):
        if not isinstance(text, str):
            raise InputError(f"predictions[{number}] is {text!r} and not text; give a list of str")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"predictions[{number}] holds half of a surrogate pair, which is no Unicode text; "
                "replace it"
            ) from None
    return predictions
