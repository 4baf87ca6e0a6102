"""The charts of what loops do: what is drawn on the axes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ouroboros.eval.depth import Depth
from ouroboros.eval.loops import LoopRecord
from ouroboros.report.drawing import drawn
from ouroboros.report.loop_charts import charts, modulation
from ouroboros.report.loops import Look

plt = pytest.importorskip("matplotlib.figure")


def record(loop: int, scale: float, tokens: int = 3) -> LoopRecord:
    """Cores of lengths that grow along the text."""
    along = torch.arange(1.0, tokens + 1)
    core = scale * torch.stack((3 * along, 4 * along), dim=-1)
    told = {"gate": along / 10, "ran": along < 2}
    return LoopRecord(segment=1, loop=loop, update=along, cosine=along / 9, handed={"a": core, "b": core}, told=told)


LOOK = Look(
    segment=1,
    texts=[[record(0, 1.0), record(1, 2.0)], [record(0, 0.0), record(1, 0.0)]],
    tokens=[["ab", "<x>", "$y$"], ["a", "b", "c"]],
    depths=[
        Depth(segment=1, steps=(1, 2, 2), halted=(1 / 3, 1.0), probability=(0.5, None)),
        Depth(segment=1, steps=(2, 2, 2), halted=(0.0, 1.0), probability=(0.1, None)),
    ],
)


def test_modulation_is_the_length_of_everything_handed() -> None:
    root = 2**0.5
    expected = torch.tensor([[5.0, 10, 15], [10.0, 20, 30]]) * root
    torch.testing.assert_close(modulation(LOOK.texts[0]), expected)


def axes_of(title: str, look: Look = LOOK) -> object:
    (chart,) = (one for one in charts(look, False) if one.title == title)
    axes = plt.Figure().add_subplot()
    chart.draw(axes)
    return axes


def lines(title: str) -> dict[str, Sequence[float]]:
    found: object = axes_of(title)
    return {line.get_label(): list(line.get_ydata()) for line in found.get_lines()}  # pyrefly: ignore


def test_lines_are_means_over_all_tokens_by_loop() -> None:
    assert lines("Length of what is handed to each map") == {"a": [5.0, 10.0], "b": [5.0, 10.0]}
    assert lines("Gates, gains and probabilities") == {"gate": pytest.approx([0.2, 0.2])}, "without what is no number"
    assert [*lines("How far each loop moves the state").values()] == [[2.0, 2.0]]
    halted = lines("Tokens that have halted")
    assert halted == {"text 1": pytest.approx([100 / 3, 100]), "text 2": [0, 100]}


def test_heat_maps_have_a_cell_for_each_loop_and_token() -> None:
    axes = axes_of("Modulation of text 1")
    strength = axes.get_images()[0].get_array()[..., 3]  # pyrefly: ignore
    assert strength.shape == (2, 3) and strength[1, 2] == strength.max() == 1 and strength[0, 0] == strength.min()
    assert [text.get_text() for text in axes.get_xticklabels()] == ["ab", "<x>", "$y$"]  # pyrefly: ignore
    words = next(chart.words for chart in charts(LOOK, False) if chart.title == "Modulation of text 1")
    assert "from 7.07 (palest) to 42.4 (strongest)" in words


def test_bars_are_the_loops_of_each_token() -> None:
    bars = axes_of("Loops of each token").patches  # pyrefly: ignore
    assert [bar.get_height() for bar in bars] == [1, 2, 2]


def test_every_chart_is_drawn_and_says_which_part() -> None:
    found = charts(LOOK, True)
    assert all(chart.title.endswith(" (part 2)") for chart in found) and len(found) == 8
    assert all("<svg" in drawn(chart) for chart in found)
