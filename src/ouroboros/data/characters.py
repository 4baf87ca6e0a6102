"""The vocabulary of the ``chars`` tokenizer: one id per character of the training text.

The ids of the ``n`` distinct characters (Unicode code points) are their ranks 0..n-1. Two ids follow: ``n`` stands for
every character that the training text lacks, and ``n + 1`` is the end-of-text token.

An unknown character has an id of its own because each alternative hides something. Reading it as a space makes it look
like known text: a prompt reads as another prompt, and a score counts a space that was not there. An error would end
training on most real texts, whose held-out part has some rare character that the training part lacks. With its own id
the text keeps its length and place, the tokenizer reports what it did not know, and bits per byte stay honest: the id
says only that the character is none of the ``n``, so a score adds ``ln(1112064 - n)`` nats for which of the other
Unicode characters it was, all taken as equally likely (:attr:`Characters.unknown_nats`). Probabilities of all texts
still sum to at most 1.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
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


class Characters:
    """A set of characters, at least one, with their ids.

    Attributes:
        unknown_id: n, the id of every other character.
        unknown_nats: what a score adds for each unknown character, in nats.
    """

    def __init__(self, characters: Iterable[str]) -> None:
        self.known = sorted(set(characters))
        check(bool(self.known), "tokenizer 'chars': the training text has no character")
        self.unknown_id = len(self.known)
        self.unknown_nats = math.log(UNICODE_CHARACTERS - len(self.known))
        self._ids = np.full(0x110000, self.unknown_id, dtype=np.int32)
        self._ids[[ord(character) for character in self.known]] = np.arange(len(self.known))

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Characters | None:
        """The characters of a tokenizer's definition (``tokenizer.json``), or None if it is of another kind."""
        model = state["model"]
        if model["type"] != "BPE" or model.get("unk_token") != UNKNOWN:
            return None
        found = cls(entry for entry in model["vocab"] if len(entry) == 1)
        is_plain = all(token["special"] for token in state["added_tokens"])
        return found if is_plain and _definition(found.backend()) == _definition(state) else None

    def backend(self) -> Tokenizer:
        """The same vocabulary for the tokenizers library: byte-pair encoding of characters without any merge."""
        vocabulary = {character: index for index, character in enumerate([*self.known, UNKNOWN])}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
        # Without a decoder, ids would be joined by spaces.
        backend.decoder = decoders.Sequence([decoders.Replace(UNKNOWN, REPLACEMENT), decoders.Fuse()])
        return backend

    def encode(self, text: str) -> np.ndarray:
        """The id of each character, int32 (n,)."""
        return self._ids[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")]

    def unknown(self, text: str) -> Counter[str]:
        """How often each unknown character occurs in ``text``."""
        found = Counter(text)
        return Counter({character: found[character] for character in found.keys() - set(self.known)})


def _definition(source: Tokenizer | Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides how a tokenizer reads and writes, its special tokens left out."""
    state = json.loads(source.to_str()) if isinstance(source, Tokenizer) else source
    model = {name: value for name, value in state["model"].items() if value}
    return model, state["normalizer"], state["pre_tokenizer"], state["decoder"]


def describe_unknown(unknown: Counter[str]) -> str:
    """The characters, most frequent first, at most five of them: ``'$' x 3, '\\u200b' x 1 and 2 others``."""
    ranked = sorted(unknown.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(ranked) - _SHOWN} others" if len(ranked) > _SHOWN else ""
    return ", ".join(f"{character!r} x {count}" for character, count in ranked[:_SHOWN]) + more
