"""The one place that opens text: gzip and zstd are decompressed, UTF-16 and UTF-32 read as UTF-8, archives refused.

The first bytes tell what a file is; its ending only says whether it holds records. Any other file is given as it is,
binary files too, because the byte tokenizer takes any bytes. A compressed file is read piece by piece, so that it needs
no more memory than the same text uncompressed.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import re
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from ouroboros.errors import OuroborosError, check, first_line

COMPRESSED_ENDINGS = (".gz", ".gzip", ".zst", ".zstd")
_HEAD = 4096
"""Bytes that a file is judged by."""
_GZIP = re.compile(rb"\x1f\x8b\x08")
# A zstd file may begin with frames to be skipped.
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
_PARQUET = rb"PAR1\x15"
_UNPACK = "unpack it and name the texts in it"
_DECOMPRESS = "decompress it, or compress the text with gzip or zstd instead, which are read as they are"
_CONVERT = "convert it to text first"
_REFUSED = {
    rb"PK(\x03\x04|\x05\x06|\x07\x08)": ("a zip archive (office documents and e-books are some, too)", _UNPACK),
    rb"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", _UNPACK),
    rb"Rar!\x1a\x07": ("a RAR archive", _UNPACK),
    rb"[\0-\xff]{257}ustar": ("a tar archive", _UNPACK),
    rb"\xfd7zXZ\0": ("compressed by xz", _DECOMPRESS),
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": ("compressed by bzip2", _DECOMPRESS),
    rb"\x04\x22M\x18|\x02\x21L\x18": ("compressed by lz4", _DECOMPRESS),
    rb"%PDF-[0-9]": ("a PDF document", _CONVERT),
    rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an old office document", _CONVERT),
    rb"SQLite format 3\0": ("an SQLite database", _CONVERT),
    rb"ARROW1\0\0": ("an Arrow file", "write it as parquet or as JSON lines"),
    _PARQUET: ("a parquet file", "give it a name that ends in .parquet, without any other compression"),
    rb"\x1f\x8b\x08|" + _ZSTD.pattern: ("compressed twice", "decompress it once"),
}
"""What a file must not be, by its first bytes, and what to do about it."""
_WIDE = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
"""Encodings with their byte-order marks. UTF-32 comes first, because its marks begin as those of UTF-16 do."""
_MIN_PATTERN = 16
"""Bytes from which on zero bytes at every second place are no accident."""


class StreamError(OuroborosError):
    """A source that could not be opened or broke off; it may work when opened again."""


def text_suffix(path: PurePath) -> str:
    """The ending of a file's name in small letters, without that of a compression: ``.jsonl`` of ``a.JSONL.gz``."""
    name = path.name.lower()
    ending = next((ending for ending in COMPRESSED_ENDINGS if name.endswith(ending)), "")
    return PurePath(name.removesuffix(ending)).suffix


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[tuple[io.BufferedReader, str | None]]:
    """The bytes of the text in a file, and what a user must know of how they are read, or None.

    Raises:
        OuroborosError: an archive, another compression, a document that is no text, UTF-16 without a byte-order mark;
            compressed or encoded data that is cut off or damaged, also while it is read in the body.
        StreamError: the system refuses it.
    """
    try:
        with path.open("rb") as file:
            yield _opened(file, path)
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk, not of the data
            raise StreamError(f"file {str(path)!r}: cannot be read: {error.strerror}") from error
        raise OuroborosError(
            f"file {str(path)!r}: its compressed data is cut off or damaged ({first_line(error)});"
            " fetch or make it again"
        ) from None


def _opened(file: Any, path: Path) -> tuple[io.BufferedReader, str | None]:
    head = file.peek(_HEAD)[:_HEAD]
    if _GZIP.match(head):
        file = gzip.GzipFile(fileobj=file)
    elif _ZSTD.match(head):
        import pyarrow

        file = io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    head = file.peek(_HEAD)[:_HEAD]
    for mark, (what, fix) in _REFUSED.items():
        check(not re.match(mark, head), f"file {str(path)!r}: is {what}, not text; {fix}")
    marked = (name for name, marks in _WIDE.items() if head.startswith(marks) and _is_readable(head, name))
    encoding = next(marked, None)
    if encoding is None:
        guess = _guess(head)
        check(
            guess is None,
            f"file {str(path)!r}: looks like {guess} text without a byte-order mark; convert it to UTF-8 first:"
            f" iconv -f {guess} -t UTF-8 {path.name} > utf8-{path.name}",
        )
        return file, "binary data rather than text, its bytes taken as they are" if b"\0" in head else None
    try:
        text = file.read().decode(encoding)
    except UnicodeDecodeError as error:
        raise OuroborosError(
            f"file {str(path)!r}: begins as {encoding.upper()} text, which breaks off at byte {error.start}"
            f" ({error.reason}); mend it, or convert it to UTF-8"
        ) from None
    note = f"{encoding.upper()} text, read as UTF-8 (bits per byte count the bytes of that)"
    return io.BufferedReader(io.BytesIO(text.encode())), note


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
