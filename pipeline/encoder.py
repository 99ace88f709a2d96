"""Text to ids in bulk: `tokenizers`, or a faster encoder that was seen to give the same ids.

`gigatoken` (the extra `[fast]`) encodes about forty times as fast. It is taken only for GPT-2's
kind of tokenizer, and only after it gave the very ids of `tokenizers` on a sample of the corpus and
on strings made to find a difference; if a single one differs, `tokenizers` does the work.
"""

import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

FAST = "gigatoken"
REFERENCE = "tokenizers"

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
        self._fast = None
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

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, uint32."""
        if self._fast is not None:
            return [self._fast.encode(text) for text in texts]
        encodings = self._reference.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]


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
    for text, theirs in zip(texts, reference.open().encode(texts), strict=True):
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
