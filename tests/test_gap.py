"""What the curves say, by table: improving, flat, overfitting, unstable, or nothing to be said."""

import math
import time

import pytest

from pipeline.gap import verdict


def logs(held_out, training=None, every=10):
    """An evaluation each `every` updates, with the training log of the same update beside it."""
    training = held_out if training is None else training
    found = []
    for number, (high, low) in enumerate(zip(held_out, training, strict=True), start=1):
        found += [
            {"step": every * number, "loss": low},
            {"step": every * number, "eval_loss": high},
        ]
    return found


@pytest.mark.parametrize(
    ("held_out", "training", "kind"),
    [
        ([5, 4, 3.5, 3.2, 3.0], None, "improving"),
        ([5, 4, 3.01, 3.0, 3.0], None, "flat"),
        ([4, 3, 3, 2.98, 2.985], None, "flat"),
        ([4, 3, 3.2, 3.5], [4, 3, 2.5, 2], "overfitting"),
        ([4, 3, 3.02, 3.029], [4, 3, 2.5, 2], "flat"),  # less than another seed would do
        ([4, 3, 3.02, 3.031], [4, 3, 2.5, 2], "overfitting"),
        ([4, 3, 5, 6], [4, 3, 5, 6], "unstable"),
        ([4, 3, 5, 6], [4, 3, 3, 3], "unstable"),
        ([4, 3.5], None, "improving"),
        ([4, 4], None, "flat"),
        ([4], None, "unknown"),
        ([], None, "unknown"),
    ],
)
def test_kinds(held_out, training, kind):
    assert verdict(logs(held_out, training)).kind == kind


def test_overfitting_is_said_with_updates_values_and_what_treats_it():
    said = verdict(logs([4, 3, 3.2, 3.5], [4, 3, 2.5, 2]), keeps_best=True).sentence
    for words in (
        "At update 40 the held-out loss is 3.5000, 1.5000 above the training loss around it",
        "rose from 3.0000 (update 20) to 3.5000 (update 40) while", "from 3.0000 to 2.0000",
        "training.weight_decay", "evaluation.early_stopping_patience", "data.files",
        "The saved weights are those of the best evaluation.",
    ):  # fmt: skip
        assert words in said
    assert "saved weights" not in verdict(logs([4, 3, 3.2, 3.5], [4, 3, 2.5, 2])).sentence


def test_no_evaluation_is_said_with_its_keys():
    assert "training.eval_steps" in verdict([{"step": 1, "loss": 3.0}]).sentence


def test_training_loss_is_the_mean_of_the_logs_around_the_evaluation():
    history = [{"step": step, "loss": float(step)} for step in range(1, 21)]
    history += [{"step": 10, "eval_loss": 30.0}, {"step": 20, "eval_loss": 29.0}]
    assert "11.5000 above the training loss around it (17.5000)" in verdict(history).sentence


def test_the_nearest_log_stands_in_where_none_is_around():
    history = [
        {"step": 100, "loss": 2.0},
        {"step": 1, "eval_loss": 4.0},
        {"step": 3, "eval_loss": 3.0},
    ]
    assert "1.0000 above the training loss around it (2.0000)" in verdict(history).sentence


def test_held_out_text_alone_and_what_is_no_number_are_no_obstacle():
    history = [
        {"step": 1, "eval_loss": 4.0},
        {"step": 2, "eval_loss": math.nan},
        {"eval_loss": 1.0},
    ]
    assert verdict(history).sentence.startswith("At update 1 the held-out loss is 4.0000. One")
    rising = [{"step": n, "eval_loss": 3.0 + n} for n in range(4)]
    assert verdict(rising).kind == "unstable"


def test_a_long_history_takes_no_time():
    history = [{"step": n, "loss": 3.0, **({"eval_loss": 3.0} if n % 50 == 0 else {})}
               for n in range(1, 100_001)]  # fmt: skip
    started = time.perf_counter()
    assert verdict(history).kind == "flat"
    assert time.perf_counter() - started < 5  # 0.2 s here; looking at all for each took minutes


def test_one_evaluation_far_above_the_training_loss_may_be_overfitting():
    said = verdict(logs([8.2], [4.04]))
    assert said.kind == "unknown" and "so wide a gap is overfitting, or" in said.sentence
    assert verdict(logs([3.1], [2.85])).kind == "unknown"
