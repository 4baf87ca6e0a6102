"""Text in records: json lines, json arrays, parquet files and Hugging Face streams."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ouroboros.config import DataSpec
from ouroboros.errors import OuroborosError, nearest

logger = logging.getLogger(__name__)


def read_records(path: Path, field: str) -> Iterator[tuple[int, bytes]]:
    """The text of each record of a ``.jsonl``, ``.json`` or ``.parquet`` file: (line or row from 1, UTF-8 bytes).

    Raises:
        OuroborosError: not readable, not JSON or parquet, a record without ``field``; names file and line or row.
    """
    try:
        if path.suffix.lower() == ".parquet":
            yield from _read_parquet(path, field)
        elif _is_array(path):
            yield from _read_array(path, field)
        else:
            yield from _read_lines(path, field)
    except OSError as error:
        raise OuroborosError(f"file {str(path)!r}: cannot be read: {error.strerror or error}") from error


def record_text(record: Any, field: str, where: str) -> bytes:
    """``record[field]`` as UTF-8 bytes; ``where`` names file and line in errors."""
    if not isinstance(record, dict):
        raise OuroborosError(f"{where}: expected an object with a field {field!r}, got {type(record).__name__}")
    if field not in record:
        raise OuroborosError(f"{where}: no field {field!r} (data.text_field){nearest(field, map(str, record))}")
    text = record[field]
    if not isinstance(text, str):
        raise OuroborosError(f"{where}: field {field!r} holds {_kind(text)}, not text")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise OuroborosError(f"{where}: field {field!r} has an unpaired surrogate at character {error.start}") from None


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _is_array(path: Path) -> bool:
    """Whether a ``.json`` file is one array; otherwise it is read as json lines."""
    if path.suffix.lower() != ".json":
        return False
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _read_lines(path: Path, field: str) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, record_text(_parse(line, f"{path}:{number}"), field, f"{path}:{number}")


def _read_array(path: Path, field: str) -> Iterator[tuple[int, bytes]]:
    for number, record in enumerate(_parse(path.read_bytes(), str(path)), 1):
        yield number, record_text(record, field, f"{path}: record {number}")


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise OuroborosError(f"{where}: not JSON: {error}") from None


def _read_parquet(path: Path, field: str) -> Iterator[tuple[int, bytes]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise OuroborosError(f"{path}: no column {field!r} (data.text_field){nearest(field, names)}")
            row = 0
            for batch in file.iter_batches(columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield row, record_text({field: value}, field, f"{path}: row {row}")
    except pyarrow.ArrowException as error:
        raise OuroborosError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from error


def read_hub(text: str, spec: DataSpec) -> Iterator[tuple[str, bytes]]:
    """Stream ``hf:NAME``, ``hf:NAME:CONFIG`` or ``hf:NAME:CONFIG:SPLIT`` (split ``train`` by default).

    Yields:
        (``NAME:row`` from 1, UTF-8 bytes).

    Raises:
        OuroborosError: no ``data.max_bytes``; no such data set, no network; a row without the text field.
    """
    name, config, split = (*text.removeprefix("hf:").split(":"), "", "")[:3]
    if not name:
        raise OuroborosError(f"source {text!r}: no name after 'hf:'; write 'hf:OWNER/NAME'")
    if spec.max_bytes is None:
        raise OuroborosError(f"source {text!r}: a stream needs data.max_bytes, for example 10000000")
    for number, row in enumerate(_hub_rows(text, name, config or None, split or "train"), 1):
        yield f"{name}:{number}", record_text(row, spec.text_field, f"source {text!r}: row {number}")


def _hub_rows(text: str, name: str, config: str | None, split: str) -> Iterable[Any]:
    import datasets

    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # network, hub and parser errors share no base class; the user needs one line
        reason = (str(error).strip().splitlines() or [""])[0]
        raise OuroborosError(f"source {text!r}: cannot be streamed: {type(error).__name__}: {reason}") from error
