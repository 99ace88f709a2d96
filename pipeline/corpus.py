"""Documents from files, tables, the Hub or the standard library, each on one side of the split."""

import glob
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from pipeline.recipe import DataSection, InputError, first_line, not_loaded

STANDARD_LIBRARY = "python:stdlib"
SPLITS = ("train", "validation", "test")
TABLES = (".jsonl", ".csv", ".parquet")
# Below this many documents, about 5 % of them would be too few to speak for the rest.
FEWEST_DOCUMENTS_TO_HOLD_OUT = 100
NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """A text with the name of where it came from and the split it belongs to."""

    name: str
    text: str
    split: str


class Corpus:
    """The documents of a recipe's `data:` section, in a fixed order.

    Attributes:
        hold_out: "documents" or "tail", what `data.hold_out: auto` came to.
        fingerprint: sha256 over the bytes read (for a Hub data set, over its identity).
    """

    def __init__(self, section: DataSection) -> None:
        """Find the sources.

        Raises:
            InputError: a source is missing or empty, a column is missing, nothing is left.
        """
        self._section = section
        self._texts: list[tuple[str, Path]] = []
        self._tables: list[tuple[str, Any]] = []  # pyarrow.Table, or datasets.Dataset of the Hub
        self._paths: list[Path] = []
        for source in section.files or []:
            self._add(source)
        self._hub = None if section.dataset is None else _load_hub(section)
        if self._hub is not None:
            self._tables.append((section.dataset, self._hub))
        for name, table in self._tables:
            if section.text_column not in table.column_names:
                raise InputError(
                    f"{name}: no column {section.text_column!r}; it has "
                    f"{', '.join(table.column_names)}; set data.text_column"
                )
        self.hold_out = section.hold_out
        if section.hold_out == "auto":
            count = len(self._texts) + sum(len(table) for _, table in self._tables)
            few = count < FEWEST_DOCUMENTS_TO_HOLD_OUT
            self.hold_out = "tail" if few else "documents"
        self.fingerprint = self._fingerprint()

    def documents(self) -> Iterator[Document]:
        """Yield every document that is not empty; with `tail`, each in up to three pieces.

        Raises:
            InputError: bytes that are not UTF-8 (file and offset), or a value that is not text.
        """
        for name, text in self._named_texts():
            if self.hold_out == "documents":
                yield Document(name, text, split_of(text, self._section))
                continue
            held_out = self._section.validation_fraction + self._section.test_fraction
            cuts = [int(len(text) * (1 - f)) for f in (held_out, self._section.test_fraction)]
            pieces = text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]
            for split, piece in zip(SPLITS, pieces, strict=True):
                if piece:
                    yield Document(name, piece, split)

    def texts(self, split: str) -> Iterator[str]:
        """Yield the texts of one split."""
        return (document.text for document in self.documents() if document.split == split)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which text is on which side: part of the origin of every artifact."""
        return {
            "fingerprint": self.fingerprint,
            "text_column": self._section.text_column,
            "errors": self._section.errors,
            "hold_out": self.hold_out,
            "validation_fraction": self._section.validation_fraction,
            "test_fraction": self._section.test_fraction,
        }

    @property
    def size(self) -> int | None:
        """Bytes of all text files, None where a table's text has to be read to know."""
        return None if self._tables else sum(path.stat().st_size for _, path in self._texts)

    def _named_texts(self) -> Iterator[tuple[str, str]]:
        for name, path in self._texts:
            if text := read_text(path, errors=self._section.errors):
                yield name, text
        for name, table in self._tables:
            for number, text in enumerate(table[self._section.text_column]):
                text = text.as_py() if isinstance(text, pa.Scalar) else text
                if not isinstance(text, str):
                    raise InputError(
                        f"{name}: row {number} of column {self._section.text_column!r} is "
                        f"{text!r} and not text; clean the table or set data.text_column"
                    )
                if text:
                    yield f"{name}:{number}", text

    def _add(self, source: str) -> None:
        if source == STANDARD_LIBRARY:
            root = Path(sysconfig.get_path("stdlib"))
            for path in sorted(root.rglob("*.py")):
                parts = path.relative_to(root).parts
                if not NOT_THE_LIBRARY & set(parts):
                    self._texts.append(("/".join(parts), path))
                    self._paths.append(path)
            return
        path = Path(source)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*.txt") if p.is_file())
            remedy = f"for other files give a pattern, such as '{source}/**/*.md'"
        elif path.exists():
            if path.stat().st_size == 0:
                raise InputError(f"{source}: the file is empty; there is nothing to train on")
            found = [path]
        else:
            found = [Path(p) for p in sorted(glob.glob(source, recursive=True))]
            found = [p for p in found if p.is_file()]
            remedy = f"looked in {Path.cwd()}; check data.files"
        if not found:
            kind = "no .txt file in this folder" if path.is_dir() else "no such file"
            raise InputError(f"{source}: {kind}; {remedy}")
        for path in found:
            if path.suffix in TABLES:
                self._tables.append((str(path), _read_table(path, self._section.text_column)))
                self._paths.append(path)
            else:
                self._texts.append((str(path), path))
                self._paths.append(path)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self._paths:
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        if self._hub is not None:
            digest.update(self._hub._fingerprint.encode())
        return digest.hexdigest()


def split_of(text: str, section: DataSection) -> str:
    """Return the split of a document, a function of nothing but its own text.

    The first 8 bytes of the text's sha256 are a number in [0, 1); the test set takes the lowest
    `test_fraction`, validation the next `validation_fraction`. Copies land on one side, and adding
    documents moves no other.
    """
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8])
    share = number / 2**64
    if share < section.test_fraction:
        return "test"
    if share < section.test_fraction + section.validation_fraction:
        return "validation"
    return "train"


def read_text(path: Path, *, errors: str = "strict") -> str:
    """Return a file's text, UTF-8, a byte-order mark removed, line endings as they are.

    Raises:
        InputError: the file cannot be read, or holds other bytes and `errors` is "strict".
    """
    try:
        content = path.read_bytes()
        return content.decode("utf-8", errors).removeprefix("\ufeff")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {content[error.start]:#04x} at offset {error.start} is not UTF-8; "
            "convert the file, or replace such bytes with --data.errors replace"
        ) from None


def read_files(names: list[str], *, errors: str = "strict") -> list[str]:
    """Return the texts of files in the order given.

    Raises:
        InputError: a file is missing, empty, or not UTF-8.
    """
    texts = []
    for name in names:
        if not Path(name).is_file():
            kind = "a folder; name the files in it" if Path(name).is_dir() else "no such file"
            raise InputError(f"{name}: {kind}; looked in {Path.cwd()}")
        texts.append(read_text(Path(name), errors=errors))
        if not texts[-1]:
            raise InputError(f"{name}: the file is empty; there is nothing to score")
    return texts


def _read_table(path: Path, column: str) -> pa.Table:
    """Read a table by its suffix, without the cache of `datasets`, which trusts size and time."""
    try:
        if path.suffix == ".jsonl":
            return pyarrow.json.read_json(path)
        if path.suffix == ".csv":
            return pyarrow.csv.read_csv(
                path,
                parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
                # Everything in a CSV is text; without this a column of digits were numbers.
                convert_options=pyarrow.csv.ConvertOptions(column_types={column: pa.string()}),
            )
        return pyarrow.parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: not a {path.suffix} table: {first_line(error)}") from None


def _load_hub(section: DataSection):  # -> datasets.Dataset
    import datasets

    try:
        return datasets.load_dataset(
            section.dataset,
            section.dataset_config,
            split=section.dataset_split,
            revision=section.dataset_revision,
        )
    except Exception as error:  # network, name, configuration, split, permission
        raise not_loaded(f"data.dataset {section.dataset}", "data set", error) from None
