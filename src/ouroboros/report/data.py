"""The section on a run's data: each source, what was dropped of it and why, and its share of the training tokens."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ouroboros.data.loader import count_windows
from ouroboros.data.prepared import PreparedData
from ouroboros.data.splits import SPLITS
from ouroboros.errors import OuroborosError
from ouroboros.report.content import Card, Section, Table
from ouroboros.report.drawing import LIGHT, Chart, label
from ouroboros.report.text import percent, plural, tick
from ouroboros.train.rundir import STATE, RunDirectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ouroboros.report.run import Run

logger = logging.getLogger(__name__)

MAX_SOURCES = 8
"""More would not be told apart on a chart; the heaviest are shown."""
_MAX_LABEL = 18
_NO_BREAK = chr(0xA0)
_NOT_DROPPED = ("read", "kept", "held out")
_KINDS = {"file": "plain text", "python": "code files", "directory": "files", "glob": "files"}
_SPLITS = {"train": "training", "valid": "validation", "test": "test"}


def data_section(run: Run) -> Section | None:
    """The data of a run; None if it has none.

    Raises:
        OuroborosError: the prepared data is damaged, or of another release.
    """
    data = run.data
    if data is None:
        return None
    entries, labels = data.manifest["sources"], short_labels(data)
    step, position = _position(run, len(entries))
    places, read_step = _places(run, data, position, step)
    drawn = position.get("counts") or [None] * len(entries)
    counts = [_counts(*pair) for pair in zip(entries, places or [None] * len(entries), strict=True)]
    lead = _summary(counts, read_step)
    if lead and data.spec.stream:
        lead += (
            " The sources are read while training runs; sizes, lengths and held-out parts are of the head of each,"
            " which was read before."
        )
    charts, tables = [], []
    if len(entries) > 1:
        weights = [weight / sum(data.weights) for weight in data.weights]
        shares = [None if count is None else count / max(sum(drawn), 1) for count in drawn]
        charts.append(share_chart(labels, {"weight": weights, "this run": shares}))
        rows = [
            (name, percent(weight), percent(share)) for name, weight, share in zip(labels, weights, shares, strict=True)
        ]
        note = "" if step is None else f"This run: tokens drawn by step {step:,}."
        tables.append(Table(head=("Source", "weight", "this run"), rows=rows, note=note))
    for index in heaviest(data.weights):
        if len(sizes := document_sizes(data, index)) > 1:
            title = f"Length of the documents of {labels[index]}"
            charts.append(length_chart(title, sizes, data.spec.sequence_length))
    cards = []
    for index, entry in enumerate(entries):
        place = places[index] if places else None
        facts = _facts(data, entry, counts[index], place, drawn[index], position.get("sequence_length", 0))
        cards.append(Card(labels[index], "" if entry["text"] == labels[index] else entry["text"], facts))
    return Section(ident="data", title="The data", lead=lead, charts=charts, cards=cards, tables=tables)


def _counts(entry: Mapping[str, Any], place: Mapping[str, Any] | None) -> Counter[str] | None:
    """Documents of a source: those read, kept and, of a stream that training reads, held out; and, by reason, dropped.

    None if an older release did not count them.
    """
    if place is not None:
        return Counter(place["counts"])
    if entry.get("read") is None or entry.get("kept") is None:
        return None
    return Counter({"read": entry["read"], "kept": entry["kept"], **entry.get("dropped", {})})


def _dropped(counts: Counter[str]) -> list[tuple[str, int]]:
    """Reasons and documents, the most frequent first."""
    found = [(reason, count) for reason, count in counts.items() if reason not in _NOT_DROPPED]
    return sorted(found, key=lambda item: (-item[1], item[0]))


def _summary(counts: Sequence[Counter[str] | None], read_step: int | None) -> str:
    """What was read and what was dropped, in a sentence or two; empty if that is not known."""
    known = [one for one in counts if one is not None]
    if len(known) < len(counts):
        return ""
    total = sum(known, Counter[str]())
    read, kept = total["read"], total["kept"]
    when = "" if read_step is None else f" by step {read_step:,}"
    begin = f"{plural(read, 'document')} of {plural(len(known), 'source')} {'was' if read == 1 else 'were'} read{when}"
    if not _dropped(total):
        return f"{begin}; nothing was dropped."
    why = ", ".join(f"{reason} ({count:,})" for reason, count in _dropped(total))
    gone = f"{read - kept:,} ({percent((read - kept) / read)}) {'was' if read - kept == 1 else 'were'} dropped"
    return f"{begin} and {kept:,} kept; {gone}: {why}."


def _facts(
    data: PreparedData,
    entry: Mapping[str, Any],
    counts: Counter[str] | None,
    place: Mapping[str, Any] | None,
    drawn: int | None,
    length: int,
) -> list[tuple[str, str]]:
    """Label and value of each line about a source.

    Args:
        data: of the run.
        entry: the source in the manifest.
        counts: its documents.
        place: where training stands in it, for a stream.
        drawn: its sequences that training has drawn.
        length: tokens of such a sequence.
    """
    lines = [("format", entry["format"] or _KINDS.get(entry["kind"], f"column {data.spec.text_field!r}"))]
    if counts is not None:
        shown = {"documents read": counts["read"], "kept": counts["kept"]}
        shown |= {f"dropped: {reason}": count for reason, count in _dropped(counts)}
        lines += [(name, f"{count:,} ({percent(count / max(counts['read'], 1))})") for name, count in shown.items()]
        lines[1] = ("documents read", f"{counts['read']:,}")
        if place is not None:
            lines.append(("held out of these", f"{counts['held out']:,}"))
    for split in SPLITS:
        sizes = entry["splits"][split]
        if sizes["documents"]:
            parts = [plural(sizes[unit], unit.removesuffix("s")) for unit in ("documents", "bytes", "tokens")]
            # A line breaks between the parts, not within.
            name = _SPLITS[split] if place is None else f"head, {_SPLITS[split]}"
            lines.append((name, ", ".join(part.replace(" ", _NO_BREAK) for part in parts)))
    if drawn is not None:
        lines.append(("drawn so far", f"{drawn * length:,} tokens"))
        if not data.spec.stream:
            passes = drawn / count_windows(entry["splits"]["train"]["tokens"], length)
            lines.append(("passes", f"{passes:,.2f}"))
    if place is not None:
        again = plural(place["restarts"], "time") if place["restarts"] else "never"
        lines += [("whole passes", f"{place['epoch']:,}"), ("opened again after a failure", again)]
    return lines


def _position(run: Run, sources: int) -> tuple[int | None, Mapping[str, Any]]:
    """The newest checkpoint's step and data position; (None, {}) without one that fits the data."""
    try:
        newest = RunDirectory(run.directory).newest()
    except OuroborosError as error:
        logger.warning("the shares drawn so far are left out: %s", error)
        return None, {}
    if newest is None:
        return None, {}
    loader = newest.documents.get(STATE, {}).get("loader", {})
    fits = len(loader.get("counts", ())) == sources and "sequence_length" in loader
    return (newest.step, loader) if fits else (None, {})


def _places(
    run: Run, data: PreparedData, position: Mapping[str, Any], step: int | None
) -> tuple[Sequence[Mapping[str, Any]], int | None]:
    """Where each stream is by the newer of the last ``stream`` record and the checkpoint, and at which step."""
    if not data.spec.stream:
        return (), None
    places: Sequence[Mapping[str, Any]] = position.get("positions", ())
    logged = [record for record in run.metrics if record.get("kind") == "stream"]
    if logged and (step is None or logged[-1]["step"] > step):
        places, step = logged[-1]["sources"], logged[-1]["step"]
    return (places, step) if len(places) == len(data.sources) else ((), None)


def short_labels(data: PreparedData) -> list[str]:
    """The last part of each source's name, without what follows its dot; the whole name where two would be the same."""
    names = [ref.text for ref in data.sources]
    short = [name.rstrip("/").rpartition("/")[2] for name in names]
    short = [name.partition(".")[0] or name for name in short]
    return [name if short.count(name) == 1 else whole for name, whole in zip(short, names, strict=True)]


def document_sizes(data: PreparedData, source: int) -> np.ndarray:
    """Tokens of each training document of a source, the end-of-text token included."""
    return np.diff(data.offsets("train", source))


def heaviest(weights: Sequence[float]) -> list[int]:
    """The numbers of at most :data:`MAX_SOURCES` sources, those of most weight, in their order."""
    return sorted(sorted(range(len(weights)), key=lambda index: (-weights[index], index))[:MAX_SOURCES])


def share_chart(names: Sequence[str], shares: Mapping[str, Sequence[float | None]]) -> Chart:
    """Shares of the training tokens of at least two sources, side by side.

    Args:
        names: of the sources.
        shares: by what they are, the first of which is the weight; one that holds a None is left out.
    """
    known = {name: [share or 0.0 for share in found] for name, found in shares.items() if None not in found}
    shown = heaviest(next(iter(known.values())))

    def draw(axes: Axes) -> None:
        height = 0.8 / len(known)
        for row, (name, found) in enumerate(known.items()):
            places = [place + (row - (len(known) - 1) / 2) * height for place in range(len(shown))]
            values = [100 * found[index] for index in shown]
            color = LIGHT[("faint", "arm0", "arm1")[row]]
            bars = axes.barh(places, values, height=0.88 * height, color=color, label=name)
            texts = [percent(found[index]) for index in shown]
            axes.bar_label(bars, texts, padding=4, color=LIGHT["soft"], fontsize=9 if len(shown) <= 4 else 7)
        axes.set_yticks(range(len(shown)), [_shortened(names[index]) for index in shown])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 118 * max(found[index] for found in known.values() for index in shown))

    return Chart(title="Share of the training tokens", draw=draw, x="% of the training tokens", y="source", legend=3)


def length_chart(title: str, sizes: np.ndarray, block: int, lost: np.ndarray | None = None) -> Chart:
    """Documents by their length.

    Args:
        title: of the chart.
        sizes: tokens of each document.
        block: tokens of a training sequence; a broken line marks it.
        lost: share of each document that a cut into blocks loses, drawn in another colour.
    """
    bins = np.frexp(sizes)[1] - 1  # 2^k to 2^(k+1) - 1 tokens
    first, last, edge = int(bins.min()), int(bins.max()), math.log2(block)
    documents = np.bincount(bins)[first:]
    gone = np.zeros(len(documents)) if lost is None else np.bincount(bins, weights=lost)[first:]

    def draw(axes: Axes) -> None:
        # A bar lies between the lengths it stands for.
        middle = np.arange(first, last + 1) + 0.5
        kept = "documents" if lost is None else "in a block"
        axes.bar(middle, documents - gone, width=0.92, color=LIGHT["arm0"], label=kept)
        if lost is not None:
            name = "lost by the block cut"
            axes.bar(middle, gone, width=0.92, bottom=documents - gone, color=LIGHT["arm1"], label=name)
        axes.axvline(edge, color=LIGHT["ink"], linewidth=1.2, linestyle=(0, (4, 3)), label=f"{block:,} tokens")
        low, high = min(first, math.floor(edge)), max(last + 1, math.ceil(edge))
        ticks = range(low, high + 1, max(1, math.ceil((high - low) / 9)))
        axes.set_xticks(ticks, [tick(2**k) if k < 10 else f"{2 ** (k - 10):,} Ki" for k in ticks])
        axes.yaxis.set_major_formatter(lambda value, _: tick(value))
        axes.grid(visible=False, axis="x")

    return Chart(title=title, draw=draw, x="tokens of a document", y="documents", legend=3)


def held_out_sample(data: PreparedData, count: int, length: int) -> tuple[str, np.ndarray]:
    """Sequences that do not overlap from the test part, else the validation part: always the same ones.

    Args:
        data: of the run.
        count: sequences, fewer where there is less text.
        length: tokens of a sequence, fewer where no source has as many.

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
            places = [(stream, at * length) for stream in streams for at in range(len(stream) // length)]
            chosen = np.random.default_rng(0).choice(len(places), min(count, len(places)), replace=False)
            windows = [places[at][0][places[at][1] : places[at][1] + length] for at in sorted(chosen.tolist())]
            return split, np.stack(windows).astype(np.int64)
    raise OuroborosError(f"{data.directory}: no held-out text; set data.test_fraction or data.valid_fraction above 0")


def _shortened(name: str) -> str:
    shown = label(name)
    return shown if len(shown) <= _MAX_LABEL else shown[: _MAX_LABEL - 1] + chr(0x2026)
