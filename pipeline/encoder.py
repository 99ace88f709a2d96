"""Text to ids in bulk: `tokenizers` with a memory for words, or a faster encoder that agrees.

Text is the same few words over and over, and byte-pair encoding treats each by itself. So GPT-2's
kind of tokenizer is asked for each word once; the text is cut into words here, by the tokenizer's
own pattern, which a check of every character that occurs makes sure of. That is about five times
as fast as `tokenizers` alone, and the ids are its own.

`gigatoken` (the extra `[fast]`) is a hundred times as fast. It is taken only after it gave the very
ids of `tokenizers` on a sample of the corpus and on strings made to find a difference; if a single
one differs, `tokenizers` does the work.
"""

import importlib.metadata
import importlib.util
import json
import logging
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import regex
from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

FAST = "gigatoken"
REFERENCE = "tokenizers"

# GPT-2's pattern (Radford et al. 2019, encoder.py), and what it comes to for ASCII text.
WORDS = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+"
    r"|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+"
)
ASCII_WORDS = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII
)
# A neighbour of each kind, and the pattern of what it forms one word with. White space is what
# joins none of them.
NEIGHBOURS = {
    "a": regex.compile(r"\p{L}"),
    "1": regex.compile(r"\p{N}"),
    "!": regex.compile(r"[^\p{White_Space}\p{L}\p{N}]"),
}
WORDS_KEPT, LONGEST_KEPT = 1 << 18, 64  # about 50 MB

# White space, digits, quotes, scripts, joined emoji, control characters, specials spelt out, and
# code points beyond the basic plane: where patterns and byte handling differ between encoders.
ADVERSARIAL = (
    "a  b   c\t\td \n\n e\r\n\r\nf\x0b\x0cg\x85h\u00a0i\u2003j\u3000k",
    "it's IT'S they'll we'd I'm you've 'tis '' ' 's'S \u2019s",
    "1234567 3.14 1,000,000 \u0661\u0662\u0663 \u00bd\u00b2 \u2167 x2y3",
    "<|endoftext|> <|endoftext|><|endoftext|>x <|im_start|> [PAD] </s>",
    "\x00\x01\x7f\ufeff\ufffd\u200b\u200d\u2028\u2029\ue000",
    "e\u0301 \u00e9 \u1100\u1161 \uac00 \u0928\u093f \u0b95\u0bcd \u0f40\u0f72",
    "\u4e2d\u6587\u6ca1\u6709\u7a7a\u683c\u3002\u3042\u30a2 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\U00010000\U0010ffff \U0001d400 \U00020000",
    "!!!???...---=====*****_____$$$$ ((())) {{}} \\\\// a_b __init__ @x #y",
    " lead", "trail ", " ", "  ", "\n", "\n \n", "", "'", "a" * 3000, " " * 3000, "ab" * 1500,
)  # fmt: skip


class Encoder(NamedTuple):
    """Says how to encode; it can be sent to another process and opened there."""

    tokenizer_json: str
    name: str = REFERENCE

    def open(self) -> "OpenEncoder":
        """Return what encodes, in this process."""
        return OpenEncoder(self)


class OpenEncoder:
    """Encodes lists of texts; special tokens that a text spells stay ordinary text."""

    def __init__(self, encoder: Encoder) -> None:
        self._fast = self._words = None
        if encoder.name == FAST:
            import gigatoken

            content = json.loads(encoder.tokenizer_json)
            content["added_tokens"] = []  # so that no text is ever a special token
            self._fast = gigatoken.Tokenizer.from_json(json.dumps(content))
            return
        self._reference = Tokenizer.from_str(encoder.tokenizer_json)
        self._reference.encode_special_tokens = True
        self._reference.no_truncation()
        self._reference.no_padding()
        if _is_gpt2_kind(encoder.tokenizer_json):
            self._words = _Words(self._reference)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, uint32."""
        if self._fast is not None:
            return [self._fast.encode(text) for text in texts]
        if self._words is not None:
            return self._words.encode(texts)
        return _ids(self._reference, texts)


class _Words:
    """A memory for the ids of words, the pieces that GPT-2's pattern cuts a text into."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, bytes] = {}  # ids as the bytes of uint32
        self._checked: dict[str, bool] = {}  # characters beyond ASCII, and whether patterns agree

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        cut = [self._cut(text) for text in texts]
        new = set().union(*(words for words in cut if words is not None)) - self._known.keys()
        kept = self._known
        if new:
            found = dict(zip(new, map(_bytes, _ids(self._tokenizer, list(new))), strict=True))
            # The first words are the frequent ones.
            room = max(0, WORDS_KEPT - len(kept))
            short = [word for word in found if len(word) <= LONGEST_KEPT][:room]
            kept.update((word, found[word]) for word in short)
            if len(short) < len(found):
                kept = kept | found
        ids = [
            None if words is None else np.frombuffer(b"".join(map(kept.__getitem__, words)), "<u4")
            for words in cut
        ]
        odd = _ids(self._tokenizer, [t for t, w in zip(texts, cut, strict=True) if w is None])
        rest = iter(odd)
        return [next(rest) if found is None else found for found in ids]

    def _cut(self, text: str) -> list[str] | None:
        """Return the words, or None where the patterns may disagree about a character."""
        if text.isascii():
            return ASCII_WORDS.findall(text)
        for character in set(text) - self._checked.keys():
            self._checked[character] = character.isascii() or self._agree(character)
        if not all(map(self._checked.__getitem__, set(text))):
            return None
        return WORDS.findall(text)

    def _agree(self, character: str) -> bool:
        """See that a character is a letter, a digit, white space or else to both patterns.

        Which of the four it is decides all that the pattern does with it.
        """
        pieces = self._tokenizer.pre_tokenizer.pre_tokenize_str
        for neighbour, pattern in NEIGHBOURS.items():
            joined = len(pieces(f"{neighbour}{character}{neighbour}")) == 1
            if joined != bool(pattern.fullmatch(character)):
                return False
        return True


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.uint32) for encoding in encodings]


def _bytes(ids: np.ndarray) -> bytes:
    return ids.astype("<u4", copy=False).tobytes()


def choose_encoder(tokenizer_json: str, sample: Iterable[str]) -> Encoder:
    """Return the fast encoder if it is installed and gives the same ids on `sample`."""
    reference = Encoder(tokenizer_json)
    if importlib.util.find_spec(FAST) is None or not _is_gpt2_kind(tokenizer_json):
        return reference
    try:
        fast = Encoder(tokenizer_json, FAST).open()
    except Exception as error:  # a young library: whatever it does not know, the other does
        logger.info("encoding with tokenizers: gigatoken cannot read this tokenizer (%s)", error)
        return reference
    texts = [*ADVERSARIAL, *sample]
    asked = Tokenizer.from_str(tokenizer_json)
    asked.encode_special_tokens = True
    asked.no_truncation()
    for text, theirs in zip(texts, _ids(asked, texts), strict=True):
        if not np.array_equal(fast.encode([text])[0], theirs):
            logger.info(
                "encoding with tokenizers: gigatoken %s gives other ids, for instance for %r",
                importlib.metadata.version(FAST), text[:40],
            )  # fmt: skip
            return reference
    return Encoder(tokenizer_json, FAST)


def _is_gpt2_kind(tokenizer_json: str) -> bool:
    content = json.loads(tokenizer_json)
    pre_tokenizer = content.get("pre_tokenizer") or {}
    return (
        content["model"].get("type") == "BPE"
        and all(token["special"] for token in content.get("added_tokens") or [])
        and not content["model"].get("dropout")
        and content.get("normalizer") is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer.get("add_prefix_space")
    )
