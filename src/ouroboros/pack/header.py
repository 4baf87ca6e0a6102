"""What the header of a packed file says, and what it may say: every length is checked before anything is made of it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from ouroboros.config import from_dict
from ouroboros.errors import OuroborosError, check, first_line

LARGEST_HEADER = 1 << 21
"""Bytes of the header, decompressed."""
FREE_NUMBERS, NUMBERS_PER_BYTE = 1 << 23, 128
"""A file may hold so many numbers, and so many more for each of its bytes."""
FREE_TEXT, TEXT_PER_BYTE = 1 << 22, 128
"""A tokenizer may expand to so many bytes, and so many times its size in the file."""
DTYPES = ("float16", "bfloat16", "float32", "int64")
"""Of tensors that are stored as they are."""
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\.(json|jinja|model|txt)")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The score that a file claims for its model, as `ouroboros eval` measures it."""

    bits_per_byte: float
    bytes: int
    """Of the text that was scored."""
    loops: int | None
    window: int
    stride: int
    data_sha256: str

    def __post_init__(self) -> None:
        check(math.isfinite(self.bits_per_byte) and self.bits_per_byte >= 0, "bits_per_byte must be finite and >= 0")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a packed file tells beside its model; nothing of it is needed to run the model."""

    recipe: dict[str, Any] | None = None
    """The recipe that the model was trained by, resolved."""
    provenance: dict[str, Any] | None = None
    """Where the model comes from, and what packed it."""
    method: dict[str, Any] | None = None
    """How the weights were quantised."""
    calibration: dict[str, Any] | None = None
    """The text that the quantiser was shown."""
    score: Claim | None = None


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the codes of a tensor: its first dimension, and all others; a vector is one row."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // rows


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """A tensor in a section."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    """Of the section."""
    groups: int = 0
    """Steps in a row, of codes; 0 of a tensor that is stored as it is."""

    @property
    def numbers(self) -> int:
        """How many it has."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of its codes."""
        return matrix_shape(self.shape)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the tokenizer."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Section:
    """A run of bytes behind the header."""

    name: str
    codec: str
    offset: int
    """Of its first byte, counted from the end of the header."""
    bytes: int
    sha256: str
    bits: int | None = None
    """Of each code; None for other sections."""
    dtype: str | None = None
    """Of the numbers of tensors that are stored as they are."""
    tensors: tuple[TensorEntry, ...] = ()
    files: tuple[FileEntry, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Header:
    """All of it."""

    spec: dict[str, Any]
    """The model's specification."""
    eos_token_id: int | None
    sections: tuple[Section, ...]
    facts: Facts

    @property
    def tensors(self) -> list[tuple[Section, TensorEntry]]:
        """Every tensor with its section, in the order of the file."""
        return [(section, entry) for section in self.sections for entry in section.tensors]

    def section(self, name: str) -> Section | None:
        """The section of this name, if there is one."""
        return next((section for section in self.sections if section.name == name), None)


def parse_header(text: bytes | bytearray, size: int, where: str) -> Header:
    """The header ``text`` of a file with ``size`` bytes behind its header; ``where`` begins the text of an error.

    Raises:
        OuroborosError: names the field or section.
    """
    try:
        values = json.loads(text.decode(), object_pairs_hook=_distinct, parse_constant=_not_a_number)
    except OuroborosError as error:
        raise OuroborosError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise OuroborosError(f"{where}: not JSON: {first_line(error)}") from None
    check(isinstance(values, dict), f"{where}: expected a JSON object, got {type(values).__name__}")
    header = from_dict(Header, values, where=where)
    _check_sections(header, size, where)
    _check_tensors(header, size, where)
    return header


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    check(len(found) == len(pairs), f"a key is given twice among {', '.join(repr(k) for k, _ in pairs[:8])}")
    return found


def _not_a_number(text: str) -> Any:
    raise OuroborosError(f"{text} is no number of JSON")


def _check_sections(header: Header, size: int, where: str) -> None:
    """Sections follow each other without gap or overlap up to the end of the file, and each is of a known kind."""
    end, seen = 0, set()
    for section in header.sections:
        place = f"{where}: section {section.name!r}"
        check(section.name not in seen, f"{place} stands there twice")
        seen.add(section.name)
        check(section.bytes >= 0, f"{place}: {section.bytes} bytes")
        check(section.offset == end, f"{place} begins at {section.offset} where the one before ends at {end}")
        end += section.bytes
        named = kind_of(section)
        check(named == section.name, f"{place}: unknown; its content is what a section {named!r} holds")
        known = section.bits is not None or section.codec == "brotli"  # those of codes are known where they are decoded
        check(known, f"{place}: unknown codec {section.codec!r}; this version reads brotli there")
        files = [file.name for file in section.files]
        check(len(set(files)) == len(files), f"{place}: a file stands there twice")
        for file in section.files:
            check(bool(_FILE_NAME.fullmatch(file.name)), f"{place}: file {file.name!r} is none of a tokenizer")
            check(file.bytes >= 0, f"{place}: file {file.name!r} of {file.bytes} bytes")
        text = sum(file.bytes for file in section.files)
        check(
            text <= FREE_TEXT + TEXT_PER_BYTE * section.bytes,
            f"{place}: {section.bytes:,} bytes cannot honestly hold files of {text:,}",
        )
    check(end == size, f"{where}: the sections have {end:,} bytes and the file has {size:,} for them")


def kind_of(section: Section) -> str:
    """The name that a section must have for what it says of itself."""
    if section.bits is not None and section.dtype is None and not section.files:
        return f"codes/{section.bits}/{section.codec}"
    if section.bits is None and section.dtype is not None and not section.files:
        return f"plain/{section.dtype}"
    empty = section.bits is None and section.dtype is None and not section.tensors
    return "unknown" if not empty else "tokenizer" if section.files else "scales"


def _check_tensors(header: Header, size: int, where: str) -> None:
    """Shapes, settings and shares of tensors; all numbers together stay in proportion to the file."""
    numbers, seen = 0, set()
    for section, entry in header.tensors:
        place = f"{where}: section {section.name!r}: tensor {entry.name!r}"
        check(entry.name not in seen, f"{place} stands there twice")
        seen.add(entry.name)
        check(
            len(entry.shape) <= 8 and all(0 < length < 1 << 40 for length in entry.shape),
            f"{place}: shape {entry.shape} is none of a tensor (up to 8 dimensions, none of them empty)",
        )
        if section.bits is None:
            check(section.dtype in DTYPES, f"{place}: unknown dtype {section.dtype!r}; known: {', '.join(DTYPES)}")
            check(entry.groups == 0, f"{place}: groups belong to codes")
        else:
            check(2 <= section.bits <= 8, f"{place}: codes have 2 to 8 bits, not {section.bits}")
            columns = entry.matrix[1]
            fits = 0 < entry.groups <= columns and columns % entry.groups == 0
            check(fits, f"{place}: {columns} columns do not divide into {entry.groups} groups")
        numbers += entry.numbers
        check(
            numbers <= FREE_NUMBERS + NUMBERS_PER_BYTE * size,
            f"{place}: with it the file of {size:,} bytes claims {numbers:,} numbers, more than so many bytes can"
            " honestly hold",
        )
    for section in header.sections:
        shares = [entry.bytes for entry in section.tensors]
        check(
            not shares or (min(shares) >= 0 and sum(shares) == section.bytes),
            f"{where}: section {section.name!r}: its tensors' bytes do not sum to its own",
        )
