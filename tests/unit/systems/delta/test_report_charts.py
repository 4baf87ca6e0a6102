"""The charts of the delta residuals."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

import pytest
import torch

from ouroboros.report.drawing import Chart, drawn
from ouroboros.systems.delta.report_charts import Look, charts, direction_products, product_values

WANTED = {
    "Gate b by depth": {"gate b", "median", "attention", "feed-forward", "visit, in order (shaded: loop \u00d72)"},
    "Eigenvalue along k by depth": {"0 erase", "1 keep", "\u22121 reflect"},
    "Keep, erase or reflect": {"keep", "erase", "reflect", "% of the tokens"},
    "Product of the shortcuts by depth": {"how many are below 0.5", "singular values, smallest first"},
    "Do residuals use the same directions?": {"visit: attention | feed-forward"},
    "Erased and written": {"erased", "written"},
    "Target v by depth": {"target v"},
}


def by_title(look: Look) -> dict[str, Chart]:
    return {chart.title: chart for chart in charts(look)}


def texts(chart: Chart) -> set[str]:
    return {e.text or "" for e in ElementTree.fromstring(drawn(chart)).iter() if e.tag.endswith("text")}


def test_every_chart_has_words(look: Look) -> None:
    found = by_title(look)
    assert list(found) == list(WANTED) and all(len(chart.words) > 20 for chart in found.values())
    assert "not the Jacobian of the layer" in found["Eigenvalue along k by depth"].words
    assert "frozen shortcuts alone" in found["Product of the shortcuts by depth"].words
    assert "width 16 would give 0.20" in found["Do residuals use the same directions?"].words
    assert "In the outer 2.5 % of the range" in found["Gate b by depth"].words


@pytest.mark.parametrize("title", WANTED)
def test_charts_name_what_they_draw(title: str, look: Look) -> None:
    assert WANTED[title] <= texts(by_title(look)[title])


def test_the_same_look_gives_the_same_chart(look: Look) -> None:
    first, second = (by_title(look)["Gate b by depth"] for _ in range(2))
    assert drawn(first) == drawn(second)


def test_control_that_only_writes_has_no_operator_to_draw(look_of: Callable[..., Look]) -> None:
    found = by_title(look_of("1", erase=False))
    assert len(found) == 4 and not any("Eigenvalue" in title or "Product" in title for title in found)


@pytest.mark.parametrize("value", ["constant", "linear"])
def test_targets_without_a_range_are_not_drawn(look_of: Callable[..., Look], value: str) -> None:
    assert "Target v by depth" not in by_title(look_of("1", value=value))


def test_products_of_directions_are_those_of_the_records(look: Look) -> None:
    size = direction_products(look, range(6))
    k = torch.stack([one.direction for one in look.records])
    expected = (k[0] * k[3]).sum(-1).double()
    assert size[3, 0].item() == pytest.approx(expected.abs().mean().item(), abs=1e-6)
    assert size[2, 2].item() == pytest.approx(1, abs=1e-4)


def test_product_has_at_most_as_many_small_values_as_residuals(look: Look) -> None:
    values = product_values(look)
    assert values.shape == (24, 6, 6) and (values >= 0).all() and (values <= 1 + 1e-6).all()
    for use in range(6):
        assert torch.allclose(values[:, use, use + 1 :], torch.ones_like(values[:, use, use + 1 :]))
    # The first shortcut's only value is its eigenvalue's size.
    assert torch.allclose(values[:, 0, 0], look.records[0].eigenvalue.flatten().abs().double(), atol=1e-3)
