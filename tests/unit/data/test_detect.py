from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest

from ouroboros.config import DataSpec
from ouroboros.data.detect import name_formats

TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = {"chat.jsonl": {"messages": TURNS}, "text.jsonl": {"text": "x", "messages": TURNS}, "bad.jsonl": None}
    for name, row in rows.items():
        Path(name).write_text(json.dumps(row) + "\n")
    Path("notes.txt").write_text("notes")
    return tmp_path


def test_conversations_get_their_format_and_keep_their_weight(caplog: pytest.LogCaptureFixture) -> None:
    given = ("chat.jsonl", "chat.jsonl=0.3", "chat.jsonl@{messages}", "text.jsonl", "notes.txt", "python:=2")
    with caplog.at_level(logging.WARNING):
        found = name_formats(DataSpec(sources=given)).sources
    assert found == ("chat.jsonl@messages", "chat.jsonl@messages=0.3", *given[2:])
    assert caplog.messages[0] == "source 'chat.jsonl': has conversations and no 'text', read as chat.jsonl@messages"
    assert len(caplog.messages) == 2
    assert name_formats(DataSpec(sources=found)).sources == found


def test_compressed_files_directories_and_globs(caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("chats", "texts"):
        Path(folder, "in").mkdir(parents=True)
    Path("chats/README.md").write_text("# Chats")
    Path("chats/in/a.json.gz").write_bytes(gzip.compress(Path("chat.jsonl").read_bytes()))
    Path("texts/a.txt").write_text("notes")
    Path("texts/in/b.jsonl").write_bytes(Path("text.jsonl").read_bytes())
    given = ("chats/in/a.json.gz", "chats=2", "chats/**/*.gz", "texts", "texts/**/*.jsonl", "none/*.jsonl")
    found = name_formats(DataSpec(sources=given)).sources
    assert found == ("chats/in/a.json.gz@messages", "chats@messages=2.0", "chats/**/*.gz@messages", *given[3:])
    # What is left out of a directory is said by who reads it.
    assert len(caplog.messages) == 3 and all("has conversations" in message for message in caplog.messages)


def test_what_cannot_be_read_is_left_to_the_reader() -> None:
    given = ("bad.jsonl", "gone.jsonl", "notes.txt=x", "mix:rhrm", "hf:me/set")
    assert name_formats(DataSpec(sources=given)).sources == given


def test_parquet(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist([{"conversations": TURNS}]), "c.parquet")
    found = name_formats(DataSpec(sources=("c.parquet",), text_field="body"), quiet=True)
    assert found.sources == ("c.parquet@conversations",) and not caplog.messages
