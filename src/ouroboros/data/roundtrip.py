"""Whether a tokenizer gives text back as it was: one that loses text cannot be scored in bits per byte of it."""

from __future__ import annotations

from collections.abc import Iterable

from ouroboros.data.tokenize import TextTokenizer
from ouroboros.errors import OuroborosError

SAMPLE_BYTES = 1_000_000
"""Bytes of each part of a source that are tried, at its beginning."""
_SHOWN = 20
"""Characters of a difference that a message shows."""


def check_round_trip(
    tokenizer: TextTokenizer, documents: Iterable[tuple[str, bytes]], *, what: str, limit: int = SAMPLE_BYTES
) -> None:
    """Encode and decode a sample and refuse a tokenizer that changes it.

    Tokenizers that are lossless by their making are not tried, and those of characters are not either: what they do
    not know is counted, reported and paid for in the score.

    Args:
        tokenizer: any.
        documents: (name, text) of each.
        what: what names the tokenizer in a message.
        limit: bytes of the sample; the document that crosses it is tried whole.

    Raises:
        OuroborosError: a document is not UTF-8, or comes back as something else; shows the first difference.
    """
    if tokenizer.is_lossless or tokenizer.kind == "chars":
        return
    tried = 0
    for name, document in documents:
        found = tokenizer.decode(tokenizer.encode(document, name=name))
        if found != document:
            raise OuroborosError(_difference(document, found, name, what))
        tried += len(document)
        if tried >= limit:
            return


def _difference(document: bytes, found: bytes, name: str, what: str) -> str:
    text, other = document.decode(), found.decode("utf-8", "replace")
    place = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    start = max(place - _SHOWN // 2, 0)
    shown = [repr(part[start : start + _SHOWN]) for part in (text, other)]
    return (
        f"{what}: loses text: it gives back {shown[1]} for {shown[0]} (character {place + 1} of {name}), so it can"
        " neither write this text nor be scored on it; use 'bytes', 'bpe:4096' or the directory of a byte-level BPE"
        " tokenizer without a normaliser"
    )
