"""How published numbers prepare their text, by name.

A perplexity can be compared with a published one only where text, windows and units are the same.
"""

import re
from collections.abc import Callable

# WikiText is cut into words: spaces before punctuation, @-@ for a hyphen. The language-model
# benchmarks of Megatron-LM and lm-eval put it back so, in this order (quirks included: " N ").
_WIKITEXT: tuple[tuple[str, str], ...] = (
    (r"s '", "s'"),
    *((rf" @{re.escape(mark)}@ ", mark) for mark in "-,."),
    *((rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)
_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in _WIKITEXT]


def wikitext(text: str) -> str:
    """Return WikiText's text as it was before it was cut into words."""
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return text


DETOKENIZERS: dict[str, Callable[[str], str]] = {"wikitext": wikitext}
