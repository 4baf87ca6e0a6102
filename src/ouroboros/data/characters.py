"""The vocabulary of the ``chars`` tokenizer: one id per character of the training text.

The ids of the ``n`` distinct characters (Unicode code points) are their ranks 0..n-1. Two ids follow: ``n`` stands for
every character that the training text lacks, and ``n + 1`` is the end-of-text token.

An unknown character has an id of its own because each alternative hides something: reading it as a space makes it look
like known text, and an error would end training on most real texts, whose held-out part has some rare character. With
its own id the text keeps its length and place, the tokenizer reports what it did not know, and bits per byte stay
honest: the id says only that the character is none of the ``n``, so a score adds ``ln(1112064 - n)`` nats for which of
the other Unicode characters it was, all taken as equally likely. Probabilities of all texts still sum to at most 1.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, models

from ouroboros.errors import check

UNKNOWN = "<|unknown|>"
"""Entry of the unknown characters in ``tokenizer.json``; text that spells it is ordinary text."""
REPLACEMENT = "\ufffd"
"""What an unknown character decodes to: U+FFFD, which Unicode has for this."""
UNICODE_CHARACTERS = 0x110000 - 0x800
"""Code points that text can have: all but the surrogates."""
_SHOWN = 5
"""Characters in one message."""


def character_model(characters: Iterable[str]) -> Tokenizer:
    """The vocabulary of some characters: byte-pair encoding of them without any merge."""
    known = sorted(set(characters))
    check(bool(known), "tokenizer 'chars': the training text has no character")
    vocabulary = {character: index for index, character in enumerate([*known, UNKNOWN])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    # Without a decoder, ids would be joined by spaces.
    backend.decoder = decoders.Sequence([decoders.Replace(UNKNOWN, REPLACEMENT), decoders.Fuse()])
    return backend


def known_characters(state: Mapping[str, Any]) -> list[str] | None:
    """The characters of a tokenizer's definition (``tokenizer.json``) by id, or None if it is of another kind."""
    model = state["model"]
    if model["type"] != "BPE" or model.get("unk_token") != UNKNOWN:
        return None
    known = sorted(entry for entry in model["vocab"] if len(entry) == 1)
    same = _definition(json.loads(character_model(known).to_str())) == _definition(state)
    return known if same and all(token["special"] for token in state["added_tokens"]) else None


def _definition(state: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides how a tokenizer reads and writes, its special tokens left out."""
    model = {name: value for name, value in state["model"].items() if value}
    return model, state["normalizer"], state["pre_tokenizer"], state["decoder"]


def unknown_nats(known: int) -> float:
    """What a score adds for each unknown character, in nats, where so many are known."""
    return math.log(UNICODE_CHARACTERS - known)


def describe_unknown(unknown: Counter[str]) -> str:
    """The characters, most frequent first, at most five of them: ``'$' x 3, '\\u200b' x 1 and 2 others``."""
    ranked = sorted(unknown.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(ranked) - _SHOWN} others" if len(ranked) > _SHOWN else ""
    return ", ".join(f"{character!r} x {count}" for character, count in ranked[:_SHOWN]) + more
