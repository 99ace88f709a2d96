"""The limits of numbers in `training:`, seen without torch."""

from typing import Any

from pipeline.checkpoint import FEWEST_KEPT
from pipeline.recipe import InputError

# Values that TrainingArguments accepts and that cannot work, with the smallest that can.
SMALLEST = {
    "learning_rate": (0, "above"),
    "max_steps": (1, "at least"),
    "num_train_epochs": (0, "above"),
    "per_device_train_batch_size": (1, "at least"),
    "per_device_eval_batch_size": (1, "at least"),
    "save_total_limit": (FEWEST_KEPT, "at least"),
    "logging_steps": (0, "above"),
    "eval_steps": (0, "above"),
    "save_steps": (0, "above"),
    "seed": (0, "at least"),
    "dataloader_num_workers": (0, "at least"),
    "adam_epsilon": (0, "above"),
    "weight_decay": (0, "at least"),
    "max_grad_norm": (0, "at least"),
    "ddp_timeout": (0, "above"),
}


def check_limits(training: dict[str, Any]) -> None:
    """Check the numbers of a recipe's `training:`.

    Raises:
        InputError: one is beyond its limits, or two contradict each other.
    """
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= training.get(name, 0.9) < 1:
            raise InputError(
                f"training.{name}: must be at least 0 and below 1; got {training[name]}"
            )
    if training.get("seed", 0) >= 2**32:  # NumPy's generator takes 32 bits
        raise InputError(f"training.seed: must be below 4294967296; got {training['seed']}")
    if "num_train_epochs" in training and training.get("max_steps", -1) > 0:
        raise InputError(
            "training.num_train_epochs and training.max_steps contradict each other; take one "
            "back with null, as in --training.max_steps null"
        )
    for name, (smallest, word) in SMALLEST.items():
        value = training.get(name)
        if value is None or (name, value) == ("max_steps", -1):  # the library's own "not given"
            continue
        fits = value >= smallest if word == "at least" else value > smallest
        if not fits:  # also NaN
            raise InputError(f"training.{name}: must be {word} {smallest}; got {value}")
