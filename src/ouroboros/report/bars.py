"""Bar charts of the data section as SVG for the page; see :mod:`ouroboros.report.charts`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ouroboros.report.canvas import canvas, label
from ouroboros.report.data import Lengths, Source
from ouroboros.report.palette import LIGHT
from ouroboros.report.text import percent, tick

MAX_SOURCES = 8
"""More would not be told apart; the heaviest are shown."""
_MAX_LABEL = 18


def share_chart(sources: Sequence[Source], *, ident: str = "shares") -> str:
    """Share of the training tokens of each source: asked for, drawn, and what the published pipeline would have given.

    Args:
        sources: at least two, else there is nothing to compare and the result is empty.
        ident: unique on the page.
    """
    if len(sources) < 2:
        return ""
    shown = heaviest(sources)
    series = [
        ("weight", "faint", [source.weight for source in shown]),
        ("this run", "arm0", [source.drawn_share for source in shown]),
        ("published pipeline", "arm1", [source.published_share for source in shown]),
    ]
    series = [one for one in series if None not in one[2]]
    with canvas(ident) as drawing:
        axes = drawing.axes
        height = 0.8 / len(series)
        for row, (name, color, shares) in enumerate(series):
            places = [place + (row - (len(series) - 1) / 2) * height for place in range(len(shown))]
            values = [100 * (share or 0.0) for share in shares]
            axes.barh(places, values, height=0.88 * height, color=LIGHT[color], label=name)
            for place, share in zip(places, shares, strict=True):
                style = {"textcoords": "offset points", "fontsize": 9 if len(shown) <= 4 else 7, "va": "center"}
                axes.annotate(
                    percent(share), (100 * (share or 0.0), place), xytext=(4, 0), color=LIGHT["soft"], **style
                )
        axes.set_yticks(range(len(shown)), [_shortened(source.label) for source in shown])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 118 * max(share or 0.0 for _, _, shares in series for share in shares))
        axes.set_xlabel("% of the training tokens")
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, columnspacing=1.2)
        return drawing.svg("Share of the training tokens of each source")


def length_chart(lengths: Lengths, *, ident: str) -> str:
    """Documents by length in tokens, with the part of them that a cut into blocks would have lost in another colour.

    Args:
        lengths: of one source; without a document the result is empty.
        ident: unique on the page.
    """
    used = [k for k, count in enumerate(lengths.documents) if count]
    if not used:
        return ""
    edge = math.log2(lengths.block)
    bins = range(used[0], used[-1] + 1)
    lost = [lengths.lost[k] for k in bins]
    kept = [max(lengths.documents[k] - lengths.lost[k], 0.0) for k in bins]
    with canvas(ident) as drawing:
        axes = drawing.axes
        # A bar lies between the lengths it stands for.
        middle = [k + 0.5 for k in bins]
        axes.bar(middle, kept, width=0.92, color=LIGHT["arm0"], label="in a block")
        axes.bar(middle, lost, width=0.92, bottom=kept, color=LIGHT["arm1"], label="lost by the block cut")
        axes.axvline(edge, color=LIGHT["ink"], linewidth=1.2, linestyle=(0, (4, 3)), label=f"{lengths.block:,} tokens")
        first, last = min(used[0], math.floor(edge)), max(used[-1] + 1, math.ceil(edge))
        every = max(1, math.ceil((last - first) / 9))
        ticks = list(range(first, last + 1, every))
        axes.set_xticks(ticks, [tick(2**k) if k < 10 else f"{2 ** (k - 10):,} Ki" for k in ticks])
        axes.yaxis.set_major_formatter(lambda value, _: tick(value))
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("tokens of a document")
        axes.set_ylabel("documents")
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, columnspacing=1.2)
        return drawing.svg("Training documents by length, and the part that a cut into blocks would have lost")


def heaviest(sources: Sequence[Source]) -> list[Source]:
    """At most :data:`MAX_SOURCES` sources, those of most weight, in their order."""
    chosen = sorted(range(len(sources)), key=lambda index: (-sources[index].weight, index))[:MAX_SOURCES]
    return [sources[index] for index in sorted(chosen)]


def _shortened(name: str) -> str:
    shown = label(name)
    return shown if len(shown) <= _MAX_LABEL else shown[: _MAX_LABEL - 1] + chr(0x2026)
