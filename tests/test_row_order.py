"""The order of rows: a permutation, another one for each seed and epoch, no table in memory."""

import itertools
import tracemalloc
import warnings

import numpy as np
import pytest

from pipeline.row_order import PLACES_AT_ONCE, RowOrder, permuted


@pytest.fixture(autouse=True)
def no_warning():
    """NumPy says of overflow in a single number what it does not say of one in an array."""
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        yield


def order(size, *keys):
    return permuted(np.arange(size), size, *keys).tolist()


@pytest.mark.parametrize("sizes", [range(1, 71), [255, 256, 257, 4095, 4097, 65536, 99_991]])
def test_every_place_is_taken_once(sizes):
    for size in sizes:
        for keys in [(0, 0), (0, 1), (7, 3), (2**32 - 1, 10**9), (2**64 + 5,), ()]:
            found = order(size, *keys)
            assert sorted(found) == list(range(size)), (size, keys)


def test_seeds_and_epochs_have_orders_of_their_own():
    found = {
        (seed, epoch): tuple(order(50, seed, epoch)) for seed in range(9) for epoch in range(9)
    }
    assert len(set(found.values())) == 81
    assert found == {key: tuple(order(50, *key)) for key in found}
    assert tuple(range(50)) not in found.values()
    assert order(50, 1, 2) != order(50, 2, 1) and order(50, 1) != order(50, 1, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 50, 1000, 2**33, 2**40 + 3])
def test_a_place_alone_is_that_place_among_all(size):
    places = np.unique(np.linspace(0, size - 1, 60).astype(np.int64))
    together = permuted(places, size, 3, 4)
    assert together.dtype == np.int64 and len(set(together.tolist())) == len(places)
    assert together.min() >= 0 and together.max() < size
    alone = [int(permuted(np.array([place]), size, 3, 4)[0]) for place in places]
    assert alone == together.tolist()
    backwards = permuted(places[::-1], size, 3, 4)
    assert backwards.tolist() == together.tolist()[::-1]


def test_what_is_given_stays_as_it_is():
    places = np.arange(30)
    permuted(places, 30, 0)
    assert places.tolist() == list(range(30))
    assert permuted(places[:0], 30, 0).tolist() == []
    assert permuted(places[:0], 0, 0).tolist() == []


def test_a_row_may_come_anywhere():
    """Over 2,000 seeds each of 10 rows stands about 200 times in each of 10 places."""
    counts = np.zeros((10, 10), int)
    for seed in range(2000):
        counts[np.arange(10), order(10, seed, 0)] += 1
    assert 130 < counts.min() and counts.max() < 270  # five standard deviations of 13.4


def test_neighbours_are_torn_apart():
    found = np.array(order(10_000, 0, 0))
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(10_000), found)[0, 1]) < 0.05


# -- the sampler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [0, 1, 400, 499, 500])
def test_a_sampler_has_a_length_and_takes_no_row_twice_in_an_epoch(taken):
    sampler = RowOrder(500, taken, 3)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        found = list(sampler)
        assert len(sampler) == len(found) == len(set(found)) == taken
        assert found == order(500, 3, epoch)[:taken] and all(type(place) is int for place in found)
        epochs.append(found)
    if taken > 1:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_two_samplers_of_one_seed_agree_in_every_epoch():
    one, two, other = (RowOrder(70, 64, seed) for seed in (5, 5, 6))
    assert list(one) == list(two) != list(other)
    two.set_epoch(1)
    assert list(one) != list(two)
    one.set_epoch(1)
    assert list(one) == list(two) == list(two)
    one.set_epoch(0)
    assert list(one) == list(RowOrder(70, 64, 5))


def test_the_order_does_not_depend_on_how_many_are_taken_at_once(monkeypatch):
    expected = list(RowOrder(1000, 990, 2))
    for size in (1, 7, 990, 991):
        monkeypatch.setattr("pipeline.row_order.PLACES_AT_ONCE", size)
        assert list(RowOrder(1000, 990, 2)) == expected


def test_memory_stays_flat_for_a_billion_rows():
    """A list of them would be 8 GB; what is walked is only one stretch at a time."""
    sampler = RowOrder(10**9, 10**9 - 5, 0)
    assert len(sampler) == 10**9 - 5
    tracemalloc.start()
    try:
        found = list(itertools.islice(sampler, 3 * PLACES_AT_ONCE, 3 * PLACES_AT_ONCE + 1))
        found += itertools.islice(sampler, 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(found)) == 1001 and max(found) > 10**8
    assert peak < 300 * PLACES_AT_ONCE  # bytes


# -- rows that are left out -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7, None])
@pytest.mark.parametrize("left_out", [[], [3], [0, 1, 2, 3], [499], range(96, 112)])
def test_in_the_place_of_a_row_left_out_stands_another_and_all_others_stay(seed, left_out):
    plain, order = RowOrder(500, 496, seed), RowOrder(500, 496, seed, left_out=left_out)
    for epoch in range(4):
        plain.set_epoch(epoch)
        order.set_epoch(epoch)
        before, after = list(plain), list(order)
        assert len(order) == len(after) == 496
        assert not set(after) & set(left_out)
        assert all(type(row) is int and 0 <= row < 500 for row in after)
        differing = {place for place in range(496) if before[place] != after[place]}
        assert differing == {place for place in range(496) if before[place] in set(left_out)}


def test_how_the_rows_left_out_are_given_does_not_matter():
    given = [{5, 17, 300}, [300, 5, 17], (17, 5, 300, 5), np.array([5, 17, 300])]
    orders = [list(RowOrder(400, 400, 3, left_out=left_out)) for left_out in given]
    assert all(order == orders[0] for order in orders)


def test_a_place_has_the_same_row_whoever_asks_for_it():
    order = RowOrder(1000, 990, 3, left_out=range(100, 300))
    order.set_epoch(2)
    whole = list(order)
    assert order.rows(2, 0, 990).tolist() == whole
    for start, stop in ((0, 1), (17, 33), (980, 990), (400, 400), (5, 6)):
        assert order.rows(2, start, stop).tolist() == whole[start:stop]
    assert order.rows(2, 985, 2000).tolist() == whole[985:]
    assert order.rows(2, 0, 990).dtype == np.int64
    order.set_epoch(0)
    assert order.rows(2, 0, 990).tolist() == whole


def test_of_many_rows_left_out_those_that_stand_for_them_are_spread():
    """By the place's own permutations, and not always the same one or its neighbours."""
    order = RowOrder(1000, 1000, 1, left_out=range(500))
    rows, counts = np.unique(order.rows(0, 0, 1000), return_counts=True)
    assert rows.min() >= 500 and len(rows) == 500
    assert counts.max() < 12
    assert not np.array_equal(order.rows(0, 0, 1000), order.rows(1, 0, 1000))


def test_leaving_more_out_changes_only_what_has_to_change():
    """What was left out before a second rollback keeps its place, unless that is left out too."""
    first, second = (RowOrder(500, 500, 4, left_out=range(n)) for n in (20, 40))
    before, after = first.rows(0, 0, 500), second.rows(0, 0, 500)
    changed = before != after
    assert changed.any() and np.array_equal(changed, np.isin(before, range(20, 40)))


@pytest.mark.parametrize("seed", [0, None])
def test_all_rows_but_one_may_be_left_out(seed):
    order = RowOrder(30, 30, seed, left_out=range(1, 30))
    if seed is None:
        assert set(order.rows(0, 29, 30).tolist()) == {0}
    else:
        assert set(order) == {0}


@pytest.mark.parametrize("left_out", [[16, 17, 18, 19], [0, 1, 2, 3], [*range(4), *range(96, 100)]])
def test_of_a_stream_rows_near_by_stand_for_those_left_out(left_out):
    """Those shortly before are still on the disk; at the beginning only those after it exist."""
    order = RowOrder(400, 400, None, left_out=left_out)
    found = order.rows(0, 0, 400)
    places = np.arange(400)
    assert not np.isin(found, left_out).any()
    others = ~np.isin(places, left_out)
    assert np.array_equal(found[others], places[others])
    assert np.abs(found - places).max() <= 2 * len(left_out)
    late = ~others & (places >= 2 * len(left_out))
    assert (found[late] < places[late]).all()


# -- in the middle --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 16, 250, 495, 496, 1000])
@pytest.mark.parametrize("seed", [3, None])
def test_an_epoch_can_begin_at_any_place_and_does_so_once(place, seed):
    order = RowOrder(500, 496, seed, left_out=[7, 8])
    order.set_epoch(5)
    whole = list(order)
    order.start_at(place)
    assert len(order) == 496
    assert list(order) == whole[place:]
    assert list(order) == whole
    order.set_epoch(6)
    assert list(order) == RowOrder(500, 496, seed, left_out=[7, 8]).rows(6, 0, 496).tolist()


def test_the_place_may_be_named_before_the_epoch():
    order = RowOrder(500, 496, 3)
    order.start_at(100)
    order.set_epoch(2)
    assert list(order) == order.rows(2, 100, 496).tolist()


def test_of_a_billion_rows_the_last_are_there_at_once(monkeypatch):
    size = 10**9
    order = RowOrder(size, size, 0, left_out=[1, 2, 3])
    asked = []
    rows = order.rows

    def counted(epoch, start, stop):
        asked.append((start, stop))
        return rows(epoch, start, stop)

    monkeypatch.setattr(order, "rows", counted)
    order.start_at(size - 5)
    assert list(order) == rows(0, size - 5, size).tolist()
    assert asked == [(size - 5, size - 5 + PLACES_AT_ONCE)]
    order.start_at(size // 2)
    assert len(list(itertools.islice(order, 10))) == 10 and len(asked) == 2


# -- as they come ---------------------------------------------------------------------------------


def test_without_a_seed_rows_come_as_they_are_in_every_epoch():
    order = RowOrder(70, 64, None)
    for epoch in (0, 1, 9):
        order.set_epoch(epoch)
        assert list(order) == list(range(64))
    assert order.rows(3, 60, 70).tolist() == [60, 61, 62, 63]


def test_seed_0_is_a_seed():
    assert list(RowOrder(70, 64, 0)) != list(range(64))


def test_what_is_returned_is_the_caller_s():
    order = RowOrder(70, 64, None)
    order.rows(0, 0, 64)[:] = 0
    assert list(order) == list(range(64))
