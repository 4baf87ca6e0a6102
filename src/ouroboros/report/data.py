"""What a run's data tells: each source, what was dropped of it and why, and its share of the training tokens."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ouroboros.data.loader import count_windows
from ouroboros.data.prepared import MANIFEST, PreparedData, open_prepared
from ouroboros.data.splits import SPLITS
from ouroboros.errors import OuroborosError
from ouroboros.registry import found, load
from ouroboros.report.text import percent, plural

logger = logging.getLogger(__name__)

_NO_BREAK = chr(0xA0)
_NOT_DROPPED = ("read", "kept", "held out")
_KINDS = {"file": "plain text", "python": "code files", "directory": "files", "glob": "files"}


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long the training documents of a source are, and what a cut into blocks would have lost of them.

    The cut is the published one: blocks within one document, whose last 1 to ``block`` tokens are left over.
    """

    documents: Sequence[int]
    """Entry k: documents of 2^k to 2^(k+1) - 1 tokens, end-of-text token included."""
    lost: Sequence[float]
    """Entry k: of these, the sum over documents of the share of its tokens that is in no block."""
    block: int
    """Tokens."""
    documents_lost: int
    """Documents without a block."""
    tokens_lost: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of a run's data. What is None or empty is not known."""

    name: str
    """As the user wrote it, without format and weight."""
    label: str
    """Short, for charts."""
    format: str
    weight: float
    """Share of the training tokens that was asked for."""
    splits: Mapping[str, Mapping[str, int]]
    """By split: ``documents``, ``bytes`` and ``tokens``; of a stream those of the head that was read ahead."""
    read: int | None = None
    """Documents, of a stream those that training has read so far, as the next three."""
    kept: int | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    """By reason."""
    held_out: int | None = None
    """Of a stream: kept documents that training passed over."""
    drawn: int | None = None
    """Training tokens so far."""
    drawn_share: float | None = None
    published_share: float | None = None
    """Share of the training tokens in the published pipeline: see :func:`published_shares_of`."""
    passes: float | None = None
    """How often the source has been read; of a stream whole passes."""
    restarts: int | None = None
    """Of a stream: how often it was opened again after a failure."""
    lengths: Lengths | None = None

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Label and value of each line about the source."""
        lines = [("format", self.format)]
        if self.read is not None and self.kept is not None:
            lines.append(("documents read", f"{self.read:,}"))
            lines.append(("kept", f"{self.kept:,} ({percent(self.kept / max(self.read, 1))})"))
            for reason, count in sorted(self.dropped.items(), key=lambda item: (-item[1], item[0])):
                lines.append((f"dropped: {reason}", f"{count:,} ({percent(count / max(self.read, 1))})"))
        if self.held_out is not None:
            lines.append(("held out of these", f"{self.held_out:,}"))
        head = "" if self.restarts is None else "head, "
        names = {"train": "training", "valid": "validation", "test": "test"}
        for split, sizes in self.splits.items():
            parts = [plural(sizes[unit], unit.removesuffix("s")) for unit in ("documents", "bytes", "tokens")]
            # A line breaks between the parts, not within.
            lines.append((head + names[split], ", ".join(part.replace(" ", _NO_BREAK) for part in parts)))
        if self.drawn is not None:
            lines.append(("drawn so far", f"{self.drawn:,} tokens"))
        if self.passes is not None:
            lines.append(("passes", f"{self.passes:,.2f}") if head == "" else ("whole passes", f"{self.passes:,.0f}"))
        if self.restarts is not None:
            again = plural(self.restarts, "time") if self.restarts else "never"
            lines.append(("opened again after a failure", again))
        return lines


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """The data of a run."""

    sources: Sequence[Source]
    streamed: bool
    step: int | None = None
    """Optimiser steps done when the tokens drawn were counted."""
    read_step: int | None = None
    """Of a stream: optimiser steps done when the documents read were counted."""

    @property
    def summary(self) -> str:
        """What was read and what was dropped, in a sentence or two."""
        known = [s for s in self.sources if s.read is not None and s.kept is not None]
        if len(known) < len(self.sources):
            return ""
        read, kept = sum(s.read or 0 for s in known), sum(s.kept or 0 for s in known)
        reasons = sum((Counter(s.dropped) for s in known), Counter[str]())
        when = "" if self.read_step is None else f" by step {self.read_step:,}"
        begin = (
            f"{plural(read, 'document')} of {plural(len(known), 'source')} {'was' if read == 1 else 'were'} read{when}"
        )
        if not reasons:
            return f"{begin}; nothing was dropped."
        why = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common())
        gone = f"{read - kept:,} ({percent((read - kept) / read)}) {'was' if read - kept == 1 else 'were'} dropped"
        return f"{begin} and {kept:,} kept; {gone}: {why}."


def data_facts(run: Path, metrics: Sequence[Mapping[str, Any]]) -> DataFacts | None:
    """The data of the run in ``run``; None if it has none, or what was kept of it has no sources.

    Args:
        run: the run directory.
        metrics: its records; those of kind ``stream`` are used.

    Raises:
        OuroborosError: the prepared data is damaged, or of another release.
    """
    if not (run / "data" / MANIFEST).is_file():
        return None
    data = open_prepared(run / "data")
    step, position = _position(run, len(data.sources))
    draws = position.get("counts") or [None] * len(data.sources)
    places, read_step = _places(data, metrics, position, step)
    published = published_shares_of(data)
    labels = _labels([ref.text for ref in data.sources])
    sources = []
    for index, (entry, weight) in enumerate(zip(data.manifest["sources"], data.weights, strict=True)):
        values: dict[str, Any] = {"read": entry.get("read"), "kept": entry.get("kept")}
        values["dropped"] = entry.get("dropped", {})
        if places:
            values |= _read_so_far(places[index])
        if draws[index] is not None:
            values["drawn"] = draws[index] * position["sequence_length"]
            values["drawn_share"] = draws[index] / max(sum(draws), 1)
            if not data.spec.stream:
                windows = count_windows(entry["splits"]["train"]["tokens"], position["sequence_length"])
                values["passes"] = draws[index] / windows
        sources.append(
            Source(
                name=entry["text"],
                label=labels[index],
                format=entry["format"] or _KINDS.get(entry["kind"], f"column {data.spec.text_field!r}"),
                weight=weight / sum(data.weights),
                splits={split: entry["splits"][split] for split in SPLITS if entry["splits"][split]["documents"]},
                published_share=published[index] if published else None,
                lengths=_lengths(data, index),
                **values,
            )
        )
    return DataFacts(sources=sources, streamed=data.spec.stream, step=step, read_step=read_step)


def published_shares_of(data: PreparedData) -> list[float] | None:
    """The share of training tokens each source would have had in a published pipeline, None if it is not known.

    A system tells it by an entry of the registry's place ``shares``: a function of the prepared data.
    """
    return next((load(target)(data) for target in found("shares").values()), None)


def _position(run: Path, sources: int) -> tuple[int | None, Mapping[str, Any]]:
    """The newest checkpoint's step and data position; (None, {}) without one that fits the data."""
    from ouroboros.train.checkpoint import candidates, load_newest

    if not candidates(run / "checkpoints"):
        return None, {}
    try:
        newest = load_newest(run / "checkpoints")
    except OuroborosError as error:
        logger.warning("the shares drawn so far are left out: %s", error)
        return None, {}
    loader = newest.documents.get("state.json", {}).get("loader", {})
    fits = len(loader.get("counts", ())) == sources and "sequence_length" in loader
    return (newest.step, loader) if fits else (None, {})


def _places(
    data: PreparedData, metrics: Sequence[Mapping[str, Any]], position: Mapping[str, Any], step: int | None
) -> tuple[Sequence[Mapping[str, Any]], int | None]:
    """Where each stream is by the newer of the last ``stream`` record and the checkpoint, and at which step."""
    if not data.spec.stream:
        return (), None
    places: Sequence[Mapping[str, Any]] = position.get("positions", ())
    logged = [record for record in metrics if record.get("kind") == "stream"]
    if logged and (step is None or logged[-1]["step"] > step):
        places, step = logged[-1]["sources"], logged[-1]["step"]
    return (places, step) if len(places) == len(data.sources) else ((), None)


def _read_so_far(place: Mapping[str, Any]) -> dict[str, Any]:
    counts = place["counts"]
    dropped = {reason: count for reason, count in counts.items() if reason not in _NOT_DROPPED}
    return {
        "read": counts.get("read", 0),
        "kept": counts.get("kept", 0),
        "dropped": dropped,
        "held_out": counts.get("held out", 0),
        "passes": float(place["epoch"]),
        "restarts": place["restarts"],
    }


def _lengths(data: PreparedData, index: int) -> Lengths | None:
    """None for a single document, whose length is its size."""
    sizes, block = np.diff(data.offsets("train", index)), data.spec.sequence_length
    if len(sizes) < 2:
        return None
    # The last block begins below size - block.
    blocks = np.maximum(-(-sizes // block) - 1, 0)
    powers = np.frexp(sizes)[1] - 1
    return Lengths(
        documents=np.bincount(powers).tolist(),
        lost=np.bincount(powers, weights=1 - block * blocks / sizes).tolist(),
        block=block,
        documents_lost=int((blocks == 0).sum()),
        tokens_lost=int(sizes.sum() - block * blocks.sum()),
    )


def _labels(names: Sequence[str]) -> list[str]:
    """The last part of each name, without what follows its dot; the whole name where two would be the same."""
    short = [name.rstrip("/").rpartition("/")[2] for name in names]
    short = [name.partition(".")[0] or name for name in short]
    return [name if short.count(name) == 1 else whole for name, whole in zip(short, names, strict=True)]
