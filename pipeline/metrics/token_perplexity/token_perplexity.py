"""Perplexity and bits per byte of texts under a causal language model, as an `evaluate` metric.

`evaluate.load` copies this file out of the package, so the arithmetic stays in `pipeline`.
"""

import datasets
import evaluate

from pipeline.perplexity import score_texts

_DESCRIPTION = """\
Perplexity at the level of the corpus: exp of the total nats over the total predicted tokens, and
bits per UTF-8 byte, which can be compared between tokenizers.
"""

_CITATION = """\
@article{jelinek1977perplexity,
  title={Perplexity: a measure of the difficulty of speech recognition tasks},
  author={Jelinek, Fred and Mercer, Robert L. and Bahl, Lalit R. and Baker, James K.},
  journal={The Journal of the Acoustical Society of America},
  volume={62}, number={S1}, year={1977}
}
"""

_INPUTS = """\
Args:
    predictions (list of str): texts, laid end to end with end-of-text after each.
    model: a loaded causal language model.
    tokenizer: its tokenizer.
    block_size (int, optional): tokens in a window, by default the model's positions.
    batch_size (int): windows in one forward pass.
Returns:
    loss (nats per token), perplexity, bits_per_byte, tokens, bytes: over every token after the
    first, each scored once.
"""


class TokenPerplexity(evaluate.Metric):
    """Corpus perplexity from a model that is already loaded."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            module_type="metric",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model, tokenizer, block_size=None, batch_size=8):
        score = score_texts(
            predictions, model, tokenizer, block_size=block_size, batch_size=batch_size
        )
        return {
            name.removeprefix("text_"): value for name, value in score.as_metrics("text").items()
        }
