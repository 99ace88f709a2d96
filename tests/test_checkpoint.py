"""A checkpoint is whole or absent; damage is named; only what is ours is ever removed."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline import artifact, checkpoint
from pipeline.recipe import InputError


def make(run_folder: Path, step: int) -> Path:
    folder = run_folder / f"checkpoint-{step}"
    with artifact.staged(folder, {}) as (staging, facts):
        (staging / "model.safetensors").write_bytes(bytes(range(256)) * 40)
        (staging / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        facts["step"] = step
    return folder


DAMAGE = {
    "missing": lambda p: p.unlink(),
    "empty": lambda p: p.write_bytes(b""),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "a zeroed page": lambda p: p.write_bytes(
        p.read_bytes()[:1000] + bytes(400) + p.read_bytes()[1400:]
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_one_is_named_skipped_and_kept(tmp_path, caplog, kind):
    make(tmp_path, 10)
    newest = make(tmp_path, 20)
    DAMAGE[kind](newest / "model.safetensors")
    assert checkpoint.newest_whole(tmp_path) == tmp_path / "checkpoint-10"
    assert str(newest / "model.safetensors") in caplog.text
    assert newest.exists()


def test_a_manifest_that_is_missing_makes_it_no_checkpoint(tmp_path):
    make(tmp_path, 10)
    (make(tmp_path, 20) / artifact.MANIFEST).unlink()
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    assert checkpoint.newest_whole(tmp_path) == tmp_path / "checkpoint-10"


def test_newest_is_by_number_not_by_name_or_time(tmp_path):
    for step in (100, 9, 20):
        make(tmp_path, step)
    assert checkpoint.newest_whole(tmp_path).name == "checkpoint-100"


def test_rotation_keeps_the_newest_the_best_and_what_is_not_ours(tmp_path):
    for step in (10, 20, 30, 40, 50):
        make(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("mine")
    checkpoint.rotate(tmp_path, keep=2, best=tmp_path / "checkpoint-10")
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {
        "checkpoint-10", "checkpoint-40", "checkpoint-50", "checkpoint-best", "checkpoint-5"
    }  # fmt: skip


def test_rotation_never_leaves_fewer_than_two(tmp_path):
    for step in (10, 20, 30):
        make(tmp_path, step)
    checkpoint.rotate(tmp_path, keep=1, best=None)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-30"]


def test_without_a_limit_all_stay(tmp_path):
    for step in (10, 20, 30):
        make(tmp_path, step)
    checkpoint.rotate(tmp_path, keep=None, best=None)
    assert len(checkpoint.checkpoints(tmp_path)) == 3


def test_what_resume_means(tmp_path):
    assert checkpoint.chosen(tmp_path, "auto") is None
    with pytest.raises(InputError, match="--resume must: no whole checkpoint in"):
        checkpoint.chosen(tmp_path, "must")
    folder = make(tmp_path, 10)
    assert checkpoint.chosen(tmp_path, "never") is None
    assert checkpoint.chosen(tmp_path, "auto") == folder
    assert checkpoint.chosen(tmp_path, str(folder)) == folder
    with pytest.raises(InputError, match="--resume elsewhere: no such folder; name a"):
        checkpoint.chosen(tmp_path, "elsewhere")


def test_a_renamed_one_is_named_skipped_and_kept(tmp_path, caplog):
    make(tmp_path, 10)
    make(tmp_path, 20).rename(tmp_path / "checkpoint-999")
    assert checkpoint.newest_whole(tmp_path).name == "checkpoint-10"
    assert "checkpoint-999 was made after update 20, and renamed" in caplog.text


def test_only_later_ones_than_the_one_gone_back_to_are_set_aside(tmp_path):
    for step in (10, 20, 30):
        make(tmp_path, step)
    (tmp_path / "checkpoint-40").mkdir()
    checkpoint.set_aside_after(tmp_path, 10, but=tmp_path / "checkpoint-30")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-10", "checkpoint-20.superseded-1", "checkpoint-30", "checkpoint-40"
    ]  # fmt: skip


def test_room_is_for_those_that_are_to_come(tmp_path, monkeypatch):
    free = 1_000
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9_999, 0, free))
    make(tmp_path, 10)
    checkpoint.check_room(tmp_path, size=500, planned=9, keep=2, has_best=False)
    with pytest.raises(InputError, match="need 0.00 MB there .3 more of 0.00 MB., and 0.00 MB"):
        checkpoint.check_room(tmp_path, size=500, planned=9, keep=2, has_best=True)
    with pytest.raises(InputError, match="lower training.save_total_limit"):
        checkpoint.check_room(tmp_path, size=500, planned=9, keep=None, has_best=False)
    checkpoint.check_room(tmp_path, size=500, planned=2, keep=None, has_best=False)
