"""Shards of text to shards of ids: in parallel, each whole or absent, so that work is never redone.

Every shard becomes a folder of its own: all ids in the order of the documents (of examples marked,
see `marks`), and a table with one line for each document. A shard that stands already and was made
from the same text is kept. Which processes made them, on how many machines, leaves no trace.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pipeline import artifact, interruption, marks
from pipeline.corpus import SPLITS, Corpus, Document, Reader, split_of_digest
from pipeline.encoder import Encoder, OpenEncoder
from pipeline.raw_documents import Shard
from pipeline.recipe import InputError

CHARACTERS_PER_CALL = 1 << 20  # keeps every thread busy, and memory small
TEXTS_PER_CALL = 1 << 13  # the same for texts of a few letters
# A process takes half a second to start: below this much text, this one does it alone.
BYTES_WORTH_A_PROCESS = 16 << 20
SECONDS_BETWEEN_LOOKS = 0.02
TABLE = np.dtype(
    [
        ("tokens", np.int64),  # end-of-text included
        ("bytes", np.int64),
        ("digest", np.uint64, (2,)),  # first 16 bytes of the sha256 of the (whole) document
        ("split", np.uint8),  # place in SPLITS
    ]
)


class Work(NamedTuple):
    """What is the same for all shards of a corpus."""

    reader: Reader
    encoder: Encoder
    end_of_text: int
    dtype: str


class TokenShard(NamedTuple):
    """A finished shard."""

    folder: Path
    group: int
    """Place of its source in `corpus.source_names()`."""
    facts: dict[str, Any]

    @property
    def table(self) -> np.ndarray:
        """One line of `TABLE` for each document."""
        return np.fromfile(self.folder / "documents.bin", TABLE)

    def tokens(self, dtype: str) -> np.ndarray:
        """All ids, memory-mapped."""
        path = self.folder / "tokens.bin"
        if not path.stat().st_size:
            return np.empty(0, dtype)
        return np.memmap(path, dtype, mode="r")

    def names(self, places: np.ndarray) -> list[str]:
        """Names of the documents at these places of the table."""
        lines = (self.folder / "names.jsonl").read_text().split("\n")
        return [json.loads(lines[place]) for place in places]


def make_token_shards(
    corpus: Corpus,
    choose_work: Callable[[], Work],
    folder: Path,
    *,
    tokenizer: str,
    num_proc: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> list[TokenShard]:
    """Return every shard of the corpus as ids, those of this `rank` made now if they are not yet.

    `choose_work` is called when the processes are starting up. The main process (rank 0) waits for
    the shards that other machines make.

    Raises:
        InputError: what reading a document raises; a process that died; a full disk.
    """
    specs = []
    for number, shard in enumerate(corpus.shards):
        made_from = {
            "shard": corpus.shard_identity(shard),
            "tokenizer": tokenizer,
            "shortest": corpus.reader.cleaning.shortest,
            "longest": corpus.reader.cleaning.longest,
        }
        specs.append((folder / f"{number:06}", made_from, shard))
    mine = specs[rank::world_size]
    to_do = [spec for spec in mine if not _is_finished(spec[0], spec[1])]
    total = sum(shard.size for _, _, shard in mine)
    start = total - sum(shard.size for _, _, shard in to_do)
    with tqdm(
        desc="tokenising", total=total, initial=start, unit="B", unit_scale=True, delay=2,
        disable=None,
    ) as bar:  # fmt: skip
        if to_do:
            _make_all(to_do, choose_work, bar, _processes(num_proc, to_do))
    if rank == 0 and world_size > 1:
        _wait_for_others(specs, folder)
    return [
        TokenShard(place, corpus.group_of(shard), artifact.read_manifest(place)["facts"])
        for place, _, shard in (specs if rank == 0 else mine)
    ]


def make_token_shard(place: Path, made_from: dict, shard: Shard, work: Work, report: Any) -> None:
    """Read, clean and encode one shard into the folder `place`; `report` is told of bytes read.

    Raises:
        InputError: see `make_token_shards`.
    """
    counts = {"empty": 0, "short": 0, "long": 0}
    with artifact.staged(place, made_from) as (staging, facts):
        with (
            (staging / "tokens.bin").open("wb") as tokens,
            (staging / "documents.bin").open("wb") as table,
            (staging / "names.jsonl").open("w") as names,
        ):
            batch = _Batch(work, tokens, table)
            for document in work.reader.documents(shard):
                windows = _limited(document, work.reader.cleaning, counts)
                if windows is None:
                    continue
                batch.add(document, windows, report)
                names.write(json.dumps(document.name) + "\n")
            batch.flush()
        facts |= counts | {"encoder": work.encoder.name}


def end_with(parent: int) -> None:
    """End this process soon after its parent, however that ends: killed, it says nothing."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Batch:
    """Collects windows of documents and writes their ids when there are enough."""

    def __init__(self, work: Work, tokens: Any, table: Any) -> None:
        self._encoder: OpenEncoder | marks.ExampleEncoder = _opened(work.encoder)
        self._end = np.array([work.end_of_text], np.uint32)
        if work.reader.of_examples:
            self._encoder = marks.ExampleEncoder(self._encoder, work.end_of_text)
            self._end |= marks.PREDICTED
        self._work, self._tokens, self._table = work, tokens, table
        self._rows: list[tuple] = []
        self._texts: list[str] = []
        self._ends: list[bool] = []  # whether the document ends with that window
        self._characters = 0
        self._documents: list[tuple] = []  # lines of `TABLE` but for their number of tokens
        self._open_tokens = 0  # of the document that has not ended

    def add(self, document: Document, windows: Iterator[str], report: Any) -> None:
        digest, size, last = hashlib.sha256(), 0, None
        for window in windows:
            content = window.encode()
            digest.update(content)
            size += len(content)
            if last is not None:
                self._append(last, is_end=False)
            last = window
            report(len(content))
        # Of a part the whole document's: copies of it are found by that.
        found = digest.digest() if document.whole is None else document.whole[1]
        split = document.given_split or split_of_digest(found, document.section)
        halves = tuple(np.frombuffer(found[:16], np.uint64).tolist())
        self._append(last, is_end=True, document=(size, halves, SPLITS.index(split)))

    def _append(self, text: str, *, is_end: bool, document: tuple | None = None) -> None:
        self._texts.append(text)
        self._ends.append(is_end)
        if document is not None:
            self._documents.append(document)
        self._characters += len(text)
        if self._characters >= CHARACTERS_PER_CALL or len(self._texts) >= TEXTS_PER_CALL:
            self.flush()

    def flush(self) -> None:
        if not self._texts:
            return
        encoded = self._encoder.encode(self._texts)
        parts: list[np.ndarray] = []
        finished = iter(self._documents)
        for ids, is_end in zip(encoded, self._ends, strict=True):
            parts.append(ids)
            self._open_tokens += len(ids)
            if is_end:
                parts.append(self._end)
                self._rows.append((self._open_tokens + 1, *next(finished)))
                self._open_tokens = 0
        flat = np.concatenate(parts)
        assert flat.max() <= np.iinfo(self._work.dtype).max  # astype would wrap around
        self._tokens.write(flat.astype(self._work.dtype).data)
        self._table.write(np.array(self._rows, TABLE).tobytes())
        self._rows = []
        self._texts, self._ends, self._documents, self._characters = [], [], [], 0


def _limited(document: Document, cleaning: Any, counts: dict[str, int]) -> Iterator[str] | None:
    """Return the document's windows, or None, counted, where it is left out."""
    windows = document.read()
    first = next(windows, "")
    if not first:
        counts["empty"] += 1
        return None
    length, second = len(first), next(windows, None)
    if document.whole is not None:
        length = document.whole[0]
    elif second is not None and (cleaning.longest or cleaning.shortest > length):
        length = sum(len(window) for window in document.read())
    if length < cleaning.shortest:
        counts["short"] += 1
        return None
    if cleaning.longest is not None and length > cleaning.longest:
        counts["long"] += 1
        return None
    return _chained(first, second, windows)


def _chained(first: str, second: str | None, rest: Iterator[str]) -> Iterator[str]:
    yield first
    if second is not None:
        yield second
    yield from rest


def _is_finished(place: Path, made_from: dict[str, Any]) -> bool:
    """Tell whether a shard stands, whole; one of another text or damaged makes room."""
    manifest = artifact.read_manifest(place)
    if manifest is not None and manifest["made_from"] == made_from:
        if artifact.damage(place) is None:
            return True
    shutil.rmtree(place, ignore_errors=True)
    return False


def _processes(num_proc: int | None, to_do: list) -> int:
    if num_proc is not None:
        return min(num_proc, len(to_do))
    if sum(shard.size for _, _, shard in to_do) < BYTES_WORTH_A_PROCESS:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, len(to_do))


def _make_all(to_do: list, choose_work: Callable[[], Work], bar: tqdm, processes: int) -> None:
    if processes == 1:
        work = choose_work()
        for place, made_from, shard in to_do:
            make_token_shard(place, made_from, shard, work, bar.update)
        return
    # Spawned, not forked: the parent has threads. A worker imports no torch and starts quickly.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    # The processes are the parallelism.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(processes, context, _start_worker, (counter, os.getpid())) as pool,
        ):
            waiting: list[Future] = [pool.submit(os.getpid) for _ in range(processes)]
            # Through a file: a large vocabulary in a pipe makes each start wait for the last.
            file = Path(folder) / "work"
            file.write_bytes(pickle.dumps(choose_work()))
            queue, shown = iter(to_do), 0
            try:
                while True:
                    while len(waiting) < 2 * processes and (spec := next(queue, None)):
                        waiting.append(pool.submit(_work_on, file, *spec))
                    if not waiting:
                        break
                    for task in [task for task in waiting if task.done()]:
                        task.result()
                        waiting.remove(task)
                    bar.update(counter.value - shown)
                    shown = counter.value
                    time.sleep(SECONDS_BETWEEN_LOOKS)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool:
        raise InputError(
            "a process that tokenises died (out of memory?): use a smaller --num_proc; the shards "
            "that were finished are kept"
        ) from None
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


_counter: Any = None


def _start_worker(counter: Any, parent: int) -> None:
    global _counter
    _counter = counter
    end_with(parent)  # its id as it says itself: it may be gone by now
    interruption.ignore()  # signals sent to the whole group are for the parent


def _work_on(file: Path, place: Path, made_from: dict, shard: Shard) -> None:
    def report(size: int) -> None:
        with _counter.get_lock():
            _counter.value += size

    make_token_shard(place, made_from, shard, _read_work(file), report)


@functools.lru_cache(maxsize=1)
def _read_work(file: Path) -> Work:
    return pickle.loads(file.read_bytes())


_open_encoders: dict[str, OpenEncoder] = {}


def _opened(encoder: Encoder) -> OpenEncoder:
    """Return the process's encoder: the words it has seen make the next shard faster."""
    key = hashlib.sha256(f"{encoder.name}{encoder.tokenizer_json}".encode()).hexdigest()
    if key not in _open_encoders:
        _open_encoders.clear()
        _open_encoders[key] = encoder.open()
    return _open_encoders[key]


def _wait_for_others(specs: list, folder: Path) -> None:
    """Wait until the other machines have made their shards."""

    def is_there(place: Path, made_from: dict) -> bool:
        manifest = artifact.read_manifest(place)
        return manifest is not None and manifest["made_from"] == made_from

    missing = [spec[:2] for spec in specs if not is_there(*spec[:2])]
    with tqdm(desc="other machines' shards", total=len(missing), delay=2, disable=None) as bar:
        while missing:
            for report in folder.glob("failed-*.txt"):  # each removes its own old one at its start
                raise InputError(f"another machine stopped: {report.read_text()}")
            time.sleep(SECONDS_BETWEEN_LOOKS)
            left = [spec for spec in missing if not is_there(*spec)]
            bar.update(len(missing) - len(left))
            missing = left
