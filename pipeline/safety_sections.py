"""The sections of a recipe about what can go wrong: before a run, while it trains, at its end."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.sections import Section, at_commas


class FaultSection(Section):
    """What a run does when something goes wrong."""

    grace_seconds: float = Field(25.0, gt=0)
    """Time from the first SIGTERM, SIGINT or SIGUSR1 to the end; a save that takes longer is
    skipped, and the last whole checkpoint stands (schedulers and launchers kill after 30)."""
    hang_seconds: float = Field(600.0, gt=0)
    """A process that neither ends a batch nor a save for so long ends the job and says where it
    was; the first update, which compiles, may take as long."""
    rollbacks: int = Field(0, ge=0)
    """Times that a loss or gradient that is not finite sends the run back to the newest whole
    checkpoint, to go on without the rows of that update; after that, and by default, it stops."""


class GuardSection(Section):
    """What is watched while a run trains, and said when it looks ill; it changes no number."""

    spike_sigmas: float = Field(6.0, ge=0)
    """A loss, or a gradient norm, so many standard deviations above the mean of the updates before
    is a spike (OLMo-core's 6; healthy runs here reached 3.4); 0: off."""
    spike_window: int = Field(128, ge=20)
    """Updates that it is measured by (as in OLMo-core and llm.c), once half of them are there."""
    skip_spikes: bool = False
    """Whether an update with a spike is not made, its rows being lost (skipped_updates counts them;
    of equal spikes in a row four at most, as they raise what is measured by)."""
    stuck_updates: int = Field(100, ge=0)
    """A fresh model's loss that is still at ln(vocabulary) after so many updates learns nothing
    (the quickstart is 9 % below it after 10); far above it, the run has diverged; 0: off."""
    norm_growth: float = Field(5.0, ge=0)
    """Gradient norms grow if their median over a window is so many times the lowest since the
    warm-up (healthy runs here: up to 2.5 times); 0: off."""
    gap: bool = True
    """Whether an evaluation that shows overfitting is said."""

    @model_validator(mode="after")
    def _something_to_skip(self) -> "GuardSection":
        if self.skip_spikes and not self.spike_sigmas:
            raise ValueError(
                "guards.skip_spikes needs guards.spike_sigmas above 0: else nothing is a spike"
            )
        if 0 < self.norm_growth <= 1:
            raise ValueError(
                f"guards.norm_growth is a factor above 1, or 0 for off; got {self.norm_growth:g}"
            )
        return self


# Of what is looked at before the first update, what a person may accept though it fails.
CHECKS = (
    "labels", "initial_loss", "gradient", "overfitting", "memory", "disk", "evaluation",
)  # fmt: skip


class PreflightSection(Section):
    """What is looked at before the first update (all of it: --dry_run)."""

    accept: list[Literal[CHECKS]] = Field(default_factory=list)
    """Checks that may fail: the run begins all the same, and its report says so."""

    @field_validator("accept", mode="before")
    @classmethod
    def _names_at_commas(cls, values: Any) -> Any:
        is_text = isinstance(values, list) and all(isinstance(value, str) for value in values)
        return at_commas(values) if is_text else values
