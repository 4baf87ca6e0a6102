from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.data.characters import UNKNOWN, character_model, describe_unknown, known_characters, unknown_nats
from ouroboros.data.tokenize import character_tokenizer
from ouroboros.errors import OuroborosError

KNOWN = " \n\0\u00e9ab\U0001f600<|unkow>"


def test_ids_are_ranks_by_code_point() -> None:
    backend = character_model("banana \n\U0001f600\u00e9")
    assert known_characters(json.loads(backend.to_str())) == ["\n", " ", "a", "b", "n", "\u00e9", "\U0001f600"]
    assert backend.encode("\U0001f600ban\nx").ids == [6, 3, 2, 4, 0, 7] and backend.encode("").ids == []


@given(st.text(max_size=40))
def test_every_character_has_one_id_and_unknown_ones_are_counted(text: str) -> None:
    tokenizer = character_tokenizer([KNOWN.encode()])
    ids = tokenizer.encode(text.encode())
    assert ids.dtype == np.int32 and len(ids) == len(text)
    unknown = Counter(character for character in text if character not in KNOWN)
    assert tokenizer.unknown(text.encode()) == unknown
    assert (ids == tokenizer.unknown_id).sum() == unknown.total()
    shown = "".join(character if character in KNOWN else "\ufffd" for character in text)
    assert tokenizer.decode(ids) == tokenizer.backend.decode(ids.tolist()).encode() == shown.encode()


def test_text_that_spells_the_unknown_entry_is_text() -> None:
    backend = character_model(KNOWN)
    assert backend.decode(backend.encode(UNKNOWN).ids) == UNKNOWN


def test_an_unknown_character_is_one_of_all_others() -> None:
    everything = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    others = sum(character not in "ab" for character in everything)
    assert unknown_nats(2) == pytest.approx(math.log(others), abs=1e-12)


def test_a_definition_is_recognised_and_no_other() -> None:
    state = json.loads(character_model(KNOWN).to_str())
    assert known_characters(state) == sorted(set(KNOWN))
    model: dict[str, Any] = state["model"]
    swapped = {**model["vocab"], "a": model["vocab"]["b"], "b": model["vocab"]["a"]}
    longer = {**model["vocab"], "ab": len(model["vocab"])}
    added = {"id": 99, "content": "ab", "special": False}
    others = [
        {"model": {**model, "unk_token": "<unk>"}},
        {"model": {**model, "type": "WordLevel"}},
        {"model": {**model, "vocab": swapped}},
        {"model": {**model, "vocab": longer, "merges": [["a", "b"]]}},
        {"model": {**model, "fuse_unk": True}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"decoder": None},
        {"added_tokens": [added]},
    ]
    assert [known_characters(state | change) for change in others] == [None] * len(others)


def test_no_character_at_all_is_an_error() -> None:
    with pytest.raises(OuroborosError, match="the training text has no character"):
        character_model([])


def test_unknown_characters_are_named_most_frequent_first() -> None:
    assert describe_unknown(Counter("$$$\u200b\u00e9\u00e9")) == "'$' x 3, '\u00e9' x 2, '\\u200b' x 1"
    assert describe_unknown(Counter("abcdefg")) == "'a' x 1, 'b' x 1, 'c' x 1, 'd' x 1, 'e' x 1 and 2 others"
