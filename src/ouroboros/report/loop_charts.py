"""The charts of what loops do: by loop and token, and by loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ouroboros.report.drawing import LIGHT, NUM_ARMS, Chart, arm_color, evenly, heat, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ouroboros.eval.loops import LoopRecord
    from ouroboros.report.loops import Look

MAX_HEATS = 2
"""Texts of which what is handed is drawn by loop and token."""
_DASHES = ("-", (0, (4, 2)), ":")
_BAND = "The line is the mean over all tokens, the band holds the middle eight of ten."


def charts(look: Look, many: bool) -> list[Chart]:
    """The charts of one looped segment.

    Args:
        look: what it does.
        many: whether the page has other segments, so that titles say which one it is.
    """
    of = f" (part {look.segment + 1})" if many else ""
    found = []
    if look.handed:
        found += _of_handed(look, of)
    states = {"update": "length of the change / of the state", "cosine": "cosine"}
    titles = {"update": "How far each loop moves the state", "cosine": "Cosine of a state with the one before the loop"}
    behind = " Behind the last loop it includes what parts do there, such as a bridge."
    for name, axis in states.items():
        draw = partial(_draw_bands, look=look, of={axis: lambda one, name=name: getattr(one, name)}, named=False)
        found.append(Chart(title=f"{titles[name]}{of}", draw=draw, x="loop", y=axis, words=_BAND + behind))
    told = look.texts[0][0].told
    values = {name: partial(_told, name=name) for name, x in told.items() if x.is_floating_point()}
    if values:
        draw = partial(_draw_bands, look=look, of=values, named=True)
        found.append(
            Chart(title=f"Gates, gains and probabilities{of}", draw=draw, x="loop", y="value", legend=2, words=_BAND)
        )
    if look.depths:
        draw = partial(_draw_halted, look=look)
        found.append(Chart(title=f"Tokens that have halted{of}", draw=draw, x="loop", y="share of tokens, %", legend=4))
        draw = partial(_draw_steps, look=look)
        found.append(Chart(title=f"Loops of each token{of}", draw=draw, y="loops until it halts"))
    return found


def _of_handed(look: Look, of: str) -> list[Chart]:
    draw = partial(_draw_lengths, look=look)
    words = "Each line is one map of the blocks; the mean over all tokens."
    found = [
        Chart(
            title=f"Length of what is handed to each map{of}", draw=draw, x="loop", y="L2 norm", legend=4, words=words
        )
    ]
    for index, tokens in enumerate(look.tokens[:MAX_HEATS]):
        lengths = modulation(look.texts[index])
        if lengths.shape[1] == 1:  # the same for all tokens
            continue
        low, high = float(lengths.min()), float(lengths.max())
        words = f"L2 norm of what is handed to all maps together, from {low:.3g} (palest) to {high:.3g} (strongest)."
        draw = partial(_draw_heat, lengths=lengths, tokens=tokens)
        found.append(Chart(title=f"Modulation of text {index + 1}{of}", draw=draw, y="loop", words=words))
    return found


def modulation(records: Sequence[LoopRecord]) -> Tensor:
    """The length of all that is handed together, (loops, T), or (loops, 1) where all tokens get the same."""
    return torch.stack([torch.cat(tuple(one.handed.values()), dim=-1).norm(dim=-1) for one in records])


def _told(record: LoopRecord, name: str) -> Tensor:
    return record.told[name]


def _draw_heat(axes: Axes, *, lengths: Tensor, tokens: Sequence[str]) -> None:
    low, high = lengths.min(), lengths.max()
    loops, width = lengths.shape
    shade = 0.06 + 0.94 * (lengths - low) / (high - low).clamp(min=1e-12)
    heat(axes, shade.numpy(), (-0.5, width - 0.5, 0.5, loops + 0.5), "arm2")
    axes.set_yticks(evenly(range(1, loops + 1), 8))
    _token_axis(axes, tokens)
    axes.grid(visible=False, axis="y")


def _token_axis(axes: Axes, tokens: Sequence[str]) -> None:
    names = [label(token)[:9] for token in tokens]
    turned = 90 if max(map(len, names)) > 1 else 0
    axes.set_xticks(range(len(names)), names, rotation=turned, fontsize=9)
    axes.grid(visible=False, axis="x")


def _draw_lengths(axes: Axes, *, look: Look) -> None:
    for index, name in enumerate(look.handed):
        means = [float(torch.cat([r.handed[name].norm(dim=-1) for r in loop]).mean()) for loop in _by_loop(look)]
        style = _DASHES[index // NUM_ARMS % len(_DASHES)]
        color = LIGHT[arm_color(index)]
        axes.plot(_loops(len(means)), means, marker="o", markersize=4, linestyle=style, color=color, label=label(name))
    _loop_axis(axes, len(look.texts[0]))
    axes.set_ylim(bottom=0)


def _draw_bands(axes: Axes, *, look: Look, of: dict[str, Callable[[LoopRecord], Tensor]], named: bool) -> None:
    """The mean over all tokens of all texts by loop, and where the middle eight tenths of them are."""
    for index, (name, value) in enumerate(of.items()):
        every = [torch.cat([value(record) for record in loop]).float() for loop in _by_loop(look)]
        places, color = _loops(len(every)), LIGHT[arm_color(index)]
        low, high = ([float(one.quantile(q)) for one in every] for q in (0.1, 0.9))
        axes.fill_between(places, low, high, color=color, alpha=0.18, linewidth=0)
        means = [float(one.mean()) for one in every]
        axes.plot(places, means, marker="o", markersize=4, color=color, label=label(name) if named else None)
    _loop_axis(axes, len(look.texts[0]))
    axes.margins(y=0.15)


def _draw_halted(axes: Axes, *, look: Look) -> None:
    for index, one in enumerate(look.depths):
        shares, color = [100 * share for share in one.halted], LIGHT[arm_color(index)]
        axes.plot(_loops(len(shares)), shares, marker="o", markersize=4, color=color, label=f"text {index + 1}")
    _loop_axis(axes, len(look.texts[0]))
    axes.set_ylim(-4, 104)


def _draw_steps(axes: Axes, *, look: Look) -> None:
    steps = look.depths[0].steps
    axes.bar(range(len(steps)), steps, width=0.7, color=LIGHT["arm0"])
    axes.set_yticks(evenly(range(len(look.texts[0]) + 1), 8))
    _token_axis(axes, look.tokens[0])


def _by_loop(look: Look) -> list[tuple[LoopRecord, ...]]:
    """The records of each loop, of all texts."""
    return list(zip(*look.texts, strict=True))


def _loops(count: int) -> list[int]:
    return list(range(1, count + 1))


def _loop_axis(axes: Axes, count: int) -> None:
    axes.set_xticks(evenly(_loops(count), 10))
