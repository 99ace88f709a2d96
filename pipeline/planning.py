"""What a GPT-2's shape says before it is built: its parameters, and the operations of a token.

Both come out exactly as PyTorch counts them (`tests/test_planning.py`).
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """What sets the size of a GPT-2; names as in its config in words."""

    layers: int
    width: int
    heads: int
    vocabulary: int = 50257
    positions: int = 1024
    inner: int | None = None
    """Width of the MLP (`n_inner`); four times `width` where nothing is said, as in GPT-2."""

    @property
    def mlp_width(self) -> int:
        """Width between the MLP's two products."""
        return 4 * self.width if self.inner is None else self.inner


# Radford et al. 2019, table 2; by the parameters that they really have, in millions.
SIZES = {
    "124M": Shape(12, 768, 12),
    "355M": Shape(24, 1024, 16),
    "774M": Shape(36, 1280, 20),
    "1558M": Shape(48, 1600, 25),
}
# What the Hub calls them, and distilgpt2 (Sanh et al. 2019), half the layers of the smallest.
_NAMED = {
    "gpt2": SIZES["124M"],
    "gpt2-medium": SIZES["355M"],
    "gpt2-large": SIZES["774M"],
    "gpt2-xl": SIZES["1558M"],
    "distilgpt2": Shape(6, 768, 12),
}
_ORGANISATIONS = ("openai-community", "distilbert", "openai", "")

# Of `pipeline.attention`, queries at a time of `blockwise_causal`: that room costs torch, so a test
# keeps it the same.
QUERIES = 128


def known_shape(name: str) -> Shape | None:
    """Return the shape of OpenAI's GPT-2 or distilgpt2 by its name on the Hub, None of others."""
    organisation, _, model = name.rpartition("/")
    return _NAMED.get(model.lower()) if organisation.lower() in _ORGANISATIONS else None


def parameters_by_part(shape: Shape) -> dict[str, int]:
    """Return how many parameters each part has; the head is the embedding."""
    layers, width, inner = shape.layers, shape.width, shape.mlp_width
    return {
        "embedding": shape.vocabulary * width,
        "positions": shape.positions * width,
        "attention": layers * (4 * width**2 + 4 * width),  # queries, keys, values; projection
        "mlp": layers * (2 * width * inner + inner + width),  # to the inner width, and back
        "norms": layers * 4 * width + 2 * width,
    }


def parameters(shape: Shape) -> int:
    """Return how many parameters the model has, the tied embedding once."""
    return sum(parameters_by_part(shape).values())


def flops_per_token(
    *,
    parameters: int,
    layers: int,
    width: int,
    block_size: int,
    trained: int | None = None,
    still: int = 0,
    still_layers: int = 0,
) -> int:
    """Return the floating-point operations of a training step per token: 6N + 12 L C T.

    Each weight multiplies and adds once forwards and twice backwards (Kaplan et al. 2020): for its
    input's gradient and for its own; queries meet keys, and probabilities values, over the whole
    block as PaLM counts it (Chowdhery et al. 2022, appendix B), though half of it is above the
    diagonal and need not be computed.

    Args:
        trained: parameters that have a gradient (default: all).
        still: parameters below all that are trained, which no gradient passes.
        still_layers: the layers that they are.
    """
    trained = parameters if trained is None else trained
    products = 2 * parameters + 2 * (parameters - still) + 2 * trained
    return products + 4 * (3 * layers - 2 * still_layers) * width * block_size


def training_flops(shape: Shape, block_size: int) -> int:
    """Return the floating-point operations of a training step per token, all parameters trained."""
    return flops_per_token(
        parameters=parameters(shape), layers=shape.layers, width=shape.width, block_size=block_size
    )


def flops_by_part(shape: Shape, *, block_size: int, is_blockwise: bool = False) -> dict[str, float]:
    """Return the operations of a training step per token in matrix products, exactly, by part.

    What `torch.utils.flop_counter` counts, where `training_flops` counts 2 x 3 for every parameter:
    positions, norms and biases multiply nothing, and a row's last token predicts nothing.

    Args:
        is_blockwise: attention is `blockwise_causal`, which leaves out most of what is above the
            diagonal; else the whole block counts, as for PaLM.

    Returns:
        `layers` (their weights), `attention` (queries with keys, probabilities with values) and
        `head`.
    """
    width, layers = shape.width, shape.layers
    met = seen_keys(block_size) if is_blockwise else block_size**2
    return {
        "layers": 6.0 * layers * (4 * width**2 + 2 * width * shape.mlp_width),
        "attention": 12 * layers * width * met / block_size,
        "head": 6 * shape.vocabulary * width * (block_size - 1) / block_size,
    }


def seen_keys(block_size: int) -> int:
    """Return with how many keys a row's queries meet in `blockwise_causal`, in all."""
    return sum((end - start) * end for start, end in query_parts(block_size))


def query_parts(block_size: int) -> list[tuple[int, int]]:
    """Return the queries that `blockwise_causal` takes at a time; each sees the keys to its end."""
    starts = range(0, block_size, QUERIES)
    return [(start, min(start + QUERIES, block_size)) for start in starts]
