from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.config import FilterSpec
from ouroboros.data.filters import Filters, letter_share, repeated_lines, repeated_ngrams

RHRM = Filters(
    FilterSpec(max_characters=10_000, symbol_run=10, min_letters=0.3, max_repeated_lines=0.5, max_repeated_ngrams=0.5)
)
SYMBOLS = Filters(FilterSpec(symbol_run=10))
LANGUAGES = {
    "chinese": "你好，世界。今天的天气很好，我们去公园走一走吧。",  # noqa: RUF001
    "japanese": "こんにちは世界、テスト文章です。",
    "thai": "สวัสดีชาวโลก นี่คือข้อความ",
    "russian": "Приветствую вас, друзья!",
    "greek": "Καλημέρασας κόσμε",
    "hindi": "नमस्ते दुनिया, हिन्दी में लिखा",
    "arabic": "مرحبا بالعالم، هذا نص",
    "vietnamese": unicodedata.normalize("NFD", "Tiếng Việt được viết ở đây"),
    "accents": "é" * 12 + " café crème",
    "code": "def f(x):\n    # ====================\n    return {'a': [1, (2, 3)]}[x]\n\nassert f('a')[1] == (2, 3)\n",
    "latex": "\\frac{\\alpha}{\\beta} = \\sqrt{x^{2}}",
}
RULERS = {
    "deep": "if (a) { if (b) { f(((((((((((x))))))))))) } }",
    "table": "| name | size |\n|------|-----:|\n| left | 12 |\n|:--:|:--:|:--:|:--:|:--:|\n",
    "grid": "+-----+-----+\n| left | right |\n+=====+=====+",
    "box": "┌──────┬──────┐",
    "ruler": "title\n__________________\n**************\nbody",
    "emoji": "well done " + "😀" * 15,
}


@pytest.mark.parametrize("name", sorted(LANGUAGES))
def test_text_of_any_language_and_code_pass(name: str) -> None:
    assert RHRM.reason(LANGUAGES[name]) is None


@pytest.mark.parametrize("name", sorted(RULERS))
def test_rulers_and_tables_are_no_spam(name: str) -> None:
    assert SYMBOLS.reason(RULERS[name]) is None


@pytest.mark.parametrize(
    "text",
    [
        "buy @#$%^&*()!@# now",
        "\u2605\u2606\u266a\u266b\u2660\u2663\u2665\u2666\u25b2\u25bc",
        "!?!?!?!?!?!?",
        "a_!_!_!_!_!_b",
        "$%#" * 4,
        "\u0430@#$%^&*()!\u0430",
    ],
)
def test_runs_of_different_symbols(text: str) -> None:
    assert SYMBOLS.reason(text) == "symbols"
    assert Filters(FilterSpec(symbol_run=13)).reason(text) is None


def test_marks_and_white_space_break_runs() -> None:
    assert SYMBOLS.reason("!@#$%\u0301^&*()") is None
    assert SYMBOLS.reason("!@#$% ^&*()") is None
    assert SYMBOLS.reason("!@#$%\u3000^&*()") is None
    assert SYMBOLS.reason("!@#$%^&*()") == "symbols"


def test_symbols_are_what_the_categories_say() -> None:
    """One character before nine different symbols makes ten in a row exactly if it is a symbol itself."""
    for code in [*range(0x3100), *range(0xFE00, 0xFFFF), *range(0x1F000, 0x1FB00), 0xE000, 0xD800, sys.maxunicode]:
        character = chr(code)
        if character in "!@#$%^&*(":
            continue
        is_symbol = not character.isspace() and unicodedata.category(character)[0] not in "LMN"
        assert (SYMBOLS.reason(character + "!@#$%^&*(") == "symbols") == is_symbol, hex(code)
        assert letter_share(character + "a") == (0.5 if is_symbol else 1.0), hex(code)


def test_ascii_rule_is_the_published_one() -> None:
    filters = Filters(FilterSpec(symbol_run=10, symbol_rule="ascii", max_characters=20))
    assert filters.reason("-" * 10) == "symbols"
    assert filters.reason("-" * 9) is None
    assert filters.reason(LANGUAGES["russian"][:13]) == "symbols"
    assert filters.reason("\u00a0" * 12) is None
    assert filters.reason("x" * 21) == "long"


def test_lengths() -> None:
    filters = Filters(FilterSpec(min_characters=3, max_characters=5))
    assert [filters.reason("\u00e9" * n) for n in (2, 3, 5, 6)] == ["short", None, None, "long"]


def test_letters() -> None:
    filters = Filters(FilterSpec(min_letters=0.5))
    assert [filters.reason(text) for text in ("a!", "a!!", "\u0905\u0941 !!", "  ", "12 .")] == [
        None,
        "letters",
        None,
        "letters",
        None,
    ]


def test_repeated_lines() -> None:
    assert repeated_lines("ab\ncd\n\n ab \nabcd") == pytest.approx(2 / 10)
    assert repeated_lines("\n \n") == 0
    filters = Filters(FilterSpec(max_repeated_lines=0.5))
    assert filters.reason("buy now\n" * 3 + "something else\n") is None
    assert filters.reason("buy now\n" * 4) == "repeated lines"


def naive_share(words: list[str]) -> float:
    grams = [tuple(words[i : i + 8]) for i in range(len(words) - 7)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


@given(st.lists(st.sampled_from("ab"), max_size=60) | st.lists(st.integers(0, 9).map(str), max_size=60))
def test_repeated_ngrams_against_counting(words: list[str]) -> None:
    assert repeated_ngrams(" ".join(words)) == pytest.approx(naive_share(words))


def test_repetition_without_spaces() -> None:
    filters = Filters(FilterSpec(max_repeated_ngrams=0.5))
    assert filters.reason(LANGUAGES["chinese"] * 4) == "repeated n-grams"
    assert filters.reason(LANGUAGES["chinese"]) is None
    assert filters.reason("the same eight words again and again and " * 5) == "repeated n-grams"


def test_off_is_nothing() -> None:
    assert not Filters(FilterSpec())
    assert not Filters(FilterSpec(symbol_rule="ascii"))
    assert Filters(FilterSpec(min_letters=0.1))
    assert Filters(FilterSpec()).reason("!@#$%^&*()" * 2000) is None


@given(st.text(max_size=300))
def test_any_text_has_an_answer(text: str) -> None:
    assert RHRM.reason(text) in {None, "symbols", "letters", "repeated lines", "repeated n-grams"}


def test_code_of_this_project_passes() -> None:
    root = Path(__file__).parents[3] / "src" / "ouroboros"
    files = [path for path in root.rglob("*.py") if path.name != "filters.py"]
    filters = Filters(FilterSpec(symbol_run=10, min_letters=0.3, max_repeated_lines=0.5, max_repeated_ngrams=0.5))
    dropped = [path.name for path in files if filters.reason(path.read_text(encoding="utf-8"))]
    assert len(dropped) < 0.1 * len(files), dropped
