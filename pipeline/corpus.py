"""All documents of a recipe, cleaned one by one, each on one side of the split."""

import functools
import hashlib
import itertools
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import file_search, raw_documents, sources, text_files
from pipeline.data_sections import CleaningSection, DataSection, SourceSection
from pipeline.file_digests import file_digests
from pipeline.raw_documents import Shard
from pipeline.recipe import InputError

SPLITS = ("train", "validation", "test")
# Below this many documents, about 5 % of them would be too few to speak for the rest.
FEWEST_DOCUMENTS_TO_HOLD_OUT = 100


class Document(NamedTuple):
    """A text, or the part of it that belongs to one split, in windows that tokenise as the whole.

    `split` is None while it is not known: it follows from the hash of the whole text.
    """

    name: str
    read: Any  # Callable[[], Iterator[str]]
    given_split: str | None
    section: DataSection
    whole: tuple[int, bytes] | None = None
    """Characters and sha256 of the whole document, where this is a part of one."""

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.read())

    @property
    def digest(self) -> bytes:
        """sha256 of the whole document."""
        if self.whole is not None:
            return self.whole[1]
        digest = hashlib.sha256()
        for window in self.read():
            digest.update(window.encode())
        return digest.digest()

    @property
    def split(self) -> str:
        """The split that the document belongs to; where its hash decides, the text is read."""
        return self.given_split or split_of_digest(self.digest, self.section)

    def is_within(self, cleaning: CleaningSection) -> bool:
        """Tell whether the whole document is neither too short nor too long."""
        length = self.whole[0] if self.whole else sum(len(window) for window in self.read())
        return cleaning.shortest <= length <= (cleaning.longest or length)


class Reader:
    """What a process needs to read shards: it can be sent to another process.

    Attributes:
        hold_out: "documents" or "tail".
        of_examples: whether a document is an `Example`, which is its one window.
    """

    def __init__(self, section: DataSection, cleaning: CleaningSection, hold_out: str) -> None:
        self.section, self.cleaning, self.hold_out = section, cleaning, hold_out
        self.of_examples = section.example_format is not None

    def documents(self, shard: Shard) -> Iterator[Document]:
        """Yield the documents of a shard, empty ones too; with `tail`, each in three pieces.

        Raises:
            InputError: see `raw_documents.read_shard` and `text_files.safe_windows`.
        """
        given = None if shard.source >= 0 else SPLITS[-shard.source]
        for raw in raw_documents.read_shard(shard, self.source(shard)):
            read = functools.partial(self._windows, raw)
            if given is not None or self.hold_out == "documents":
                yield Document(raw.name, read, given, self.section)
                continue
            length, digest = 0, hashlib.sha256()
            for window in read():
                length += len(window)
                digest.update(window.encode())
            test = self.section.held_out_fraction("test")
            held_out = self.section.held_out_fraction("validation") + test
            cuts = [0, *(int(length * (1 - share)) for share in (held_out, test)), length]
            if not self.cleaning.shortest <= length <= (self.cleaning.longest or length):
                cuts = [0, length, length, length]  # it will be left out, and is counted once
            for split, (start, stop) in zip(SPLITS, itertools.pairwise(cuts), strict=True):
                if start < stop or length == 0 and split == "train":
                    part = functools.partial(_slice, read, start, stop)
                    whole = length, digest.digest()
                    yield Document(raw.name, part, split, self.section, whole)

    def source(self, shard: Shard) -> SourceSection:
        """Return the source that a shard is a part of."""
        if shard.source >= 0:
            return self.section.all_sources[shard.source]
        split = SPLITS[-shard.source]
        return held_out_source(self.section, split)

    def _windows(self, raw: raw_documents.Document) -> Iterator[str]:
        form = self.cleaning.normalization
        if self.of_examples:
            (example,) = raw.read()
            normal = functools.partial(unicodedata.normalize, form)
            yield example if form is None else example.mapped(normal)
            return
        for window in text_files.safe_windows(raw.read(), raw.name):
            yield window if form is None else unicodedata.normalize(form, window)


class Corpus:
    """The documents of a recipe's `data:` section, in a fixed order.

    Attributes:
        reader: reads the shards, here or in another process.
        shards: the parts that can be read alone, in the order of the documents.
        size: bytes of all files on disk, 0 for what is on the Hub.
    """

    def __init__(
        self,
        section: DataSection,
        cleaning: CleaningSection | None = None,
        *,
        digests: Path | None = None,
    ) -> None:
        """Find the sources and take the fingerprint of their bytes.

        `digests` is a file that keeps the fingerprints of files beside their size, times and
        inode: a file that is untouched since is not read again.

        Raises:
            InputError: a source is missing or empty, a column is missing, nothing is left.
        """
        self._section, cleaning = section, cleaning or CleaningSection()
        groups: list[tuple[int, SourceSection]] = list(enumerate(section.all_sources))
        for split in SPLITS[1:]:
            if section.has_own(split):
                groups.append((-SPLITS.index(split), held_out_source(section, split)))
        files = {number: file_search.find_files(source) for number, source in groups}
        stats = [(str(path), _stat(path)) for found in files.values() for _, path in found]
        self.size = sum(stat.st_size for _, stat in stats)
        self._digests = file_digests(stats, digests)
        self.shards = [
            shard
            for number, source in groups
            for shard in sources.shards_of(
                number, source, files[number], total_bytes=self.size, streaming=section.streaming
            )
        ]
        self.reader = Reader(section, cleaning, section.hold_out)
        self._cleaning = cleaning
        if self.reader.of_examples:
            self.reader.hold_out = "documents"
        elif section.hold_out == "auto":
            found = itertools.islice(self._raw_documents(), FEWEST_DOCUMENTS_TO_HOLD_OUT)
            few = sum(1 for _ in found) < FEWEST_DOCUMENTS_TO_HOLD_OUT
            self.reader.hold_out = "tail" if few else "documents"
        self._groups, self._files = groups, files

    @property
    def hold_out(self) -> str:
        """ "documents" or "tail", what `data.hold_out: auto` came to."""
        return self.reader.hold_out

    def documents(self) -> Iterator[Document]:
        """Yield every document that is not empty; with `tail`, each in up to three pieces.

        Raises:
            InputError: bytes that are not UTF-8 (file and offset), or a value that is not text.
        """
        for shard in self.shards:
            for document in self.reader.documents(shard):
                if next(document.read(), None):
                    yield document

    def texts(self, split: str) -> Iterator[str]:
        """Yield the texts of one split."""
        return (document.text for document in self.documents() if document.split == split)

    def source_names(self) -> list[str]:
        """Return what tables call the sources; files given for a held-out split come last."""
        names = []
        for number, source in self._groups:
            given = source.files[0] if source.files else source.dataset
            name = getattr(source, "name", None) or given
            names.append(name if number >= 0 else f"{SPLITS[-number]} text")
        return names

    def group_of(self, shard: Shard) -> int:
        """Return the place of a shard's source among `source_names`."""
        return [number for number, _ in self._groups].index(shard.source)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over the bytes of all sources (for a Hub data set, over its identity)."""
        return _combined([self._source_fingerprint(number) for number, _ in self._groups])

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which text is on which side: part of the origin of every artifact."""
        section = self._section
        return {
            "sources": [
                self._settings(number) | {"fingerprint": self._source_fingerprint(number)}
                for number, _ in self._groups
            ],
            "hold_out": self.hold_out,
            "validation_fraction": section.held_out_fraction("validation"),
            "test_fraction": section.held_out_fraction("test"),
            "normalization": self._cleaning.normalization,
        }

    def shard_identity(self, shard: Shard) -> dict[str, Any]:
        """Return what decides the documents of one shard."""
        digests = [self._digests[path] for _, path in shard.files]
        if shard.kind == "hub":
            digests = [self._source_fingerprint(shard.source)]
        return {
            "kind": shard.kind,
            "range": [shard.start, shard.stop],
            "fingerprint": _combined(digests),
            "names": _combined([name for name, _ in shard.files]),
            "source": self._settings(shard.source),
            **{k: v for k, v in self.identity.items() if k != "sources"},
        }

    def _settings(self, number: int) -> dict[str, Any]:
        """Return how a source is read, and which split it is given to, if any."""
        settings = dict(self._groups)[number].model_dump(
            mode="json",
            include={"format", "text_column", "separator", "errors", "join_rows"},
            exclude_defaults=True,
        )
        return settings | ({"split": SPLITS[-number]} if number < 0 else {})

    def _raw_documents(self) -> Iterator[raw_documents.Document]:
        for shard in self.shards:
            if shard.source >= 0:
                yield from raw_documents.read_shard(shard, self.reader.source(shard))

    @functools.cache  # noqa: B019 - a corpus lives as long as the process
    def _source_fingerprint(self, number: int) -> str:
        source = dict(self._groups)[number]
        if source.dataset is not None and self._section.streaming:
            return sources.streamed_identity(source)
        if source.dataset is not None:
            return raw_documents.load_hub(source)._fingerprint
        files = [(self._digests[str(path)], path) for _, path in self._files[number]]
        # The same bytes are other documents in a file of another kind.
        return _combined([f"{digest}:{sources.kind_of(p, source)}" for digest, p in files])


def held_out_source(section: DataSection, split: str) -> SourceSection:
    """Return the text given for a held-out split as a source, read as the first one is."""
    first = section.all_sources[0]
    files = getattr(section, f"{split}_files")
    if not files:
        return first.model_copy(update={"dataset_split": getattr(section, f"{split}_split")})
    like = first.model_dump(include={"format", "text_column", "separator", "errors", "join_rows"})
    return SourceSection(files=files, **like)


def split_of(text: str, section: DataSection) -> str:
    """Return the split of a document, a function of nothing but its own text.

    The first 8 bytes of the text's sha256 are a number in [0, 1); the test set takes the lowest
    `test_fraction`, validation the next `validation_fraction`. Copies land on one side, and adding
    documents moves no other.
    """
    return split_of_digest(hashlib.sha256(text.encode()).digest(), section)


def split_of_digest(digest: bytes, section: DataSection) -> str:
    """Return the split of the document whose text has this sha256."""
    share = int.from_bytes(digest[:8]) / 2**64
    test = section.held_out_fraction("test")
    if share < test:
        return "test"
    if share < test + section.held_out_fraction("validation"):
        return "validation"
    return "train"


def _slice(read: Any, start: int, stop: int) -> Iterator[str]:
    """Yield the characters from `start` to `stop` of a text in windows."""
    place = 0
    for window in read():
        part = window[max(0, start - place) : max(0, stop - place)]
        place += len(window)
        if part:
            yield part
        if place >= stop:
            return


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _combined(digests: list[str]) -> str:
    digest = hashlib.sha256()
    for one in digests:
        digest.update(f"{len(one)}:{one}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
