"""The scaling law that fits a ladder, and how far what it foretells can be trusted.

L(N, D) = E + A / N^alpha + B / D^beta by the method of Hoffmann et al. 2022, appendix D.2: the
Huber loss (delta 1e-3) of the logarithm, minimised with L-BFGS from many starts. With so few runs
many laws fit as well: the intervals are those of all of them, weighted by how well they do.
"""

import math
from typing import NamedTuple

import numpy as np

from pipeline.ladder import Run
from pipeline.recipe import InputError
from pipeline.scaling_laws import Law, Validity

# Five constants, and one run more to tell how far runs scatter about any law.
FEWEST_RUNS, FEWEST_SIZES, FEWEST_BUDGETS = 6, 3, 2
# Of the spread of log D, the share (squared) that the size has to leave open: with less, tokens per
# parameter differ by a thirtieth of what the sizes do, and nothing tells N from D.
LEAST_APART = 1e-3
# By which the logarithm of the loss falls with that of N and of D. Ten times as many then lower it
# by 0.2 %; another seed changes the quickstart's by 0.7 %.
LEAST_FALL = 1e-3

DELTA = 1e-3  # of the Huber loss, appendix D.2
# alpha and beta start on their grid (0.25 for its 0, where the power is a constant like E), and the
# other three where least squares puts them for these: 25 starts instead of 4,500. On ladders of 14
# runs with noise all of them ended in the same minimum.
EXPONENTS = (0.25, 0.5, 1.0, 1.5, 2.0)
NAMES = ("A", "B", "E", "alpha", "beta")
# Of log A and log B at the runs' mean N and D, log E, alpha, beta: limits of the search.
LIMITS = ((-9, 5), (-9, 5), (-5, 5), (0.02, 2), (0.02, 2))

# Laws that the runs leave possible: E, alpha and beta on a grid that is drawn closer around them.
CONFIDENCE = 0.95
STEPS, ZOOMS = 24, 8
NEGLIGIBLE = math.exp(-10)  # of the best one's weight
DRAWN = 4000  # laws of which the interval is made: its ends are then certain to a twentieth
DIGITS = 1e-12  # of a float, a few left over
SMALLEST = 1e-12  # sum of squares of runs that a law fits exactly


class Estimate(NamedTuple):
    """A predicted loss with the interval that holds such a run 19 times of 20."""

    loss: float
    low: float
    high: float


class Possible(NamedTuple):
    """Laws that the runs leave possible, drawn by their weight; arrays of equal length.

    A and B stand for the terms at the runs' mean N and D, of which `centre` holds the logarithms.
    """

    E: np.ndarray
    A: np.ndarray
    B: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    noise: np.ndarray
    """By how much one run may lie off each law, drawn too: the logarithm of a factor."""
    centre: tuple[float, float]

    def losses(self, parameters: float, tokens: float) -> np.ndarray:
        """Return what a run might come to by each law."""
        of_size = self.A * np.exp(-self.alpha * (math.log(parameters) - self.centre[0]))
        of_tokens = self.B * np.exp(-self.beta * (math.log(tokens) - self.centre[1]))
        return (self.E + of_size + of_tokens) * np.exp(self.noise)


class Fit(NamedTuple):
    """A law and how well its runs determine it."""

    law: Law
    runs: list[Run]
    scatter: float
    """Deviation of a run's loss from the law, as a share of it."""
    ranges: dict[str, tuple[float, float]]
    """Of each constant, its 95 % interval."""
    undetermined: list[str]
    """Constants whose interval is wider than they are, or that ended at a limit of the search."""
    possible: Possible

    @property
    def residuals(self) -> list[float]:
        """Of each run, the share by which its loss lies above the law's."""
        return [run.loss / self.law.loss(run.parameters, run.tokens) - 1 for run in self.runs]

    def predicted(self, parameters: float, tokens: float) -> Estimate:
        """Return the loss that a run of N parameters and D tokens would have.

        The interval (95 %) is that of one more run of this ladder, by all laws of this form that
        the runs leave possible and the scatter of runs about them; so it widens with the distance
        from the runs. Of simulated ladders it held 91 to 100 of 100 such runs, up to 40 times the
        size and 900 times the tokens. It supposes that the form holds and that the run is made
        like these (tokenizer, text, optimizer, rule of batch and rate): it knows nothing of what
        only larger runs meet.
        """
        low, high = _interval(self.possible.losses(parameters, tokens))
        loss = self.law.loss(parameters, tokens)
        # The law is of the Huber loss and not the middle of the possible ones.
        return Estimate(loss, min(low, loss), max(high, loss))


def fit(runs: list[Run]) -> Fit:
    """Return the law that the runs follow; a second at most.

    Raises:
        InputError: the runs are too few, or of too few sizes or lengths, for five constants; their
            tokens follow from their size; or their loss does not fall with both.
    """
    _check_enough(runs)
    sizes = np.array([run.parameters for run in runs], float)
    tokens = np.array([run.tokens for run in runs], float)
    losses = np.log([run.loss for run in runs])
    centre = (float(np.log(sizes).mean()), float(np.log(tokens).mean()))
    x, y = np.log(sizes) - centre[0], np.log(tokens) - centre[1]
    _check_falling(x, y, losses)
    found = _minimum(x, y, losses)
    a, b, e, alpha, beta = map(float, found)
    law = Law(
        math.exp(e), math.exp(a + alpha * centre[0]), math.exp(b + beta * centre[1]), alpha, beta,
        f"fitted to {len(runs)} runs",
        Validity(
            (float(sizes.min()), float(sizes.max())), (float(tokens.min()), float(tokens.max())),
            "all parameters, with embeddings; the runs' own text, tokenizer, optimizer and rule "
            "of batch and learning rate",
        ),
    )  # fmt: skip
    residuals = losses - np.log(law.loss(sizes, tokens))
    scatter = math.sqrt(float(residuals @ residuals) / (len(runs) - len(NAMES)))
    possible = _possible(x, y, np.exp(losses), centre)
    ranges = _ranges(possible)
    return Fit(law, runs, scatter, ranges, _undetermined(law, found, ranges), possible)


def _check_enough(runs: list[Run]) -> None:
    sizes, budgets = {run.parameters for run in runs}, {run.tokens for run in runs}
    have = (len(runs), len(sizes), len(budgets))
    fewest = (FEWEST_RUNS, FEWEST_SIZES, FEWEST_BUDGETS)
    if any(one < least for one, least in zip(have, fewest, strict=True)):
        raise InputError(
            "a law of five constants needs {} runs at least, of {} sizes and {} budgets of tokens; "
            "here are {} run(s), {} size(s) and {} budget(s)".format(*fewest, *have)
        )


def _check_falling(x: np.ndarray, y: np.ndarray, losses: np.ndarray) -> None:
    (xx, xy), (_, yy) = np.cov(x, y)
    if xx * yy - xy**2 < LEAST_APART * xx * yy:
        raise InputError(
            "the tokens of these runs follow from their sizes (about as many per parameter in all "
            "of them), so that the two cannot be told apart; add runs of the same sizes on more or "
            "fewer tokens"
        )
    slopes, *_ = np.linalg.lstsq(np.stack([x, y], 1), losses - losses.mean(), rcond=None)
    for slope, what in zip(slopes, ("parameters", "tokens"), strict=True):
        if slope > -LEAST_FALL:
            raise InputError(
                f"the losses of these runs do not fall with their {what} (ten times as many change "
                f"them by {math.expm1(slope * math.log(10)):+.1%}), so that no law can be fitted "
                "to them; take runs that differ more in size and tokens, or see that their "
                "learning rates suit them"
            )


def _minimum(x: np.ndarray, y: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return (a, b, e, alpha, beta) of the least Huber loss; x and y are centred logarithms."""
    from scipy.optimize import minimize

    results = [
        minimize(
            _objective, start, args=(x, y, losses), jac=True, method="L-BFGS-B", bounds=LIMITS,
            options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-7, "maxcor": 20},
        )
        for start in _starts(x, y, losses)
    ]  # fmt: skip
    return min(results, key=lambda result: result.fun).x


def _starts(x: np.ndarray, y: np.ndarray, losses: np.ndarray) -> list[np.ndarray]:
    from scipy.optimize import nnls

    found, measured = [], np.exp(losses)
    least = np.exp([low for low, _ in LIMITS[:3]])
    for alpha in EXPONENTS:
        for beta in EXPONENTS:
            terms = np.stack([np.exp(-alpha * x), np.exp(-beta * y), np.ones_like(x)], 1)
            scales, _ = nnls(terms / measured[:, None], np.ones_like(x))
            found.append(np.array([*np.log(np.maximum(scales, least)), alpha, beta]))
    return found


def _objective(
    point: np.ndarray, x: np.ndarray, y: np.ndarray, losses: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the sum of Huber losses, over delta squared so that it is of order one, and its slope.

    A mean of them, which is smaller, stopped Hoffmann's L-BFGS too early (Besiroglu et al. 2024).
    """
    terms = np.stack([point[0] - point[3] * x, point[1] - point[4] * y, np.full_like(x, point[2])])
    most = terms.max(0)
    shares = np.exp(terms - most)
    total = shares.sum(0)
    errors = (most + np.log(total) - losses) / DELTA
    clipped = np.clip(errors, -1, 1)
    value = float((clipped * (errors - clipped / 2)).sum())
    pull = shares / total * clipped / DELTA
    slope = [pull[0].sum(), pull[1].sum(), pull[2].sum(), -(pull[0] @ x), -(pull[1] @ y)]
    return value, np.array(slope)


def _possible(
    x: np.ndarray, y: np.ndarray, losses: np.ndarray, centre: tuple[float, float]
) -> Possible:
    """Return laws drawn by their weight, given the runs.

    For each E, alpha and beta of the grid the law is linear in A and B, which least squares finds
    with their uncertainty. Its weight is the likelihood of normal errors of unknown size (Gelman et
    al., Bayesian Data Analysis, section 14.2); before the runs all E, alpha and beta weigh alike.
    """
    limits = [(0.0, float(losses.min())), *LIMITS[3:]]
    freedom = len(losses) - 2
    for _ in range(ZOOMS):
        axes = [np.linspace(*limit, STEPS) for limit in limits]
        grid = [values.ravel() for values in np.meshgrid(*axes, indexing="ij")]
        of_size = np.exp(-np.outer(grid[1], x)) / losses
        of_tokens = np.exp(-np.outer(grid[2], y)) / losses
        rest = 1 - np.outer(grid[0], 1 / losses)
        pairs = ((of_size, of_size), (of_tokens, of_tokens), (of_size, of_tokens))
        aa, bb, ab = (np.einsum("gr,gr->g", *pair) for pair in pairs)
        determinant = aa * bb - ab**2
        is_told = determinant > DIGITS * aa * bb  # else A and B are one constant, by its rounding
        determinant = np.where(is_told, determinant, 1)
        ar, br = (np.einsum("gr,gr->g", one, rest) for one in (of_size, of_tokens))
        a, b = (bb * ar - ab * br) / determinant, (aa * br - ab * ar) / determinant
        squares = ((rest - a[:, None] * of_size - b[:, None] * of_tokens) ** 2).sum(1) + SMALLEST
        weights = -freedom / 2 * np.log(squares) - np.log(determinant) / 2
        weights[(a <= 0) | (b <= 0) | ~is_told] = -np.inf
        if not math.isfinite(weights.max()):
            raise InputError(
                "no law whose loss falls with parameters and with tokens lies near these runs; "
                "leave out those whose loss is far off"
            )
        weights = np.exp(weights - weights.max())
        kept = weights > NEGLIGIBLE
        closer = [
            (max(low, values[kept].min() - axis[1] + axis[0]),
             min(high, values[kept].max() + axis[1] - axis[0]))
            for values, axis, (low, high) in zip(grid, axes, limits, strict=True)
        ]  # fmt: skip
        if math.prod(map(_width, closer)) > 0.5 * math.prod(map(_width, limits)):
            break
        limits = closer
    source = np.random.default_rng(0)  # the same runs give the same interval
    drawn = source.choice(len(weights), DRAWN, p=weights / weights.sum())
    spread = np.sqrt(squares[drawn] / source.chisquare(freedom, DRAWN))
    first, second, noise = spread * source.standard_normal((3, DRAWN))
    aa, bb, ab, determinant = aa[drawn], bb[drawn], ab[drawn], determinant[drawn]
    return Possible(
        E=grid[0][drawn],
        A=np.maximum(a[drawn] + first * np.sqrt(bb / determinant), 0),
        B=np.maximum(
            b[drawn] - first * ab / np.sqrt(bb * determinant) + second / np.sqrt(bb), 0
        ),
        alpha=grid[1][drawn], beta=grid[2][drawn], noise=noise, centre=centre,
    )  # fmt: skip


def _width(limits: tuple[float, float]) -> float:
    return limits[1] - limits[0]


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _ranges(possible: Possible) -> dict[str, tuple[float, float]]:
    values = possible._asdict()
    # At N and D of one, as the law has them.
    values["A"] = possible.A * np.exp(possible.alpha * possible.centre[0])
    values["B"] = possible.B * np.exp(possible.beta * possible.centre[1])
    return {name: _interval(values[name]) for name in NAMES}


def _undetermined(law: Law, found: np.ndarray, ranges: dict[str, tuple[float, float]]) -> list[str]:
    """Return the names; A and B are left out, which follow alpha and beta and are always wide."""
    ended = [
        name for name, value, (low, high) in zip(NAMES, found, LIMITS, strict=True)
        if not low + 1e-6 < value < high - 1e-6
    ]  # fmt: skip
    wide = [n for n in ("E", "alpha", "beta") if ranges[n][1] - ranges[n][0] > getattr(law, n)]
    return [name for name in NAMES if name in ended or name in wide]
