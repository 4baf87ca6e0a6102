"""The charts of the delta residuals: what each is called, what it shows and what it does not, and what is drawn.

The letters are those of ``X + b k (v - k.X)``, where k is the direction of the sublayer's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.nn.operators import coherence, product_singular_values
from ouroboros.report.drawing import DASHED, LIGHT, Chart, evenly, heat, shown_visits
from ouroboros.report.text import percent, plural
from ouroboros.schedule import Schedule
from ouroboros.systems.delta.measure import ResidualRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"mixer": "arm0", "mlp": "arm1"}
NAMES = {"mixer": "attention", "mlp": "feed-forward"}
REGIMES = {"keep": "loop0", "erase": "loop2", "reflect": "loop5"}
"""What gates of 0, 1 and 2 do, and its colour."""
CUTS = (0.5, 1.5)
"""Gates that bound the regimes."""
EDGE = 0.025
"""Share of its range at either end in which a gate or a target hardly learns."""
PRODUCT_TOKENS, MAX_PRODUCT_USES = 32, 64
"""For a product of more shortcuts, singular values at every depth take too long."""
BINS, ROWS = 20, 32
"""Of the histograms, and of the singular values that are drawn."""
LOW = 0.5
"""A singular value below this counts as mostly erased."""

_HEAT = "The stronger the colour, the more tokens have that {}; each column is scaled to its own fullest part."


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the delta residuals of a model do on a sample of text."""

    schedule: Schedule
    records: Sequence[ResidualRecord]
    """One for each use, in order of execution."""

    @property
    def spec(self) -> DeltaSpec:
        """The residual's specification."""
        return self.records[0].spec

    @cached_property
    def median_gates(self) -> list[float]:
        """Of each use."""
        return [float(np.median(one.beta.numpy())) for one in self.records]

    @cached_property
    def drawn(self) -> dict[int, float]:
        """The numbers of the uses that charts show, and their places on the axis over depth.

        Both sublayers of a visit stand side by side, the mixer to the left.
        """
        place = {slot: index for index, slot in enumerate(shown_visits(self.schedule))}
        return {
            number: place[one.visit.slot] + (-0.25 if one.sublayer == "mixer" else 0.25)
            for number, one in enumerate(self.records)
            if one.visit.slot in place
        }


def charts(look: Look) -> list[Chart]:
    """Those that there is something to draw for, in the order of the page."""
    depth, spec = partial(Chart, schedule=look.schedule, legend=3), look.spec
    words = (
        f"{_HEAT.format('gate')} A gate of 0 leaves the state as it is. {_ends(look, 'beta', 2.0)} A gate says nothing"
        " of how much the state held along k: see what is erased and written."
    )
    found = [depth(title="Gate b by depth", draw=partial(_draw_gates, look), y="gate b", words=words)]
    if spec.erase:
        found += _operator(look, depth)
    found.append(_directions(look))
    words = (
        "b |k\u00b7X| is taken away along k and b |v| put in its place, mean over tokens. Amounts of opposite sign do"
        " not cancel here, so the state may move by more or less than their difference."
    )
    draw = partial(_draw_amounts, look)
    found.append(depth(title="Erased and written", draw=draw, y="mean over tokens", words=words))
    if spec.value == "sigmoid":
        words = f"{_HEAT.format('target')} {_ends(look, 'value', spec.value_scale)} A target is never negative here."
        draw = partial(_draw_histograms, look, field="value", low=0.0, high=spec.value_scale)
        found.append(depth(title="Target v by depth", draw=draw, y="target v", words=words))
    return found


def _ends(look: Look, field: str, high: float) -> str:
    """How many gates or targets, which are sigmoids, hardly learn any more."""
    values = torch.stack([getattr(one, field) for one in look.records]) / high
    low, top = ((at < EDGE).double().mean().item() for at in (values, 1 - values))
    return f"In the outer 2.5 % of the range, where it hardly learns, lie {percent(low)} (low end) and {percent(top)}."


def _operator(look: Look, depth: Callable[..., Chart]) -> Iterator[Chart]:
    """What there is of the shortcuts ``I - b k k^T`` of a model that erases."""
    words = (
        "1 \u2212 b |k|\u00b2 is the factor on what lies along k; all other directions keep the factor 1. Below 0 the"
        f" sign turns. {_HEAT.format('factor')} This is the shortcut with k, b and v held fixed, not the Jacobian of"
        " the layer: k, b and v depend on the state too, so the layer as a whole can amplify although its shortcut"
        " cannot."
    )
    y = "eigenvalue along k"
    yield depth(title="Eigenvalue along k by depth", draw=partial(_draw_eigenvalues, look), y=y, words=words)
    words = (
        "Shares of the tokens with a gate below 0.5, from 0.5 to 1.5, and from 1.5 on. The cuts are a convention: the"
        " gate is continuous."
    )
    yield depth(title="Keep, erase or reflect", draw=partial(_draw_regimes, look), y="% of the tokens", words=words)
    if len(look.records) > MAX_PRODUCT_USES:
        return
    values = product_values(look)
    below = (values < LOW).double().sum(-1).mean(0)
    words = (
        "Each cell is a singular value of the product of all shortcuts so far: empty is 1 (kept), full is 0 (gone). The"
        f" line counts those below {LOW:g}; after the last residual there are {below[-1]:.1f} on average over"
        f" {plural(len(values), 'token')}. It says how much of the first state reaches that depth through the frozen"
        " shortcuts alone, not what the layers write, and it is not the Jacobian."
    )
    draw, y = partial(_draw_products, look, values.mean(0), below), "singular values, smallest first"
    yield depth(title="Product of the shortcuts by depth", draw=draw, y=y, words=words)


def product_values(look: Look) -> Tensor:
    """Singular values of the product of the shortcuts up to each of N uses, ascending: (tokens, N, min(N, D))."""
    gates = torch.stack([one.beta.flatten() for one in look.records], dim=1)
    chosen = torch.linspace(0, len(gates) - 1, min(len(gates), PRODUCT_TOKENS)).long()
    directions = torch.stack([one.direction.flatten(0, 1)[chosen] for one in look.records], dim=1)
    return product_singular_values(directions, gates[chosen]).flip(-1)


def direction_products(look: Look, numbers: Sequence[int]) -> Tensor:
    """Means over tokens of ``|k_i . k_j|`` between these uses."""
    sequences = len(look.records[0].direction)  # one at a time: all would be N^2 numbers for each token at once
    each = (torch.stack([look.records[i].direction[at] for i in numbers], dim=1) for at in range(sequences))
    return torch.stack([coherence(k).abs().mean(0) for k in each]).mean(0)


def _directions(look: Look) -> Chart:
    numbers, width = sorted(look.drawn, key=lambda i: look.records[i].sublayer), look.records[0].direction.shape[-1]
    names, products = [str(look.records[i].visit.slot) for i in numbers], direction_products(look, numbers).numpy()
    words = (
        "|k\u1d62\u00b7k\u2c7c| between every two residuals, mean over tokens; full is 1. Two frozen shortcuts act on"
        f" each other through this number alone. Unrelated directions of width {width:,} would give"
        f" {math.sqrt(2 / math.pi / width):.2f}. It does not say whether two residuals write the same values."
    )

    def draw(axes: Axes) -> None:
        last, shown = len(names) - 0.5, evenly(range(len(names)), 8)
        heat(axes, products[::-1], (-0.5, last, last, -0.5))
        axes.set_xticks(shown, [names[at] for at in shown])
        axes.set_yticks(shown, [names[at] for at in shown])
        axes.grid(visible=False)

    return Chart(
        title="Do residuals use the same directions?",
        draw=draw,
        x="visit: attention | feed-forward",
        y="feed-forward | attention",
        words=words,
    )


def _draw_histograms(look: Look, axes: Axes, field: str, low: float, high: float) -> None:
    """A column for each use, stronger where more tokens are, each scaled to its own fullest part."""
    shown = [look.records[i] for i in look.drawn]
    counts = torch.stack([torch.histc(getattr(one, field).float(), BINS, low, high) for one in shown], dim=1)
    extent = (-0.5, len(shown) / 2 - 0.5, low, high)
    heat(axes, (counts / counts.amax(0)).numpy(), extent, [COLORS[one.sublayer] for one in shown])
    for sublayer, color in COLORS.items():
        axes.plot([], [], "s", color=LIGHT[color], label=NAMES[sublayer])


def _draw_gates(look: Look, axes: Axes) -> None:
    _draw_histograms(look, axes, "beta", 0.0, 2.0)
    axes.axhline(1, color=LIGHT["soft"], linewidth=1.0, linestyle=DASHED)
    medians, places = [look.median_gates[i] for i in look.drawn], np.array(list(look.drawn.values()))
    axes.hlines(medians, places - 0.25, places + 0.25, LIGHT["ink"], linewidth=1.8, label="median")
    axes.set_ylim(-0.03, 2.03)


def _draw_eigenvalues(look: Look, axes: Axes) -> None:
    _draw_histograms(look, axes, "eigenvalue", -1.0, 1.0)
    axes.axhline(0, color=LIGHT["soft"], linewidth=1.0, linestyle=DASHED)
    axes.set_yticks([-1, -0.5, 0, 0.5, 1], ["\u22121 reflect", "\u22120.5", "0 erase", "0.5", "1 keep"])


def _draw_regimes(look: Look, axes: Axes) -> None:
    counts = np.array([np.histogram(look.records[i].beta.numpy(), [0.0, *CUTS, 2.0])[0] for i in look.drawn])
    found = 100 * counts / counts.sum(1, keepdims=True)
    bottoms, places = found.cumsum(axis=1) - found, list(look.drawn.values())
    for at, (name, color) in enumerate(REGIMES.items()):
        axes.bar(places, found[:, at], width=0.44, bottom=bottoms[:, at], color=LIGHT[color], label=name)
    axes.set_ylim(0, 106)  # above the bars, the shade of a loop is seen


def _draw_products(look: Look, values: Tensor, below: Tensor, axes: Axes) -> None:
    numbers, places = list(look.drawn), list(look.drawn.values())
    gone = (1 - values[numbers, :ROWS]).T.numpy()  # strong where little is left
    heat(axes, gone, (-0.5, len(numbers) / 2 - 0.5, 0, len(gone)), "arm2")
    name = f"how many are below {LOW:g}"
    axes.step(places, below[numbers].tolist(), where="mid", color=LIGHT["ink"], linewidth=1.6, label=name)
    axes.set_yticks(evenly(range(len(gone) + 1), 9))


def _draw_amounts(look: Look, axes: Axes) -> None:
    for field, color in (("erased", "arm3"), ("written", "arm2")):
        means = [getattr(look.records[i], field).mean().item() for i in look.drawn]
        axes.plot(list(look.drawn.values()), means, "o-", markersize=4, color=LIGHT[color], label=field)
    axes.set_ylim(bottom=0)
