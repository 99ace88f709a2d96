"""Perplexity, bits per byte and accuracy of a causal language model on texts, for `evaluate`.

`evaluate.load` copies this file out of the package, so the arithmetic stays in `pipeline`.
"""

import datasets
import evaluate

from pipeline.measuring import measure_texts
from pipeline.recipe import InputError

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
    batch_size (int): windows in one forward pass, 8; it changes no number.
    add_start_token (bool, optional): end-of-text stands before each text, so that its first token
        is predicted, too; by default unless the model was trained without.
    add_end_token (bool): the end-of-text after each text is predicted, too; False.
    joined (bool): lay the texts end to end as held-out text is in training; False: each by itself.
    packed (bool): texts share rows instead of being padded; False. The same numbers.
    max_length (int, optional): tokens of a text after which the rest is left out (`truncated`).
    target (str): "all", or "last_word": only the last word of each text is scored (LAMBADA).
    detokenize (str, optional): "wikitext" undoes WikiText's cutting into words before scoring.
    device (str, optional): "cpu", "cuda", ...; by default the model stays where it is.
Returns:
    perplexity: exp(total nats / total predicted tokens).
    mean_perplexity: the mean of each text's perplexity, what `evaluate`'s own metric returns.
    perplexities: each text's; None where it has nothing to predict.
    nats_per_token, bits_per_byte, word_perplexity (per white-space separated word), accuracy (the
    predicted token was the most likely one), last_word_accuracy (with that target: all its tokens).
    confidence_intervals: of each of them [low, high], or None for fewer than two texts.
    tokens (predicted), bytes and words (of what was predicted), bytes_per_token, documents,
    nothing_to_predict, truncated: counts.
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
        """Check the texts, which the library would turn into text whatever they are."""
        if predictions is not None:
            _check(predictions)
        if "model" not in options:
            raise InputError("give model: a loaded model, a folder or a Hub name")
        return super().compute(predictions=predictions, references=references, **options)

    def _compute(self, predictions, model, tokenizer=None, **options):
        return measure_texts(
            predictions, model, tokenizer, bytes_to_read=sum(len(t.encode()) for t in predictions),
            **options,
        ).numbers()  # fmt: skip


def _check(predictions):
    """See that these are texts.

    Raises:
        InputError: there are none, or what is given is something else.
    """
    if isinstance(predictions, str):
        raise InputError("predictions is one text; give a list of texts")
    if not len(predictions):
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
