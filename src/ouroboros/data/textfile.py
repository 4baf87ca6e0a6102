"""The one place that opens text: gzip and zstd are decompressed, UTF-16 and UTF-32 read as UTF-8, archives refused.

The first bytes tell what a file is; its ending only says whether it holds records. Any other file is given as it is,
binary files too, because the byte tokenizer takes any bytes. A compressed file is read piece by piece, so that it needs
no more memory than the same text uncompressed.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import stat
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from ouroboros.errors import OuroborosError, first_line

COMPRESSED_ENDINGS = (".gz", ".gzip", ".zst", ".zstd")
_HEAD = 4096
"""Bytes that a file is judged by."""
_CHUNK = 1 << 16
_GZIP = re.compile(rb"\x1f\x8b\x08")
# A zstd file may begin with frames to be skipped.
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
_PARQUET = re.compile(rb"PAR1\x15")
_DECOMPRESS = "decompress it, or compress the text with gzip or zstd instead, which are read as they are"
_REFUSED: dict[str, dict[bytes, str]] = {
    "unpack it and name the texts in it": {
        rb"PK(\x03\x04|\x05\x06|\x07\x08)": "a zip archive (office documents and e-books are some, too)",
        rb"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
        rb"Rar!\x1a\x07": "a RAR archive",
        rb"[\0-\xff]{257}ustar": "a tar archive",
        rb"MSCF\0\0\0\0": "a cabinet archive",
        rb"!<arch>\n": "an ar archive or a Debian package",
        rb"\xed\xab\xee\xdb": "an RPM package",
    },
    _DECOMPRESS: {
        rb"\xfd7zXZ\0": "compressed by xz",
        rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "compressed by bzip2",
        rb"\x04\x22M\x18|\x02\x21L\x18": "compressed by lz4",
        rb"LZIP[\0\1]": "compressed by lzip",
        rb"\x89LZO\0\r\n\x1a\n": "compressed by lzop",
        rb"\xff\x06\0\0sNaPpY": "compressed by snappy",
        rb"\x1f\x9d[\x89-\x90]": "compressed by compress",
        rb"\]\0\0[\0-\xff]{2}(\xff{8}|[\0-\xff]{5}\0{3})": "compressed by lzma",
    },
    "convert it to text first": {
        rb"%PDF-[0-9]": "a PDF document",
        rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old office document",
        rb"SQLite format 3\0": "an SQLite database",
    },
    "write it as parquet or as JSON lines": {rb"ARROW1\0\0": "an Arrow file"},
}
"""What a file must not be, by its first bytes, under what to do about it."""
_WIDE = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
"""Encodings with their byte-order marks. UTF-32 comes first, because its marks begin as those of UTF-16 do."""
_MIN_PATTERN = 16
"""Bytes from which on zero bytes at every second place are no accident."""


def text_suffix(path: PurePath) -> str:
    """The ending of a file's name in small letters, without that of a compression: ``.jsonl`` of ``a.JSONL.gz``."""
    name = path.name.lower()
    ending = next((ending for ending in COMPRESSED_ENDINGS if name.endswith(ending)), "")
    return PurePath(name.removesuffix(ending)).suffix


def special_kind(mode: int) -> str | None:
    """What is neither a file nor a directory, in words: reading it could wait for ever or never end."""
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def open_text(path: Path) -> io.BufferedReader:
    """The bytes of the text in a file: as they are, decompressed, or converted from UTF-16 or UTF-32 to UTF-8.

    Raises:
        OuroborosError: an archive, another compression, a document that is no text, UTF-16 without a byte-order mark,
            a named pipe or a device. While reading: compressed or encoded data that is cut off or damaged.
        OSError: the system refuses it.
    """
    return _open(path)[0]


def look(path: Path) -> str | None:
    """What a user must know of how the file is read, or None. Raises as :func:`open_text`."""
    file, note = _open(path)
    file.close()
    return note


def _open(path: Path) -> tuple[io.BufferedReader, str | None]:
    kind = special_kind(path.stat().st_mode)
    if kind:
        raise OuroborosError(
            f"file {str(path)!r}: is {kind}, from which a text cannot be read twice; write it to a file first"
        )
    file: Any = path.open("rb")
    try:
        is_parquet = text_suffix(path) == ".parquet"
        head = file.peek(_HEAD)[:_HEAD]
        if _is_compressed(head) and not is_parquet:
            file = io.BufferedReader(_Chunks(_decompress(file, head, path), file), _CHUNK)
            head = file.peek(_HEAD)[:_HEAD]
        _refuse(head, path, is_parquet)
        if is_parquet:
            return file, None
        encoding = _encoding(head, path)
        if encoding:
            note = f"{encoding.upper()} text, read as UTF-8 (bits per byte count the bytes of that)"
            return io.BufferedReader(_Chunks(_recode(file, encoding, path), file), _CHUNK), note
        return file, "binary data rather than text, its bytes taken as they are" if b"\0" in head else None
    except BaseException:
        file.close()
        raise


def _is_compressed(head: bytes) -> bool:
    return bool(_GZIP.match(head) or _ZSTD.match(head))


def _refuse(head: bytes, path: Path, is_parquet: bool) -> None:
    """Refuse what would be trained on as if it were text."""
    marks = ((mark, what, fix) for fix, kinds in _REFUSED.items() for mark, what in kinds.items())
    found = next(((what, fix) for mark, what, fix in marks if re.match(mark, head)), None)
    if _is_compressed(head):
        found = ("compressed", _DECOMPRESS) if is_parquet else ("compressed twice", "decompress it once")
    elif _PARQUET.match(head) and not is_parquet:
        found = "a parquet file", "give it a name that ends in .parquet, without any other compression"
    if found:
        raise OuroborosError(f"file {str(path)!r}: is {found[0]}, not text; {found[1]}")


class _Chunks(io.RawIOBase):
    """The bytes of an iterator as a file; closes ``inner``, which they are made from."""

    def __init__(self, chunks: Iterator[bytes], inner: io.BufferedReader) -> None:
        self._chunks, self._inner, self._rest = chunks, inner, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def close(self) -> None:
        self._inner.close()
        super().close()


def _decompress(file: io.BufferedReader, head: bytes, path: Path) -> Iterator[bytes]:
    kind = "gzip" if _GZIP.match(head) else "zstd"
    try:
        stream = gzip.GzipFile(fileobj=file) if kind == "gzip" else _zstd(file)
        while chunk := stream.read(_CHUNK):
            yield chunk
    except (EOFError, OSError, zlib.error) as error:
        if getattr(error, "errno", None):
            raise  # of the disk, not of the data
        raise OuroborosError(
            f"file {str(path)!r}: its {kind} data is cut off or damaged ({first_line(error)}); fetch or make it again"
        ) from None


def _zstd(file: io.BufferedReader) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")


def _recode(file: io.BufferedReader, encoding: str, path: Path) -> Iterator[bytes]:
    decoder, done = codecs.getincrementaldecoder(encoding)(), 0
    while True:
        data = file.read(_CHUNK)
        try:
            text = decoder.decode(data, not data)
        except UnicodeDecodeError as error:
            raise OuroborosError(
                f"file {str(path)!r}: begins as {encoding.upper()} text, which breaks off near byte {done}"
                f" ({error.reason}); mend it, or convert it to UTF-8"
            ) from None
        done += len(data)
        if text:
            yield text.encode()
        if not data:
            return


def _encoding(head: bytes, path: Path) -> str | None:
    """``utf-16`` or ``utf-32`` where a byte-order mark says so and what follows is text; refuses them without one."""
    for encoding, marks in _WIDE.items():
        if head.startswith(marks) and _is_readable(head, encoding):
            return encoding
    guess = _guess(head)
    if guess:
        raise OuroborosError(
            f"file {str(path)!r}: looks like {guess} text without a byte-order mark; convert it to UTF-8 first:"
            f" iconv -f {guess} -t UTF-8 {path.name} > utf8-{path.name}"
        )
    return None


def _guess(head: bytes) -> str | None:
    """UTF-16 or UTF-32 by its zero bytes; None unless it is sure."""
    if len(head) < _MIN_PATTERN or b"\0" not in head:
        return None
    if 2 * head.count(0) >= len(head):
        wide = next((name for name in ("UTF-32LE", "UTF-32BE") if _is_readable(head, name)), None)
        if wide:
            return wide
    for name, low, high in (("UTF-16LE", head[0::2], head[1::2]), ("UTF-16BE", head[1::2], head[0::2])):
        if 0 not in low and 10 * high.count(0) >= len(high) and _is_readable(head, name):
            return name
    return None


def _is_readable(head: bytes, encoding: str) -> bool:
    """Whether ``head`` decodes, its last character perhaps cut, to hardly anything but characters that texts have."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    odd = sum(unicodedata.category(char) in ("Cc", "Cn") and char not in "\t\n\f\r" for char in text)
    return 50 * odd <= len(text)
