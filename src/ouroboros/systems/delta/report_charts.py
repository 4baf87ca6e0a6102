"""The charts of the delta residuals: what each is called, what it shows and what it does not, and what is drawn.

Attention and feed-forward network of a visit stand side by side. The letters are those of the formula above the charts:
``X + b k (v - k.X)``, where k is the direction of the sublayer's output h. Everything is drawn from what a
:class:`~ouroboros.systems.delta.report.Look` has recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ouroboros.nn.operators import coherence, product_singular_values
from ouroboros.report.drawing import DASHED, LIGHT, Chart, evenly, heat, matrix, scale_colors, spread
from ouroboros.report.text import percent, plural
from ouroboros.systems.delta.measure import shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ouroboros.systems.delta.report import Look

COLORS = {"mixer": "arm0", "mlp": "arm1"}
NAMES = {"mixer": "attention", "mlp": "feed-forward"}
REGIMES = {"keep": (0.0, "loop0"), "erase": (1.0, "loop2"), "reflect": (2.0, "loop5")}
"""By name the gate that does it, and its colour."""
CUTS = (0.5, 1.5)
"""Gates that bound the regimes."""
GATE_EDGE = 1e-3
"""A gate this close to 0 or 2 has stopped learning."""
VALUE_EDGE = 0.025
"""A sigmoid target in this share of its range at either end is saturated: outside (0.1, 3.9) at scale 4."""
SMALL = 100.0
"""A sublayer's output shorter than this many ``eps`` has a direction that the guard shortens or noise decides."""
PRODUCT_TOKENS, PRODUCT_WORK, MAX_PRODUCT_USES = 32, 4 * 10**8, 256
"""Bounds of the products of shortcuts: tokens, tokens times N^4 (N decompositions of N x N matrices each), and N."""
BINS = 20
"""Of the histograms of gates and targets."""
FEATURES = 32
"""Of the coupling matrix, and rows of the singular values."""
LOW = 0.5
"""A singular value below this counts as mostly erased."""
MAX_CHANNELS, MAX_READINGS = 6, 12

_HEAT = "The stronger the colour, the more tokens have that {}; each column is scaled to its own fullest part."
_SPREAD = "The dot is the median, the thick line holds half of the tokens and the thin one 90 %."


def charts(look: Look) -> list[Chart]:
    """Those that there is something to draw for, in the order of the page."""
    groups = (_gates, _products, _directions, _amounts, _lengths, _channels, _forced)
    return [chart for group in groups for chart in group(look)]


def _by_depth(look: Look, title: str, y: str, words: str, draw: Callable[[Axes], None], legend: int = 2) -> Chart:
    """A chart over the visits."""
    return Chart(title=title, draw=draw, y=y, schedule=look.schedule, legend=legend, words=words)


def _gates(look: Look) -> Iterator[Chart]:
    erase = look.spec.erase
    closed, opened = look.share(lambda one: one.beta < GATE_EDGE), look.share(lambda one: one.beta > 2 - GATE_EDGE)
    change = "replaces what it holds along k, 2 turns it round" if erase else "adds v along k, 2 adds twice as much"
    words = (
        f"{_HEAT.format('gate')} A gate of 0 leaves the state as it is, 1 {change}. Within 0.001 of the ends, where a"
        f" gate has stopped learning, lie {percent(closed)} of the gates (at 0) and {percent(opened)} (at 2). A gate"
        " says nothing of how much the state held along k: see what is erased and written."
    )
    yield _by_depth(look, "Gate b by depth", "gate b", words, partial(_draw_gates, look))
    if not erase:
        return
    words = (
        f"1 \u2212 b |k|\u00b2 is the factor on what lies along k; all other directions keep the factor 1. {_SPREAD}"
        " Below 0 (tinted) the sign turns. This is the shortcut with k, b and v held fixed, not the Jacobian of the"
        " layer: k, b and v depend on the state too, so the layer as a whole can amplify although its shortcut cannot."
    )
    draw = partial(_draw_eigenvalues, look)
    yield _by_depth(look, "Eigenvalue along k by depth", "eigenvalue along k", words, draw)
    words = (
        "Shares of the tokens with a gate below 0.5, from 0.5 to 1.5, and from 1.5 on. The cuts are a convention: the"
        " gate is continuous. A finer cut is in the table below."
    )
    draw = partial(_draw_regimes, look)
    yield _by_depth(look, "Keep, erase or reflect", "% of the tokens", words, draw, legend=3)


def _draw_histograms(look: Look, axes: Axes, field: str, low: float, high: float) -> None:
    """A column for each use, stronger where more tokens are, each scaled to its own fullest part."""
    shown = [look.records[i] for i in look.drawn()[0]]
    counts = torch.stack([torch.histc(getattr(one, field).float(), BINS, low, high) for one in shown], dim=1)
    extent = (-0.5, len(shown) / 2 - 0.5, low, high)
    heat(axes, (counts / counts.amax(0)).numpy(), extent, [COLORS[one.sublayer] for one in shown])
    for sublayer, color in COLORS.items():
        axes.plot([], [], "s", color=LIGHT[color], label=NAMES[sublayer])


def _draw_gates(look: Look, axes: Axes) -> None:
    numbers, places = look.drawn()
    _draw_histograms(look, axes, "beta", 0.0, 2.0)
    axes.axhline(1, color=LIGHT["soft"], linewidth=1.0, linestyle=DASHED)
    for gates, name, color, dashes in (
        (look.median_gates, "median", "ink", "-"),
        (look.gates_before, "before training", "faint", ":"),
    ):
        medians = [gates[i] for i in numbers]
        axes.hlines(medians, places - 0.25, places + 0.25, LIGHT[color], dashes, linewidth=1.8, label=name)
    axes.set_ylim(-0.03, 2.03)
    names = ("0 keep", "0.5", "1 erase", "1.5", "2 reflect") if look.spec.erase else ("0", "0.5", "1", "1.5", "2")
    axes.set_yticks([0, 0.5, 1, 1.5, 2], names)


def _draw_spreads(look: Look, axes: Axes, field: str, floor: float = -math.inf) -> None:
    for sublayer, color in COLORS.items():
        numbers, places = look.drawn(sublayer)
        spreads = look.quantiles(field)
        spread(axes, places, [[max(value, floor) for value in spreads[i]] for i in numbers], color, NAMES[sublayer])


def _draw_eigenvalues(look: Look, axes: Axes) -> None:
    axes.axhspan(-1.05, 0, color=LIGHT["arm3"], alpha=0.07, linewidth=0, zorder=0.5)
    axes.axhline(0, color=LIGHT["soft"], linewidth=1.0, linestyle=DASHED)
    _draw_spreads(look, axes, "eigenvalue")
    axes.set_ylim(-1.05, 1.05)
    axes.set_yticks([-1, -0.5, 0, 0.5, 1], ["\u22121 reflect", "\u22120.5", "0 erase", "0.5", "1 keep"])


def _draw_regimes(look: Look, axes: Axes) -> None:
    numbers, places = look.drawn()
    found = 100 * np.array([shares(look.records[i].beta, CUTS) for i in numbers])
    bottoms = found.cumsum(axis=1) - found
    for at, (name, (_, color)) in enumerate(REGIMES.items()):
        axes.bar(places, found[:, at], width=0.44, bottom=bottoms[:, at], color=LIGHT[color], label=name)
    axes.set_ylim(0, 106)  # above the bars, the shade of a loop is seen


def product_values(look: Look) -> Tensor:
    """Singular values of the product of the shortcuts up to each use, ascending: (tokens, N, min(N, D))."""
    gates = torch.stack([one.beta.flatten() for one in look.records], dim=1)
    tokens, N = gates.shape
    chosen = torch.linspace(0, tokens - 1, min(tokens, PRODUCT_TOKENS, max(1, PRODUCT_WORK // N**4))).long()
    directions = torch.stack([one.direction.flatten(0, 1)[chosen] for one in look.records], dim=1)
    return product_singular_values(directions, gates[chosen]).flip(-1)


def _products(look: Look) -> Iterator[Chart]:
    if not look.spec.erase or len(look.records) > MAX_PRODUCT_USES:
        return
    values = product_values(look)
    below = (values < LOW).double().sum(-1).mean(0)
    words = (
        "Each cell is a singular value of the product of all shortcuts so far: empty is 1 (kept), full is 0 (gone). The"
        f" line counts those below {LOW:g}; after the last residual there are {below[-1]:.1f} on average over"
        f" {plural(len(values), 'token')}. It says how much of the first state reaches that depth through the frozen"
        " shortcuts alone, not what the layers write, and it is not the Jacobian."
    )

    def draw(axes: Axes) -> None:
        numbers, places = look.drawn()
        gone = (1 - values.mean(0)[numbers, :FEATURES]).T.numpy()  # strong where little is left
        heat(axes, gone, (-0.5, len(numbers) / 2 - 0.5, 0, len(gone)), "arm2")
        name = f"how many are below {LOW:g}"
        axes.step(places, below[numbers].tolist(), where="mid", color=LIGHT["ink"], linewidth=1.6, label=name)
        axes.set_ylim(0, len(gone))
        axes.set_yticks(evenly(range(len(gone) + 1), 9))

    title, y = "Product of the shortcuts by depth", "singular values, smallest first"
    yield _by_depth(look, title, y, words, draw, legend=1)


def direction_products(look: Look, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Means over tokens of ``|k_i . k_j|`` and of ``k_i . k_j`` between these uses."""
    size = signed = torch.zeros(len(numbers), len(numbers), dtype=torch.float64)
    sequences = len(look.records[0].direction)
    for at in range(sequences):  # one at a time: all would be N^2 numbers for each token at once
        products = coherence(torch.stack([look.records[i].direction[at] for i in numbers], dim=1))
        size, signed = size + products.abs().mean(0) / sequences, signed + products.mean(0) / sequences
    return size, signed


def coupling(k: Tensor, gate: float) -> tuple[Tensor, list[int], float]:
    """``-b k k^T`` for the features with the largest entries of ``k``; these features; their share of ``|k|^2``."""
    k = k.double()
    features = k.abs().argsort(descending=True, stable=True)[:FEATURES]
    strong = k[features]
    share = (strong.square().sum() / k.square().sum().clamp(min=1e-30)).item()
    return -gate * strong[:, None] * strong, features.tolist(), share


def _square(title: str, x: str, y: str, words: str, values: Tensor, names: Sequence[str], *, halved: bool) -> Chart:
    """Numbers in [-1, 1] between every two of ``names``, maybe with lines between two halves of them."""

    def draw(axes: Axes) -> None:
        matrix(axes, values.numpy(), names, names)
        axes.set_aspect("equal")
        for line in (axes.axhline, axes.axvline) if halved else ():
            line(len(names) / 2 - 0.5, color=LIGHT["soft"], linewidth=1.0)

    return Chart(title=title, draw=draw, x=x, y=y, words=words)


def _directions(look: Look) -> Iterator[Chart]:
    visit, width = "visit" if look.schedule.is_looped else "block", look.records[0].direction.shape[-1]
    numbers = [i for sublayer in NAMES for i in look.drawn(sublayer)[0]]
    names = [str(look.records[i].visit.slot) for i in numbers]
    size, signed = direction_products(look, numbers)
    x, y = f"{visit}: attention | feed-forward", "feed-forward | attention"
    words = (
        "|k\u1d62\u00b7k\u2c7c| between every two residuals, mean over tokens; full is 1. Two frozen shortcuts act on"
        f" each other through this number alone. Unrelated directions of width {width:,} would give"
        f" {math.sqrt(2 / math.pi / width):.2f}. It does not say whether two residuals write the same values."
    )
    yield _square("Do residuals use the same directions?", x, y, words, size, names, halved=True)
    words = (
        "k\u1d62\u00b7k\u2c7c: green points the same way, orange the opposite way. Empty here and full on the left"
        " means that the sign changes from token to token."
    )
    yield _square("The same with sign", x, y, words, signed, names, halved=True)
    if not look.spec.erase:
        return
    one = max(look.records, key=lambda record: record.erased.mean().item())
    sequence, position = divmod(int(one.erased.argmax()), one.erased.shape[1])
    gate = one.beta[sequence, position].item()
    found, features, share = coupling(one.direction[sequence, position], gate)
    largest = found.abs().max().item()
    words = (
        f"\u2212b k k\u1d40 of one token (position {position} of sequence {sequence}) in the {NAMES[one.sublayer]} of"
        f" {visit} {one.visit.slot}, with gate {gate:.2f}: its strongest {plural(len(features), 'feature')}, which hold"
        f" {percent(share)} of k. Green adds, orange takes away; full is {largest:.2g}. The residual and token that"
        " erase most were chosen, so it is an extreme, not an average."
    )
    x, y, names = "feature, the strongest first", "feature", [str(feature) for feature in features]
    yield _square("Which features one update mixes", x, y, words, found / (largest or 1.0), names, halved=False)


def _amounts(look: Look) -> Iterator[Chart]:
    y = "mean over tokens"
    words = (
        "b |k\u00b7X| is taken away along k and b |v| put in its place, mean over tokens. Amounts of opposite sign do"
        " not cancel here, so the state may move by more or less than their difference."
    )
    draw = partial(_draw_pair, look, {"erased": "erased", "written": "written"})
    yield _by_depth(look, "Erased and written", y, words, draw)
    words = (
        "|v \u2212 k\u00b7X| before and after the update, mean over tokens. A gate of 1 makes it 0, one near 0 or 2"
        " leaves it as large as it was. It need not become small: v is what the residual writes, not a truth."
    )
    draw = partial(_draw_pair, look, {"before": "discrepancy", "after": "discrepancy_after"})
    yield _by_depth(look, "Distance from the target", y, words, draw)
    words = _HEAT.format("target")
    if look.spec.value == "sigmoid":
        low, high = 0.0, look.spec.value_scale
        edge = VALUE_EDGE * high
        words += (
            " In the outer 2.5 % of the range, where the sigmoid hardly learns, lie"
            f" {percent(look.share(lambda one: one.value < edge))} (low end) and"
            f" {percent(look.share(lambda one: one.value > high - edge))} (high end) of the targets. A sigmoid target"
            " is never negative."
        )
    else:
        low = min(one.value.min().item() for one in look.records)
        high = max(one.value.max().item() for one in look.records)
    if low < high:
        draw = partial(_draw_histograms, look, field="value", low=low, high=high)
        yield _by_depth(look, "Target v by depth", "target v", words, draw)


def _draw_pair(look: Look, fields: Mapping[str, str], axes: Axes) -> None:
    """Two means for both sublayers: quantities of the records, by name."""
    for (name, field), color in zip(fields.items(), ("arm3", "arm2"), strict=True):
        means = look.means(field)
        for sublayer, marker, dashes in (("mixer", "o", "-"), ("mlp", "s", DASHED)):
            numbers, places = look.drawn(sublayer)
            style = {"marker": marker, "markersize": 4, "linestyle": dashes, "linewidth": 1.5, "color": LIGHT[color]}
            axes.plot(places, [means[i] for i in numbers], label=f"{name}, {NAMES[sublayer]}", **style)
    axes.set_ylim(bottom=0)


def _lengths(look: Look) -> Iterator[Chart]:
    words = (
        "|X| after every residual. The broken line is a new model of the same seed on the same text. A twin with the"
        " usual additive residual would have to be trained to stand beside them."
    )

    def draw_state(axes: Axes) -> None:
        after = (LIGHT["arm2"], look.means("state_norm_after"))
        _draw_lines(look, {"this model": after, "before training": (LIGHT["faint"], look.lengths_before)}, axes)
        axes.lines[-1].set(linestyle=DASHED, marker="")

    yield _by_depth(look, "Length of the state", "|X|, mean over tokens", words, draw_state)
    small = look.share(lambda one: one.h_norm < SMALL * look.spec.eps)
    words = (
        f"|h|, of which only the direction is used. {_SPREAD} Below 100 eps ({100 * look.spec.eps:g}), where the guard"
        f" or noise decides the direction, lie {percent(small)} of the tokens. The length has no effect on the state,"
        " but gradients are divided by it."
    )

    def draw_outputs(axes: Axes) -> None:
        _draw_spreads(look, axes, "h_norm", floor=look.spec.eps)  # a logarithmic axis has no place for 0
        axes.set_yscale("log")
        ticks = np.geomspace(*axes.get_ylim(), 6)
        axes.set_yticks(ticks, [f"{at:.2g}" for at in ticks])
        axes.minorticks_off()

    yield _by_depth(look, "Length of the sublayer's output", "|h|", words, draw_outputs)


def _draw_lines(look: Look, lines: Mapping[str, tuple[str, Sequence[float]]], axes: Axes) -> None:
    """Numbers of each use, joined by a line: name to colour and numbers."""
    numbers, places = look.drawn()
    for name, (color, values) in lines.items():
        axes.plot(places, [values[i] for i in numbers], "o-", color=color, linewidth=1.7, markersize=3.5, label=name)
    axes.set_ylim(bottom=0)


def channel_facts(look: Look) -> tuple[Tensor, Tensor]:
    """Mean length of each value channel of the state after each use, (N, V), and mean cosine of each pair, (N, P)."""
    rows, columns = torch.triu_indices(look.spec.values, look.spec.values, offset=1)
    lengths, cosines = [], []
    for one in look.records:
        norms = one.gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        cosine = one.gram / (norms[..., :, None] * norms[..., None, :]).clamp(min=1e-12)
        lengths.append(norms.flatten(0, -2).mean(0))
        cosines.append(cosine.flatten(0, -3).mean(0)[rows, columns])
    return torch.stack(lengths), torch.stack(cosines)


def _channels(look: Look) -> Iterator[Chart]:
    if look.spec.values < 2:
        return
    lengths, cosines = channel_facts(look)
    shown = evenly(range(look.spec.values), MAX_CHANNELS)
    colors = zip(shown, scale_colors(len(shown)), strict=True)
    lines = {f"channel {channel}": (color, lengths[:, channel].tolist()) for channel, color in colors}
    words = "Each channel of the state by itself, after every residual. Equal lengths do not mean equal contents."
    draw, y = partial(_draw_lines, look, lines), "length, mean over tokens"
    yield _by_depth(look, "Length of the value channels", y, words, draw, legend=3)
    words = (
        "Cosine between two channels of the state, mean over tokens: 1 is the same direction, as at the start, when all"
        " are copies. Near 1 the extra channels hold little that one would not."
    )
    draw = partial(_draw_likeness, look, cosines)
    yield _by_depth(look, "Are the value channels different?", "cosine of two channels", words, draw)
    names = evenly(list(look.readings), MAX_READINGS)
    read, weights = (torch.stack(found) for found in zip(*(look.readings[name] for name in names), strict=True))
    words = (
        "What each compressor multiplies the channels by after its filter; green is positive, orange negative. A weight"
        " says how a channel is read, not how much is in it."
    )
    x, y = "value channel", "compressor"
    yield Chart(title="Read vectors", draw=partial(_draw_readings, read, names), x=x, y=y, words=words)
    words = "The same with the compressor's filter folded in, mean over features: single features may differ from it."
    title, draw = "Weights of the channels, filter included", partial(_draw_readings, weights, names)
    yield Chart(title=title, draw=draw, x=x, y=y, words=words)


def _draw_likeness(look: Look, cosines: Tensor, axes: Axes) -> None:
    numbers, places = look.drawn()
    pairs, color = cosines[numbers].numpy(), LIGHT["arm2"]
    axes.fill_between(places, pairs.min(1), pairs.max(1), color=color, alpha=0.2, linewidth=0, label="range over pairs")
    axes.plot(places, pairs.mean(1), "o-", color=color, linewidth=1.8, markersize=4, label="mean")
    axes.set_ylim(min(0.0, pairs.min()) - 0.03, 1.03)


def _draw_readings(values: Tensor, names: Sequence[str], axes: Axes) -> None:
    strength, channels = values / (values.abs().max().item() or 1.0), values.shape[1]
    matrix(axes, strength.numpy(), [str(channel) for channel in range(channels)], names)
    for (y, x), value in np.ndenumerate(values.numpy() if channels <= 8 else np.empty((0, 0))):
        color = LIGHT["card" if abs(strength[y, x]) > 0.85 else "ink"]
        axes.text(x, y, f"{value:.2f}".replace("-", "\u2212"), ha="center", va="center", fontsize=8.5, color=color)


def _forced(look: Look) -> Iterator[Chart]:
    words = (
        f"Change of the loss on {look.forced_tokens:,} of the tokens when one gate is forced to 0 (keep), 1 (erase) or"
        " 2 (reflect) for every token, with 95 % intervals. The axis is linear up to 0.01 and logarithmic beyond. The"
        " model was not trained that way: a large bar says that it relies on this gate, not that another model could"
        " not do without."
    )
    for sublayer, name in NAMES.items() if look.forced else ():
        title, y = f"Forcing one gate: {name}", "loss change, nats per token"
        yield _by_depth(look, title, y, words, partial(_draw_forced, look, sublayer), legend=3)
        words = "The same for the feed-forward networks."


def _draw_forced(look: Look, sublayer: str, axes: Axes) -> None:
    numbers, places = look.drawn(sublayer)
    place = {look.records[i].visit.slot: round(at) for i, at in zip(numbers, places, strict=True)}
    for index, (gate, color) in enumerate(REGIMES.values()):
        chosen = [one for one in look.forced if (one.sublayer, one.beta) == (sublayer, gate) and one.slot in place]
        at, changes = [place[one.slot] + 0.27 * (index - 1) for one in chosen], [one.change for one in chosen]
        reach = [1.96 * (one.stderr or 0.0) for one in chosen]
        axes.bar(at, changes, width=0.24, color=LIGHT[color], label=f"b = {gate:g}", yerr=reach, ecolor=LIGHT["faint"])
    axes.axhline(0, color=LIGHT["soft"], linewidth=1.0)
    axes.set_yscale("symlog", linthresh=0.01, linscale=0.5)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.003), max(high, 0.012))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+g}".replace("-", "\u2212") if value else "0")
    axes.minorticks_off()
