"""Records: json lines, json arrays, parquet files and Hugging Face streams, each record as a document.

A reader yields rows, each of which can load its columns; :func:`document_of` makes text of them by a format, and says
of each record that has no text, or cannot be read, why it is left out.
"""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ouroboros.config import DataSpec
from ouroboros.data.formats import TextFormat
from ouroboros.data.textfile import StreamError, open_text, text_suffix
from ouroboros.errors import OuroborosError, check, first_line

BAD, NO_TEXT = "bad record", "no text"
"""Reasons to leave out a record."""
ANCHOR_ROWS = 1000
"""Rows of a hub stream between two anchors."""


class Anchor(NamedTuple):
    """A place in a hub stream that its reader can return to."""

    record: int
    """Rows before it."""
    state: dict[str, Any]
    """The reader's own state there, as JSON values, so that of the files before it nothing is fetched."""


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
    dropped: str | None = None
    """Why it is left out, in a word or two; None: it stays."""
    fault: str | None = None
    """What is wrong with a record that cannot be read."""
    anchor: Anchor | None = None
    """Of some rows of a stream: where it can be opened again without reading what precedes."""
    ids: np.ndarray | None = None
    """Its tokens, where the source has them: see :mod:`ouroboros.data.token_shards`."""

    def part(self, low: int, high: int) -> Document:
        """Bytes ``low`` to ``high`` of this document, by the same name; without ids."""
        answers = self.answers
        if answers is not None:
            cut = ((max(start, low) - low, min(end, high) - low) for start, end in answers)
            answers = tuple((start, end) for start, end in cut if start <= end)
        return replace(self, data=self.data[low:high], answers=answers, ids=None)


Row = tuple[int, str, Callable[[], Any]]
"""A record that has not been parsed: its line or row, from 1; the same with the file, for messages; what gives its
columns, or raises :class:`~ouroboros.errors.OuroborosError` for what is no record."""


def read_rows(path: Path, form: TextFormat | None = None) -> Iterator[Row]:
    """The records of a ``.jsonl``, ``.json`` or ``.parquet`` file in order; of parquet, the columns that ``form`` asks
    for. A file that cannot be read, or is something else, is an error that names it."""
    return _parquet_rows(path, form) if text_suffix(path) == ".parquet" else _json_rows(path)


def read_hub(
    text: str, spec: DataSpec, form: TextFormat, start: int = 0, anchor: Anchor | None = None
) -> Iterator[Document]:
    """Stream ``hf:NAME``, ``hf:NAME:CONFIG`` or ``hf:NAME:CONFIG:SPLIT`` (split ``train`` by default).

    The first document is row ``start`` + 1, looked for from ``anchor`` on if there is one. Every :data:`ANCHOR_ROWS`
    rows a document has an anchor for what follows it. A stream that cannot be read is a :class:`StreamError`.
    """
    import datasets

    name, config, split = (*text.removeprefix("hf:").split(":"), "", "")[:3]
    check(bool(name), f"source {text!r}: no name after 'hf:'; write 'hf:OWNER/NAME'")
    check(
        spec.max_bytes is not None or spec.stream,
        f"source {text!r}: needs data.stream or data.max_bytes, for example 10000000",
    )
    passed = 0 if anchor is None else anchor.record
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        if anchor is not None:
            rows.load_state_dict(anchor.state)
        for number, values in enumerate(itertools.islice(rows, start - passed, None), start + 1):
            row = (number, f"source {text!r}: row {number}", lambda values=values: values)
            document = document_of(row, name, form, spec.skip_bad_records)
            state = rows.state_dict() if number % ANCHOR_ROWS == 0 else None
            yield replace(document, anchor=Anchor(number, state)) if state else document
    except OuroborosError:
        raise
    except Exception as error:  # network, hub and parser errors share no base class; the user needs one line
        reason = first_line(error, otherwise="")
        raise StreamError(f"source {text!r}: cannot be streamed: {type(error).__name__}: {reason}") from error


def document_of(row: Row, name: str, form: TextFormat, leave_out: bool) -> Document:
    """The text of a record, called ``NAME:row``. What is no JSON object, lacks a column of ``form`` or has no text
    there is an error that names file and line or row; with ``leave_out`` it is handed on as dropped."""
    place, where, load = row
    name = f"{name}:{place}"
    try:
        values = load()
        check(isinstance(values, dict), f"{where}: expected an object with columns, got {type(values).__name__}")
        found = form.render(values, where)
        if found is None:
            return Document(name, b"", dropped=NO_TEXT)
        text, answers = found
        data = text.encode()
        if answers and len(data) != len(text):
            answers = tuple((len(text[:start].encode()), len(text[:end].encode())) for start, end in answers)
        group = form.group_of(values, where)
        return Document(name, data, group=group.encode() if group else None, answers=answers)
    except ValueError as error:
        fault = str(error)
        if isinstance(error, UnicodeEncodeError):
            fault = f"{where}: its text has an unpaired surrogate at character {error.start}"
        if leave_out:
            return Document(name, b"", dropped=BAD, fault=fault)
        # A fault of the first record is one of the format rather than of the record.
        hint = "; data.skip_bad_records leaves such records out" if place > 1 else ""
        raise OuroborosError(f"{fault}{hint}") from None


def _json_rows(path: Path) -> Iterator[Row]:
    """Lines; of a ``.json`` file that begins with a bracket, the entries of the array."""
    with open_text(path) as (file, _):
        head = file.peek(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        if text_suffix(path) == ".json" and head.startswith(b"["):
            for number, value in enumerate(_parse(file.read(), str(path)), 1):
                yield number, f"{path}: record {number}", lambda value=value: value
            return
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield number, f"{path}:{number}", partial(_parse, line, f"{path}:{number}")


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deep
        raise OuroborosError(f"{where}: not JSON: {first_line(error)}") from None


def _parquet_rows(path: Path, form: TextFormat | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # The columns that the format reads, those themselves or what their names begin with; if one is missing,
            # all, so that the first record says which.
            names, read = file.schema_arrow.names, () if form is None else (*form.columns, *filter(None, [form.group]))
            found = dict.fromkeys(column if column in names else column.partition(".")[0] for column in read)
            batches = file.iter_batches(columns=list(found) if found and found.keys() <= set(names) else None)
            for row, value in enumerate((value for batch in batches for value in batch.to_pylist()), 1):
                yield row, f"{path}: row {row}", lambda value=value: value
    except pyarrow.ArrowException as error:
        raise OuroborosError(f"{path}: not a readable parquet file: {first_line(error)}") from error
    except OSError as error:
        raise StreamError(f"file {str(path)!r}: cannot be read: {first_line(error)}") from error
