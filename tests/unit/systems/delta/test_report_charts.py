"""The charts of the delta residuals."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from ouroboros.report.drawing import Chart, drawn
from ouroboros.systems.delta.measure import record
from ouroboros.systems.delta.report import Look, look_at
from ouroboros.systems.delta.report_charts import channel_facts, charts, coupling, direction_products, product_values

DeltaModel = Callable[..., tuple[Any, Any, torch.Tensor]]
WANTED = {
    "Gate b by depth": {"0 keep", "1 erase", "2 reflect", "attention", "feed-forward", "median", "before training"},
    "Eigenvalue along k by depth": {"0 erase", "1 keep", "\u22121 reflect", "visit, in order (shaded: loop \u00d72)"},
    "Keep, erase or reflect": {"keep", "erase", "reflect", "% of the tokens"},
    "Product of the shortcuts by depth": {"how many are below 0.5", "singular values, smallest first"},
    "Do residuals use the same directions?": {"visit: attention | feed-forward"},
    "The same with sign": {"feed-forward | attention"},
    "Which features one update mixes": {"feature, the strongest first"},
    "Erased and written": {"erased, attention", "written, feed-forward"},
    "Distance from the target": {"before, attention", "after, feed-forward"},
    "Target v by depth": {"target v"},
    "Length of the state": {"this model", "before training"},
    "Length of the sublayer's output": {"|h|"},
    "Length of the value channels": {"channel 0", "channel 2"},
    "Are the value channels different?": {"range over pairs", "mean"},
    "Read vectors": {"block 0", "block 1", "read-out", "value channel", "0.33"},
    "Weights of the channels, filter included": {"block 0", "read-out"},
    "Forcing one gate: attention": {"b = 0", "b = 1", "b = 2", "loss change, nats per token", "0"},
    "Forcing one gate: feed-forward": {"b = 2"},
}


def by_title(look: Look) -> dict[str, Chart]:
    return {chart.title: chart for chart in charts(look)}


def texts(chart: Chart) -> set[str]:
    return {e.text or "" for e in ElementTree.fromstring(drawn(chart).svg).iter() if e.tag.endswith("text")}


def test_every_chart_has_words(look: Look) -> None:
    found = by_title(look)
    assert list(found) == list(WANTED) and all(len(chart.words) > 20 for chart in found.values())
    assert "not the Jacobian of the layer" in found["Eigenvalue along k by depth"].words
    assert "frozen shortcuts alone" in found["Product of the shortcuts by depth"].words
    assert "width 16 would give 0.20" in found["Do residuals use the same directions?"].words
    assert "2 turns it round" in found["Gate b by depth"].words


@pytest.mark.parametrize("title", WANTED)
def test_charts_name_what_they_draw(title: str, look: Look) -> None:
    assert WANTED[title] <= texts(by_title(look)[title])


def test_the_same_look_gives_the_same_chart(look: Look) -> None:
    first, second = (by_title(look)["Gate b by depth"] for _ in range(2))
    assert drawn(first) == drawn(second)


def test_control_that_only_writes_has_no_operator_to_draw(delta_model: DeltaModel) -> None:
    found = by_title(look_at(*delta_model("1", erase=False)))
    assert len(found) == 10 and not any("Eigenvalue" in title or "Product" in title for title in found)
    assert "2 adds twice as much" in found["Gate b by depth"].words and "2" in texts(found["Gate b by depth"])


def test_targets_are_drawn_over_their_range(delta_model: DeltaModel) -> None:
    assert "Target v by depth" not in by_title(look_at(*delta_model("1", value="constant")))
    found = by_title(look_at(*delta_model("1", value="linear")))["Target v by depth"]
    assert "target v" in texts(found) and "sigmoid" not in found.words


@pytest.mark.parametrize("size", [0.0, 1e-4, 0.02, 4.0, -3.0])
def test_changes_of_any_size_have_an_axis(size: float, look: Look) -> None:
    forced = [dataclasses.replace(one, change=size, stderr=None) for one in look.forced]
    found = texts(by_title(dataclasses.replace(look, forced=forced))["Forcing one gate: attention"])
    assert "0" in found and (size < 0 or "+0.01" in found)
    assert ("+1" in found) == (size == 4.0) and ("\u22121" in found) == (size == -3.0)


def test_output_of_zero_has_a_place(look: Look) -> None:
    lengths = torch.tensor([[0.0, 0.0, 1.0, 2.0, 3.0]])
    other = dataclasses.replace(look, records=[dataclasses.replace(one, h_norm=lengths) for one in look.records])
    numbers = [
        float(text) for text in texts(by_title(other)["Length of the sublayer's output"]) if re.match(r"\d.*e", text)
    ]
    assert numbers and min(numbers) <= look.spec.eps


def test_products_of_directions_are_those_of_the_records(look: Look) -> None:
    size, signed = direction_products(look, range(6))
    k = torch.stack([one.direction for one in look.records])
    expected = (k[0] * k[3]).sum(-1).double()
    assert signed[0, 3].item() == pytest.approx(expected.mean().item(), abs=1e-6)
    assert size[3, 0].item() == pytest.approx(expected.abs().mean().item(), abs=1e-6)
    assert size[2, 2].item() == pytest.approx(1, abs=1e-4)


def test_product_has_at_most_as_many_small_values_as_residuals(look: Look) -> None:
    values = product_values(look)
    assert values.shape == (24, 6, 6) and (values >= 0).all() and (values <= 1 + 1e-6).all()
    for use in range(6):
        assert torch.allclose(values[:, use, use + 1 :], torch.ones_like(values[:, use, use + 1 :]))
    # The first shortcut's only value is its eigenvalue's size.
    assert torch.allclose(values[:, 0, 0], look.records[0].eigenvalue.flatten().abs().double(), atol=1e-3)


def test_coupling_is_of_the_strongest_features() -> None:
    k = torch.tensor([0.1, -0.9, 0.4])
    matrix, features, share = coupling(k, 1.5)
    assert features == [1, 2, 0] and share == pytest.approx(1)
    assert matrix[0, 1].item() == pytest.approx(1.5 * 0.9 * 0.4) and matrix[0, 0].item() == pytest.approx(-1.5 * 0.81)
    assert coupling(torch.ones(64) / 8, 1.0)[2] == pytest.approx(0.5)


def test_channels_are_those_of_the_state(delta_model: DeltaModel, look: Look) -> None:
    model, _, ids = delta_model("1 (1)x2", values=3)
    lengths, cosines = channel_facts(look)
    assert lengths.shape == cosines.shape == (6, 3)
    squares = record(model, ids)[0].gram.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(lengths[0], squares.sqrt().mean((0, 1)))
    assert (cosines <= 1 + 1e-5).all() and (cosines >= -1 - 1e-5).all()
