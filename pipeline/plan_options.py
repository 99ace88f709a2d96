"""What can be typed at the doors that tell of a run before it is made."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline import hardware
from pipeline.options import RecipeOptions

PICTURES = (".png", ".svg", ".pdf")
TEXT_FOR_GPUS = str(Path(__file__).parent.parent / "recipes" / "gpt2_small.yaml")


def _drawn_by_its_ending(picture: str) -> str:
    if Path(picture).suffix not in PICTURES:
        raise ValueError(f"--picture {picture}: name a file that ends in {', '.join(PICTURES)}")
    return picture


Picture = Annotated[str, AfterValidator(_drawn_by_its_ending)]


class PlanOptions(RecipeOptions):
    """Options of plan.py."""

    hardware: str = "cpu"
    """cpu (this machine), a device of the table (a100, h100, 8xh100), or the folder of a run for
    the figures that it measured."""
    topology: Literal["none", "ddp", "fsdp2", "zero2", "zero3"] | None = None
    """How several devices share the model (default: of ddp and fsdp2 the first that fits)."""
    mfu: float | None = Field(None, gt=0, le=1)
    """Share of the devices' rate that a training step reaches (default: the table's, or the
    run's)."""
    price_per_hour: float | None = Field(None, ge=0)
    """Price of one device for an hour, in any currency."""
    budget: str | None = None
    """Devices and a time, '8xh100 24h': instead of planning a recipe, write the one that makes most
    of them, on the text of --config (default: that of recipes/gpt2_small.yaml, on a CPU the
    quickstart's)."""
    recipe: str | None = None
    """With budget: file to write (default: one in outputs/plan, named after the budget)."""
    overwrite: bool = False
    """With budget: replace that file."""
    fit: list[str] | None = None
    """metrics.json of runs (a ladder): fit their scaling law, and foretell the recipe's loss."""
    leave_out: list[str] = Field(default_factory=list)
    """With fit: those of them that are foretold and not fitted."""
    json_: str | None = Field(None, alias="json")
    """File to write the numbers to."""
    picture: Picture | None = None
    """File to draw to, .png, .svg or .pdf."""

    @model_validator(mode="before")
    @classmethod
    def _text_of_a_budget(cls, values: Any) -> Any:
        if not isinstance(values.get("budget"), str) or values.get("config") is not None:
            return values
        devices, _ = hardware.budget(values["budget"])
        return values if devices.device.kind == "cpu" else {**values, "config": TEXT_FOR_GPUS}

    @model_validator(mode="after")
    def _one_question(self) -> "PlanOptions":
        stated = self.model_fields_set
        if self.budget is not None and self.fit is not None:
            raise ValueError("give one of --budget and --fit: they are two questions")
        if self.budget is not None and "hardware" in stated:
            raise ValueError("--budget names the devices itself; leave out --hardware")
        for name in ("hardware", "topology", "mfu", "price_per_hour"):
            if name in stated and self.fit is not None:
                raise ValueError(f"--{name} has no meaning with --fit; leave it out")
        for name, needed in (("recipe", "budget"), ("overwrite", "budget"), ("leave_out", "fit")):
            if name in stated and getattr(self, needed) is None:
                raise ValueError(f"--{name} has a meaning with --{needed} only")
        return self


class FindOptions(RecipeOptions):
    """Options of find_learning_rate.py."""

    start: float = Field(1e-6, gt=0)
    """The rate of the first update."""
    end: float = Field(1.0, gt=0, le=100)
    """The rate of the last one; a sweep that has diverged ends before."""
    updates: int = Field(100, ge=20, le=1000)
    """Updates of each sweep, at least eight for each factor of ten."""
    seeds: int = Field(3, ge=1)
    """Sweeps, each with other first weights and another order of the rows; the first has the
    recipe's seed."""
    picture: Picture | None = None
    """File to draw the sweeps into, .png, .svg or .pdf (default: learning_rate.png in the folder
    learning_rate of the output folder, beside the numbers)."""

    @model_validator(mode="after")
    def _a_range_that_is_swept(self) -> "FindOptions":
        if self.end < 10 * self.start:
            raise ValueError(
                f"--start {self.start:g} and --end {self.end:g}: the end must be at least ten "
                "times the start; leave both out for 1e-6 to 1"
            )
        # No more than 0.125 decades apart: the loss is smoothed over 0.2 (see rate_suggestion).
        needed = math.ceil(8 * math.log10(self.end / self.start) - 1e-9)
        if self.updates < needed:
            raise ValueError(
                f"--updates {self.updates}: from {self.start:g} to {self.end:g} takes at least "
                f"{needed}; give more, or a narrower range"
            )
        return self
