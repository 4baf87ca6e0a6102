from __future__ import annotations

import gzip
import json
import logging
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.config import DataSpec, FilterSpec
from ouroboros.data.documents import character_floor, judged_documents, name_formats, read_documents
from ouroboros.data.sources import SourceRef, parse_source
from ouroboros.errors import OuroborosError
from ouroboros.registry import found, load

SPEC = DataSpec()


def read(source: Path | str, spec: DataSpec = SPEC) -> list[tuple[str, bytes]]:
    return [(document.name, document.data) for document in read_documents(parse_source(str(source)), spec)]


@pytest.mark.parametrize("name", ["a.txt@qa", "python:@qa", "dir@{a}", "dir/*@qa"])
def test_a_format_needs_records(tmp_path: Path, name: str) -> None:
    (tmp_path / "dir").mkdir()
    for file in ("a.txt", "dir/b.txt"):
        (tmp_path / file).write_text("text")
    with pytest.raises(OuroborosError, match=r"source '[^']*': has no records \(jsonl, json, parquet\), so it cannot"):
        list(read_documents(parse_source(name, base=tmp_path), SPEC))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two files of records and a text in between; the records have texts of different kinds."""
    texts: list[list[str | None]] = [["zero", None, "", "three!", "four"], ["x" * 50, "seven"]]
    for name, values in zip(("a", "c"), texts, strict=True):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": value}) for value in values))
    (tmp_path / "b.txt").write_bytes(b"f\xffive")
    return tmp_path


def test_positions_and_counts(mixed: Path) -> None:
    counts = Counter({"read": 100, "kept": 1})
    spec = DataSpec(filters=FilterSpec(min_characters=5, max_characters=40))
    documents = list(read_documents(parse_source(str(mixed)), spec, counts=counts))
    assert [(document.name, document.index) for document in documents] == [
        ("a.jsonl:4", 3),
        ("b.txt", 5),
        ("c.jsonl:2", 7),
    ]
    assert documents[1].data == b"f\xffive"
    assert counts == {"read": 108, "kept": 4, "no text": 2, "short": 2, "long": 1}


@pytest.mark.parametrize("start", range(10))
def test_start_is_a_position(mixed: Path, start: int) -> None:
    ref = parse_source(str(mixed))
    documents = list(judged_documents(ref, SPEC))
    assert [document.dropped for document in documents] == [None, "no text", "no text", *[None] * 5]
    assert list(judged_documents(ref, SPEC, start=start)) == [d for d in documents if d.index >= start]


def test_limits(mixed: Path) -> None:
    ref = parse_source(str(mixed))

    def read_lengths(spec: DataSpec) -> list[int]:
        return [len(document.data) for document in read_documents(ref, spec)]

    assert read_lengths(SPEC) == [4, 6, 4, 5, 50, 5]
    assert read_lengths(DataSpec(max_bytes=7)) == [4, 3]
    # documents of a stream stay whole
    assert read_lengths(DataSpec(max_bytes=7, stream=True)) == [4, 6]
    assert read_lengths(DataSpec(max_bytes=4, stream=True)) == [4]


def test_head_of_a_stream(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("long text")
    assert read(tmp_path / "a.txt", DataSpec(stream=True, max_bytes=2)) == [("a.txt", b"long text")]


def test_a_file_named_by_itself_is_not_filtered(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("long text")
    (tmp_path / "b.txt").write_text("short")
    spec = DataSpec(filters=FilterSpec(max_characters=5))
    assert read(tmp_path / "a.txt", spec) == [("a.txt", b"long text")]
    assert read(tmp_path, spec) == [("b.txt", b"short")]


def test_a_file_is_filtered_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("long text")
    (tmp_path / "b.txt").write_text("short")
    assert read(tmp_path, DataSpec(max_bytes=3, filters=FilterSpec(max_characters=8))) == [("b.txt", b"sho")]


def test_all_documents_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    with pytest.raises(
        OuroborosError, match=r"source '.*a\.jsonl': every document was dropped \(3 read, 0 kept, 2 short, 1 no text\)"
    ):
        read(tmp_path / "a.jsonl", DataSpec(filters=FilterSpec(min_characters=2)))


def test_what_nobody_counts_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    caplog.set_level("INFO")
    read(tmp_path / "a.jsonl")
    assert "2 read, 1 kept, 1 no text" in caplog.text
    caplog.clear()
    list(read_documents(parse_source(str(tmp_path / "a.jsonl")), SPEC, counts=Counter()))
    assert caplog.text == ""


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


@pytest.mark.parametrize("name", found("sources"))
def test_texts_that_are_made(name: str) -> None:
    whole = load(found("sources")[name])()
    assert parse_source(f"{name}:=2") == SourceRef(f"{name}:", 2.0) and parse_source(f"{name}:").kind == name
    assert read(f"{name}:") == [(name, whole)]
    assert read(f"{name}:", DataSpec(max_bytes=40)) == [(name, whole[:40])]
    strict = DataSpec(filters=FilterSpec(max_repeated_ngrams=0.1, max_characters=9))
    assert read(f"{name}:", strict) == [(name, whole)]
    assert list(judged_documents(parse_source(f"{name}:"), SPEC, start=1)) == []
    assert SourceRef(f"{name}:x").kind == "file"
    with pytest.raises(OuroborosError, match=f"source '{name}:': has no records"):
        read(f"{name}:@qa")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nots.txt", "no such file or directory; did you mean 'notes.txt'"),
        ("zzz/q.txt", "no such file or directory"),
        ("qqqq", "written 'hf:NAME'"),
        ("pythn:", "did you mean 'python:'"),
        ("neddle:", "did you mean 'needle:'"),
        ("periodic", "did you mean 'periodic:'"),
        ("needle.tx", "did you mean 'needle.txt'"),
        ("periodic.txt", r"'needle\.txt'|'notes\.txt'|known|hf:NAME"),
        ("empty.txt", "is empty"),
        ("*.rst", "no file matches this glob"),
        ("di*", "'\\*\\*/\\*' goes into directories"),
        ("dir", r"no text, code or record files in this directory \(it has .png\)"),
    ],
)
def test_missing_things(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "needle.txt").write_text("x")
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
    (tmp_path / "first.md").write_text("\u00e9\u00e9", encoding="utf-8")
    with pytest.raises(OuroborosError, match="its first character has more than data.max_bytes = 1 bytes"):
        read(tmp_path / "first.md", DataSpec(max_bytes=1))
    (tmp_path / "first.md").unlink()
    (tmp_path / "a.txt").write_text("abc\u00e9\u00e9", encoding="utf-8")
    (tmp_path / "b.txt").write_text("more")
    assert read(tmp_path, DataSpec(max_bytes=4)) == [("a.txt", b"abc")]
    assert read(tmp_path, DataSpec(max_bytes=5)) == [("a.txt", "abc\u00e9".encode())]
    assert read(tmp_path, DataSpec(max_bytes=9)) == [("a.txt", "abc\u00e9\u00e9".encode()), ("b.txt", b"mo")]
    assert read(tmp_path, DataSpec(max_bytes=99))[1] == ("b.txt", b"more")


def test_compressed_records_and_texts(tmp_path: Path) -> None:
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    for name, data in {
        "a.jsonl.gz": gzip.compress(lines),
        "b.json.gz": gzip.compress(lines),
        "c.json.gz": gzip.compress(b' [{"text": "three"}]'),
        "d.txt.gz": gzip.compress(b"four"),
        "e.txt": gzip.compress(b"five"),
        "f.jsonl": '{"text": "six"}\n'.encode("utf-16"),
    }.items():
        (tmp_path / name).write_bytes(data)
    texts = [("d.txt.gz", b"four"), ("e.txt", b"five")]
    records = [("a.jsonl.gz:1", b"one"), ("a.jsonl.gz:2", b"two"), ("b.json.gz:1", b"one"), ("b.json.gz:2", b"two")]
    whole = [*records, ("c.json.gz:1", b"three"), *texts, ("f.jsonl:1", b"six")]
    assert read(tmp_path) == read(tmp_path / "**") == whole
    assert read(tmp_path, DataSpec(max_bytes=4)) == [("a.jsonl.gz:1", b"one"), ("a.jsonl.gz:2", b"t")]
    assert read(tmp_path / "d.txt.gz", DataSpec(max_bytes=3)) == [("d.txt.gz", b"fou")]
    assert parse_source(f"{tmp_path}/a.jsonl.gz@{{text}}!").kind == "records"


def test_what_is_said_of_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "abcdefg":
        (tmp_path / f"{name}.txt").write_bytes("text".encode("utf-16"))
    (tmp_path / "x.txt").write_bytes(b"a\0b")
    read(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"source '{tmp_path}': UTF-16 text, read as UTF-8 (bits per byte count the bytes of that): a.txt (the"
        " first such file)",
        f"source '{tmp_path}': binary data rather than text, its bytes taken as they are: x.txt (the first such file)",
    ]
    caplog.clear()
    list(judged_documents(parse_source(str(tmp_path)), DataSpec(stream=True)))
    assert caplog.text == ""


def test_a_pipe_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("pipe.txt", "pipe.jsonl", "/dev/zero"):
        with pytest.raises(OuroborosError, match=f"{name}': is a named pipe or a device, which cannot be read twice"):
            list(read_documents(parse_source(name, base=tmp_path), SPEC))


def test_a_home_that_nobody_has(tmp_path: Path) -> None:
    with pytest.raises(OuroborosError, match="source '~nobody-here/x': no such file"):
        list(read_documents(parse_source("~nobody-here/x", base=tmp_path), SPEC))


@given(st.text(max_size=20), st.integers(0, 80))
def test_character_floor(text: str, position: int) -> None:
    data = text.encode()
    place = character_floor(data, min(position, len(data)))
    data[:place].decode()
    data[place:].decode()
    assert min(position, len(data)) - 3 <= place <= position


TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = {"chat.jsonl": {"messages": TURNS}, "text.jsonl": {"text": "x", "messages": TURNS}, "bad.jsonl": None}
    for name, row in rows.items():
        Path(name).write_text(json.dumps(row) + "\n")
    Path("notes.txt").write_text("notes")
    return tmp_path


@pytest.mark.usefixtures("chats")
def test_conversations_get_their_format_and_keep_their_weight(caplog: pytest.LogCaptureFixture) -> None:
    given = ("chat.jsonl", "chat.jsonl=0.3", "chat.jsonl@{messages}", "text.jsonl", "notes.txt", "python:=2")
    with caplog.at_level(logging.WARNING):
        named = name_formats(DataSpec(sources=given)).sources
    assert named == ("chat.jsonl@messages", "chat.jsonl@messages=0.3", *given[2:])
    assert caplog.messages[0] == "source 'chat.jsonl': has conversations and no 'text', read as chat.jsonl@messages"
    assert len(caplog.messages) == 2
    assert name_formats(DataSpec(sources=named)).sources == named


@pytest.mark.usefixtures("chats")
def test_compressed_files_directories_and_globs(caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("chats", "texts"):
        Path(folder, "in").mkdir(parents=True)
    Path("chats/README.md").write_text("# Chats")
    Path("chats/in/a.json.gz").write_bytes(gzip.compress(Path("chat.jsonl").read_bytes()))
    Path("texts/a.txt").write_text("notes")
    Path("texts/in/b.jsonl").write_bytes(Path("text.jsonl").read_bytes())
    given = ("chats/in/a.json.gz", "chats=2", "chats/**/*.gz", "texts", "texts/**/*.jsonl", "none/*.jsonl")
    named = name_formats(DataSpec(sources=given)).sources
    assert named == ("chats/in/a.json.gz@messages", "chats@messages=2.0", "chats/**/*.gz@messages", *given[3:])
    # What is left out of a directory is said by who reads it.
    assert len(caplog.messages) == 3 and all("has conversations" in message for message in caplog.messages)


@pytest.mark.usefixtures("chats")
def test_what_cannot_be_read_is_left_to_the_reader() -> None:
    given = ("bad.jsonl", "gone.jsonl", "notes.txt=x", "mix:rhrm", "hf:me/set")
    assert name_formats(DataSpec(sources=given)).sources == given


def test_conversations_in_parquet(chats: Path, caplog: pytest.LogCaptureFixture) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist([{"conversations": TURNS}]), "c.parquet")
    named = name_formats(DataSpec(sources=("c.parquet",), text_field="body"), quiet=True)
    assert named.sources == ("c.parquet@conversations",) and not caplog.messages
