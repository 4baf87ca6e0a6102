"""Suggestions in error messages."""

from __future__ import annotations

import pytest

from ouroboros.errors import OuroborosError, first_line, nearest


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("lop", ["loop", "gpt"], "; did you mean 'loop'?"),
        ("hiden_size", ["vocab_size", "hidden_size"], "; did you mean 'hidden_size'?"),
        ("zzz", ["loop", "gpt"], "; known: gpt, loop"),
        ("zzz", [], ""),
        ("b", iter(["c", "a"]), "; known: a, c"),
    ],
)
def test_nearest(name: str, known: list[str], hint: str) -> None:
    assert nearest(name, known) == hint


def test_is_a_value_error() -> None:
    """transformers and pydantic pass ValueError on or name it; neither knows ours."""
    assert issubclass(OuroborosError, ValueError)


def test_first_line() -> None:
    assert first_line(ValueError("\n one \ntwo")) == "one "
    assert first_line(ValueError()) == "ValueError"
    assert first_line(ValueError(), otherwise="") == ""
