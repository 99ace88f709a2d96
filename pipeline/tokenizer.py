"""Train or load a byte-level BPE tokenizer with its special tokens set.

`transformers` is imported where it is needed and not before: it imports torch, and preparing text
takes less time than that.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm

from pipeline import artifact
from pipeline.completions import Example
from pipeline.corpus import Corpus, Document
from pipeline.raw_documents import Shard
from pipeline.reach import check_local, not_loaded
from pipeline.recipe import InputError
from pipeline.sections import ModelSection, TokenizerSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

COMPARED_BYTES = 1 << 20
END_OF_TEXT = "<|endoftext|>"  # bos, eos and pad, as in GPT-2


class FolderTokenizer:
    """A tokenizer that transformers saved, opened without it: what preparing text needs."""

    def __init__(self, folder: str) -> None:
        config = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
        if config.get("backend") != "tokenizers":  # another version may build it differently
            raise ValueError(f"{folder}: not saved by transformers 5")
        self.name_or_path = folder
        self.backend_tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        names = [value for key, value in config.items() if key.endswith("_token")]
        found = [self._id_of(name) for name in names if isinstance(name, str)]
        self.all_special_ids = sorted({number for number in found if number is not None})
        self.eos_token_id = self._id_of(config["eos_token"])
        is_byte_level = isinstance(self.backend_tokenizer.decoder, decoders.ByteLevel)
        if self.eos_token_id is None or not is_byte_level:
            raise ValueError(f"{folder}: what is wrong is said by `load_tokenizer`")

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each entry."""
        return self.backend_tokenizer.get_vocab()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text, special tokens shown."""
        return self.backend_tokenizer.decode(list(ids), skip_special_tokens=False)

    def _id_of(self, name: str) -> int | None:
        return self.backend_tokenizer.token_to_id(name)


def obtain_tokenizer(
    section: TokenizerSection,
    corpus: Corpus,
    folder: Path,
    *,
    model: ModelSection | None = None,
    for_text_only: bool = False,
    is_awaited: bool = False,
) -> PreTrainedTokenizerBase | FolderTokenizer:
    """Return the recipe's tokenizer: loaded, found in `folder`, or trained and kept there.

    Where `model` goes on from a pretrained one, its tokenizer is the default. With
    `for_text_only` it is opened without transformers where that is possible. Where it `is_awaited`
    by other machines (`await_tokenizer`), they are told of a failure.

    Raises:
        InputError: see `train_tokenizer` and `load_tokenizer`, or the folder holds another one.
    """
    load = _load_quickly if for_text_only else load_tokenizer
    if section.vocab_size is None:
        return _existing(section, model, load)
    made_from = {
        "tokenizer": section.model_dump(mode="json", exclude={"pretrained"}),
        "corpus": corpus.identity,
    }
    if not artifact.reusable(folder, made_from):
        failed = folder.with_name(f"_failed-{folder.name}.txt")
        with contextlib.suppress(OSError):
            failed.unlink(missing_ok=True)
        try:
            with artifact.staged(folder, made_from) as (staging, _):
                sample = training_sample(corpus, section)
                first = next(sample, None)
                if first is None:
                    raise InputError("there is no training text: every document is empty")
                sample = itertools.chain([first], sample)
                tokenizer = train_tokenizer(sample, vocab_size=section.vocab_size)
                tokenizer.save_pretrained(staging)
        except InputError as error:
            if is_awaited:
                failed.write_text(str(error))
            raise
        logger.info("tokenizer: %s entries trained, in %s", f"{len(tokenizer):,}", folder)
    return load(str(folder))


def _existing(
    section: TokenizerSection, model: ModelSection | None, load: Callable[..., Any]
) -> PreTrainedTokenizerBase | FolderTokenizer:
    """Return the tokenizer that is named, or else the model's, with what the recipe adds to it."""
    home = None if model is None else model.pretrained
    own = (section.pretrained, section.revision) if section.pretrained else (home, model.revision)
    tokenizer = (load_tokenizer if section.added_tokens else load)(*own)
    if section.pretrained is not None and home is not None:
        if load_tokenizer(home, model.revision).get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"tokenizer.pretrained {section.pretrained}: its entries are not those that "
                f"{home} was trained with; leave out tokenizer.pretrained"
            )
    for token in section.added_tokens:
        if token in tokenizer.get_vocab():
            raise InputError(
                f"tokenizer.added_tokens: {token!r} is an entry of {own[0]} already; leave it out"
            )
    if section.added_tokens:
        tokenizer.add_tokens(section.added_tokens)
    return tokenizer


def await_tokenizer(section: TokenizerSection, folder: Path, *, rank: int) -> None:
    """On all machines but the first: wait until that one has trained the tokenizer.

    Raises:
        InputError: it could not.
    """
    while rank and section.vocab_size is not None and artifact.read_manifest(folder) is None:
        with contextlib.suppress(FileNotFoundError):
            said = folder.with_name(f"_failed-{folder.name}.txt").read_text()
            raise InputError(f"the first machine stopped: {said}")
        time.sleep(0.2)


def training_sample(corpus: Corpus, section: TokenizerSection) -> Iterator[str]:
    """Yield training text of at most `sample_bytes`, each shard of the corpus giving its share.

    A document counts, and is read, up to `sample_document_characters`.
    """
    total = sum(shard.size for shard in corpus.shards if shard.source >= 0)
    with tqdm(
        desc="tokenizer", total=min(total, section.sample_bytes), unit="B", unit_scale=True,
        delay=2, disable=None,
    ) as bar:  # fmt: skip
        for shard in corpus.shards:
            budget = -(-section.sample_bytes * shard.size // max(1, total))
            if shard.source < 0 or budget <= 0:
                continue
            for text in _beginnings(corpus, shard, section.sample_document_characters):
                size = len(text.encode())
                if size > budget:
                    text = text.encode()[:budget].decode("utf-8", "ignore")
                if text:
                    yield text
                bar.update(min(size, budget))
                budget -= size
                if budget <= 0:
                    break


def compare(corpus: Corpus, tokenizers: dict[str, PreTrainedTokenizerBase]) -> str:
    """Return a table of the bytes that a token stands for, by source and tokenizer.

    Held-out text and training text alike, about a megabyte from all over each source.
    """
    names = corpus.source_names()
    counts = {name: {t: [0, 0] for t in tokenizers} for name in names}
    encoders = {name: text_encoder(tokenizer) for name, tokenizer in tokenizers.items()}
    for number, name in enumerate(names):
        shards = [shard for shard in corpus.shards if corpus.group_of(shard) == number]
        for shard in shards:
            left = COMPARED_BYTES // len(shards)
            for document in corpus.reader.documents(shard):
                text = next(document.read(), "")[: max(left, 1000)]
                for t, encoder in encoders.items():
                    ids = encoder.encode(text, add_special_tokens=False).ids
                    counts[name][t][0] += len(text.encode())
                    counts[name][t][1] += len(ids)
                left -= len(text.encode())
                if left <= 0:
                    break
    width = max(24, *(len(name) + 2 for name in names))
    lines = [f"{'bytes per token':<{width}}" + "".join(f"{t[-24:]:>26}" for t in tokenizers)]
    for name in names:
        ratios = (size / max(1, count) for size, count in counts[name].values())
        lines.append(f"{name:<{width}}" + "".join(f"{ratio:>26.3f}" for ratio in ratios))
    return "\n".join(lines)


def _beginnings(corpus: Corpus, shard: Shard, characters: int) -> Iterator[str]:
    for document in corpus.reader.documents(shard):
        if document.split == "train":
            left = characters
            for window in _windows(document):
                yield window[:left]
                left -= len(window)
                if left <= 0:
                    break


def _windows(document: Document) -> Iterator[str]:
    """Yield the windows of a document, of an example its pieces: no word reaches across them."""
    for window in document.read():
        yield from window.pieces if isinstance(window, Example) else (window,)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer (GPT-2's kind) of exactly `vocab_size` entries.

    All 256 bytes are in the alphabet, so that any text round-trips; the one special token is
    <|endoftext|>, id 0. The same texts in the same order give the same file.

    Raises:
        InputError: the texts give fewer entries than asked for.
    """
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocab_size:
        raise InputError(
            f"tokenizer.vocab_size is {vocab_size}, but the training text gives only "
            f"{backend.get_vocab_size()} entries; set tokenizer.vocab_size to that or less"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder or on the Hub, with an end-of-text and a pad token.

    Raises:
        InputError: there is none, it is not byte-level BPE, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer, GPT2TokenizerFast

    bare = (Path(name) / "vocab.json").is_file() and (Path(name) / "merges.txt").is_file()
    bare = bare and not (Path(name) / "tokenizer_config.json").exists()
    if not bare:
        check_local(name, "tokenizer", "tokenizer_config.json")
    try:
        if bare:  # as OpenAI published GPT-2's
            tokenizer = GPT2TokenizerFast.from_pretrained(name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=False
            )
    except Exception as error:  # network, name, file format
        raise not_loaded(name, "tokenizer", error) from None
    check_tokenizer(tokenizer, name)
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """See that a tokenizer is of the kind that everything here is made for.

    Raises:
        InputError: it is not byte-level BPE, or it has no end-of-text token.
    """
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise InputError(f"{name}: this tokenizer has no end-of-text token (eos_token)")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{name}: only fast tokenizers (tokenizer.json) can be used")
    if not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        raise InputError(f"{name}: only byte-level BPE tokenizers, as GPT-2's, can be used")


def _load_quickly(
    name: str, revision: str | None = None
) -> PreTrainedTokenizerBase | FolderTokenizer:
    try:
        return FolderTokenizer(name)
    except Exception:  # no folder, another format, damage: the full way works or says what is wrong
        return load_tokenizer(name, revision)


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return an encoder for corpus text: text that spells <|endoftext|> stays ordinary text.

    The setting is the copy's own, the saved tokenizer keeps <|endoftext|> one id.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sha256 over everything that decides which ids a text becomes."""
    content = tokenizer.backend_tokenizer.to_str() + f"{tokenizer.eos_token_id}"
    return hashlib.sha256(content.encode()).hexdigest()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return how many bytes of text each id stands for, int64 [vocabulary]; special tokens: 0.

    In a byte-level vocabulary every character of an entry is one byte, but for added tokens.
    """
    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    special = set(tokenizer.all_special_ids)
    for entry, number in tokenizer.get_vocab().items():
        if number not in special:
            lengths[number] = len(entry)
    for number, token in tokenizer.backend_tokenizer.get_added_tokens_decoder().items():
        if number not in special:  # it stands there as it is
            lengths[number] = len(token.content.encode())
    return lengths
