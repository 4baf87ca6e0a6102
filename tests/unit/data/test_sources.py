from __future__ import annotations

from pathlib import Path

import pytest

from ouroboros.data.sources import SourceRef, parse_source
from ouroboros.errors import OuroborosError


def test_weight_is_read() -> None:
    assert parse_source("notes.txt") == SourceRef("notes.txt", 1.0)
    assert parse_source("notes.txt=0.3") == SourceRef("notes.txt", 0.3)
    assert parse_source("python:=2") == SourceRef("python:", 2.0)
    assert parse_source("hf:a/b:c=1e-2") == SourceRef("hf:a/b:c", 0.01)


@pytest.mark.parametrize("text", ["a=0", "a=-1", "a=nan", "a=inf", "a=x", "=1", "", "  ", "a="])
def test_bad_sources(text: str) -> None:
    with pytest.raises(OuroborosError, match="source"):
        parse_source(text)


def test_a_file_named_with_an_equals_sign_wins(tmp_path: Path) -> None:
    (tmp_path / "a=2").write_text("x")
    assert parse_source("a=2", base=tmp_path) == SourceRef("a=2", 1.0, tmp_path)
    assert parse_source("a=2=3", base=tmp_path) == SourceRef("a=2", 3.0, tmp_path)


def test_formats_are_read(tmp_path: Path) -> None:
    assert parse_source("a.jsonl@gsm8k") == SourceRef("a.jsonl", format="gsm8k")
    assert parse_source("a.jsonl@gsm8k=0.4") == SourceRef("a.jsonl", 0.4, format="gsm8k")
    assert parse_source("hf:a/b:c@qa=2") == SourceRef("hf:a/b:c", 2, format="qa")
    assert parse_source("*.jsonl@chat") == SourceRef("*.jsonl", format="chat")
    assert parse_source("a.jsonl@{t}: {b}") == SourceRef("a.jsonl", format="{t}: {b}")
    assert parse_source("a.jsonl@{t} = {b}@{t}") == SourceRef("a.jsonl", format="{t} = {b}@{t}")
    assert parse_source("a.jsonl@{t} = {b}=3") == SourceRef("a.jsonl", 3.0, format="{t} = {b}")


def test_at_signs_in_names_of_files(tmp_path: Path) -> None:
    (tmp_path / "me@home").mkdir()
    for name in ("a@qa", "me@home/x.jsonl", "b@2.jsonl"):
        (tmp_path / name).write_text("{}")
    named = {
        "a@qa": ("a@qa", None),
        "a@qa=2": ("a@qa", None),
        "a@qa@qa": ("a@qa", "qa"),
        "me@home": ("me@home", None),
        "me@home/*.jsonl": ("me@home/*.jsonl", None),
        "me@home/x.jsonl@chat": ("me@home/x.jsonl", "chat"),
        "b@2.jsonl@{a}@{b}": ("b@2.jsonl", "{a}@{b}"),
        "gone@3.jsonl": ("gone@3.jsonl", None),
    }
    refs = {text: parse_source(text, base=tmp_path) for text in named}
    assert {text: (ref.text, ref.format) for text, ref in refs.items()} == named


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf:a/b@gsm8", "format 'gsm8': unknown; did you mean 'gsm8k'"),
        ("known.jsonl@gsm8=2", "format 'gsm8': unknown; did you mean 'gsm8k'"),
        ("*.jsonl@{a", "a brace itself is written twice"),
        ("@qa", "no name before '@'"),
    ],
)
def test_bad_formats(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "known.jsonl").touch()
    with pytest.raises(OuroborosError, match=message):
        parse_source(text, base=tmp_path)


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "odd[1].txt").write_text("x")
    named = {
        text: parse_source(text, base=tmp_path).kind for text in ("python:", "hf:x", ".", "*.txt", "a.JSONL", "a.md")
    }
    assert list(named.values()) == ["python", "hf", "directory", "glob", "records", "file"]
    assert parse_source("odd[1].txt", base=tmp_path).kind == "file"
