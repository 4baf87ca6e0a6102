"""Conversations told by their content: records with a list of turns and no text."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from ouroboros.config import DataSpec
from ouroboros.data.formats import PublishedFormat, chat_column
from ouroboros.data.records import read_records
from ouroboros.data.sources import SourceRef, is_records, parse_source, source_files
from ouroboros.errors import OuroborosError

logger = logging.getLogger(__name__)


def name_formats(spec: DataSpec, *, quiet: bool = False) -> DataSpec:
    """``spec`` with ``@messages`` or ``@conversations`` behind each source that needs it and has no format.

    Only the first record is looked at, of several files that of the first one with records. A source that cannot be
    read stays as it is: who reads it says why.
    """
    return dataclasses.replace(spec, sources=tuple(_named(text, spec.text_field, quiet) for text in spec.sources))


def _named(text: str, text_field: str, quiet: bool) -> str:
    if text.startswith("mix:"):
        return text
    with contextlib.suppress(OuroborosError):
        ref = parse_source(text)
        form = _format_of(ref, text_field) if ref.format is None else None
        if form is not None:
            weight = "" if ref.weight == 1 else f"={ref.weight!r}"
            if not quiet:
                logger.warning(
                    "source %r: has conversations and no %r, read as %s@%s", text, text_field, ref.text, form
                )
            return f"{ref.text}@{form}{weight}"
    return text


def _format_of(ref: SourceRef, text_field: str) -> str | None:
    look = _Look()
    records = (
        record for _, path in source_files(ref, quiet=True) if is_records(path) for record in read_records(path, look)
    )
    next(records, None)
    return chat_column(look.seen[0], text_field) if look.seen else None


class _Look(PublishedFormat):
    """Keeps the records that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "seen", [])

    seen: list[Mapping[str, Any]]

    def render(self, record: Mapping[str, Any], where: str) -> None:
        self.seen.append(record)
