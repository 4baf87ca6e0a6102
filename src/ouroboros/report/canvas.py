"""A matplotlib figure in the page's style, drawn without pyplot's global state and written as inline SVG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ouroboros.errors import OuroborosError
from ouroboros.report.palette import LIGHT
from ouroboros.report.svg import embed
from ouroboros.report.text import displayable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_INCHES = (5.0, 3.3)
"""Small, so that labels stay readable when the chart is scaled to a phone."""

_SETTINGS: dict[str, Any] = {
    # Text as text, in the page's font; names may hold dollar signs.
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10.5,
    "axes.edgecolor": LIGHT["line"],
    "axes.labelcolor": LIGHT["soft"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.8,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["line"],
    "ytick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["soft"],
    "ytick.labelcolor": LIGHT["soft"],
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.fontsize": 10,
}


class Canvas:
    """One figure with one pair of axes; use :func:`canvas` to make it."""

    def __init__(self, figure: Figure, axes: Axes, ident: str) -> None:
        self.axes = axes
        self._figure = figure
        self._ident = ident

    def svg(self, description: str) -> str:
        """The figure as an ``<svg>`` element; the same drawing gives the same text."""
        stream = io.StringIO()
        # All metadata off: it holds a date and addresses.
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with warnings.catch_warnings():
            # The reader's browser chooses the font, so what this machine's font lacks does not matter.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            self._figure.savefig(stream, format="svg", metadata=metadata, transparent=True)
        return embed(stream.getvalue(), ident=self._ident, label=description)


@contextmanager
def canvas(ident: str) -> Iterator[Canvas]:
    """An empty chart; draw on its ``axes`` and take its ``svg`` inside the block.

    Args:
        ident: unique on the page; part of every identifier in the SVG.

    Raises:
        OuroborosError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise OuroborosError("reports need matplotlib: pip install 'ouroboros-lm[report]'") from None
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_SETTINGS, "svg.hashsalt": ident}):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        yield Canvas(figure, figure.add_subplot(), ident)


def label(name: str) -> str:
    """``name`` as a legend entry: shown even when it begins with an underscore, which matplotlib would hide."""
    shown = " ".join(displayable(name).split())
    return shown.lstrip("_") or "unnamed"
