"""Ids to text as they come, without ever showing half a character."""

import codecs

from transformers import PreTrainedTokenizerBase

# GPT-2's alphabet (its bytes_to_unicode): printable bytes of Latin-1 stand for themselves, the
# others, in order, for the characters from 256 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
BYTE_OF |= {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}


class WholeCharacters:
    """A byte-level tokenizer's `decode(skip_special_tokens=True)`, one id after the other.

    What is held back is only the beginning of a character whose last bytes are still to come.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._entry = tokenizer.convert_ids_to_tokens
        self._added = tokenizer.added_tokens_decoder
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, number: int) -> str:
        """Return the characters that this id completes, often one or more, sometimes none."""
        if number in self._added and self._added[number].special:
            return ""
        entry = self._entry(number) or ""  # a model may have more ids than its tokenizer
        try:
            content = bytes(BYTE_OF[character] for character in entry)
        except KeyError:  # an added entry, which is text as it stands
            content = entry.encode()
        return self._decoder.decode(content)

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)
