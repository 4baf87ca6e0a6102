"""Whether a tokenizer gives text back as it was: one that loses text cannot be scored in bits per byte of it.

Byte-level vocabularies, as GPT-2 has them, do so by their making: each byte is a printable character, so that any bytes
are text. The definition of a tokenizer (its ``tokenizer.json`` as a dictionary) tells them; others are tried.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ouroboros.errors import OuroborosError

if TYPE_CHECKING:
    from ouroboros.data.tokenize import TextTokenizer

SAMPLE_BYTES = 1_000_000
"""Bytes of each part of a source on which a tokenizer is tried, at its beginning."""
_SHOWN = 20
"""Characters of a difference that a message shows."""


@functools.cache
def byte_alphabet() -> tuple[str, ...]:
    """The character of each byte in byte-level vocabularies (Radford et al. 2019): those of Latin-1 that are printable
    stand for themselves, U+0100 onward for the other bytes in order."""
    spare = iter(range(256, 512))
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return tuple(chr(byte) if byte in printable else chr(next(spare)) for byte in range(256))


def steps_of(part: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    """A pre-tokenizer or decoder as a flat list of its steps."""
    if part is None:
        return []
    return part[children] if part["type"] == "Sequence" else [part]


def is_byte_level(state: dict[str, Any]) -> bool:
    """Whether the entries stand for bytes."""
    steps = steps_of(state["decoder"], "decoders")
    return state["model"]["type"] == "BPE" and [step["type"] for step in steps] == ["ByteLevel"]


def is_lossless(state: dict[str, Any]) -> bool:
    """Whether every text comes back unchanged: byte-level, all bytes known, nothing normalised, added or removed."""
    model = state["model"]
    steps = steps_of(state["pre_tokenizer"], "pretokenizers")
    return (
        is_byte_level(state)
        and state["normalizer"] is None
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and set(byte_alphabet()) <= set(model["vocab"])
        and any(step["type"] == "ByteLevel" for step in steps)
        and all(step["type"] in ("ByteLevel", "Split", "Digits", "Punctuation") for step in steps)
        and not any(step.get("add_prefix_space") or step.get("behavior") == "Removed" for step in steps)
        and not any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"])
    )


def is_byte_model(state: dict[str, Any]) -> bool:
    """Whether it is lossless and its ids are the byte values and one special token."""
    vocab = {char: byte for byte, char in enumerate(byte_alphabet())}
    added = [(token["id"], token["special"]) for token in state["added_tokens"]]
    is_plain = state["model"].get("vocab") == vocab and not state["model"].get("merges")
    return is_plain and added == [(256, True)] and is_lossless(state)


def check_round_trip(tokenizer: TextTokenizer, documents: Iterable[tuple[str, bytes]], *, what: str) -> None:
    """Encode and decode a sample and refuse a tokenizer that changes it, which no score in bits per byte can be of.

    Those that are lossless by their making are not tried, nor those of characters: what they do not know is counted,
    reported and paid for in the score. ``documents`` are (name, text) each; the error names the tokenizer as ``what``
    and shows the first difference.
    """
    tried = 0
    for name, document in () if tokenizer.is_lossless or tokenizer.unknown_id is not None else documents:
        found = tokenizer.decode(tokenizer.encode(document, name=name))
        if found != document:
            text, other = document.decode(), found.decode("utf-8", "replace")
            length = min(len(text), len(other))
            place = next((i for i in range(length) if text[i] != other[i]), length)
            start = max(place - _SHOWN // 2, 0)
            raise OuroborosError(
                f"{what}: loses text: it gives back {other[start : start + _SHOWN]!r} for"
                f" {text[start : start + _SHOWN]!r} (character {place + 1} of {name}), so it can neither write this"
                " text nor be scored on it; use 'bytes', 'bpe:4096' or the directory of a byte-level BPE tokenizer"
                " without a normaliser"
            )
        tried += len(document)
        if tried >= SAMPLE_BYTES:
            return
