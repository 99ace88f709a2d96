"""Train or load a byte-level BPE tokenizer with its special tokens set."""

import copy
import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline import artifact
from pipeline.corpus import Corpus
from pipeline.recipe import InputError, TokenizerSection, check_local, not_loaded

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"  # bos, eos and pad, as in GPT-2


def obtain_tokenizer(
    section: TokenizerSection, corpus: Corpus, folder: Path, *, model: str | None = None
) -> PreTrainedTokenizerBase:
    """Return the recipe's tokenizer: loaded, found in `folder`, or trained and kept there.

    `model` is the pretrained model to go on from, if any: its tokenizer is the default.

    Raises:
        InputError: see `train_tokenizer` and `load_tokenizer`, or the folder holds another one.
    """
    if section.vocab_size is None:
        tokenizer = load_tokenizer(section.pretrained or model)
        if section.pretrained is not None and model is not None:
            if load_tokenizer(model).get_vocab() != tokenizer.get_vocab():
                raise InputError(
                    f"tokenizer.pretrained {section.pretrained}: its entries are not those that "
                    f"{model} was trained with; leave out tokenizer.pretrained"
                )
        return tokenizer
    made_from = {"tokenizer": {"vocab_size": section.vocab_size}, "corpus": corpus.identity}
    if not artifact.reusable(folder, made_from):
        with artifact.staged(folder, made_from) as (staging, _):
            tokenizer = train_tokenizer(corpus.texts("train"), vocab_size=section.vocab_size)
            tokenizer.save_pretrained(staging)
        logger.info("tokenizer: %s entries trained, in %s", f"{len(tokenizer):,}", folder)
    return load_tokenizer(str(folder))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer (GPT-2's kind) of exactly `vocab_size` entries.

    All 256 bytes are in the alphabet, so that any text round-trips; the one special token is
    <|endoftext|>, id 0. The same texts in the same order give the same file.

    Raises:
        InputError: the texts give fewer entries than asked for.
    """
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


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder or on the Hub, with an end-of-text and a pad token.

    Raises:
        InputError: there is none, it is not byte-level BPE, or it has no end-of-text token.
    """
    check_local(name, "tokenizer", "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # network, name, file format
        raise not_loaded(name, "tokenizer", error) from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{name}: this tokenizer has no end-of-text token (eos_token)")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{name}: only fast tokenizers (tokenizer.json) can be used")
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        raise InputError(f"{name}: only byte-level BPE tokenizers, as GPT-2's, can be used")
    return tokenizer


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

    In a byte-level vocabulary every character of an entry is one byte.
    """
    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    special = set(tokenizer.all_special_ids)
    for entry, number in tokenizer.get_vocab().items():
        if number not in special:
            lengths[number] = len(entry)
    return lengths
