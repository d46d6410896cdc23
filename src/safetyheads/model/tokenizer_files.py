"""Refuses a tokenizer.json whose rules would turn a short text into one that no memory holds."""

import math
import re
from base64 import b64decode
from collections.abc import Mapping
from typing import Any

from safetyheads.errors import InputError

MOST_GROWTH = 100_000
"""How many bytes a tokenizer may make of one; those in use stay below 30,000 as this is counted."""
# Bytes that a step makes of one at most: by the longest form of a character in Unicode, and with the marks that a step
# puts before each piece.
_GROWTH = {
    **dict.fromkeys(("NFKC", "NFKD"), 11),
    **dict.fromkeys(("NFC", "NFD", "BertProcessing", "RobertaProcessing"), 3),
    **dict.fromkeys(("Lowercase", "WordPiece", "BPEDecoder", "CTC"), 2),
    **dict.fromkeys(("ByteLevel", "BertNormalizer"), 4),
}
# Parts of the file, and what they call the steps that they have inside. A text goes through the first three in turn.
_ENCODES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
_DECODES = {"decoder": "decoders"}


def refuse_growth(described: Mapping[str, Any]) -> None:
    """Refuse rules that make a text too long, before any text meets them: reading the file is enough for that."""
    for parts in (_ENCODES, _DECODES):
        if math.prod(growth(described.get(part), inner) for part, inner in parts.items()) > MOST_GROWTH:
            raise InputError(f"its {', '.join(parts)} may make a text more than {MOST_GROWTH:,} times longer")


def growth(part: Any, inner: str) -> float:
    """Bytes that all steps of a part make of one at most; ``inner`` is what sequences call their steps."""
    waiting, found = [part] if part else [], 1.0
    while waiting:
        step = waiting.pop()
        found *= _growth(step)
        waiting += step.get(inner, ())
    return found


def _growth(step: Mapping[str, Any]) -> float:
    kind = str(step.get("type"))
    if kind == "Replace":
        written, replaced = _length(step["content"]), _length(step["pattern"].get("String", ""))
        # A regular expression may match a single byte, and an empty text before it; some match one at the end too.
        return max(1.0, written / replaced) if replaced else 1.0 + written * (1 + _matches_nothing(step["pattern"]))
    if kind == "TemplateProcessing":
        return max(1, len(step["single"])) * max([1, *(len(token["ids"]) for token in step["special_tokens"].values())])
    if kind == "Precompiled":
        return _longest_entry(b64decode(step["precompiled_charsmap"]))
    # What stands before a text, or before each piece of it.
    return float(_GROWTH.get(kind, 1 + _length(step.get("prepend", "")) + _length(step.get("replacement", ""))))


def _matches_nothing(pattern: Mapping[str, Any]) -> bool:
    """Whether it may match at the end of a text; so taken where Python does not know its syntax."""
    try:
        return re.search(str(pattern.get("Regex", "")), "") is not None
    except re.error:
        return True


def _length(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _longest_entry(table: bytes) -> float:
    """Bytes of the longest text in SentencePiece's table: an index, its size before it, and texts that end with a zero.

    Infinite where the index would not fit: it would be read beyond its end, for as long as its size says.
    """
    begins = 4 + int.from_bytes(table[:4], "little")
    return max([1, *map(len, table[begins:].split(b"\0"))]) if begins <= len(table) else math.inf
