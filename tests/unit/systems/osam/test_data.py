from __future__ import annotations

import itertools

import numpy as np
import pytest

from ouroboros.errors import OuroborosError
from ouroboros.systems.osam.data import (
    NEEDLE,
    PHRASE,
    PHRASES,
    SENTENCE,
    needle_text,
    periodic_text,
    published_starts,
)


def test_sizes_are_those_of_the_published_texts() -> None:
    periodic, needle = periodic_text(), needle_text()
    assert (len(SENTENCE), len(periodic), len(set(periodic))) == (31, 620_000, 17)
    assert (len(PHRASE), len(NEEDLE), len(needle), len(set(needle))) == (19, 15, 161_225, 13)
    assert (needle.count(NEEDLE), needle.count(PHRASE)) == (615, PHRASES)


def test_words_and_marks() -> None:
    sentence = SENTENCE.decode()
    assert sentence.isascii() and len(sentence.split()) == 5 and sentence.endswith(". ")
    assert {sentence.count(mark) for mark in ",'."} == {1} and periodic_text() == SENTENCE * 20_000
    assert PHRASE.islower() and len(PHRASE.split()) == 3 and PHRASE.endswith(b" ")
    assert NEEDLE.islower() and len(NEEDLE.split()) == 2 and NEEDLE.startswith(b" ") and NEEDLE.endswith(b" ")


def test_a_needle_follows_as_soon_as_240_characters_of_phrases_have_passed() -> None:
    expected, passed = b"", 0
    for _ in range(PHRASES):
        expected, passed = expected + PHRASE, passed + len(PHRASE)
        if passed >= 240:
            expected, passed = expected + NEEDLE, 0
    text = needle_text()
    assert text == expected
    first = text.find(NEEDLE)
    assert first == 247 and text.find(NEEDLE, first + 1) == first + 262


def test_starts_are_uniform_below_a_bound_that_leaves_out_the_last_window() -> None:
    draws = np.concatenate(list(itertools.islice(published_starts(20, 8, 50, 3), 100)))
    assert draws.dtype == np.int64 and set(draws.tolist()) == set(range(20 - 8 - 1))
    assert np.bincount(draws).min() > 350
    again = next(published_starts(20, 8, 5000, 3))
    assert next(published_starts(20, 8, 5000, 4)).tolist() != again.tolist()
    assert next(published_starts(10, 8, 3, 0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((9, 8, 1, 0), "has 9 tokens; windows of 8 need at least 10"),
        ((9, 0, 1, 0), "sequence_length must be >= 1"),
        ((9, 2, 0, 0), "batch_size must be >= 1"),
    ],
)
def test_starts_of_nothing_are_refused(sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        published_starts(*sizes)
