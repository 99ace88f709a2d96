"""Rows of ids on disk: one Arrow file for each split, which `datasets` opens too.

2 bytes a token (4 above 65,536 entries, and of examples, marked as `marks` says); beside the ids of
a row stand the columns in which documents begin and how many of its tokens are text. It is written
a bit at a time, and memory-mapped to read.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.packing import Rows

TOKENS_PER_RECORD_BATCH = 1 << 21  # 4 MB


class RowWriter:
    """Writes rows as an Arrow stream that `datasets.Dataset.from_file` opens, a bit at a time."""

    def __init__(self, path: Path, *, block_size: int, dtype: np.dtype) -> None:
        column = np.dtype(np.uint16 if block_size < 1 << 16 else np.uint32)
        ids, place = pa.from_numpy_dtype(dtype), pa.from_numpy_dtype(column)
        self._schema = pa.schema(
            {
                "input_ids": pa.list_(ids, block_size),
                "document_starts": pa.list_(place),
                "tokens": place,
            }
        )
        self.count = self.used = 0
        self._column, self._dtype = column, dtype
        self._block_size = block_size
        self._rows_per_batch = max(1, TOKENS_PER_RECORD_BATCH // block_size)
        self._waiting: list[Rows] = []
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, self._schema)

    def write(self, rows: Rows) -> None:
        """Take rows; enough of them become a record batch."""
        self.count += len(rows.ids)
        self.used += int(rows.used.sum())
        self._waiting.append(rows)
        if sum(len(waiting.ids) for waiting in self._waiting) >= self._rows_per_batch:
            self._flush()

    def close(self) -> None:
        """Write the rest and close the file."""
        self._flush()
        self._writer.close()
        self._file.close()

    def _flush(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        ids = _joined([rows.ids for rows in waiting]).astype(self._dtype, copy=False)
        counts = _joined([np.diff(rows.offsets) for rows in waiting])
        starts = _joined([rows.starts for rows in waiting]).astype(self._column)
        used = _joined([rows.used for rows in waiting]).astype(self._column)
        offsets = _array(np.append(0, np.cumsum(counts)).astype(np.int32))
        columns = [
            pa.FixedSizeListArray.from_arrays(_array(ids.reshape(-1)), self._block_size),
            pa.ListArray.from_arrays(offsets, _array(starts)),
            _array(used),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _array(values: np.ndarray) -> pa.Array:
    """Return an Arrow array over the same memory; `pa.array` would import pandas first."""
    values = np.ascontiguousarray(values)
    type_ = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(type_, len(values), [None, pa.py_buffer(values)])


class RowFile:
    """The rows of a split, memory-mapped, or rows in memory.

    Attributes:
        block_size: tokens in a row.
    """

    def __init__(self, batches: list[Rows]) -> None:
        self._batches = batches
        self._ends = np.cumsum([len(batch.ids) for batch in batches])
        self.block_size = batches[0].ids.shape[1]

    @classmethod
    def open(cls, path: Path) -> "RowFile":
        """Return the rows of a file; nothing is read yet."""
        with pa.memory_map(str(path)) as file:
            return cls([_views(batch) for batch in pa.ipc.open_stream(file)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return ids [block_size], columns in which documents begin, and how many ids are text."""
        batch = self._batches[0]
        if len(self._batches) > 1:
            number = int(np.searchsorted(self._ends, index, side="right"))
            index -= int(self._ends[number - 1]) if number else 0
            batch = self._batches[number]
        starts = batch.starts[batch.offsets[index] : batch.offsets[index + 1]]
        return batch.ids[index], starts, int(batch.used[index])

    def documents_before(self, stride: int) -> np.ndarray:
        """Return how many documents begin before each row, and in all, int64 [rows + 1].

        The rows begin every `stride` tokens of one stream: what begins in a later column begins
        in the next row, too.
        """
        counts = []
        for batch in self._batches:
            own = np.append(0, np.cumsum(batch.starts < stride))
            counts.append(own[batch.offsets[1:]] - own[batch.offsets[:-1]])
        return np.append(0, np.cumsum(np.concatenate(counts)))

    def documents_of(self, index: int) -> list[np.ndarray]:
        """Return the ids of a row, document by document, without what is filled up."""
        ids, starts, used = self.row(index)
        return [part for part in np.split(ids[:used], starts[starts > 0]) if len(part)]


def _views(batch: pa.RecordBatch) -> Rows:
    """Return the columns of a record batch as arrays that share its memory."""
    ids, starts, used = batch.columns
    return Rows(
        ids.flatten().to_numpy().reshape(batch.num_rows, -1),
        starts.values.to_numpy(),
        starts.offsets.to_numpy(),
        used.to_numpy(),
    )
