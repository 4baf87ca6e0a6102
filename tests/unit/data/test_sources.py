from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.config import DataSpec
from ouroboros.data.sources import SourceRef, character_floor, parse_source, read_documents
from ouroboros.errors import OuroborosError

SPEC = DataSpec()


def read(source: Path | str, spec: DataSpec = SPEC) -> list[tuple[str, bytes]]:
    return [(document.name, document.data) for document in read_documents(parse_source(str(source)), spec)]


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


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "odd[1].txt").write_text("x")
    named = {
        text: parse_source(text, base=tmp_path).kind for text in ("python:", "hf:x", ".", "*.txt", "a.JSONL", "a.md")
    }
    assert list(named.values()) == ["python", "hf", "directory", "glob", "records", "file"]
    assert parse_source("odd[1].txt", base=tmp_path).kind == "file"


def test_file_bytes_are_untouched(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbfa\r\nb\r\xff\0"
    (tmp_path / "a.bin").write_bytes(data)
    assert read(tmp_path / "a.bin") == [("a.bin", data)]


def test_directory_is_sorted_recursive_and_skips_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.py", "a/b/c.md", ".git/x.txt", ".hidden.txt", "p.png", "a/__pycache__/x.py", "c.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "r.jsonl").write_text('{"text": "row"}\n')
    (tmp_path / "empty.txt").touch()
    expected = [("a/b/c.md", b"a/b/c.md"), ("a/z.py", b"a/z.py"), ("b.txt", b"b.txt"), ("r.jsonl:1", b"row")]
    assert read(tmp_path) == expected


def test_glob_names_do_not_depend_on_the_place(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/y.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [name for name, _ in read(tmp_path / "**" / "*.txt")] == ["a/z.txt", "b.txt"]
    assert [name for name, _ in read(tmp_path / "a" / "*")] == ["y.py", "z.txt"]
    relative = read_documents(parse_source("a/*", base=tmp_path), SPEC)
    assert [document.name for document in relative] == ["y.py", "z.txt"]


def test_python_source() -> None:
    documents = read("python:", DataSpec(max_bytes=100_000))
    assert sum(len(data) for _, data in documents) == 100_000
    assert documents[0][0].endswith(".py")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nots.txt", "no such file or directory; did you mean 'notes.txt'"),
        ("zzz/q.txt", "no directory"),
        ("qqqq", "written 'hf:NAME'"),
        ("pythn:", "did you mean 'python:'"),
        ("empty.txt", "is empty"),
        ("*.rst", "no file matches this glob"),
        ("di*", "'\\*\\*/\\*' goes into directories"),
        ("dir", r"no text, code or record files in this directory \(it has .png\)"),
    ],
)
def test_missing_things(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "x.png").write_text("x")
    with pytest.raises(OuroborosError, match=message) as caught:
        list(read_documents(parse_source(name, base=tmp_path), SPEC))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OuroborosError, match=r"a\.txt': cannot be read: Permission denied"):
        read(tmp_path / "a.txt")


def test_max_bytes_stops_at_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc\u00e9\u00e9", encoding="utf-8")
    (tmp_path / "b.txt").write_text("more")
    assert read(tmp_path, DataSpec(max_bytes=4)) == [("a.txt", b"abc")]
    assert read(tmp_path, DataSpec(max_bytes=5)) == [("a.txt", "abc\u00e9".encode())]
    assert read(tmp_path, DataSpec(max_bytes=9)) == [("a.txt", "abc\u00e9\u00e9".encode()), ("b.txt", b"mo")]
    assert read(tmp_path, DataSpec(max_bytes=99))[1] == ("b.txt", b"more")


@given(st.text(max_size=20), st.integers(0, 80))
def test_character_floor(text: str, position: int) -> None:
    data = text.encode()
    place = character_floor(data, min(position, len(data)))
    data[:place].decode()
    data[place:].decode()
    assert min(position, len(data)) - 3 <= place <= position
