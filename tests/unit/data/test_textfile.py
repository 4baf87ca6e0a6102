from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sqlite3
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ouroboros.data.textfile import open_text, text_suffix
from ouroboros.errors import OuroborosError

TEXT = "".join(f"line {i} of a text with \u00e9 and \u4e16\n" for i in range(9_000)).encode()


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def tar(data: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        info = tarfile.TarInfo("plain.txt")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def zipped(data: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("plain.txt", data)
    return sink.getvalue()


def parquet(data: bytes) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": [data.decode()]}), sink)
    return sink.getvalue()


def sqlite(data: bytes) -> bytes:
    with sqlite3.connect(":memory:") as base:
        base.execute("create table texts (text)")
        content = base.serialize()
    base.close()
    return content


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def write(data: bytes, name: str = "plain.txt") -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def read(path: Path) -> bytes:
    with open_text(path) as (stream, _):
        return stream.read()


def look(path: Path) -> str | None:
    with open_text(path) as (_, note):
        return note


@pytest.mark.parametrize("name", ["plain.txt", "plain.txt.gz", "plain", "x.jsonl"])
@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_compressed_text_whatever_the_name(file: Callable[..., Path], pack: Callable, name: str) -> None:
    path = file(pack(TEXT), name)
    assert read(path) == TEXT
    with open_text(path) as (stream, _):
        assert b"".join(stream) == TEXT
    with open_text(path) as (stream, _):
        assert stream.read(7) == TEXT[:7]
    assert look(path) is None


def test_compressed_in_parts(file: Callable[..., Path]) -> None:
    assert read(file(gzip.compress(TEXT[:99]) + gzip.compress(TEXT[99:]))) == TEXT
    assert read(file(zstd(TEXT[:99]) + zstd(TEXT[99:]))) == TEXT
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0four"
    assert read(file(skipped + zstd(TEXT))) == TEXT
    assert read(file(gzip.compress(b""))) == read(file(zstd(b""))) == read(file(b"")) == b""


def test_the_name_alone_compresses_nothing(file: Callable[..., Path]) -> None:
    assert read(file(TEXT, "a.txt.gz")) == TEXT


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(TEXT)[:-9], "its compressed data is cut off or damaged"),
        (gzip.compress(TEXT)[:12], "its compressed data is cut off or damaged"),
        (gzip.compress(TEXT)[:40] + b"\0\1\2" + gzip.compress(TEXT)[43:], "its compressed data is cut off or damaged"),
        (gzip.compress(TEXT) + b"more", "its compressed data is cut off or damaged"),
        (zstd(TEXT)[:-9], r"its compressed data is cut off or damaged \(Truncated"),
        (zstd(TEXT)[:12], "its compressed data is cut off or damaged"),
        (zstd(TEXT) + b"more than four", "its compressed data is cut off or damaged"),
        (gzip.compress(gzip.compress(TEXT)), "is compressed twice, not text; decompress it once"),
        (gzip.compress(tar(TEXT)), "is a tar archive"),
        (zstd(parquet(b"x")), "is a parquet file"),
    ],
    ids=map(str, range(10)),  # the data holds the time of its making, which processes that share the tests must not see
)
def test_damaged_and_nested(file: Callable[..., Path], data: bytes, message: str) -> None:
    with pytest.raises(OuroborosError, match=f"plain.txt': {message}") as caught:
        read(file(data))
    assert "\n" not in str(caught.value)


ODD = [
    (zipped, "a zip archive"),
    (tar, "a tar archive"),
    (parquet, "a parquet file, not text; give it a name that ends in .parquet"),
    (sqlite, "an SQLite database"),
    (lzma.compress, "compressed by xz, not text; decompress it, or compress the text with gzip or zstd"),
    (bz2.compress, "compressed by bzip2"),
    (lambda data: bz2.compress(b""), "compressed by bzip2"),
    (lambda data: b"7z\xbc\xaf\x27\x1c\0\4" + data, "a 7-Zip archive"),
    (lambda data: b"Rar!\x1a\x07\x01\0" + data, "a RAR archive"),
    (lambda data: b"\x04\x22M\x18" + data, "compressed by lz4"),
    (lambda data: b"%PDF-1.7\n" + data, "a PDF document, not text; convert it to text first"),
    (lambda data: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + data, "an old office document"),
    (lambda data: b"ARROW1\0\0" + data, "an Arrow file"),
]


@pytest.mark.parametrize("name", ["plain.txt", "x.jsonl"])
@pytest.mark.parametrize(("make", "message"), ODD)
def test_archives_are_refused_by_name(file: Callable[..., Path], make: Callable, message: str, name: str) -> None:
    path = file(make(TEXT[:5000]), name)
    for reader in (read, look):
        with pytest.raises(OuroborosError, match=f"{name}': is {message}"):
            reader(path)


def test_what_is_no_archive_is_untouched(file: Callable[..., Path]) -> None:
    chaos = bytes(range(256)) * 40
    for data in (
        chaos,
        b"PK is no zip\n",
        b"BZh9 is no bzip2",
        b"\xff\xfe" + chaos,
        b"\x1f\x8b",
        b"\xff\xd8\xff" + chaos,
    ):
        assert read(file(data)) == data
    assert look(file(chaos)) == "binary data rather than text, its bytes taken as they are"
    assert look(file(TEXT)) is None


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be", "utf-32-be"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_marked_wide_text_is_read_as_utf8(file: Callable[..., Path], encoding: str, pack: Callable) -> None:
    data = ("\ufeff" * encoding.endswith("be") + TEXT.decode() + "\U0001f600").encode(encoding)
    path = file(pack(data))
    assert read(path) == TEXT + "\U0001f600".encode()
    assert look(path) == f"{encoding[:6].upper()} text, read as UTF-8 (bits per byte count the bytes of that)"
    assert read(file("\u0416\u0448 ".encode("utf-16"))) == "\u0416\u0448 ".encode()


@pytest.mark.parametrize("end", [b"x", b"\x00\xd8a\0"])
def test_wide_text_that_breaks_off(file: Callable[..., Path], end: bytes) -> None:
    with pytest.raises(OuroborosError, match=r"begins as UTF-16 text, which breaks off at byte \d+ \("):
        read(file(TEXT.decode().encode("utf-16") + end))


@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
def test_unmarked_wide_text_is_refused(file: Callable[..., Path], encoding: str) -> None:
    for text in (TEXT.decode(), "short one", "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440. " * 30):
        with pytest.raises(OuroborosError, match=f"looks like {encoding} text without.*iconv -f {encoding} -t UTF-8"):
            read(file(text.encode(encoding)))


def test_numbers_are_no_wide_text(file: Callable[..., Path]) -> None:
    for data in (
        b"".join(n.to_bytes(2, "little") for n in range(4000)),
        b"".join(n.to_bytes(4, "little") for n in range(0, 400_000, 97)),
        bytes(5000),
        b"a\0" * 4,
    ):
        assert read(file(data)) == data


def test_endings() -> None:
    named = {"a.txt": ".txt", "a.JSONL.GZ": ".jsonl", "a.json.zst": ".json", "a.gz": "", "a": "", "a.b.gzip": ".b"}
    assert {name: text_suffix(Path(name)) for name in named} == named


def test_compressed_text_needs_no_more_memory(file: Callable[..., Path]) -> None:
    """A text of 8 MB in 8 kB is read line by line."""
    path = file(gzip.compress(b"0123456789abcde\n" * (1 << 19)))
    tracemalloc.start()
    with open_text(path) as (stream, _):
        assert sum(map(len, stream)) == 1 << 23
    assert tracemalloc.get_traced_memory()[1] < 1 << 21
    tracemalloc.stop()
