"""Sizes of GPT-2 from thousands of parameters to billions; the rate and batch that go with one."""

import math

from pipeline.interpolation import between
from pipeline.planning import Shape

# GPT-2's four (Radford et al. 2019, table 2) and GPT-3's 24 x 2,048 and above (Brown et al. 2020,
# table 2.1); between and below them the ratio of width to layers goes on.
HEAD = 64
LAYERS_AND_WIDTH = (
    (2, 64), (4, 128), (4, 192), (4, 256), (6, 320), (6, 384), (8, 448), (8, 512), (10, 576),
    (10, 640), (12, 704), (12, 768), (16, 832), (18, 896), (20, 960), (24, 1024), (28, 1152),
    (36, 1280), (42, 1408), (48, 1600), (40, 2048), (32, 2560), (32, 3200), (32, 4096),
    (40, 5120),
)  # fmt: skip
# Brown et al. 2020, table 2.1: parameters, learning rate, tokens per update.
# (Its 0.5 million are taken as 2^19, and so on.)
GPT3 = (
    (125e6, 6e-4, 2**19), (350e6, 3e-4, 2**19), (760e6, 2.5e-4, 2**19), (1.3e9, 2e-4, 2**20),
    (2.7e9, 1.6e-4, 2**20), (6.7e9, 1.2e-4, 2**21), (13e9, 1e-4, 2**21), (175e9, 0.6e-4, 3.2e6),
)  # fmt: skip
LEAST_OF_GPT3 = 120e6  # GPT-2 small is its 125M


def shapes(vocabulary: int, positions: int) -> list[Shape]:
    """Return the shapes, the smallest first."""
    return [
        Shape(layers, width, width // HEAD, vocabulary, positions)
        for layers, width in LAYERS_AND_WIDTH
    ]


def gpt3_learning_rate(parameters: float, *, inside: float) -> tuple[float, str]:
    """Return AdamW's peak rate for a size, and the source.

    From 120M parameters on GPT-3's table 2.1, straight lines between logarithms; below, Kaplan et
    al. 2020, equation D.1: 0.003239 - 0.0001395 ln(parameters without embeddings).
    """
    if parameters < LEAST_OF_GPT3:
        rate = 0.003239 - 0.0001395 * math.log(inside)
        return max(rate, GPT3[0][1]), "Kaplan et al. 2020, equation D.1"
    return _interpolated(parameters, 1), "Brown et al. 2020, table 2.1, interpolated"


def gpt3_batch_tokens(parameters: float) -> float:
    """Return GPT-3's tokens per update for a size (table 2.1), the first and last row beyond it."""
    return _interpolated(parameters, 2)


def _interpolated(parameters: float, column: int) -> float:
    """Return a column of GPT-3's table, whose values are straight lines between logarithms."""
    return math.exp(between([(row[0], math.log(row[column])) for row in GPT3], parameters))
