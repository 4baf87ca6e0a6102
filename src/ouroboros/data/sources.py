"""Where text comes from: the bundled text, files, globs, directories, records and hub streams.

A source is written ``TEXT`` or ``TEXT=WEIGHT``. Bytes are the truth: text files are read as bytes and never altered.
Documents come in a fixed order (names sorted; records in file order), so a source always has one fingerprint.
"""

from __future__ import annotations

import glob
import logging
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ouroboros.config import DataSpec
from ouroboros.data.bundled import bundled_files
from ouroboros.errors import OuroborosError, nearest

logger = logging.getLogger(__name__)

RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json", ".parquet"})
_TEXT_NAMES = """
    adoc asm awk bash bat bib bzl c cc cfg cl clj cmake conf cpp cs css csv cu cuh cxx d dart diff el
    erl ex exs f90 fs glsl go gradle groovy h hh hpp hs htm html ini java jl js jsx kt latex lean lisp
    log lua m markdown md mjs ml mli mm nim nix org pas patch php pl pm proto ps1 py pyi pyx r rb rkt rs
    rst s sbt scala scm sh sol sql srt svelte swift tcl tex text toml ts tsv tsx txt v vb vhd vim vue
    wat xml yaml yml zig zsh
"""
TEXT_SUFFIXES = frozenset(f".{name}" for name in _TEXT_NAMES.split())
_MAGIC = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Document:
    """One text: its name within the source (never a machine path) and its bytes."""

    name: str
    data: bytes


@dataclass(frozen=True)
class SourceRef:
    """A source as the user named it; relative paths are resolved against ``base`` (None: the current directory)."""

    text: str
    weight: float = 1.0
    base: Path | None = None

    @property
    def path(self) -> Path:
        """The file system path of a local source."""
        path = Path(self.text).expanduser()
        return path if self.base is None else self.base / path

    @property
    def kind(self) -> str:
        """``python``, ``hf``, ``directory``, ``glob``, ``records`` or ``file`` (also for what does not exist)."""
        if self.text == "python:":
            return "python"
        if self.text.startswith("hf:"):
            return "hf"
        if self.path.is_dir():
            return "directory"
        if not self.path.exists() and _MAGIC & set(self.text):
            return "glob"
        return "records" if self.path.suffix.lower() in RECORD_SUFFIXES else "file"


def parse_source(text: str, *, base: Path | None = None) -> SourceRef:
    """Read ``TEXT`` or ``TEXT=WEIGHT``; weights are relative and default to 1. A file named with ``=`` wins.

    Raises:
        OuroborosError: empty text; a weight that is not a positive number.
    """
    if not text.strip():
        raise OuroborosError(
            "data.sources: a source is empty; name a file, a directory, a glob, 'python:' or 'hf:NAME'"
        )
    whole = SourceRef(text, base=base)
    name, sign, number = text.rpartition("=")
    if not sign or whole.path.exists():
        return whole
    try:
        weight = float(number)
    except ValueError:
        raise OuroborosError(
            f"source {text!r}: the weight after '=' must be a number, as in 'notes.txt=0.3', got {number!r}"
        ) from None
    if not (math.isfinite(weight) and weight > 0):
        raise OuroborosError(f"source {text!r}: the weight must be > 0 and finite, got {number}")
    if not name:
        raise OuroborosError(f"source {text!r}: no name before '='")
    return SourceRef(name, weight, base)


def read_documents(ref: SourceRef, spec: DataSpec) -> Iterator[Document]:
    """The documents of a source, empty ones skipped, at most ``spec.max_bytes`` bytes in total.

    Raises:
        OuroborosError: missing, unreadable or empty source; a record without the text field; a failed stream.
    """
    total = empty = 0
    for document in _read(ref, spec):
        data = document.data
        if spec.max_bytes is not None and total + len(data) > spec.max_bytes:
            data = data[: character_floor(data, spec.max_bytes - total)]
        empty += not data
        if data:
            total += len(data)
            yield Document(document.name, data)
        if spec.max_bytes is not None and (total >= spec.max_bytes or len(data) < len(document.data)):
            break
    if empty:
        logger.info("source %r: skipped %d empty documents", ref.text, empty)
    if not total:
        raise OuroborosError(f"source {ref.text!r}: is empty; it needs some text")


def character_floor(data: bytes, position: int) -> int:
    """The largest UTF-8 character boundary <= ``position`` (``position`` itself in binary data)."""
    for back in range(4):
        place = position - back
        if place <= 0 or place >= len(data) or data[place] & 0xC0 != 0x80:
            return max(place, 0)
    return position


def _read(ref: SourceRef, spec: DataSpec) -> Iterator[Document]:
    kind = ref.kind
    if kind == "hf":
        from ouroboros.data.records import read_hub

        yield from (Document(name, data) for name, data in read_hub(ref.text, spec))
    elif kind == "python":
        yield from (Document(name, _read_bytes(path, spec.max_bytes)) for name, path in bundled_files())
    elif kind == "directory":
        yield from _read_files(_directory_files(ref), spec)
    elif kind == "glob":
        yield from _read_files(_glob_files(ref), spec)
    else:
        _check_file(ref)
        yield from _read_files([(ref.path.name, ref.path)], spec)


def _read_files(files: Iterable[tuple[str, Path]], spec: DataSpec) -> Iterator[Document]:
    for name, path in files:
        if path.suffix.lower() in RECORD_SUFFIXES:
            from ouroboros.data.records import read_records

            yield from (Document(f"{name}:{place}", data) for place, data in read_records(path, spec.text_field))
        else:
            yield Document(name, _read_bytes(path, spec.max_bytes))


def _read_bytes(path: Path, limit: int | None) -> bytes:
    try:
        with path.open("rb") as file:
            # A few bytes more than the limit, so that the caller sees where the last character ends.
            return file.read(-1 if limit is None else limit + 4)
    except OSError as error:
        raise OuroborosError(f"file {str(path)!r}: cannot be read: {error.strerror or error}") from error


def _check_file(ref: SourceRef) -> None:
    path = ref.path
    if path.is_file():
        return
    if path.exists():
        raise OuroborosError(f"source {ref.text!r}: not a regular file")
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        raise OuroborosError(f"source {ref.text!r}: no such file, and no directory {str(path.parent)!r}") from None
    hint = nearest(path.name, names) if names else ""
    if nearest(ref.text, ["python:"]).startswith("; did"):
        hint = nearest(ref.text, ["python:"])
    if not hint.startswith("; did"):
        hint = " (a Hugging Face data set is written 'hf:NAME')"
    raise OuroborosError(f"source {ref.text!r}: no such file or directory{hint}")


def _directory_files(ref: SourceRef) -> list[tuple[str, Path]]:
    """Text, code and record files below a directory, sorted; hidden files and ``__pycache__`` are skipped."""
    root, names, others = ref.path, [], set()

    def fail(error: OSError) -> None:
        raise OuroborosError(f"source {ref.text!r}: cannot be read: {error.strerror}: {error.filename}")

    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for name in files:
            suffix = Path(name).suffix.lower()
            # .json is configuration more often than text; name such files or a glob to read them
            if name.startswith(".") or suffix not in (TEXT_SUFFIXES | RECORD_SUFFIXES) - {".json"}:
                others.add(suffix or name)
                continue
            names.append(Path(folder, name).relative_to(root).as_posix())
    if not names:
        found = f" (it has {', '.join(sorted(others)[:6])})" if others else ""
        raise OuroborosError(
            f"source {ref.text!r}: no text, code or record files in this directory{found};"
            f" a glob such as '{ref.text.rstrip('/')}/**/*' reads any file"
        )
    if others:
        logger.info("source %r: skipped files of other kinds: %s", ref.text, ", ".join(sorted(others)[:20]))
    return [(name, root / name) for name in sorted(names)]


def _glob_files(ref: SourceRef) -> list[tuple[str, Path]]:
    """Files that match, sorted; names are relative to the part of the pattern before its first wildcard."""
    pattern = ref.path
    parts = pattern.parts
    fixed = next(i for i, part in enumerate(parts) if _MAGIC & set(part))
    root = Path(*parts[:fixed]) if fixed else Path()
    paths = [Path(match) for match in glob.glob(str(pattern), recursive=True)]
    files = sorted((path.relative_to(root).as_posix(), path) for path in paths if path.is_file())
    if not files:
        raise OuroborosError(
            f"source {ref.text!r}: no file matches this glob"
            + ("; '**/*' goes into directories" if paths else f" (looked in {str(root)!r})")
        )
    return files
