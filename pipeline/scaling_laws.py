"""What published scaling laws say of a model's size, its tokens and its loss, and where they hold.

N is a model's parameters, D the tokens that it is trained on, C the floating-point operations of
training, about 6 N D (Kaplan et al. 2020, section 2.1). Losses are nats per token of the paper's
own text and tokenizer: of other text they tell how a loss changes, not what it is.
"""

import math
from typing import NamedTuple

from pipeline.wording import short

FLOPS = 6  # of training, per parameter and token
HOFFMANN_2022 = "Hoffmann et al. 2022"  # Training Compute-Optimal Large Language Models, 2203.15556
KAPLAN_2020 = "Kaplan et al. 2020"  # Scaling Laws for Neural Language Models, 2001.08361


class Validity(NamedTuple):
    """What a law was fitted from."""

    parameters: tuple[float, float]
    tokens: tuple[float, float]
    conditions: str

    def said(self, parameters: float, tokens: float) -> str:
        """Return whether a run is within, or extrapolated and from what."""
        low, high = self._beyond(parameters, tokens)
        parts = [f"from {' and '.join(low)} on"] * bool(low)
        parts += [f"up to {' and '.join(high)}"] * bool(high)
        if not parts:
            return "within what it was fitted from"
        return f"extrapolated: fitted {', '.join(parts)}"

    def _beyond(self, parameters: float, tokens: float) -> tuple[list[str], list[str]]:
        """Return the lower ends that a run lies below, and the upper ones that it lies above."""
        named = ((parameters, self.parameters, "parameters"), (tokens, self.tokens, "tokens"))
        return (
            [f"{short(ends[0])} {name}" for value, ends, name in named if value < ends[0]],
            [f"{short(ends[1])} {name}" for value, ends, name in named if value > ends[1]],
        )


class Optimum(NamedTuple):
    """The parameters and tokens that reach the lowest loss for given operations."""

    parameters: float
    tokens: float
    loss: float | None
    """In nats per token, where the approach tells it."""
    law: str
    source: str
    constants: dict[str, float]

    @property
    def tokens_per_parameter(self) -> float:
        """How many tokens each parameter is trained on."""
        return self.tokens / self.parameters


class Law(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    source: str
    validity: Validity

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the loss of N parameters after D tokens, each seen once, in nats per token."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops: float) -> Optimum:
        """Return the lowest loss for C = 6 N D, in closed form (their equation 4)."""
        a = self.beta / (self.alpha + self.beta)
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = ratio * (flops / FLOPS) ** a
        tokens = flops / (FLOPS * parameters)
        loss = self.loss(parameters, tokens)
        return Optimum(parameters, tokens, loss, self.formula, self.source, self.constants)

    @property
    def constants(self) -> dict[str, float]:
        """E, A, B, alpha and beta."""
        return {name: getattr(self, name) for name in ("E", "A", "B", "alpha", "beta")}

    @property
    def formula(self) -> str:
        """The law as it is written."""
        return f"{self.E:g} + {self.A:g} / N^{self.alpha:g} + {self.B:.6g} / D^{self.beta:g}"


# Sections 3 and 4.1; appendix F: "we also count embeddings matrices in the total parameter count".
HOFFMANN_VALIDITY = Validity(
    (70e6, 16e9), (5e9, 500e9),
    "all parameters, with embeddings; MassiveText in SentencePiece tokens (32,000), each seen "
    "once; AdamW, a cosine schedule as long as the run",
)  # fmt: skip
# Their approach 3; appendix D.2, equation 10.
HOFFMANN = Law(
    1.69, 406.4, 410.7, 0.34, 0.28,
    f"{HOFFMANN_2022}, approach 3, appendix D.2", HOFFMANN_VALIDITY,
)  # fmt: skip
# Besiroglu et al. 2024, Chinchilla Scaling: A replication attempt, 2404.10102, table 1: fitted to
# 240 of the runs, read off a figure.
BESIROGLU = Law(
    1.8172, 482.01, 2085.43, 0.3478, 0.3658,
    "Besiroglu et al. 2024, re-fit of approach 3, table 1", HOFFMANN_VALIDITY,
)  # fmt: skip
WHY_BOTH = (
    "Approach 3 as published is rounded, and its fit had stopped too early: at 5.76e23 FLOPs it "
    "gives 93 tokens per parameter where approaches 1 and 2 give 21 and 24; fitted again "
    "(Besiroglu et al. 2024) it gives 18."
)

TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, table 3: 20.0 at 400M parameters, 21.2 at 1T
# A ratio twice or half the best raises the loss by 0.06 % (5.76e23 FLOPs) to 0.27 % (1.92e19) for
# the same compute, by both sets of constants: no one measures that.
ABOUT = 2
# N is proportional to C^a (table 2), through the budget of Gopher in figures 2 and 3.
GOPHER_FLOPS = 5.76e23
APPROACHES = {
    "1: training curves": (67e9, 0.50, "tables 2 and 3"),
    "2: isoFLOP curves": (63e9, 0.49, "table 2, figure 3"),
}


def compute_optimal(flops: float) -> dict[str, Optimum]:
    """Return what each approach finds best for C floating-point operations, by its name.

    The three of Hoffmann et al. 2022, and the third as Besiroglu et al. 2024 fitted it again
    (`WHY_BOTH`). D = C / 6 N.
    """
    found = {}
    for name, (parameters, exponent, where) in APPROACHES.items():
        best = parameters * (flops / GOPHER_FLOPS) ** exponent
        found[name] = Optimum(
            best, flops / (FLOPS * best), None,
            f"N = {short(parameters)} x (C / {GOPHER_FLOPS:g})^{exponent:.2f}".replace("e+", "e"),
            f"{HOFFMANN_2022}, {where}",
            {"N": parameters, "C": GOPHER_FLOPS, "exponent": exponent},
        )  # fmt: skip
    found["3: parametric loss"] = HOFFMANN.optimum(flops)
    found["3: fitted again"] = BESIROGLU.optimum(flops)
    return found


def verdict(parameters: float, tokens: float) -> str:
    """Say in a sentence how a run's tokens compare with the compute-optimal of its size."""
    wanted = TOKENS_PER_PARAMETER * parameters
    rule = f"compute-optimal for this size ({TOKENS_PER_PARAMETER} per parameter, {HOFFMANN_2022})"
    if tokens * ABOUT < wanted:
        return (
            f"{_times(wanted / tokens)} fewer tokens than {rule}: a smaller model on more text "
            "would reach a lower loss for the same compute"
        )
    if tokens > wanted * ABOUT:
        return (
            f"{_times(tokens / wanted)} more tokens than {rule}: a larger model on less text would "
            "reach a lower loss for the same compute, and this one is cheaper to use afterwards"
        )
    return f"about as many tokens as {rule}: {tokens / parameters:.3g} per parameter"


def _times(factor: float) -> str:
    return f"{factor:.2g}x" if factor < 99.5 else f"{factor:,.0f}x"


# -- Kaplan et al. 2020 ---------------------------------------------------------------------------


class PowerLaw(NamedTuple):
    """L(x) = (scale / x)^exponent, where nothing but x limits the loss."""

    of: str
    """N, parameters without embeddings, or D, tokens."""
    scale: float
    exponent: float
    source: str
    fitted: tuple[float, float]
    """The x of the runs that it was fitted from."""
    condition: str
    """Of what else has to be there, so that it does not limit the loss."""

    def loss(self, value: float) -> float:
        """Return the loss in nats per token."""
        return (self.scale / value) ** self.exponent

    def said(self, value: float) -> str:
        """Return the condition, and whether x is within what it was fitted from."""
        everything = (0, math.inf)
        ends = (self.fitted, everything) if self.of == "N" else (everything, self.fitted)
        return f"{self.condition}; {Validity(*ends, '').said(value, value)}"

    @property
    def constants(self) -> dict[str, float]:
        """The scale and the exponent, under the paper's names."""
        return {f"{self.of}_c": self.scale, f"alpha_{self.of}": self.exponent}

    @property
    def formula(self) -> str:
        """The law as it is written."""
        scale = f"{self.scale:g}".replace("e+", "e")
        return f"({scale} / {self.of})^{self.exponent}"


# The joint fit has constants of its own (table 2).
KAPLAN_N, KAPLAN_ALPHA_N, KAPLAN_D, KAPLAN_ALPHA_D = 6.4e13, 0.076, 1.8e13, 0.103
KAPLAN_CONSTANTS = {
    "N_c": KAPLAN_N, "alpha_N": KAPLAN_ALPHA_N, "D_c": KAPLAN_D, "alpha_D": KAPLAN_ALPHA_D,
}  # fmt: skip
KAPLAN_FORMULA = "((6.4e13 / N)^(0.076 / 0.103) + 1.8e13 / D)^0.103"
KAPLAN_SOURCE = f"{KAPLAN_2020}, equation 1.5, table 2; N without embeddings"
KAPLAN_VALIDITY = Validity(
    (768, 1.5e9), (22e6, 23e9),
    "parameters without embeddings; WebText2 in GPT-2's BPE (50,257), 1,024 tokens of context; "
    "trained until the loss no longer falls",
)  # fmt: skip
KAPLAN_OF_PARAMETERS = PowerLaw(
    "N", 8.8e13, 0.076, f"{KAPLAN_2020}, equation 1.1", KAPLAN_VALIDITY.parameters,
    "on endless text",
)  # fmt: skip
KAPLAN_OF_TOKENS = PowerLaw(
    "D", 5.4e13, 0.095, f"{KAPLAN_2020}, equation 1.2", KAPLAN_VALIDITY.tokens,
    "in a model large enough",
)  # fmt: skip
KAPLAN_BATCH, KAPLAN_ALPHA_B = 2e8, 0.21  # equation 1.4


def kaplan_loss(parameters: float, tokens: float) -> float:
    """Return L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D, in nats per token.

    Args:
        parameters: without embeddings (token and position).
        tokens: of text, seen until the loss no longer falls.
    """
    of_size = (KAPLAN_N / parameters) ** (KAPLAN_ALPHA_N / KAPLAN_ALPHA_D)
    return (of_size + KAPLAN_D / tokens) ** KAPLAN_ALPHA_D


def critical_batch_tokens(loss: float) -> float:
    """Return the tokens of an update above which more of them save hardly any updates.

    B_crit(L) = 2e8 / L^(1 / 0.21) (Kaplan et al. 2020, equation 1.4): at that batch training takes
    twice the fewest updates and twice the fewest tokens. It was fitted to losses of WebText2 in
    GPT-2's tokens, and grows as the loss falls.
    """
    return KAPLAN_BATCH / loss ** (1 / KAPLAN_ALPHA_B)


# -- from one size to another ---------------------------------------------------------------------


class Settings(NamedTuple):
    """A run whose batch and learning rate are known to be good."""

    tokens: int
    tokens_per_update: int
    learning_rate: float
    block_size: int


QUICKSTART = Settings(2_867_200, 2_048, 1e-2, 128)  # recipes/quickstart.yaml; Muon
ROWS_AT_ONCE = 4  # updates are whole multiples of these rows: so many processes can divide them


def carried(reference: Settings, *, tokens: int, block_size: int | None = None) -> Settings:
    """Return batch and learning rate of a run of other length, from one where they are known.

    Tokens per update grow with the square root of the run's tokens, whatever the model's size: the
    critical batch grows with about D^0.47 and hardly with N (Zhang et al. 2024, 2410.21676). They
    are rounded to a multiple of four rows. The rate grows with the square root of tokens per
    update, as Adam's noise wants it (Malladi et al. 2022, 2205.10287). It does not change with
    width: Muon's update, adjusted by `match_rms_adamw`, has the same root mean square at every
    width (Liu et al. 2025, section 2.2). For AdamW that last step does not hold, and far from the
    reference (its tokens times 16, say) the rate is to be measured.

    Args:
        tokens: of the whole run.
        block_size: tokens of a row; the reference's if left out.
    """
    block_size = block_size or reference.block_size
    unit = ROWS_AT_ONCE * block_size
    wanted = reference.tokens_per_update * math.sqrt(tokens / reference.tokens)
    tokens_per_update = unit * max(1, round(wanted / unit))
    rate = reference.learning_rate * math.sqrt(tokens_per_update / reference.tokens_per_update)
    return Settings(tokens, tokens_per_update, rate, block_size)
