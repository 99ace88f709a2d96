"""Another form of law for the same ladder: does the one that was fitted suit its runs?

L(N, D) = E + A / N^alpha + B / D^beta gains the same from more tokens at every size. Kaplan's joint
form gains less where the model is small, and it is as simple: where it lies much closer to the
runs, they do not follow the sum.
"""

import math
from typing import NamedTuple

import numpy as np

from pipeline.ladder import Run
from pipeline.law_fit import DELTA, Fit
from pipeline.scaling_laws import KAPLAN_2020

# Scatter about this form, as a share of that about the fitted law, below which the law is called
# unsuited. On 120 simulated ladders of 14 runs that follow a sum (three laws, noise of 0.3 and
# 0.6 %) the share was 1.4 and more.
UNSUITED = 0.8
# Of a, the ratio, b and the power, where N_c is exp(a / ratio) runs' mean sizes and D_c exp(b) mean
# tokens: both stay below what a float holds.
LIMITS = ((-30, 60), (0.1, 5), (-30, 600), (0.02, 2))
STARTS = ((0.5, 0.1), (0.5, 0.3), (1.0, 0.1), (1.0, 0.3))  # alpha_N / alpha_D, alpha_D


class Joint(NamedTuple):
    """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (Kaplan et al. 2020, 1.5)."""

    N_c: float
    D_c: float
    alpha_N: float
    alpha_D: float
    scatter: float
    """Deviation of a run's loss from the law, as a share of it."""
    source: str = f"{KAPLAN_2020}, equation 1.5"

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the loss of N parameters after D tokens, in nats per token."""
        of_size = (self.N_c / parameters) ** (self.alpha_N / self.alpha_D)
        return (of_size + self.D_c / tokens) ** self.alpha_D

    def suits_better(self, fit: Fit) -> bool:
        """Tell whether the runs follow this form rather than the one that was fitted to them."""
        return self.scatter < UNSUITED * fit.scatter


def joint(runs: list[Run]) -> Joint:
    """Return Kaplan's form as it fits a ladder, by the same Huber loss."""
    from scipy.optimize import minimize

    sizes, tokens, losses = np.log([(run.parameters, run.tokens, run.loss) for run in runs]).T
    x, y = sizes - sizes.mean(), tokens - tokens.mean()
    results = [
        minimize(
            _objective, _start(losses, ratio, power), args=(x, y, losses),
            jac=True, method="L-BFGS-B", bounds=LIMITS,
            options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-7, "maxcor": 20},
        )
        for ratio, power in STARTS
    ]  # fmt: skip
    a, ratio, b, power = map(float, min(results, key=lambda result: result.fun).x)
    found = Joint(
        math.exp(a / ratio + sizes.mean()), math.exp(b + tokens.mean()), ratio * power, power, 0.0
    )
    residuals = losses - np.log(found.loss(np.exp(sizes), np.exp(tokens)))
    freedom = len(runs) - 4
    return found._replace(scatter=math.sqrt(float(residuals @ residuals) / freedom))


def _start(losses: np.ndarray, ratio: float, power: float) -> tuple[float, ...]:
    half = float(losses.mean()) / power - math.log(2)  # both terms the same in the middle
    return half, ratio, half, power


def _objective(
    point: np.ndarray, x: np.ndarray, y: np.ndarray, losses: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the sum of Huber losses, over delta squared, and its slope."""
    a, ratio, b, power = point
    of_size, of_tokens = a - ratio * x, b - y
    both = np.logaddexp(of_size, of_tokens)
    errors = (power * both - losses) / DELTA
    clipped = np.clip(errors, -1, 1)
    value = float((clipped * (errors - clipped / 2)).sum())
    pull = clipped / DELTA
    size_pull = pull * power * np.exp(of_size - both)
    tokens_pull = pull * power * np.exp(of_tokens - both)
    slope = [size_pull.sum(), -(size_pull @ x), tokens_pull.sum(), pull @ both]
    return value, np.array(slope)
