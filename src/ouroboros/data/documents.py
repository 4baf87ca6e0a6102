"""The documents of a source: what is read of it, what of that is dropped and why, how much of it is taken.

Bytes are the truth: text files are read as bytes and never altered, but for what :mod:`ouroboros.data.textfile`
decompresses or converts. Documents come in a fixed order (names sorted; records in file order), so a source always has
one fingerprint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from ouroboros.config import DataSpec
from ouroboros.data.filters import Filters
from ouroboros.data.formats import TextFormat, chat_column, find_format
from ouroboros.data.records import BAD, Anchor, Document, document_of, read_hub, read_rows
from ouroboros.data.sources import SourceRef, is_records, parse_source, source_files
from ouroboros.data.templates import source_format
from ouroboros.data.textfile import open_text
from ouroboros.data.token_shards import read_shards, shard_tokenizer
from ouroboros.errors import OuroborosError, check

logger = logging.getLogger(__name__)

HEAD_BYTES = 4_000_000
"""What is read of a stream before training where ``data.max_bytes`` is not set."""
_HOPELESS = 10_000
"""A hub stream of which this many documents were all dropped is not read on: it may have no end."""
_NAMED = 10
"""Records left out as bad that are named, each in a line; all are counted."""


def read_documents(ref: SourceRef, spec: DataSpec, *, counts: Counter[str] | None = None) -> Iterator[Document]:
    """The documents of a source that have text and pass the filters, in order, as far as ``data.max_bytes``.

    The document that crosses that limit is cut, with ``spec.stream`` kept whole instead, because cut it would be
    another text with another split; a limit below the first character is an error. ``counts`` is added what
    :func:`count_document` counts; without it, what was dropped is logged at the end.
    """
    limit = spec.max_bytes or (HEAD_BYTES if spec.stream else None)
    counted: Counter[str] = Counter() if counts is None else counts
    total = 0
    for document in judged_documents(ref, spec, limit=limit):
        count_document(counted, document, None if counts is None else ref)
        if document.dropped:
            continue
        size = len(document.data)
        if limit is not None and not spec.stream and total + size > limit:
            document = document.part(0, character_floor(document.data, limit - total))
        total += len(document.data)
        if document.data:
            yield document
        if limit is not None and (total >= limit or len(document.data) < size):
            break
    if counts is None and counted["read"] > counted["kept"]:
        logger.info("source %r: %s", ref.text, describe_counts(counted))
    check(total > 0, f"source {ref.text!r}: its first character has more than data.max_bytes = {limit} bytes")


def judged_documents(
    ref: SourceRef, spec: DataSpec, *, start: int = 0, anchor: Anchor | None = None, limit: int | None = None
) -> Iterator[Document]:
    """Every document of a source in order; one that has no text or is filtered out says so (:attr:`Document.dropped`).

    Filters do not apply to a plain text file named by itself, which the user chose, nor to a text that is made.

    Args:
        ref: the source.
        spec: text field and filters.
        start: records and files passed over, cheaply; positions (:attr:`Document.index`) count them.
        anchor: a place of a hub stream at or before ``start``, see :attr:`Document.anchor`.
        limit: bytes that are wanted: a file that is neither filtered nor streamed is read no further.

    Raises:
        OuroborosError: missing, unreadable or empty source; a record without a column; every document dropped.
        StreamError: a hub stream that broke.
    """
    filters = Filters(spec.filters) if ref.is_filtered else None
    # The head of a stream has been read, and said of it what there is to say.
    quiet = spec.stream and limit is None
    counts: Counter[str] = Counter()
    if ref.is_hub:
        documents = read_hub(ref.text, spec, _form_of(ref, spec), start, anchor)
    else:
        documents = _read(ref, spec, start, None if filters or spec.stream else limit, quiet)
    for index, document in enumerate(documents, start):
        dropped = document.dropped or (None if document.data else "empty")
        if filters and not dropped:
            dropped = filters.reason(document.data.decode("utf-8", "replace"))
        counts.update(("read", dropped or "kept"))
        yield dataclasses.replace(document, index=index, dropped=dropped)
        if ref.is_hub and counts["read"] >= _HOPELESS and not counts["kept"]:
            break
    if counts["kept"] or (start and counts["read"] < _HOPELESS):
        return
    check(counts["read"] > counts["empty"], f"source {ref.text!r}: is empty; it needs some text")
    raise OuroborosError(
        f"source {ref.text!r}: every document was dropped ({describe_counts(counts)});"
        " see data.filters and the format of the source"
    )


def count_document(counts: Counter[str], document: Document, ref: SourceRef | None = None) -> None:
    """Count a document as ``read`` and as ``kept`` or by the reason it was dropped for. The first bad records are
    named, once where ``counts`` are handed on from pass to pass of a stream."""
    if document.dropped == BAD and ref is not None and counts[BAD] < _NAMED:
        logger.warning("source %r: left out (data.skip_bad_records): %s", ref.text, document.fault)
    counts.update(("read", document.dropped or "kept"))


def describe_counts(counts: Mapping[str, int]) -> str:
    """``10 read, 7 kept, 2 short, 1 no text`` for the counts of :func:`count_document`."""
    reasons = sorted(set(counts) - {"read", "kept"}, key=lambda name: (-counts[name], name))
    return ", ".join(f"{counts[name]:,} {name}" for name in ("read", "kept", *reasons))


def character_floor(data: bytes, position: int) -> int:
    """The largest UTF-8 character boundary <= ``position`` (``position`` itself in binary data)."""
    for back in range(4):
        place = position - back
        if place <= 0 or place >= len(data) or data[place] & 0xC0 != 0x80:
            return max(place, 0)
    return position


def name_formats(spec: DataSpec, *, quiet: bool = False) -> DataSpec:
    """``spec`` with ``@messages`` or ``@conversations`` behind each source that needs it and has no format.

    The first record tells them: one with a list of turns and no text. A source that cannot be read stays as it is,
    because who reads it says why.
    """
    return dataclasses.replace(spec, sources=tuple(_named(text, spec.text_field, quiet) for text in spec.sources))


def _named(text: str, text_field: str, quiet: bool) -> str:
    with contextlib.suppress(OuroborosError):
        ref = parse_source(text)
        files = () if ref.format else (path for _, path in source_files(ref, quiet=True) if is_records(path))
        first = next((load() for path in files for _, _, load in read_rows(path)), None)
        form = chat_column(first, text_field) if isinstance(first, dict) else None
        if form is not None:
            if not quiet:
                logger.warning(
                    "source %r: has conversations and no %r, read as %s@%s", text, text_field, ref.text, form
                )
            return f"{ref.text}@{form}" + ("" if ref.weight == 1 else f"={ref.weight!r}")
    return text


def _form_of(ref: SourceRef, spec: DataSpec) -> TextFormat:
    if ref.format:
        return source_format(find_format(ref.format), spec)
    return TextFormat("data.text_field", f"{{{spec.text_field}}}")


def _read(ref: SourceRef, spec: DataSpec, start: int, limit: int | None, quiet: bool) -> Iterator[Document]:
    """What a source on this machine holds, before it is judged; what is passed over is not parsed."""
    files = source_files(ref, quiet=quiet)
    check(
        not ref.format or any(is_records(path) for _, path in files),
        f"source {ref.text!r}: has no records (jsonl, json, parquet), so it cannot have the format {ref.format!r}",
    )
    form, said = _form_of(ref, spec), set()

    def text(name: str, path: Path) -> Document:
        with open_text(path) as (file, note):
            # A few bytes more than the limit, so that the caller sees where the last character ends.
            data = file.read(-1 if limit is None else limit + 4)
        if note and note not in said and not quiet:
            logger.warning("source %r: %s: %s (the first such file)", ref.text, note, name)
            said.add(note)
        return Document(name, data)

    def readings() -> Iterator[Callable[[], Document]]:
        made = ref.made
        if made is not None:
            yield lambda: Document(ref.kind, made())
        if ref.is_shards:
            yield from read_shards(files, shard_tokenizer(spec.tokenizer))
            return
        for name, path in files:
            if is_records(path):
                yield from (
                    partial(document_of, row, name, form, spec.skip_bad_records) for row in read_rows(path, form)
                )
            else:
                yield partial(text, name, path)

    yield from (read() for read in itertools.islice(readings(), start, None))
