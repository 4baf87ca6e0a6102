"""Windows of tokens from sources that are read while training runs, without end and without storing them.

Each source is one stream of ids: its training documents in the order of the source, each after its end-of-text id,
again from the first document when the source ends. Window ``w`` of a source is ids ``w*T`` to ``w*T + T`` inclusive,
as for stored text, so every id but the very first is a target once in every pass. Windows are mixed by
:func:`ouroboros.data.loader.choose_source`: weights are shares of *tokens*, where drawing documents would give sources
of long documents more than their weight.

The position of a source is the document at which its unread ids begin, how many ids of it are used, and the pass. All
that was read ahead is read again from there, so a restored loader gives the same batches, whatever failed before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import sleep
from typing import Any

import numpy as np

from ouroboros.config import to_dict
from ouroboros.data.documents import count_document, judged_documents
from ouroboros.data.loader import Loader, WindowLoader
from ouroboros.data.masks import Masks, ends_answered, hide
from ouroboros.data.prepared import PreparedData
from ouroboros.data.records import Anchor, Document
from ouroboros.data.splits import part_of
from ouroboros.data.textfile import StreamError
from ouroboros.data.token_shards import encode_documents
from ouroboros.errors import OuroborosError, check, first_line

logger = logging.getLogger(__name__)

MAX_FAILURES = 8
"""Failures of a source in a row, without a document between them, that end the run: after a minute of waiting."""
FIRST_WAIT = 0.5
"""Seconds between a failure and the next attempt; each further failure in a row doubles them."""
BLOCK_DOCUMENTS = 64
BLOCK_BYTES = 1 << 18
"""Documents are tokenised together until there are this many, or this many bytes of them."""


@dataclass(frozen=True)
class Place:
    """A document of a source, and what had been counted before it."""

    record: int = 0
    """Number of the document in the source, from 0, dropped ones counted too."""
    epoch: int = 0
    """Passes over the source before this one."""
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Documents before it, over all passes: ``read``, ``kept`` by the filters, ``held out`` of these, and one entry
    per reason that documents were dropped for."""
    anchor: Anchor | None = None
    """A place at or before it that a hub stream can be opened at."""


class SourceStream:
    """The ids of the training documents of one source, endlessly, from a place on; windows are looked at, then passed.

    A failed reader is opened again; ``restarts`` says how often.
    """

    def __init__(self, loader: StreamLoader, source: int, position: Mapping[str, Any]) -> None:
        data, self._loader = loader.data, loader
        self._ref, self._spec, self._tokenizer = data.sources[source], data.reading_spec, data.tokenizer
        self.name = self._ref.text
        anchor = position.get("anchor")
        self._start = Place(
            *(position["record"], position["epoch"], position["counts"]), Anchor(*anchor) if anchor else None
        )
        self._offset, self.restarts = position["offset"], position["restarts"]
        # Where the reader is, which is ahead of the ids that are used.
        self._place = self._start
        self._documents: Iterator[Document] | None = None
        self._failures = 0
        self._has_begun = self._has_text = False
        self._ids = np.zeros(0, dtype=np.int32 if loader.masks is None else np.int64)
        # Whether the end of the last document is learned. After a restored position it does not matter: the first
        # end-of-text id was a target before.
        self._ended = False
        # The documents whose ids are there, and how many ids each has; of those of the first, ``offset`` are used.
        self._heads: deque[tuple[Place, int]] = deque()
        # Read, not tokenised yet; they stay here if the source fails for good.
        self._taken: list[tuple[Place, Document]] = []

    def position(self) -> dict[str, Any]:
        """The place of the unread ids, how many ids of its document are used, and restarts, as JSON values."""
        place = self._heads[0][0] if self._heads else self._start
        found = {"record": place.record, "epoch": place.epoch, "counts": dict(place.counts)}
        anchor = {} if place.anchor is None else {"anchor": list(place.anchor)}
        return {**found, **anchor, "offset": self._offset, "restarts": self.restarts}

    def window(self, start: int, length: int) -> np.ndarray:
        """``length`` ids, ``start`` ids after the position, which stays."""
        self.fill(start + length)
        return self._ids[self._offset + start :][:length]

    def fill(self, count: int) -> None:
        """Read until ``count`` ids after the position are there. A source that cannot be opened, fails again and again
        or has no training document is an error that names it."""
        while len(self._ids) < self._offset + count:
            self._ids = np.concatenate([self._ids, *self._block()])

    def advance(self, count: int) -> None:
        """Pass ``count`` ids, of which one more must have been read."""
        self._offset += count
        while self._offset >= self._heads[0][1]:
            size = self._heads.popleft()[1]
            self._ids = self._ids[size:]
            self._offset -= size

    def _block(self) -> list[np.ndarray]:
        """The ids of the next documents, an end-of-text id before each."""
        size = sum(len(document.data) for _, document in self._taken)
        while len(self._taken) < BLOCK_DOCUMENTS and size < BLOCK_BYTES:
            self._taken.append(self._next())
            size += len(self._taken[-1][1].data)
        names = [f"source {self.name!r}: {document.name}" for _, document in self._taken]
        documents = [document for _, document in self._taken]
        texts = [document.data for document in documents]
        encoded = list(encode_documents(self._tokenizer, documents, texts, names))
        check(
            bool(self._heads) or self._offset <= len(encoded[0]),
            f"{names[0]}: has fewer tokens than were used of it; the source has changed since the checkpoint",
        )
        eos = np.array([self._tokenizer.eos_id], dtype=np.int32)
        parts, ended, masks = [], self._ended, self._loader.masks
        for (_, document), ids, name in zip(self._taken, encoded, names, strict=True):
            part = np.concatenate([eos, ids])
            if masks is not None:
                mask = masks.mask(ids, document.data, document.answers, name)
                part = hide(part, np.concatenate([[ended], mask]))
                ended = ends_answered(document.data, document.answers)
            parts.append(part)
        # Nothing below fails.
        self._heads += [(place, len(part)) for (place, _), part in zip(self._taken, parts, strict=True)]
        self._ended = ended
        self._taken.clear()
        return parts

    def _next(self) -> tuple[Place, Document]:
        """The next training document."""
        while True:
            document = self._read()
            if document is None:
                check(
                    self._has_text,
                    f"source {self.name!r}: a whole pass gave no training document; everything in it is filtered out,"
                    " held out or empty",
                )
                self._documents, self._has_text = None, False
                self._place = Place(0, self._place.epoch + 1, self._place.counts)
                logger.info("source %r: begins again, pass %d", self.name, self._place.epoch + 1)
                continue
            place, counts = self._place, Counter(self._place.counts)
            count_document(counts, document, self._ref)
            is_training = document.dropped is None and self._loader.is_training(document)
            if document.dropped is None and not is_training:
                counts["held out"] += 1
            self._place = Place(document.index + 1, place.epoch, counts, document.anchor or place.anchor)
            if is_training:
                self._has_text = True
                return dataclasses.replace(place, record=document.index), document

    def _read(self) -> Document | None:
        """The next document of any part, dropped ones too; None at the end of the source."""
        while True:
            # Whatever is raised leaves the reader unusable, an interruption too.
            documents, self._documents = self._documents, None
            try:
                if documents is None:
                    place = self._place
                    documents = judged_documents(self._ref, self._spec, start=place.record, anchor=place.anchor)
                document = next(documents, None)
                break
            except Exception as error:  # network, hub and parser errors share no base class
                self._fail(error)
        self._documents, self._failures = documents, 0
        check(
            self._has_begun or self._place == Place() or (document is not None and document.dropped is None),
            f"source {self.name!r}: record {self._place.record + 1} is not there any more; the source has changed"
            " since the checkpoint",
        )
        self._has_begun = True
        return document

    def _fail(self, error: Exception) -> None:
        """Wait before the next attempt, or give up: at once if the source was never open, or the text is at fault."""
        is_ours = isinstance(error, OuroborosError)
        if is_ours and not (self._has_begun and isinstance(error, StreamError)):
            raise error
        reason = first_line(error) if is_ours else f"{type(error).__name__}: {first_line(error)}"
        if not self._has_begun:
            raise OuroborosError(f"source {self.name!r}: cannot be opened: {reason}") from error
        self._failures += 1
        where = f"source {self.name!r}: reading record {self._place.record + 1} failed"
        if self._failures >= MAX_FAILURES:
            raise OuroborosError(f"{where} {MAX_FAILURES} times in a row: {reason}") from error
        wait = FIRST_WAIT * 2 ** (self._failures - 1)
        logger.warning("%s (%s); opening it again in %g s", where, reason, wait)
        sleep(wait)
        self.restarts += 1


class StreamLoader(Loader):
    """Batches of windows over sources that are read as training goes; its position is saved and restored exactly.

    Sources are opened at the first use of a batch: one that cannot be read then is an error at once, one that breaks
    later is opened again at the same record (see :data:`MAX_FAILURES`). Every process reads the whole stream and takes
    its rows of each global batch, so that any number of processes sees the same batches. The order is that of the
    sources; ``seed`` only marks whose position it is.
    """

    def _open(self, prepared: PreparedData) -> None:
        self.data = prepared
        self.masks = Masks(prepared.tokenizer) if prepared.spec.loss == "answers" else None
        held_out = [document for split in ("valid", "test") for document in prepared.documents(split)]
        self._held_out = {hashlib.sha256(document).digest() for document in held_out}
        start = {"record": 0, "epoch": 0, "counts": {}, "offset": 0, "restarts": 0}
        self._streams = [SourceStream(self, source, start) for source in range(len(self.names))]

    def is_training(self, document: Document) -> bool:
        """Whether a document belongs to the training part."""
        part = part_of(document, self.data.spec.valid_fraction, self.data.spec.test_fraction)
        # A copy of a held-out text may belong to another group.
        return part == "train" and hashlib.sha256(document.data).digest() not in self._held_out

    def sources(self) -> list[dict[str, Any]]:
        """Where each source is, for people: its name, ``record``, ``epoch``, ``counts``, ``offset``, ``restarts``."""
        places = [{"source": name, **stream.position()} for name, stream in zip(self.names, self._streams, strict=True)]
        return [{key: value for key, value in place.items() if key != "anchor"} for place in places]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "positions": [stream.position() for stream in self._streams]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        is_stream = state.get("positions") is not None
        check(is_stream, "data position: lacks positions; it is of stored data, not of a stream")
        super().load_state_dict(state)
        self._streams = [SourceStream(self, source, saved) for source, saved in enumerate(state["positions"])]

    def _identity(self) -> dict[str, Any]:
        prepared, spec = self.data, self.data.spec
        return {
            **super()._identity(),
            "tokenizer": prepared.tokenizer.fingerprint,
            "sources": [ref.text if ref.format is None else f"{ref.text}@{ref.format}" for ref in prepared.sources],
            "text_field": spec.text_field,
            "filters": to_dict(spec.filters),
            **({} if spec.loss == "all" else {"loss": spec.loss}),
            "held_out": [spec.valid_fraction, spec.test_fraction],
        }

    def _window(self, source: int, draw: int) -> np.ndarray:
        start = (draw - self._counts[source]) * self.sequence_length
        return self._streams[source].window(start, self.sequence_length + 1)

    def look_ahead(self) -> None:
        """Read what the next batch needs, so that :meth:`next_batch` cannot fail; the position stays."""
        self._fill(self._draw()[1])

    def _fill(self, counts: list[int]) -> list[tuple[SourceStream, int]]:
        """Read what windows up to ``counts`` need, and the id behind them; the sources with what they pass of each."""
        drawn = zip(self._streams, counts, self._counts, strict=True)
        passed = [(stream, (new - old) * self.sequence_length) for stream, new, old in drawn if new > old]
        for stream, size in passed:
            stream.fill(size + 1)
        return passed

    def _advance(self, counts: list[int]) -> None:
        # All sources are read before the first one moves, so they move together or not at all.
        for stream, size in self._fill(counts):
            stream.advance(size)
        super()._advance(counts)


def open_loader(prepared: PreparedData, **options: int) -> Loader:
    """The loader of ``prepared``: over its stored text, or over its sources as they are streamed."""
    return (StreamLoader if prepared.spec.stream else WindowLoader)(prepared, **options)
