"""Train, validation and test: decided by content, so that no text is on both sides.

With enough documents each goes by its sha256: the first 53 bits, read as a binary fraction u in [0, 1), give
validation for u < valid, test for u < valid + test, training otherwise. So copies land together, in any source and any
order. Documents of a group (rewrites of one problem) go by the sha256 of the group instead. A source of few documents
is cut: its end is the test part, what precedes it the validation part; few groups are ranked by their sha256. Streams
are never cut, since most of their documents are not known yet.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ouroboros.data.documents import character_floor
from ouroboros.data.records import Document
from ouroboros.errors import OuroborosError, check

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
_MIN_EXPECTED = 2
"""Documents a split must expect to get, for a split by hash; else the source is cut."""
_NEWLINE_REACH = 4096


@dataclass(frozen=True, slots=True)
class Span:
    """A document or a part of one: bytes ``start`` to ``end`` of the text whose sha256 is ``parent``."""

    document: Document
    digest: bytes
    """sha256 of the bytes of ``document``; equal to ``parent`` for a whole document."""
    parent: bytes
    start: int
    end: int


@dataclass(frozen=True)
class Splits:
    """The three parts of a source."""

    train: tuple[Span, ...]
    valid: tuple[Span, ...]
    test: tuple[Span, ...]

    def documents(self, split: str) -> list[Document]:
        """The documents of the part named ``train``, ``valid`` or ``test``."""
        return [span.document for span in getattr(self, split)]


def fraction_of(data: bytes) -> float:
    """Where a content lies in [0, 1): the first 53 bits of its sha256 as a binary fraction."""
    return (int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 11) / 2**53


def part_of(document: Document, valid_fraction: float, test_fraction: float) -> Literal["train", "valid", "test"]:
    """The part a document belongs to by its content alone, or by its group's."""
    place = fraction_of(_decider(document))
    return "valid" if place < valid_fraction else "test" if place < valid_fraction + test_fraction else "train"


def _decider(document: Document) -> bytes:
    return document.data if document.group is None else document.group


def split_documents(
    documents: Iterable[Document], valid_fraction: float, test_fraction: float, *, allow_cut: bool = True
) -> Splits:
    """Split the documents of one source; a fraction of 0 leaves that part empty.

    Without ``allow_cut`` every document is left to :func:`part_of`, as streams need it. Too little text for the parts
    asked for is an error, and so is text on both sides (a defect, checked always).
    """
    docs = [document for document in documents if document.data]
    wanted = [fraction for fraction in (valid_fraction, test_fraction) if fraction > 0]
    splits = _in_parts(docs, [part_of(document, valid_fraction, test_fraction) for document in docs])
    total = sum(len(document.data) for document in docs)
    enough = not wanted or min(wanted) * len(docs) >= _MIN_EXPECTED
    missing = (valid_fraction > 0 and not splits.valid) or (test_fraction > 0 and not splits.test)
    # One huge document in a held-out part would starve training.
    starved = 2 * sum(len(span.document.data) for span in splits.train) < total
    if not allow_cut:
        check(
            bool(splits.train) and not missing,
            f"the {len(docs)} documents of {total} bytes at its head give no held-out or no training part, and a stream"
            " is divided by whole documents; raise data.valid_fraction (or data.test_fraction) or data.max_bytes",
        )
    elif wanted and (not enough or missing or starved):
        # A cut could part the documents of a group.
        few = _by_cut if all(document.group is None for document in docs) else _by_group
        splits = few(docs, valid_fraction, test_fraction)
    check_disjoint([splits])
    return splits


def check_disjoint(sources: Iterable[Splits], names: Iterable[str] = ()) -> None:
    """Refuse held-out text of any source in the training part of any source: the same bytes, or overlapping parts of
    one document."""
    sources, labels = list(sources), list(names)
    # By the sha256 of a whole document, or of a part: where in it, and of which source.
    train: dict[bytes, list[tuple[float, float, int]]] = {}
    for index, splits in enumerate(sources):
        for span in splits.train:
            train.setdefault(span.parent, []).append((span.start, span.end, index))
            train.setdefault(span.digest, []).append((-math.inf, math.inf, index))
    for index, splits in enumerate(sources):
        for span in (*splits.valid, *splits.test):
            places = (*train.get(span.parent, ()), *train.get(span.digest, ()))
            shared = [i for start, end, i in places if start < span.end and span.start < end]
            if shared:
                where = f" (held out of {labels[index]!r}, training part of {labels[shared[0]]!r})" if labels else ""
                raise OuroborosError(
                    f"data.sources: the text of {span.document.name!r} is both held out and in training{where};"
                    " name each text once"
                )


def _by_group(docs: list[Document], valid_fraction: float, test_fraction: float) -> Splits:
    """Few groups: ranked by their sha256, the first ones validation, the last ones test, each at least one group."""
    sizes: Counter[bytes] = Counter()
    for document in docs:
        sizes[_decider(document)] += len(document.data)
    ranked = sorted(sizes, key=fraction_of)
    names = dict.fromkeys(ranked, "train")
    for name, fraction, order in (("valid", valid_fraction, ranked), ("test", test_fraction, ranked[::-1])):
        taken = 0
        for group in order:
            if taken >= sizes.total() * fraction:
                break
            taken += sizes[group]
            names[group] = name
    wanted = {"train", *(["valid"] if valid_fraction else []), *(["test"] if test_fraction else [])}
    check(
        wanted <= set(names.values()),
        f"too little text: {len(ranked)} groups of documents cannot give every part one",
    )
    return _in_parts(docs, [names[_decider(document)] for document in docs])


def _in_parts(docs: list[Document], names: Iterable[str]) -> Splits:
    """Documents by the name of their part. A text of two groups stays in the later part of train, valid, test only."""
    spans = [(_whole(document), SPLITS.index(name)) for document, name in zip(docs, names, strict=True)]
    last: dict[bytes, int] = {}
    for span, part in spans:
        last[span.digest] = max(part, last.get(span.digest, 0))
    kept = [(span, part) for span, part in spans if part == last[span.digest]]
    if len(kept) < len(spans):
        logger.info("dropped %d copies of held-out documents", len(spans) - len(kept))
    return Splits(*(tuple(span for span, part in kept if part == index) for index in range(len(SPLITS))))


def _whole(document: Document) -> Span:
    digest = hashlib.sha256(document.data).digest()
    return Span(document, digest, digest, 0, len(document.data))


def _by_cut(docs: list[Document], valid_fraction: float, test_fraction: float) -> Splits:
    spans = list({span.parent: span for span in map(_whole, docs)}.values())
    if len(spans) < len(docs):
        logger.info("dropped %d exact copies of documents", len(docs) - len(spans))
    total = sum(span.end for span in spans)
    test_from = total - round(total * test_fraction)
    valid_from = test_from - round(total * valid_fraction)
    valid_cut, test_cut = _boundary(spans, valid_from), _boundary(spans, test_from)
    bounds = ((0, valid_cut), (valid_cut, test_cut), (test_cut, total))
    parts = [tuple(_between(spans, *place)) for place in bounds]
    for name, fraction, part in zip(SPLITS, (1.0, valid_fraction, test_fraction), parts, strict=True):
        check(
            fraction == 0 or bool(part),
            f"too little text: the {name} part of {total} bytes would be empty; use a longer text, or set"
            f" data.{name}_fraction to 0 for none",
        )
    return Splits(*parts)


def _boundary(spans: list[Span], position: int) -> int:
    """The line start nearest to ``position`` in the joined documents, or a character boundary if none is near."""
    base = 0
    for data in (span.document.data for span in spans):
        here, base = position - base, base + len(data)
        if here < len(data):
            reach = min(_NEWLINE_REACH, len(data) // 100)
            before = data.rfind(b"\n", max(0, here - reach), here) + 1
            after = data.find(b"\n", here, here + reach) + 1
            found = [place for place in (before, after) if 0 < place < len(data)] if here else []
            near = min(found, key=lambda place: abs(place - here), default=character_floor(data, here))
            return base - len(data) + near
    return base


def _between(spans: list[Span], start: int, end: int) -> Iterator[Span]:
    """The parts of documents that lie in bytes ``start`` to ``end`` of all documents joined."""
    base = 0
    for span in spans:
        low, high = max(start - base, 0), min(end - base, span.end)
        base += span.end
        if low >= high:
            continue
        if high - low == span.end:
            yield span
        else:
            part = replace(span.document.part(low, high), name=f"{span.document.name}[{low}:{high}]")
            yield Span(part, hashlib.sha256(part.data).digest(), span.parent, low, high)
