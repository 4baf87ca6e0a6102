"""The section on a run's data: each source, what was dropped of it and why, and its share of the training tokens."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ouroboros.data.loader import count_windows
from ouroboros.data.prepared import PreparedData
from ouroboros.errors import OuroborosError
from ouroboros.report.content import Section, Table
from ouroboros.report.text import MISSING, percent, plural
from ouroboros.train.rundir import STATE, RunDirectory

if TYPE_CHECKING:
    from ouroboros.report.run import Run

logger = logging.getLogger(__name__)


def data_section(run: Run) -> Section | None:
    """The data of a run; None if it has none.

    Raises:
        OuroborosError: the prepared data is damaged, or of another release.
    """
    data = run.data
    if data is None:
        return None
    entries = data.manifest["sources"]
    step, position = _position(run, len(entries))
    places, read_step = _places(run, data, position, step)
    drawn = position.get("counts") or [None] * len(entries)
    counts = [_counts(*pair) for pair in zip(entries, places, strict=True)]
    rows = []
    for entry, weight, found, place, count in zip(entries, data.weights, counts, places, drawn, strict=True):
        tokens = entry["splits"]["train"]["tokens"]
        passes = count and count / count_windows(tokens, position["sequence_length"])
        passes = passes if place is None else place["epoch"]
        shares = percent(weight / sum(data.weights)), percent(count and count / sum(drawn))
        seen = [f"{found['read']:,}", f"{found['kept']:,}", _dropped(found)] if found else [MISSING] * 3
        last = f"{tokens:,}", MISSING if passes is None else f"{passes:.2f}"
        rows.append([entry["text"], entry["format"] or entry["kind"], *shares, *seen, *last])
    head = ("Source", "format", "weight", "this run", "read", "kept", "dropped", "training tokens", "passes")
    notes = [] if step is None else [f"This run: tokens drawn by step {step:,}."]
    if data.spec.stream:
        notes.append("The sources are read while training runs; the training tokens are of the head of each.")
    tables = [Table(head=head, rows=rows, note=" ".join(notes))]
    return Section(ident="data", title="The data", lead=_summary(counts, read_step), tables=tables)


def _counts(entry: Mapping[str, Any], place: Mapping[str, Any] | None) -> Counter[str] | None:
    """Documents of a source: those read, kept and, of a stream that training reads, held out; and, by reason, dropped.

    None if an older release did not count them.
    """
    if place is not None:
        return Counter(place["counts"])
    if entry.get("read") is None or entry.get("kept") is None:
        return None
    return Counter({"read": entry["read"], "kept": entry["kept"], **entry.get("dropped", {})})


def _dropped(counts: Counter[str]) -> str:
    """Reasons and documents, the most frequent first."""
    found = [(reason, count) for reason, count in counts.most_common() if reason not in ("read", "kept", "held out")]
    return ", ".join(f"{reason} ({count:,})" for reason, count in found) or "none"


def _summary(counts: Sequence[Counter[str] | None], read_step: int | None) -> str:
    """What was read and what was dropped, in a sentence; empty if that is not known."""
    known = [one for one in counts if one is not None]
    if len(known) < len(counts):
        return ""
    total = sum(known, Counter[str]())
    when = "" if read_step is None else f" by step {read_step:,}"
    begin = f"Read{when}: {plural(total['read'], 'document')} of {plural(len(known), 'source')}"
    gone = percent((total["read"] - total["kept"]) / max(total["read"], 1))
    return f"{begin}; kept: {total['kept']:,}; dropped ({gone}): {_dropped(total)}."


def _position(run: Run, sources: int) -> tuple[int | None, Mapping[str, Any]]:
    """The newest checkpoint's step and data position; (None, {}) without one that fits the data."""
    try:
        newest = RunDirectory(run.directory).newest()
    except OuroborosError as error:
        logger.warning("the shares drawn so far are left out: %s", error)
        newest = None
    loader = newest.documents.get(STATE, {}).get("loader", {}) if newest else {}
    fits = newest and len(loader.get("counts", ())) == sources and "sequence_length" in loader
    return (newest.step, loader) if fits else (None, {})


def _places(
    run: Run, data: PreparedData, position: Mapping[str, Any], step: int | None
) -> tuple[Sequence[Mapping[str, Any] | None], int | None]:
    """Where each stream is by the newer of the last ``stream`` record and the checkpoint, and at which step."""
    places: Sequence[Mapping[str, Any]] = position.get("positions", ())
    logged = [record for record in run.metrics if record.get("kind") == "stream"]
    if logged and (step is None or logged[-1]["step"] > step):
        places, step = logged[-1]["sources"], logged[-1]["step"]
    known = data.spec.stream and len(places) == len(data.sources)
    return (places, step) if known else ([None] * len(data.sources), None)


def held_out_sample(data: PreparedData, count: int, length: int) -> tuple[str, np.ndarray]:
    """At most ``count`` sequences that do not overlap, of at most ``length`` tokens, from the test part, else the
    validation part: always the same ones.

    Returns:
        The part and int64 (count, length).

    Raises:
        OuroborosError: no held-out text.
    """
    for split in ("test", "valid"):
        streams = [data.tokens(split, index) for index in range(len(data.sources))]
        longest = max(map(len, streams))
        if longest >= 2:
            length = min(length, longest)
            windows = [stream[: len(stream) // length * length].reshape(-1, length) for stream in streams]
            every = np.concatenate(windows)
            chosen = np.random.default_rng(0).choice(len(every), min(count, len(every)), replace=False)
            return split, every[np.sort(chosen)].astype(np.int64)
    raise OuroborosError(f"{data.directory}: no held-out text; set data.test_fraction or data.valid_fraction above 0")
