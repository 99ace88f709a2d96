"""A run survives kills, torn files and full disks; nothing secret is written, no pickle is run."""

import builtins
import contextlib
import errno
import functools
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import soak

from pipeline import artifact, checkpoint

pytestmark = pytest.mark.slow

# -- the kill loop --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def clean_process() -> Iterator[ProcessPoolExecutor]:
    """A process that has imported everything and trained nothing: autograd allows no forks then."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=soak.warm_up) as pool:
        yield pool


def test_a_run_that_is_killed_at_any_moment_goes_on_as_if_nothing_had_been(clean_process, tmp_path):
    outcome = clean_process.submit(soak.soak, 40, 0, tmp_path).result()
    report = outcome.table()
    assert len(outcome.landed) >= 40 and outcome.completed >= 4, report
    assert not outcome.crashes, report
    assert not outcome.losses and outcome.fewest_whole == 2, report
    assert outcome.identical == outcome.completed, report
    assert outcome.share("saving") >= 0.15, report
    assert outcome.share("evaluation") >= 0.10, report
    assert outcome.share("preparation") >= 0.10, report


# -- every single step of a save ------------------------------------------------------------------

STEPS = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree",
}  # fmt: skip


class Steps:
    """Counts the calls by which a process changes files; at number `stop_at` it does `stop`.

    Only for a process of its own: a hook of Python's auditing cannot be removed.
    """

    def __init__(self, stop_at: int, stop: Callable[[], None]) -> None:
        self.count, self._stop_at, self._stop = 0, stop_at, stop
        sys.addaudithook(self._heard)
        os.fsync = lambda descriptor: self.step()  # a process's death loses nothing unsynced
        write = Path.write_bytes

        def in_halves(path: Path, data: bytes) -> int:
            self.half_written(path, data)
            return write(path, data)

        Path.write_bytes = in_halves

    def half_written(self, path: Path, data: bytes) -> None:
        """Stop between the halves of a file."""
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        self.step()

    def rest(self) -> None:
        """Count on, and stop no more."""
        self._stop_at = 0

    def step(self) -> None:
        self.count += 1
        if self.count == self._stop_at:
            self._stop()

    def _heard(self, event: str, arguments: tuple) -> None:
        if event in STEPS:
            self.step()


CONTENT = bytes(range(256)) * 40


def contents(step: int) -> checkpoint.Contents:
    """A small checkpoint, one file as bytes and one by a function."""

    def write_state(path: Path) -> None:
        path.write_bytes(json.dumps({"global_step": step}).encode())

    files = {"model.safetensors": CONTENT, "trainer_state.json": write_state}
    return checkpoint.Contents(files, len(CONTENT) + 20, {}, {"step": step})


def save(run_folder: Path, *steps: int, keep: int | None = 2) -> checkpoint.Writer:
    writer = checkpoint.Writer(run_folder, keep=keep)
    for step in steps:
        writer.write(step, contents(step))
        writer.wait()
    return writer


def forked(work: Callable[[], Any]) -> tuple[int, Any]:
    """Return the exit code of a forked process and what `work` returned in it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(work()).encode())
            os._exit(0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    return soak.ended(pid), json.loads(said) if said else None


def whole(run_folder: Path) -> set[int]:
    found = checkpoint.checkpoints(run_folder)
    return {checkpoint.step_of(f) for f in found if artifact.damage(f) is None}


def with_strangers(folder: Path) -> Path:
    """Put what is not ours beside the checkpoints."""
    for name in ("checkpoint-5", "checkpoint-best", "tokenizer.d"):
        (folder / name).mkdir(parents=True)
        (folder / name / "precious").write_text("mine")
    (folder / "checkpoint-7").write_text("mine")
    return folder


def strangers_are_well(folder: Path) -> bool:
    names = ("checkpoint-5/precious", "checkpoint-best/precious", "tokenizer.d/precious")
    return all((folder / name).read_text() == "mine" for name in (*names, "checkpoint-7"))


STRANGERS = {"checkpoint-5", "checkpoint-best", "tokenizer.d", "checkpoint-7"}

# Steps saved before, and what may be whole when the save of 30 was killed, besides the new state.
BEFORE = {
    "the first": ((), [set()], {30}),
    "the second": ((10,), [{10}], {10, 30}),
    "the third, and one goes": ((10, 20), [{10, 20}, {10, 20, 30}], {20, 30}),
}


@pytest.fixture
def known_versions():
    """Asked for once, not in every fork."""
    artifact.versions()
    artifact.git_commit()


def killed_at_each_step(tmp_path: Path, before: Callable[[Path], Any]) -> Iterator[Path]:
    """Yield the run folder as it was left by a save of 30 that ended at step 1, 2, 3, ..."""
    before(with_strangers(tmp_path / "before"))
    for number in itertools.count(1):
        folder = Path(shutil.copytree(tmp_path / "before", tmp_path / str(number)))

        def work(folder=folder, number=number) -> None:
            Steps(number, lambda: os._exit(9))
            save(folder, 30)

        code, _ = forked(work)
        assert code in (0, 9)
        yield folder
        shutil.rmtree(folder)
        if code == 0:
            assert number > 15
            return


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if "one goes" in c else pytest.mark.slow) for c in BEFORE],
)
def test_a_save_killed_at_any_step_leaves_the_old_or_the_new(tmp_path, known_versions, case):
    steps, old_states, new_state = BEFORE[case]
    seen = []
    for folder in killed_at_each_step(tmp_path, lambda folder: save(folder, *steps)):
        left = whole(folder)
        assert left in [*old_states, new_state]
        seen.append(left)
        found = checkpoint.newest_whole(folder)
        assert (found and checkpoint.step_of(found)) == max(left, default=None)
        artifact.clear_leftovers(folder)
        assert {p.name for p in folder.iterdir()} == STRANGERS | {f"checkpoint-{s}" for s in left}
        assert strangers_are_well(folder)
    assert all(state in seen for state in [*old_states, new_state])
    assert seen[-1] == new_state


def test_a_save_killed_at_any_step_keeps_a_damaged_one_that_stands_in_its_way(
    tmp_path, known_versions
):
    def before(folder: Path) -> None:
        save(folder, 10, 20, 30)
        (folder / "checkpoint-30" / "model.safetensors").write_bytes(b"damaged")

    kept = []
    for folder in killed_at_each_step(tmp_path, before):
        assert whole(folder) in ({20}, {20, 30})
        places = [folder / f"checkpoint-30{end}" for end in ("", ".damaged-1")]
        kept.append([p for p in places if (p / "model.safetensors").exists()])
        assert any((p / "model.safetensors").read_bytes() == b"damaged" for p in kept[-1])
        assert strangers_are_well(folder)
    assert len(kept[-1]) == 2


def test_a_save_killed_at_any_step_that_writes_one_anew_leaves_one(tmp_path, known_versions):
    for folder in killed_at_each_step(tmp_path, lambda folder: save(folder, 20, 30)):
        assert whole(folder) in ({20}, {20, 30})
        assert strangers_are_well(folder)


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    sync, rename, done = os.fsync, os.rename, []
    monkeypatch.setattr(
        os, "fsync", lambda d: (done.append(os.readlink(f"/proc/self/fd/{d}")), sync(d))[1]
    )
    monkeypatch.setattr(os, "rename", lambda *paths: (done.append("renamed"), rename(*paths))[1])
    save(tmp_path, 30)
    staging = artifact.staging_of(tmp_path / "checkpoint-30")
    names = ["model.safetensors", "trainer_state.json", artifact.MANIFEST]
    assert done == [*(str(staging / n) for n in names), str(staging), "renamed", str(tmp_path)]


def refused_at_each_step(tmp_path: Path, code: int, steps: Any = None) -> Iterator[tuple]:
    """Yield folder and both failures: of a save refused at one step, and of the next save."""
    save(with_strangers(tmp_path / "before"), 10, 20)
    for number in itertools.count(1) if steps is None else steps:
        folder = Path(shutil.copytree(tmp_path / "before", tmp_path / str(number)))

        def work(folder=folder, number=number) -> tuple:
            def refuse() -> None:
                raise OSError(code, os.strerror(code), str(folder / "named"))

            counted = Steps(number, refuse)
            writer = save(folder, 30)
            first, count = writer.failure, counted.count
            counted.rest()
            between = sorted(whole(folder))
            assert not list(folder.glob(f"{artifact.STAGING}*"))
            writer.write(40, contents(40))
            writer.wait()
            return count, first, between, writer.failure

        exit_code, (count, first, between, second) = forked(work)
        assert exit_code == 0
        yield folder, first, set(between), second
        shutil.rmtree(folder)
        if steps is None and count < number:
            assert number > 15
            return


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def test_a_save_that_is_refused_says_so_and_the_next_one_tries_again(
    tmp_path, known_versions, code
):
    steps = None if code == errno.ENOSPC else (1, 4, 7, 12, 15)
    failures = 0
    for folder, first, between, second in refused_at_each_step(tmp_path, code, steps):
        if first is not None:
            failures += 1
            assert first.startswith(f"{folder / 'checkpoint-30'}: not saved: {os.strerror(code)} (")
            assert re.search(r"; it needs about 0\.01 MB, [\d.]+ [GM]B are free$", first)
            assert "\n" not in first
            assert {10, 20} <= between
        else:
            assert {20, 30} <= between
        assert second is None
        assert 40 in whole(folder) and len(whole(folder)) >= 2
        artifact.clear_leftovers(folder)
        ours = {p.name for p in folder.iterdir()} - STRANGERS
        assert ours == {f"checkpoint-{step}" for step in whole(folder)}
        assert strangers_are_well(folder)
    assert failures >= 4


# -- whole runs -----------------------------------------------------------------------------------


class Runs:
    """Runs of one recipe, each in a process of its own, and the one that nothing disturbed."""

    def __init__(self, pool: ProcessPoolExecutor, folder: Path) -> None:
        self._pool, self._folder = pool, folder
        self._recipe = soak.write_recipe(folder)
        self.reference = folder / "reference"
        code, said = self(self.reference)
        assert code == 0, said
        self.expected = self._result(self.reference)

    def __call__(
        self, output: Path, *more: str, prepare: Callable[[], Any] = dict
    ) -> tuple[int, str]:
        """Return exit code and output; `prepare`, importable by name, is called in the process."""
        log = self._folder / "log.txt"
        log.unlink(missing_ok=True)
        argv = ["--config", str(self._recipe), "--training.output_dir", str(output), *more]
        code = self._pool.submit(soak.run, argv, log, prepare).result()
        return code, log.read_text()

    def is_as_undisturbed(self, output: Path) -> bool:
        wrong = soak.differing(self.expected, self._result(output))
        assert not wrong, wrong
        return True

    def _result(self, output: Path) -> dict[str, Any]:
        return self._pool.submit(soak.result, output).result()


def at_updates(actions: dict[int, Callable[[], Any]]) -> None:
    """Have a run do something before an update, nothing being written at that moment."""
    from pipeline.trainer import PretrainingTrainer

    step = PretrainingTrainer.training_step

    def first(trainer, *args, **kwargs):
        if action := actions.get(trainer.state.global_step + 1):
            trainer._writer.wait()
            action()
        return step(trainer, *args, **kwargs)

    PretrainingTrainer.training_step = first


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="session")
def runs(clean_process, tmp_path_factory) -> Runs:
    return Runs(clean_process, tmp_path_factory.mktemp("survival"))


@pytest.fixture(scope="session")
def killed_run(runs, tmp_path_factory) -> Path:
    """A run killed before update 14; read it, do not change it."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    code, said = runs(folder, prepare=functools.partial(at_updates, {14: die}))
    assert code == -signal.SIGKILL, said
    assert whole(folder) == {10, 12}
    return folder


def torn(kind: str, data: bytes) -> bytes | None:
    """Return what is left of a file; None: nothing, not even its name."""
    middle = len(data) // 2
    zeroed = data[: max(0, middle - 200)] + bytes(400) + data[middle + 200 :]
    kinds = {
        "missing": None, "empty": b"", "a byte short": data[:-1], "half": data[:middle],
        "zeroed": zeroed if len(data) > 400 else data,
    }  # fmt: skip
    return kinds[kind]


def tear(path: Path, kind: str) -> bool:
    """Damage a file; tell whether that changed it."""
    data = path.read_bytes()
    left = torn(kind, data)
    if left is None:
        path.unlink()
    else:
        path.write_bytes(left)
    return left != data


KINDS = ("missing", "empty", "a byte short", "half", "zeroed")


@pytest.mark.parametrize("kind", KINDS)
def test_whichever_file_is_torn_the_one_before_is_taken(killed_run, tmp_path, caplog, kind):
    folder = Path(shutil.copytree(killed_run, tmp_path / "run"))
    newest = folder / "checkpoint-12"
    names = sorted(p.name for p in newest.iterdir())
    assert {
        "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
        "config.json", "tokenizer.json", artifact.MANIFEST,
    } <= set(names)  # fmt: skip
    torn_ones = 0
    for name in names:
        intact = (newest / name).read_bytes()
        if tear(newest / name, kind):
            torn_ones += 1
            caplog.clear()
            assert checkpoint.newest_whole(folder) == folder / "checkpoint-10"
            assert f"checkpoint skipped: {newest / name} " in caplog.text
            assert newest.is_dir()
        (newest / name).write_bytes(intact)
    assert torn_ones >= (5 if kind == "zeroed" else len(names))
    assert checkpoint.newest_whole(folder) == newest


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.safetensors", "zeroed"),
        ("trainer_state.json", "half"),
        (artifact.MANIFEST, "a byte short"),
    ],
)
def test_a_run_with_a_torn_checkpoint_ends_as_if_nothing_had_been(
    runs, killed_run, tmp_path, name, kind
):
    folder = Path(shutil.copytree(killed_run, tmp_path / "run"))
    assert tear(folder / "checkpoint-12" / name, kind)
    code, said = runs(folder)
    assert code == 0, said
    assert f"checkpoint skipped: {folder / 'checkpoint-12' / name} " in said
    assert f"resuming from {folder / 'checkpoint-10'}" in said
    # The torn one is kept, under a name that no checkpoint has.
    [kept] = folder.glob("checkpoint-12.*-1")
    shutil.rmtree(kept)
    assert runs.is_as_undisturbed(folder)


# -- disks that are full --------------------------------------------------------------------------

NOT_SAVED = re.compile(
    r"^(\S+)/checkpoint-(\d+): not saved: ([^\n]+); it needs about ([\d.]+) MB, "
    r"([\d.]+) [GM]B are free; training goes on, and the next save tries again$",
    re.MULTILINE,
)


def unsaved(said: str) -> list[int]:
    return [int(match[2]) for match in NOT_SAVED.finditer(said)]


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """Yield a mounted folder, or skip where mounting is not permitted."""
    folder.mkdir()
    command = ["mount", *options, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"mount: {error.strerror}")
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, checkpoints_left: float) -> None:
    """Write a file that leaves room for so much of a checkpoint."""
    newest = checkpoint.checkpoints(folder)[-1:]
    size = sum(p.stat().st_size for one in newest for p in one.iterdir())
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(
            file.fileno(), 0, shutil.disk_usage(folder).free - int(checkpoints_left * size)
        )


def unfill(folder: Path) -> None:
    (folder / "filler").unlink()


@pytest.mark.parametrize("checkpoints_left", [0.5, 1.0, 0.0], ids=["known", "on the way", "all"])
def test_on_a_full_disk_training_goes_on_and_saves_again_when_there_is_room(
    runs, tmp_path, checkpoints_left
):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=12m", "tmpfs") as disk:
        folder = disk / "run"
        actions = {
            6: functools.partial(fill, folder, checkpoints_left),
            13: functools.partial(unfill, folder),
        }
        code, said = runs(folder, prepare=functools.partial(at_updates, actions))
        assert code == 0, said
        assert unsaved(said) == [6, 8, 10, 12]
        assert all("No space left" in match[3] for match in NOT_SAVED.finditer(said))
        assert whole(folder) == {18, 20}
        assert runs.is_as_undisturbed(folder)


def limit_file_size(size: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def test_files_beyond_the_size_limit_cost_only_the_checkpoint(runs, tmp_path):
    """The optimizer's is the largest: its writer is C++, and its sentence not the system's."""
    model, optimizer = (
        (runs.reference / "checkpoint-20" / name).stat().st_size
        for name in ("model.safetensors", "optimizer.pt")
    )
    actions = {
        6: functools.partial(limit_file_size, (model + optimizer) // 2),
        11: functools.partial(limit_file_size, resource.RLIM_INFINITY),
    }
    code, said = runs(tmp_path / "run", prepare=functools.partial(at_updates, actions))
    assert code == 0, said
    assert unsaved(said) == [6, 8, 10]
    assert whole(tmp_path / "run") == {18, 20}
    assert runs.is_as_undisturbed(tmp_path / "run")


def test_older_checkpoints_survive_a_limit_that_is_never_lifted(runs, tmp_path):
    actions = {6: functools.partial(limit_file_size, 100_000)}
    code, said = runs(tmp_path / "run", prepare=functools.partial(at_updates, actions))
    assert code == 2, said
    assert unsaved(said) == list(range(6, 22, 2))
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'run'}: cannot be written, the disk is full (File ")
    assert whole(tmp_path / "run") == {2, 4}
    code, said = runs(tmp_path / "run")
    assert code == 0, said
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-4'}" in said
    assert runs.is_as_undisturbed(tmp_path / "run")


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how},bind", str(folder)], check=True)


def test_a_folder_that_becomes_read_only_costs_only_the_checkpoints(runs, tmp_path):
    with mounted(tmp_path / "run", "--bind", str(tmp_path / "run")) as folder:
        actions = {
            6: functools.partial(remount, folder, "ro"),
            11: functools.partial(remount, folder, "rw"),
        }
        quiet = ("--training.eval_steps", "20")
        code, said = runs(folder, *quiet, prepare=functools.partial(at_updates, actions))
        assert code == 0, said
        assert unsaved(said) == [6, 8, 10]
        assert all("Read-only file system" in match[3] for match in NOT_SAVED.finditer(said))
        assert whole(folder) == {18, 20}


def pretend_free(size: int) -> None:
    usage = shutil.disk_usage

    def little(path):
        return usage(path)._replace(free=size)

    shutil.disk_usage = little


def test_room_for_the_checkpoints_is_looked_for_before_training(runs, tmp_path):
    folder = tmp_path / "run"
    code, said = runs(folder, prepare=functools.partial(pretend_free, 500_000))
    assert code == 2, said
    assert re.search(
        rf"^error: preflight: disk: {re.escape(str(folder))}: the checkpoints that the recipe "
        r"wants need [\d.]+ MB there \(3 more of [\d.]+ MB\), and 0\.50 MB are free; make room, "
        r"lower training\.save_total_limit, or choose another --training\.output_dir, or accept it "
        r"with --preflight\.accept disk$",
        said, re.MULTILINE,
    )  # fmt: skip
    assert "Traceback" not in said and not checkpoint.checkpoints(folder)


# -- secrets, and strangers' files ----------------------------------------------------------------

CANARY = "hf_CANARYdoNotWriteThisAnywhere"


def with_secrets(folder: Path) -> None:
    os.environ["HF_TOKEN"] = os.environ["HUGGING_FACE_HUB_TOKEN"] = CANARY
    os.environ["WANDB_API_KEY"] = CANARY
    os.chdir(folder)


def test_no_secret_of_the_environment_reaches_the_run_folder(runs, tmp_path):
    (tmp_path / ".env").write_text(f"HF_TOKEN={CANARY}\nSECRET={CANARY}\n")
    code, said = runs(
        tmp_path / "run", "--training.report_to", "tensorboard",
        prepare=functools.partial(with_secrets, tmp_path),
    )  # fmt: skip
    assert code == 0, said
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files) and len(files) > 30
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    assert CANARY not in said


def test_a_token_in_the_recipe_is_refused_in_one_sentence(runs, tmp_path):
    code, said = runs(tmp_path / "run", "--training.hub_token", CANARY)
    assert code == 2
    assert said.splitlines() == [
        "error: training.hub_token: leave it out; set HF_TOKEN in the environment; a recipe is "
        "kept in files that are shared"
    ]
    assert not (tmp_path / "run").exists()


class Executed:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self):
        return builtins.open, (self._path, "w")


def remake_manifest(folder: Path) -> None:
    """Make a changed checkpoint whole again, as a stranger would."""
    origin = artifact.read_manifest(folder)
    (folder / artifact.MANIFEST).unlink()
    staging = folder.rename(folder.with_name("changed"))
    artifact.commit(staging, folder, origin["made_from"], origin["facts"])
    assert artifact.damage(folder) is None


@pytest.fixture
def strange_run(killed_run, tmp_path) -> Path:
    """A killed run that came from a stranger: a copy."""
    return Path(shutil.copytree(killed_run, tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model.safetensors", "pickle"),
        ("optimizer.pt", "pickle"),
        ("optimizer.pt", "torch"),
        ("scheduler.pt", "torch"),
        ("rng_state.pth", "torch"),
    ],
)
def test_no_pickle_of_a_checkpoint_is_executed(runs, strange_run, tmp_path, name, how):
    import torch

    newest, trap = strange_run / "checkpoint-12", tmp_path / "executed"
    if how == "pickle":
        (newest / name).write_bytes(pickle.dumps({"state": Executed(trap)}))
    else:
        torch.save({"state": Executed(trap)}, newest / name)
    remake_manifest(newest)
    code, said = runs(strange_run)
    assert code == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {newest / name}: ")
    assert said.strip().endswith(errors[0]) and "Traceback" not in said
    assert not trap.exists()


@pytest.mark.parametrize("alone", [False, True])
def test_weights_in_a_pickle_are_never_read(runs, strange_run, tmp_path, alone):
    newest, trap = strange_run / "checkpoint-12", tmp_path / "executed"
    (newest / "pytorch_model.bin").write_bytes(pickle.dumps({"state": Executed(trap)}))
    if alone:
        (newest / "model.safetensors").unlink()
    remake_manifest(newest)
    code, said = runs(strange_run)
    assert code == (2 if alone else 0), said
    assert "Traceback" not in said
    if alone:
        assert f"error: {newest / 'model.safetensors'}: " in said
    assert not trap.exists()


def test_the_trap_works(tmp_path):
    pickle.load(io.BytesIO(pickle.dumps(Executed(tmp_path / "executed")))).close()
    assert (tmp_path / "executed").exists()


def die_when_the_recipe_is_saved(half: bool) -> None:
    write = artifact.write_whole

    def write_and_die(path, text, **options):
        if path.name != "config.yaml":
            return write(path, text, **options)
        if half:
            path.with_name(f"{artifact.STAGING}{path.name}-1-1").write_text(text[:20])
        else:
            write(path, text, **options)
        die()

    artifact.write_whole = write_and_die


@pytest.mark.parametrize("half", [False, True])
def test_a_kill_between_recipe_and_status_can_be_restarted(runs, tmp_path, half):
    runs(tmp_path / "run", prepare=functools.partial(die_when_the_recipe_is_saved, half))
    code, said = runs(tmp_path / "run")
    assert code == 0, said
    assert runs.is_as_undisturbed(tmp_path / "run")


def test_a_kill_while_a_resumed_run_saves_its_recipe_can_be_restarted(runs, killed_run, tmp_path):
    folder = Path(shutil.copytree(killed_run, tmp_path / "run"))
    runs(folder, prepare=functools.partial(die_when_the_recipe_is_saved, True))
    code, said = runs(folder)
    assert code == 0, said
    assert runs.is_as_undisturbed(folder)


def die_in_preparation() -> None:
    from pipeline import run_data

    run_data.obtain_run_data = lambda *arguments: die()


def test_a_run_whose_overwriting_was_killed_early_is_not_lost(runs, tmp_path):
    """Its own command, without --overwrite, must not train anew and remove it."""
    folder = Path(shutil.copytree(runs.reference, tmp_path / "run"))
    weights = (folder / "model.safetensors").stat().st_ino
    runs(folder, "--overwrite", prepare=die_in_preparation)
    code, said = runs(folder)
    assert code == 2 or (folder / "model.safetensors").stat().st_ino == weights, said


def refuse_to_read(path: Path, code: int) -> None:
    digest = artifact._sha256

    def read(wanted):
        if wanted == path:
            raise OSError(code, os.strerror(code), str(wanted))
        return digest(wanted)

    artifact._sha256 = read


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_is_skipped(
    runs, killed_run, tmp_path, code
):  # fmt: skip
    folder = Path(shutil.copytree(killed_run, tmp_path / "run"))
    path = folder / "checkpoint-12" / "optimizer.pt"
    exit_code, said = runs(folder, prepare=functools.partial(refuse_to_read, path, code))
    assert exit_code == 0, said
    assert f"checkpoint skipped: {path} " in said


def test_samples_that_do_not_fit_on_the_disk_end_no_run(runs, tmp_path):
    """samples.txt begins a new page of the disk, which has none."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=12m", "tmpfs") as disk:
        folder = disk / "run"
        actions = {
            6: functools.partial(fill, folder, 0),
            13: functools.partial(unfill, folder),
        }
        code, said = runs(
            folder, "--training.eval_steps", "7",
            prepare=functools.partial(at_updates, actions),
        )  # fmt: skip
        assert code == 0, said


def test_a_disk_that_is_full_before_the_first_save_ends_no_run(runs, tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=12m", "tmpfs") as disk:
        folder = disk / "run"
        actions = {1: functools.partial(fill, folder, 0), 13: functools.partial(unfill, folder)}
        code, said = runs(folder, prepare=functools.partial(at_updates, actions))
        assert code == 0, said
        assert "checkpoint-2: not saved: " in said


def fill_before_the_report(folder: Path) -> None:
    from pipeline import report

    write = report.write_report

    def fill_and_write(*arguments):
        fill(folder, 0)
        return write(*arguments)

    report.write_report = fill_and_write


def test_a_report_that_does_not_fit_is_one_sentence(runs, tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=12m", "tmpfs") as disk:
        folder = disk / "run"
        code, said = runs(folder, prepare=functools.partial(fill_before_the_report, folder))
        assert code == 2 and "Traceback" not in said, said


@pytest.mark.parametrize(
    ("name", "data"),
    [("rng_state.pth", None), ("rng_state.pth", [1]), ("trainer_state.json", "{}")],
)
def test_a_strangers_file_is_one_sentence(
    runs, killed_run, tmp_path, name, data
):  # fmt: skip
    import torch

    folder = Path(shutil.copytree(killed_run, tmp_path / "run"))
    path = folder / "checkpoint-12" / name
    if data is None:
        path.unlink()
    elif isinstance(data, str):
        path.write_text(data)
    else:
        torch.save(data, path)
    remake_manifest(path.parent)
    code, said = runs(folder)
    assert code == 2 and "Traceback" not in said, said


@pytest.mark.parametrize("files", ['{"model.safetensors": 3}', '{"model.safetensors": {}}'])
def test_a_manifest_of_another_shape_is_damage(tmp_path, files):
    folder = tmp_path / "checkpoint-10"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"some")
    (folder / artifact.MANIFEST).write_text(
        f'{{"made_from": {{}}, "facts": {{}}, "files": {files}}}'
    )
    assert artifact.damage(folder)
    assert checkpoint.newest_whole(tmp_path) is None


def test_an_empty_status_file_is_no_stranger(runs, killed_run, tmp_path):
    """A rename that was not synced may leave that after a loss of power; config.yaml is there."""
    folder = Path(shutil.copytree(killed_run, tmp_path / "run"))
    (folder / "run_status.json").write_text("")
    code, said = runs(folder)
    assert code == 0, said
    assert "resuming from" in said


def test_status_files_half_written_are_cleared(runs, killed_run, tmp_path):
    folder = Path(shutil.copytree(killed_run, tmp_path / "run"))
    (folder / "_staging-run_status.json-1-1").write_text("{")
    code, said = runs(folder)
    assert code == 0, said
    assert not list(folder.glob("_staging*"))
