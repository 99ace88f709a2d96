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
