"""What a ladder's law says, as a table for the terminal."""

from collections.abc import Sequence

from pipeline.ladder import Run
from pipeline.law_fit import Fit
from pipeline.law_forms import Joint, joint
from pipeline.scaling_laws import BESIROGLU, FLOPS, HOFFMANN
from pipeline.wording import NOTHING, short

BEST = "at its best"
BETTER = (
    "Kaplan's form (Kaplan et al. 2020, equation 1.5) lies much closer to these runs:\n"
    "what they gain from more tokens depends on their size, which a sum cannot have.\n"
    "Away from them neither the law nor its interval can be trusted; a ladder whose\n"
    "rungs have about as many tokens per parameter as the planned run suits better."
)
INTERVAL = (
    "The interval is that of one more run made like these: of all laws of this form\n"
    "that the runs leave possible, with their scatter, if the form holds that far."
)


def table(
    fit: Fit, left_out: Sequence[Run] = (), planned: tuple[float, float] | None = None
) -> str:
    """Return the law, its runs, and what it predicts, for a terminal of 80 columns.

    Args:
        left_out: runs that were not fitted; they stand beside their predictions.
        planned: parameters and tokens of a run that is to be made.
    """
    sizes = len({run.parameters for run in fit.runs})
    budgets = len({run.tokens for run in fit.runs})
    other = joint(fit.runs)
    lines = [
        "L(N, D) = E + A / N^alpha + B / D^beta by Hoffmann et al. 2022, appendix D.2",
        f"fitted to {len(fit.runs)} runs of {sizes} sizes and {budgets} budgets of tokens",
        "",
        *_constants(fit),
        "",
        *_measured(fit),
        f"scatter of the runs about the law: {fit.scatter:.2%}; about Kaplan's form: "
        f"{other.scatter:.2%}",
    ]
    if other.suits_better(fit):
        lines += [BETTER]
    if left_out or planned:
        lines += ["", *_predicted(fit, other, left_out, planned), INTERVAL]
    return "\n".join(lines)


def _constants(fit: Fit) -> list[str]:
    """Return published constants beside these; of other text and tokens, only exponents compare."""
    lines = [f"{'':8}{'these runs':>11}  {'95 %':<20}{'Hoffmann 2022':>14}{'Besiroglu 2024':>16}"]
    for name in ("E", "A", "B", "alpha", "beta"):
        low, high = fit.ranges[name]
        lines.append(
            f"{name:8}{_digits(getattr(fit.law, name)):>11}  "
            f"{f'{_digits(low)} to {_digits(high)}':<20}"
            f"{getattr(HOFFMANN, name):>14,}{getattr(BESIROGLU, name):>16,}"
        )
    lines.append("Theirs are of other text, in other tokens: only alpha and beta can be compared.")
    if fit.undetermined:
        lines += [
            f"Not determined by these runs: {', '.join(fit.undetermined)}. Far from their sizes",
            "and tokens the law says little; other sizes, or more tokens, would tell.",
        ]
    return lines


def _measured(fit: Fit) -> list[str]:
    width = max(len("run"), *(len(run.name) for run in fit.runs))
    lines = [f"{'run':{width}}{'parameters':>14}{'tokens':>16}{'loss':>9}{'law':>9}{'off':>9}"]
    for run in fit.runs:
        expected = fit.law.loss(run.parameters, run.tokens)
        lines.append(
            f"{run.name:{width}}{run.parameters:>14,}{run.tokens:>16,}{run.loss:>9.4f}"
            f"{expected:>9.4f}{expected / run.loss - 1:>+9.2%}"
        )
    return lines


def _predicted(
    fit: Fit, other: Joint, left_out: Sequence[Run], planned: tuple[float, float] | None
) -> list[str]:
    rows = [(run.name, run.parameters, run.tokens, run.loss) for run in left_out]
    if planned:
        best = fit.law.optimum(float(FLOPS) * planned[0] * planned[1])
        rows += [("this recipe", *planned, None), (BEST, best.parameters, best.tokens, None)]
    width = max(len("predicted"), *(len(row[0]) for row in rows))
    lines = [
        f"{'predicted':{width}}{'size':>7}{'tokens':>7}{'law':>6} {'95 %':<14}{'measured':>9}"
        f"{'off':>8}{'Kaplan':>8}{'off':>8}"
    ]
    for name, parameters, tokens, loss in rows:
        found = fit.predicted(parameters, tokens)
        by_kaplan = other.loss(parameters, tokens)
        measured, off, off_kaplan = [NOTHING] * 3
        if loss is not None:
            measured = f"{loss:.3f}"
            off, off_kaplan = (f"{one / loss - 1:+.2%}" for one in (found.loss, by_kaplan))
        lines.append(
            f"{name:{width}}{short(parameters):>7}{short(tokens):>7}{found.loss:>6.3f} "
            f"{f'{found.low:.3f} to {found.high:.3f}':<14}{measured:>9}"
            f"{off:>8}{by_kaplan:>8.3f}{off_kaplan:>8}"
        )
    if planned:
        lines.append(f"this recipe: {fit.law.validity.said(*planned)}")
        lines.append(f"{BEST}: the parameters and tokens of least loss for its operations (6 N D)")
    return lines


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"
