from __future__ import annotations

from ouroboros.systems.osam.data import NEEDLE, PHRASE, PHRASES, SENTENCE, needle_text, periodic_text


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
