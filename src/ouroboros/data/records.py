"""Records: json lines, json arrays, parquet files and Hugging Face streams, each record as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ouroboros.config import DataSpec
from ouroboros.data.formats import TextFormat
from ouroboros.data.textfile import open_text, text_suffix
from ouroboros.errors import OuroborosError, first_line


class StreamError(OuroborosError):
    """A stream that broke or could not be opened; it may work when opened again."""


class Record(NamedTuple):
    """The text of one record, None where it has none."""

    place: int
    """Line or row, from 1."""
    text: str | None
    data: bytes | None
    """``text`` in UTF-8."""
    group: str | None
    answers: tuple[tuple[int, int], ...] | None = None
    """Bytes from and to of what is an answer, see :class:`~ouroboros.data.formats.Rendered`."""
    bad: str | None = None
    """Why a record that was to be left out could not be read."""


@dataclass
class Skip:
    """What readers leave out."""

    left: int = 0
    """Records that are still to be passed over; readers count it down."""
    bad: bool = False
    """Whether a record that cannot be read is handed on as such, where it would otherwise be an error."""


def read_records(path: Path, form: TextFormat, skip: Skip | None = None) -> Iterator[Record]:
    """The records of a ``.jsonl``, ``.json`` or ``.parquet`` file in order, without the first ``skip.left``.

    Lines that are passed over are not parsed, row groups of parquet not read. ``skip`` counts down.

    Raises:
        OuroborosError: not readable, not JSON or parquet, a record without a column of ``form`` or with something
            else than text there, unless ``skip.bad``; names file and line or row.
    """
    skip = skip or Skip()
    try:
        if text_suffix(path) == ".parquet":
            yield from _read_parquet(path, form, skip)
        elif _is_array(path):
            yield from _read_array(path, form, skip)
        else:
            yield from _read_lines(path, form, skip)
    except OSError as error:
        raise OuroborosError(f"file {str(path)!r}: cannot be read: {error.strerror or first_line(error)}") from error


def _record(load: Callable[[], Any], form: TextFormat, place: int, where: str, leave_out: bool) -> Record:
    """The record whose columns ``load`` gives."""
    try:
        return _made(load(), form, place, where)
    except OuroborosError as error:
        if leave_out:
            return Record(place, None, None, None, bad=str(error))
        # A fault of the first record is one of the format rather than of the record.
        hint = "; data.skip_bad_records leaves such records out" if place > 1 else ""
        raise OuroborosError(f"{error}{hint}") from error.__cause__


def _made(value: Any, form: TextFormat, place: int, where: str) -> Record:
    if not isinstance(value, dict):
        raise OuroborosError(f"{where}: expected an object with columns, got {type(value).__name__}")
    found = form.render(value, where)
    if found is None:
        return Record(place, None, None, None)
    text, answers = found
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise OuroborosError(f"{where}: its text has an unpaired surrogate at character {error.start}") from None
    if answers and len(data) != len(text):
        answers = tuple((len(text[:start].encode()), len(text[:end].encode())) for start, end in answers)
    return Record(place, text, data, form.group_of(value, where), answers)


def _is_array(path: Path) -> bool:
    """Whether a ``.json`` file is one array; otherwise it is read as json lines."""
    if text_suffix(path) != ".json":
        return False
    with open_text(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _read_lines(path: Path, form: TextFormat, skip: Skip) -> Iterator[Record]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            if skip.left:
                skip.left -= 1
                continue
            where = f"{path}:{number}"
            yield _record(partial(_parse, line, where), form, number, where, skip.bad)


def _read_array(path: Path, form: TextFormat, skip: Skip) -> Iterator[Record]:
    with open_text(path) as file:
        values = _parse(file.read(), str(path))
    passed = min(skip.left, len(values))
    skip.left -= passed
    for number, value in enumerate(values[passed:], passed + 1):
        yield _record(lambda value=value: value, form, number, f"{path}: record {number}", skip.bad)


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deep
        raise OuroborosError(f"{where}: not JSON: {first_line(error)}") from None


def _read_parquet(path: Path, form: TextFormat, skip: Skip) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [_root(column, names) for column in (*form.columns, *filter(None, [form.group]))] or names
            for column in wanted:
                if column not in names:
                    raise form.missing(column, names, str(path))
            row, groups = 0, list(range(file.metadata.num_row_groups))
            while groups and file.metadata.row_group(groups[0]).num_rows <= skip.left:
                size = file.metadata.row_group(groups.pop(0)).num_rows
                row, skip.left = row + size, skip.left - size
            for batch in file.iter_batches(columns=list(dict.fromkeys(wanted)), row_groups=groups) if groups else ():
                passed = min(skip.left, batch.num_rows)
                row, skip.left = row + passed, skip.left - passed
                for value in batch.slice(passed).to_pylist():
                    row += 1
                    yield _record(lambda value=value: value, form, row, f"{path}: row {row}", skip.bad)
    except pyarrow.ArrowException as error:
        raise OuroborosError(f"{path}: not a readable parquet file: {first_line(error)}") from error


def _root(column: str, names: Sequence[str]) -> str:
    """The column of a file that holds ``column``: itself, or the one that its name begins with."""
    start = column.partition(".")[0]
    return start if column not in names and start in names else column


def read_hub(text: str, spec: DataSpec, form: TextFormat, start: int = 0) -> Iterator[tuple[str, Record]]:
    """Stream ``hf:NAME``, ``hf:NAME:CONFIG`` or ``hf:NAME:CONFIG:SPLIT`` (split ``train`` by default).

    Yields:
        (``NAME:row`` with rows from 1, the record), from row ``start`` + 1 on.

    Raises:
        StreamError: no such data set, no network, the stream broke.
        OuroborosError: neither ``data.stream`` nor ``data.max_bytes``; a row without a column of ``form``.
    """
    name, config, split = (*text.removeprefix("hf:").split(":"), "", "")[:3]
    if not name:
        raise OuroborosError(f"source {text!r}: no name after 'hf:'; write 'hf:OWNER/NAME'")
    if spec.max_bytes is None and not spec.stream:
        raise OuroborosError(f"source {text!r}: needs data.stream or data.max_bytes, for example 10000000")
    for number, row in enumerate(_hub_rows(text, name, config or None, split or "train", start), start + 1):
        where = f"source {text!r}: row {number}"
        yield f"{name}:{number}", _record(lambda row=row: row, form, number, where, spec.skip_bad_records)


def _hub_rows(text: str, name: str, config: str | None, split: str, start: int) -> Iterable[Any]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        yield from rows.skip(start) if start else rows
    except Exception as error:  # network, hub and parser errors share no base class; the user needs one line
        reason = first_line(error, otherwise="")
        raise StreamError(f"source {text!r}: cannot be streamed: {type(error).__name__}: {reason}") from error
