"""Where text comes from: the built-in texts, files, globs, directories, records and hub streams.

A source is written ``TEXT``, ``TEXT@FORMAT`` or either with ``=WEIGHT``. Bytes are the truth: text files are read as
bytes and never altered, but for what :mod:`ouroboros.data.textfile` decompresses or converts. Documents come in a
fixed order (names sorted; records in file order), so a source always has one fingerprint. Which files a directory or a
glob means: :mod:`ouroboros.data.folders`. Named mixtures (``mix:NAME``) are several sources:
:mod:`ouroboros.data.mixtures`.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from ouroboros.config import DataSpec, FilterSpec
from ouroboros.data.bundled import bundled_files
from ouroboros.data.filters import Filters
from ouroboros.data.folders import MAGIC, RECORD_SUFFIXES, Files, directory_files, glob_files, glob_matches
from ouroboros.data.formats import FORMATS, FieldFormat, TextFormat, find_format
from ouroboros.data.periodic import needle_text, periodic_text
from ouroboros.data.records import Record, Skip, read_hub, read_records
from ouroboros.data.templates import source_format
from ouroboros.data.textfile import look, open_text, special_kind, text_suffix
from ouroboros.errors import OuroborosError, nearest

logger = logging.getLogger(__name__)

BUILT_IN = ("needle:", "periodic:", "python:")
"""Sources that every machine has."""
_MADE: dict[str, Callable[[], bytes]] = {"needle": needle_text, "periodic": periodic_text}
"""Texts that are made rather than read, by kind: one document each."""
HEAD_BYTES = 4_000_000
"""What is read of a stream before training where ``data.max_bytes`` is not set."""
_HOPELESS = 10_000
"""A hub stream of which this many documents were all dropped is not read on: it may have no end."""
_BAD = "bad record"
_NAMED = 10
"""Records left out as bad that are named, each in a line; all are counted."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text: its name within the source (never a machine path) and its bytes."""

    name: str
    data: bytes
    index: int = 0
    """Position of the record or file in its source, from 0; those left out count."""
    group: bytes | None = None
    """What decides its split instead of ``data``: see :class:`~ouroboros.data.formats.TextFormat`."""
    answers: tuple[tuple[int, int], ...] | None = None
    """Bytes from and to that are answers: see :class:`~ouroboros.data.formats.Rendered`."""

    def part(self, low: int, high: int) -> Document:
        """Bytes ``low`` to ``high`` of this document, by the same name."""
        answers = self.answers
        if answers is not None:
            cut = ((max(start, low) - low, min(end, high) - low) for start, end in answers)
            answers = tuple((start, end) for start, end in cut if start <= end)
        return replace(self, data=self.data[low:high], answers=answers)


@dataclass(frozen=True)
class SourceRef:
    """A source as the user named it; relative paths are resolved against ``base`` (None: the current directory)."""

    text: str
    weight: float = 1.0
    base: Path | None = None
    format: str | None = None
    """Name or template of the format of its records; None: the column ``data.text_field``."""

    @property
    def path(self) -> Path:
        """The file system path of a local source."""
        path = Path(os.path.expanduser(self.text))
        return path if self.base is None else self.base / path

    @property
    def kind(self) -> str:
        """``python``, ``periodic``, ``needle``, ``hf``, ``directory``, ``glob``, ``records`` or ``file`` (also for what
        does not exist)."""
        if self.text in BUILT_IN:
            return self.text.removesuffix(":")
        if self.text.startswith("hf:"):
            return "hf"
        if self.path.is_dir():
            return "directory"
        if not self.path.exists() and MAGIC & set(self.text):
            return "glob"
        return "records" if is_records(self.path) else "file"

    def is_there(self) -> bool:
        """Whether a local source exists; True for every other kind."""
        kind = self.kind
        if kind == "glob":
            return any(True for _ in glob_matches(self.text, self.base))
        return kind not in ("directory", "records", "file") or self.path.exists()


def parse_source(text: str, *, base: Path | None = None) -> SourceRef:
    """Read ``TEXT``, ``TEXT@FORMAT``, ``TEXT=WEIGHT`` or ``TEXT@FORMAT=WEIGHT``.

    Weights are relative and default to 1. A file whose name has these signs in it wins.

    Raises:
        OuroborosError: empty text; a weight that is not a positive number; an unknown format.
    """
    if not text.strip():
        raise OuroborosError(
            "data.sources: a source is empty; name a file, a directory, a glob, 'hf:NAME' or a built-in text"
            f" ({', '.join(map(repr, BUILT_IN))})"
        )
    if SourceRef(text, base=base).path.exists():
        return SourceRef(text, base=base)
    if text.startswith("mix:"):
        raise OuroborosError(f"source {text!r}: a mixture is several sources, so it cannot be used where one is meant")
    name, weight = split_weight(text)
    name, form = _split_format(name, base)
    if not name:
        raise OuroborosError(f"source {text!r}: no name before {'@' if form else '='!r}")
    if form is not None:
        try:
            find_format(form)
        except OuroborosError as error:
            raise OuroborosError(f"source {text!r}: {error}") from None
    return SourceRef(name, weight, base, form)


def split_weight(text: str) -> tuple[str, float]:
    """``TEXT=WEIGHT`` as (TEXT, weight), the weight 1 without one.

    Raises:
        OuroborosError: a weight that is not a positive number.
    """
    name, sign, number = text.rpartition("=")
    # "=" may be part of a template: notes.jsonl@{a} = {b}
    if not sign or ("@" in name and "{" in name and "}" in number):
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        raise OuroborosError(
            f"source {text!r}: the weight after '=' must be a number, as in 'notes.txt=0.3', got {number!r}"
        ) from None
    if not (math.isfinite(weight) and weight > 0):
        raise OuroborosError(f"source {text!r}: the weight must be > 0 and finite, got {number}")
    return name, weight


def _split_format(text: str, base: Path | None) -> tuple[str, str | None]:
    """Split at the ``@`` that ends the longest existing path, else at the first one that a format follows."""
    places = [place for place, sign in enumerate(text) if sign == "@"]
    if not places or SourceRef(text, base=base).path.exists():
        return text, None
    for place in reversed(places):
        if place and SourceRef(text[:place], base=base).path.exists():
            return text[:place], text[place + 1 :]
    for place in places:
        name, form = text[:place], text[place + 1 :]
        # Of what is not on this disk, only a hub name or a glob can have a format misspelt; else it is a missing file.
        is_elsewhere = name.startswith(("hf:", *BUILT_IN)) or MAGIC & set(name)
        if form in FORMATS or "{" in form or (is_elsewhere and re.fullmatch(r"[^/*?@]*", form)):
            return name, form
    return text, None


def head_bytes(spec: DataSpec) -> int | None:
    """How many bytes of each source are read before training; None: all."""
    return spec.max_bytes or (HEAD_BYTES if spec.stream else None)


def read_documents(
    ref: SourceRef,
    spec: DataSpec,
    *,
    start: int = 0,
    limit: int | Literal["spec"] | None = "spec",
    counts: Counter[str] | None = None,
) -> Iterator[Document]:
    """The documents of a source that have text and pass the filters, in order.

    A plain text file named by itself is one document that the user chose, and so is a text that is made; filters do
    not apply to it.

    Args:
        ref: the source.
        spec: text field, filters and limit.
        start: records and files passed over, cheaply; positions (:attr:`Document.index`) count them.
        limit: bytes in total: ``spec`` means :func:`head_bytes`, None all. The document that crosses it is cut, with
            ``spec.stream`` kept whole instead, because cut it would be another text with another split.
        counts: is added ``read``, ``kept`` and one entry per reason that documents were dropped for.

    Raises:
        OuroborosError: missing, unreadable or empty source; a record without a column; every document dropped.
        StreamError: a hub stream that broke.
    """
    limit = head_bytes(spec) if limit == "spec" else limit
    mine: Counter[str] = Counter()
    reason = _judge(ref, spec)
    total = 0
    for index, raw in enumerate(_read(ref, spec, start, limit), start):
        dropped = reason(raw)
        # Counts are handed on from pass to pass of a stream, so that nothing is named again and again.
        if raw.bad and counts is not None and counts[_BAD] < _NAMED:
            logger.warning("source %r: left out (data.skip_bad_records): %s", ref.text, raw.bad)
        for count in (mine,) if counts is None else (mine, counts):
            count["read"] += 1
            count[dropped or "kept"] += 1
        if dropped:
            if ref.kind == "hf" and not mine["kept"] and mine["read"] >= _HOPELESS:
                break
            continue
        data = whole = raw.data or b""
        document = Document(raw.name, data, index, raw.group.encode() if raw.group else None, raw.answers)
        if limit is not None and not spec.stream and total + len(data) > limit:
            document = document.part(0, character_floor(data, limit - total))
            data = document.data
        if data:
            total += len(data)
            yield document
        if limit is not None and (total >= limit or len(data) < len(whole)):
            break
    if counts is None and mine["read"] > mine["kept"]:
        logger.info("source %r: %s", ref.text, describe_counts(mine))
    if not total and (not start or mine["read"] >= _HOPELESS):
        if mine["read"] == mine["empty"]:
            raise OuroborosError(f"source {ref.text!r}: is empty; it needs some text")
        raise OuroborosError(
            f"source {ref.text!r}: every document was dropped ({describe_counts(mine)});"
            " see data.filters and the format of the source"
        )


def describe_counts(counts: Mapping[str, int]) -> str:
    """``10 read, 7 kept, 2 short, 1 no text`` for the counts of :func:`read_documents`."""
    reasons = sorted(set(counts) - {"read", "kept"}, key=lambda name: (-counts[name], name))
    return ", ".join(f"{counts[name]:,} {name}" for name in ("read", "kept", *reasons))


def character_floor(data: bytes, position: int) -> int:
    """The largest UTF-8 character boundary <= ``position`` (``position`` itself in binary data)."""
    for back in range(4):
        place = position - back
        if place <= 0 or place >= len(data) or data[place] & 0xC0 != 0x80:
            return max(place, 0)
    return position


class _Raw(NamedTuple):
    """What a source holds at one place, before it is judged; ``data`` is None for a record without text."""

    name: str
    data: bytes | None
    text: str | None = None
    group: str | None = None
    answers: tuple[tuple[int, int], ...] | None = None
    bad: str | None = None


def _judge(ref: SourceRef, spec: DataSpec) -> Callable[[_Raw], str | None]:
    """The reason to drop what was read, or None."""
    filters = Filters(spec.filters) if _is_filtered(ref, spec) else None

    def reason(raw: _Raw) -> str | None:
        if raw.bad:
            return _BAD
        if raw.data is None:
            return "no text"
        if not raw.data:
            return "empty"
        if not filters:
            return None
        return filters.reason(raw.data.decode("utf-8", "replace") if raw.text is None else raw.text)

    return reason


def _is_filtered(ref: SourceRef, spec: DataSpec) -> bool:
    return ref.kind not in ("file", *_MADE) and spec.filters != FilterSpec()


def _read(ref: SourceRef, spec: DataSpec, start: int, limit: int | None) -> Iterator[_Raw]:
    kind = ref.kind
    form = source_format(find_format(ref.format), spec) if ref.format else FieldFormat(spec.text_field)
    if kind == "hf":
        for name, record in read_hub(ref.text, spec, form, start):
            yield _raw(name, record)
        return
    # The head of a stream has been read, and said of it what there is to say.
    quiet = spec.stream and limit is None
    files = source_files(ref, quiet=quiet)
    if ref.format and not any(is_records(path) for _, path in files):
        raise OuroborosError(
            f"source {ref.text!r}: has no records (jsonl, json, parquet), so it cannot have the format {ref.format!r}"
        )
    if kind in _MADE and not start:
        yield _Raw(kind, _MADE[kind]())
    # A file is read no further than needed, unless all of it is to be judged or kept.
    part = None if spec.stream or _is_filtered(ref, spec) else limit
    notes: dict[str, list[str]] = {}
    try:
        yield from _read_files(files, form, Skip(start, spec.skip_bad_records), part, notes)
    finally:
        for note, names in notes.items() if not quiet else ():
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            logger.warning("source %r: %s: %s%s", ref.text, note, ", ".join(names[:5]), more)


def source_files(ref: SourceRef, *, quiet: bool = False) -> Files:
    """The files of a source in the order they are read; none of a text that is made or of a hub stream.

    Args:
        ref: the source.
        quiet: log nothing of what is left out.

    Raises:
        OuroborosError: nothing to read; what cannot be read.
    """
    kind = ref.kind
    if kind == "python":
        return list(bundled_files())
    if kind == "directory":
        return directory_files(ref.text, ref.path, quiet=quiet)
    if kind == "glob":
        return glob_files(ref.text, ref.base, quiet=quiet)
    if kind in _MADE or kind == "hf":
        return []
    _check_file(ref)
    return [(ref.path.name, ref.path)]


def _raw(name: str, record: Record) -> _Raw:
    return _Raw(name, record.data, record.text, record.group, record.answers, record.bad)


def is_records(path: Path) -> bool:
    """Whether a file holds records, by its name."""
    return text_suffix(path) in RECORD_SUFFIXES


def _read_files(
    files: Files, form: TextFormat, skip: Skip, limit: int | None, notes: dict[str, list[str]]
) -> Iterator[_Raw]:
    """Everything in ``files``; ``notes`` gets what is to be said of them, with their names."""
    for name, path in files:
        if skip.left and not is_records(path):
            skip.left -= 1
            continue
        try:
            note = look(path)
            data = None if is_records(path) else _read_bytes(path, limit)
        except OSError as error:
            raise OuroborosError(f"file {str(path)!r}: cannot be read: {error.strerror or error}") from error
        if note:
            notes.setdefault(note, []).append(name)
        if data is not None:
            yield _Raw(name, data)
            continue
        for record in read_records(path, form, skip):
            yield _raw(f"{name}:{record.place}", record)


def _read_bytes(path: Path, limit: int | None) -> bytes:
    with open_text(path) as file:
        # A few bytes more than the limit, so that the caller sees where the last character ends.
        return file.read(-1 if limit is None else limit + 4)


def _check_file(ref: SourceRef) -> None:
    path = ref.path
    if path.is_file():
        return
    if path.exists():
        raise OuroborosError(
            f"source {ref.text!r}: is {special_kind(path.stat().st_mode)}, from which a text cannot be read twice;"
            " write the text to a file and name that"
        )
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        raise OuroborosError(f"source {ref.text!r}: no such file, and no directory {str(path.parent)!r}") from None
    hint = nearest(path.name, names) if names else ""
    # "needle.txt" is a file that is not there rather than a misspelt "needle:".
    if not path.suffix and nearest(ref.text, BUILT_IN).startswith("; did"):
        hint = nearest(ref.text, BUILT_IN)
    if not hint.startswith("; did"):
        hint = " (a Hugging Face data set is written 'hf:NAME')"
    raise OuroborosError(f"source {ref.text!r}: no such file or directory{hint}")
