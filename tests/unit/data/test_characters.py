from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.data.characters import UNKNOWN, Characters, describe_unknown
from ouroboros.errors import OuroborosError

KNOWN = " \n\0\u00e9ab\U0001f600<|unkow>"


def test_ids_are_ranks_by_code_point() -> None:
    characters = Characters("banana \n\U0001f600\u00e9")
    assert characters.known == ["\n", " ", "a", "b", "n", "\u00e9", "\U0001f600"]
    assert characters.encode("\U0001f600ban\n").tolist() == [6, 3, 2, 4, 0]
    assert characters.unknown_id == 7 and characters.encode("").tolist() == []


@given(st.text(max_size=40))
def test_every_character_has_one_id_and_unknown_ones_are_counted(text: str) -> None:
    characters = Characters(KNOWN)
    ids = characters.encode(text)
    assert ids.dtype == np.int32 and len(ids) == len(text)
    unknown = Counter(character for character in text if character not in KNOWN)
    assert characters.unknown(text) == unknown
    assert (ids == characters.unknown_id).sum() == unknown.total()
    assert [characters.known[i] for i in ids if i < len(characters.known)] == [c for c in text if c in KNOWN]


@given(st.text(max_size=30))
def test_the_library_reads_and_writes_the_same(text: str) -> None:
    characters = Characters(KNOWN)
    backend = characters.backend()
    assert backend.encode(text).ids == characters.encode(text).tolist()
    shown = "".join(character if character in KNOWN else "\ufffd" for character in text)
    assert backend.decode(backend.encode(text).ids) == shown


def test_text_that_spells_the_unknown_entry_is_text() -> None:
    backend = Characters(KNOWN).backend()
    assert backend.decode(backend.encode(UNKNOWN).ids) == UNKNOWN


def test_an_unknown_character_is_one_of_all_others() -> None:
    everything = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    others = sum(character not in "ab" for character in everything)
    assert Characters("ab").unknown_nats == pytest.approx(math.log(others), abs=1e-12)


def test_a_definition_is_recognised_and_no_other() -> None:
    state = json.loads(Characters(KNOWN).backend().to_str())
    found = Characters.of_state(state)
    assert found is not None and found.known == sorted(set(KNOWN))
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
    assert [Characters.of_state(state | change) for change in others] == [None] * len(others)


def test_no_character_at_all_is_an_error() -> None:
    with pytest.raises(OuroborosError, match="the training text has no character"):
        Characters([])


def test_unknown_characters_are_named_most_frequent_first() -> None:
    assert describe_unknown(Counter("$$$\u200b\u00e9\u00e9")) == "'$' x 3, '\u00e9' x 2, '\\u200b' x 1"
    assert describe_unknown(Counter("abcdefg")) == "'a' x 1, 'b' x 1, 'c' x 1, 'd' x 1, 'e' x 1 and 2 others"
