"""The order of rows as a pure function of seed, epoch and place, without a table of it.

A shuffled list of a billion rows is 8 GB and has to be walked to find a place again. A Feistel
network over the numbers below a power of four (Luby and Rackoff 1988), its results outside the
range sent through again ("cycle walking", Black and Rogaway 2002), is a permutation too, and any
place of it can be computed alone.
"""

from collections.abc import Collection, Iterator

import numpy as np

ROUNDS = 6  # four are enough against chance; two more cost nanoseconds
PLACES_AT_ONCE = 1 << 14


def permuted(places: np.ndarray, size: int, *keys: int) -> np.ndarray:
    """Return where a permutation of range(size), chosen by `keys`, puts these places (int64)."""
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    rounds = _round_keys(keys)
    found = np.array(places, np.uint64)
    outside = np.ones(found.shape, bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for key in rounds:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        found[outside] = left << half | right
        outside = found >= size
    return found.astype(np.int64)


class RowOrder:
    """A sampler for `DataLoader`: `taken` of `size` rows, in another order each epoch."""

    def __init__(
        self, size: int, taken: int, seed: int | None, *, left_out: Collection[int] = ()
    ) -> None:
        """Take rows in the order of `seed`; None: as they come.

        In the place of a row that is left out stands another one, so that updates stay as long as
        they are, and every other row stays in its place.
        """
        self._size, self._taken, self._seed, self._epoch = size, taken, seed, 0
        self._left_out = np.array(sorted(left_out), np.int64)
        self._start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; Trainer calls it at the beginning of each epoch."""
        self._epoch = epoch

    def start_at(self, place: int) -> None:
        """Begin the next epoch at this place, once."""
        self._start = place

    def __len__(self) -> int:
        return self._taken

    def __iter__(self) -> Iterator[int]:
        first, self._start = self._start, 0
        for start in range(first, self._taken, PLACES_AT_ONCE):
            yield from self.rows(self._epoch, start, start + PLACES_AT_ONCE).tolist()

    def rows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the rows [stop - start] at these places of an epoch (int64)."""
        places = np.arange(start, min(stop, self._taken))
        found = self._at(places, epoch)
        attempt = 0
        while (unwanted := np.isin(found, self._left_out)).any():
            attempt += 1
            found[unwanted] = self._instead_of(places[unwanted], epoch, attempt)
        return found

    def _at(self, places: np.ndarray, epoch: int) -> np.ndarray:
        if self._seed is None:
            return places.copy()
        return permuted(places, self._size, self._seed, epoch)

    def _instead_of(self, places: np.ndarray, epoch: int, attempt: int) -> np.ndarray:
        if self._seed is not None:
            return permuted(places, self._size, self._seed, epoch, attempt)
        # Of a stream only the rows shortly before are still there; at its beginning, those after.
        shift = len(self._left_out) * min(attempt, 4) + max(0, attempt - 4)
        return np.where(places >= shift, places - shift, (places + shift) % self._size)


def _round_keys(keys: tuple[int, ...]) -> np.ndarray:
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = _mixed(state + np.uint64(key % (1 << 64)))
    steps = np.arange(1, ROUNDS + 1, dtype=np.uint64)
    return _mixed(state + steps * np.uint64(0x9E3779B97F4A7C15))


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return SplitMix64's finaliser (Steele et al. 2014): every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
