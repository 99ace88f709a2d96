"""Updates alone are timed, of their time what was waited, and never more than there was."""

from types import SimpleNamespace

import pytest

from pipeline.clock import Clock

TOKENS = 100


class Time:
    """A clock that goes when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch):
    """The time that the clock sees."""
    found = Time()
    monkeypatch.setattr("pipeline.clock.time", SimpleNamespace(perf_counter=lambda: found.now))
    return found


class Run:
    """Updates as the trainer makes them: data, batches, and logging if it is due."""

    def __init__(self, time: Time, first_step: int = 0, before: dict | None = None) -> None:
        self.time, self.step, self.clock = time, first_step, Clock(TOKENS, before)

    def update(self, *, data: float = 0.0, batches: tuple = (1.0,), logging: float = 0.0) -> None:
        with self.clock.waiting_for("data"):
            self.time.passes(data)
        for seconds in batches:
            with self.clock.batch(self.step):
                self.time.passes(seconds)
        self.step += 1
        with self.clock.waiting_for("logging"):
            self.time.passes(logging)

    def spent(self) -> dict[str, float]:
        return self.clock.spent(self.step)


@pytest.fixture
def run(time):
    """A run that has made its first update, of 50 s and 5 s of waits before."""
    run = Run(time)
    run.update(data=5.0, batches=(50.0,))
    return run


def fractions(values: dict[str, float]) -> tuple[float, float]:
    return values["data_wait_fraction"], values["logging_fraction"]


def test_waits_within_updates_are_counted(run):
    for _ in range(4):
        run.update(data=1.0, batches=(2.0,), logging=2.0)
    spent = run.spent()
    assert (spent["data_seconds"], spent["logging_seconds"]) == (4.0, 8.0)
    assert spent["update_seconds"] == 20.0 and spent["timed_updates"] == 4
    assert fractions(spent) == pytest.approx((0.2, 0.4))
    assert spent["tokens_per_second"] == 4 * TOKENS / 20


def test_the_first_update_counts_apart_with_its_waits(time):
    run = Run(time)
    run.time.passes(7.0)
    run.update(data=5.0, batches=(30.0, 20.0))
    spent = run.spent()
    assert spent["compile_seconds"] == 50.0 and spent["train_seconds"] == 62.0
    assert spent["update_seconds"] == spent["data_seconds"] == spent["timed_updates"] == 0
    assert fractions(spent) == (0.0, 0.0)
    assert spent["tokens_per_second"] == run.clock.rate(run.step) == TOKENS / 50


def test_what_follows_the_first_batches_counts(time):
    """Its log, say: it comes before the second update, and after the compilation."""
    run = Run(time)
    run.update(data=5.0, batches=(30.0, 20.0), logging=3.0)
    run.update(data=1.0, batches=(2.0, 2.0))
    spent = run.spent()
    assert (spent["update_seconds"], spent["compile_seconds"]) == (8.0, 50.0)
    assert (spent["data_seconds"], spent["logging_seconds"]) == (1.0, 3.0)


def test_nothing_is_counted_while_paused(run):
    run.update(data=1.0, batches=(3.0,))
    with run.clock.paused():
        run.time.passes(100.0)
        with run.clock.waiting_for("logging"):  # of an evaluation
            run.time.passes(30.0)
        with run.clock.waiting_for("data"):
            run.time.passes(20.0)
        assert run.spent()["update_seconds"] == 4.0
    run.update(data=1.0, batches=(3.0,))
    spent = run.spent()
    assert spent["update_seconds"] == 8.0 and spent["timed_updates"] == 2
    assert (spent["data_seconds"], spent["logging_seconds"]) == (2.0, 0.0)
    assert run.clock.rate(run.step) == 2 * TOKENS / 8
    assert spent["train_seconds"] == 5 + 50 + 8 + 150


def test_a_pause_that_fails_ends(run):
    with pytest.raises(KeyError), run.clock.paused():
        run.time.passes(10.0)
        raise KeyError
    run.update(batches=(4.0,))
    assert run.spent()["update_seconds"] == 4.0


def test_a_pause_before_the_first_update_is_not_taken_from_later_ones(time):
    run = Run(time)
    with run.clock.paused():
        time.passes(40.0)
    run.update(batches=(10.0,))
    run.update(batches=(2.0,))
    assert run.spent()["update_seconds"] == 2.0


def test_pausing_twice_pauses_once(run):
    run.clock.pause()
    run.time.passes(10.0)
    run.clock.pause()
    run.time.passes(10.0)
    assert run.spent()["update_seconds"] == 0.0


def test_each_window_has_its_own_numbers_and_the_next_begins_anew(run):
    for _ in range(2):
        run.update(data=1.0, batches=(2.0,), logging=1.0)
    first = run.clock.since_last(run.step)
    assert first["tokens_per_second"] == 2 * TOKENS / 8
    assert fractions(first) == pytest.approx((0.25, 0.25))
    for _ in range(5):
        run.update(batches=(1.0,))
    second = run.clock.since_last(run.step)
    assert second["tokens_per_second"] == TOKENS and fractions(second) == (0.0, 0.0)
    run.update(data=9.0, batches=(1.0,))
    assert fractions(run.clock.since_last(run.step)) == pytest.approx((0.9, 0.0))
    # Of the whole run nothing has gone.
    assert run.spent()["data_seconds"] == 11.0


def test_a_window_leaves_out_what_was_paused_in_it(run):
    run.clock.since_last(run.step)
    run.update(data=1.0, batches=(1.0,))
    with run.clock.paused():
        run.time.passes(50.0)
    run.update(data=1.0, batches=(1.0,))
    found = run.clock.since_last(run.step)
    assert found["tokens_per_second"] == 2 * TOKENS / 4
    assert fractions(found) == pytest.approx((0.5, 0.0))


def test_the_first_log_has_the_first_updates_rate(run):
    assert run.clock.since_last(1) == {
        "tokens_per_second": TOKENS / 50, "data_wait_fraction": 0.0, "logging_fraction": 0.0,
    }  # fmt: skip
    run.update(data=1.0, batches=(1.0,))
    again = run.clock.since_last(2), run.clock.since_last(2)  # an epoch's end logs again
    assert again[0]["tokens_per_second"] == again[1]["tokens_per_second"] == TOKENS / 2


def test_a_log_that_is_asked_for_while_it_is_written_counts_in_the_next_window(run):
    """As the trainer asks: within the wait that it has not seen the end of."""
    run.update(batches=(4.0,))
    with run.clock.waiting_for("logging"):
        run.time.passes(1.0)
        assert fractions(run.clock.since_last(run.step)) == (0.0, 0.0)
        run.time.passes(2.0)
    run.update(batches=(2.0,))
    found = fractions(run.clock.since_last(run.step))
    assert found == pytest.approx((0.0, 3 / 4)) and run.spent()["logging_seconds"] == 3.0


def test_no_fraction_is_above_one(run):
    with run.clock.waiting_for("logging"):
        run.time.passes(10.0)
        run.clock.since_last(run.step)
        run.update(batches=(1.0,))
        assert run.clock.since_last(run.step)["logging_fraction"] <= 1.0
    run.update(data=0.5, batches=(0.5,))
    found = run.clock.since_last(run.step)
    assert found["logging_fraction"] == 1.0 and found["data_wait_fraction"] <= 1.0
    old = Run(run.time, 3, {"data_seconds": 900.0, "update_seconds": 1.0, "timed_updates": 3})
    old.update(data=1.0)
    assert fractions(old.spent()) == (1.0, 0.0)


def test_what_was_before_a_resume_is_added(time):
    first = Run(time)
    for _ in range(5):
        first.update(data=1.0, batches=(3.0,), logging=1.0)
    before = first.spent() | {"step": 5}
    time.passes(10_000.0)
    second = Run(time, 5, before)
    for _ in range(3):
        second.update(data=2.0, batches=(2.0,), logging=1.0)
    spent = second.spent()
    # 1 s: the first update's log comes after what is timed apart.
    assert before["update_seconds"] == 1 + 4 * 5 and before["data_seconds"] == 4.0
    assert spent["update_seconds"] == before["update_seconds"] + 1 + 2 * 5
    assert spent["data_seconds"] == 4.0 + 4.0 and spent["logging_seconds"] == 5.0 + 3.0
    assert spent["timed_updates"] == 4 + 2 and spent["compile_seconds"] == 3.0 + 2.0
    assert spent["train_seconds"] == 25.0 + 15.0
    assert spent["tokens_per_second"] == pytest.approx(6 * TOKENS / 32)
    assert fractions(spent) == pytest.approx((8 / 32, 8 / 32))


def test_a_checkpoint_of_before_waits_were_counted_is_gone_on_from(time):
    run = Run(time, 8, {"update_seconds": 5.0, "timed_updates": 7, "tokens_per_second": 3.0})
    run.update()
    run.update(data=1.0, batches=(4.0,))
    assert fractions(run.spent()) == pytest.approx((0.1, 0.0))


def test_with_nothing_trained_nothing_is_divided(time):
    clock = Clock(TOKENS)
    for _ in range(2):
        zero = {"tokens_per_second": 0.0, "data_wait_fraction": 0.0, "logging_fraction": 0.0}
        assert clock.rate(0) == 0.0 and clock.since_last(0) == zero
        assert clock.spent(0).items() >= zero.items()
        assert clock.spent(0)["timed_updates"] == clock.spent(0)["train_seconds"] == 0
        with clock.paused(), clock.waiting_for("data"):
            time.passes(1.0)
    again = Clock(TOKENS, {"update_seconds": 20.0, "timed_updates": 4, "data_seconds": 5.0})
    assert again.spent(9)["tokens_per_second"] == 4 * TOKENS / 20


def test_a_window_that_took_no_time_has_the_rate_of_the_whole_run(run):
    """A clock may be too coarse for it."""
    run.update(batches=(4.0,))
    run.clock.since_last(run.step)
    run.update(batches=(0.0,))
    found = run.clock.since_last(run.step)
    assert found["tokens_per_second"] == 2 * TOKENS / 4 and fractions(found) == (0.0, 0.0)
