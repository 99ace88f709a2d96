"""What a ladder's law says, as a table for the terminal."""

from collections.abc import Sequence

from pipeline.ladder import Run
from pipeline.law_fit import NAMES, Estimate, Fit
from pipeline.scaling_laws import BESIROGLU, HOFFMANN
from pipeline.wording import short

INTERVAL = (
    "The interval (95 %) is that of one more run made like these: the law's uncertainty and the\n"
    "scatter of runs, if the law's form holds as far as that."
)


def table(
    fit: Fit, left_out: Sequence[Run] = (), planned: tuple[float, float] | None = None
) -> str:
    """Return the law, its runs, and what it predicts, in lines of at most 100 characters.

    Args:
        left_out: runs that were not fitted; they stand beside their predictions.
        planned: parameters and tokens of a run that is to be made.
    """
    runs, sizes = len(fit.runs), len({run.parameters for run in fit.runs})
    budgets = len({run.tokens for run in fit.runs})
    lines = [
        f"L(N, D) = E + A / N^alpha + B / D^beta, fitted to {runs} runs of {sizes} sizes and "
        f"{budgets} budgets",
        "(Hoffmann et al. 2022, appendix D.2: Huber loss of the logarithm, from many starts)",
        "",
        *_constants(fit),
        "",
        *_measured(fit),
        f"scatter of the runs about the law: {fit.scatter:.2%}",
    ]
    if left_out:
        lines += ["", "left out of the fit", *_predicted(fit, left_out)]
    if planned:
        lines += ["", *_planned(fit, *planned)]
    if left_out or planned:
        lines += ["", INTERVAL]
    return "\n".join(lines)


def _constants(fit: Fit) -> list[str]:
    """The published constants are of other text and tokens: only the exponents compare."""
    lines = [f"{'':8}{'these runs':>11}  {'95 %':<22}{'Hoffmann 2022':>14}{'Besiroglu 2024':>16}"]
    for name in ("E", "A", "B", "alpha", "beta"):
        low, high = fit.ranges[name]
        lines.append(
            f"{name:8}{_digits(getattr(fit.law, name)):>11}  "
            f"{f'{_digits(low)} to {_digits(high)}':<22}"
            f"{getattr(HOFFMANN, name):>14,}{getattr(BESIROGLU, name):>16,}"
        )
    lines.append("Theirs are of other text, in other tokens: only alpha and beta can be compared.")
    if fit.undetermined:
        named = [name for name in NAMES if name in fit.undetermined]
        lines += [
            f"Not determined by these runs: {', '.join(named)}. Far from their sizes and tokens "
            "the law",
            "says little; runs of other sizes or of more tokens would tell.",
        ]
    return lines


def _measured(fit: Fit) -> list[str]:
    width = max(len("run"), *(len(run.name) for run in fit.runs))
    lines = [f"{'run':{width}}{'parameters':>14}{'tokens':>16}{'loss':>9}{'law':>9}{'off':>9}"]
    for run, residual in zip(fit.runs, fit.residuals, strict=True):
        expected = fit.law.loss(run.parameters, run.tokens)
        lines.append(
            f"{run.name:{width}}{run.parameters:>14,}{run.tokens:>16,}{run.loss:>9.4f}"
            f"{expected:>9.4f}{residual:>9.2%}"
        )
    return lines


def _predicted(fit: Fit, left_out: Sequence[Run]) -> list[str]:
    lines = []
    for run in left_out:
        found = fit.predicted(run.parameters, run.tokens)
        lines.append(
            f"{run.name}: {short(run.parameters)} parameters, {short(run.tokens)} tokens: "
            f"predicted {written_interval(found)}, measured {run.loss:.4f}: "
            f"{found.loss / run.loss - 1:+.2%}"
        )
    return lines


def _planned(fit: Fit, parameters: float, tokens: float) -> list[str]:
    found = fit.predicted(parameters, tokens)
    best = fit.law.optimum(6 * parameters * tokens)
    return [
        f"this recipe: {short(parameters)} parameters, {short(tokens)} tokens: "
        f"loss {written_interval(found)}",
        f"  {fit.law.validity.said(parameters, tokens)}",
        f"  best for its operations by this law: {short(best.parameters)} parameters, "
        f"{short(best.tokens)} tokens: loss {written_interval(fit.predicted(*best[:2]))}",
    ]


def written_interval(found: Estimate) -> str:
    """Return a predicted loss and its interval in words."""
    return f"{found.loss:.3f} ({found.low:.3f} to {found.high:.3f})"


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"
