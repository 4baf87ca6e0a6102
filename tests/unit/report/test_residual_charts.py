"""Charts of the delta residuals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from ouroboros.report import residual_charts as charts
from ouroboros.report.delta import DeltaFacts
from ouroboros.report.palette import LIGHT

CHARTS: dict[str, Callable[[DeltaFacts], str]] = {
    "gate": charts.gate_chart,
    "eigenvalue": charts.eigenvalue_chart,
    "regimes": charts.regime_chart,
    "product": charts.product_chart,
    "coherence": lambda facts: charts.coherence_chart(facts, signed=False),
    "signed": lambda facts: charts.coherence_chart(facts, signed=True),
    "coupling": charts.coupling_chart,
    "amounts": charts.amount_chart,
    "discrepancy": charts.discrepancy_chart,
    "norm": charts.norm_chart,
    "targets": charts.target_chart,
    "outputs": charts.output_chart,
    "channels": charts.channel_chart,
    "cosines": charts.cosine_chart,
    "read": lambda facts: charts.reading_chart(facts, filtered=False),
    "weights": lambda facts: charts.reading_chart(facts, filtered=True),
    "forced": lambda facts: charts.ablation_chart(facts, "mixer", ident="f"),
}


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")]


@pytest.mark.parametrize("name", CHARTS)
def test_charts_are_valid_and_follow_the_palette(name: str, facts: DeltaFacts) -> None:
    svg = CHARTS[name](facts)
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and root.get("aria-label")
    for word in svg.replace(";", " ").replace('"', " ").replace(")", " ").split():
        assert not word.startswith("#") or word in LIGHT.values() or "-" in word, word


def test_the_same_facts_give_the_same_chart(facts: DeltaFacts) -> None:
    assert charts.gate_chart(facts) == charts.gate_chart(facts)


WANTED = {
    "gate": {"0 keep", "1 erase", "2 reflect", "attention", "feed-forward", "median", "before training", "gate b"},
    "eigenvalue": {"0 erase", "1 keep", chr(0x2212) + "1 reflect", "visit, in order (shaded: loop " + chr(0xD7) + "2)"},
    "regimes": {"keep", "erase", "reflect", "% of the tokens"},
    "product": {"how many are below 0.5"},
    "coherence": {"visit: attention | feed-forward"},
    "coupling": {"feature, the strongest first"},
    "amounts": {"erased, attention", "written, feed-forward"},
    "discrepancy": {"before, attention", "after, feed-forward"},
    "norm": {"this model", "before training"},
    "targets": {"target v"},
    "outputs": {"|h|"},
    "channels": {"channel", "0", "2"},
    "cosines": {"range over pairs", "mean"},
    "read": {"block 0", "block 1", "read-out", "value channel", "0.33"},
    "forced": {"b = 0", "b = 1", "b = 2", "loss change, nats per token", "0"},
}


@pytest.mark.parametrize("name", WANTED)
def test_charts_name_what_they_draw(name: str, facts: DeltaFacts) -> None:
    assert WANTED[name] <= set(texts(CHARTS[name](facts)))


def test_without_erasing_there_is_no_operator_to_draw(facts: DeltaFacts) -> None:
    control = dataclasses.replace(facts, erase=False, product=None, coupling=None)
    assert charts.eigenvalue_chart(control) == charts.product_chart(control) == charts.coupling_chart(control) == ""


def test_nothing_to_draw_is_empty(facts: DeltaFacts) -> None:
    uses = [dataclasses.replace(use, channel_norms=[1.0], cosines=None, targets=()) for use in facts.uses]
    vector = dataclasses.replace(facts, uses=uses, readings=(), target_range=None, ablations=())
    for name in ("channels", "cosines", "read", "weights", "targets", "forced"):
        assert CHARTS[name](vector) == "", name


@pytest.mark.parametrize("size", [0.0, 1e-4, 0.02, 4.0, -3.0])
def test_changes_of_any_size_have_an_axis(size: float, facts: DeltaFacts) -> None:
    changed = [dataclasses.replace(one, change=size, stderr=None) for one in facts.ablations]
    found = texts(CHARTS["forced"](dataclasses.replace(facts, ablations=changed)))
    assert {"0", "+0.01"} <= set(found)
    assert ("+3" in found) == (size == 4.0) and (chr(0x2212) + "1" in found) == (size == -3.0)


def test_output_of_zero_has_a_place(facts: DeltaFacts) -> None:
    zero = [
        dataclasses.replace(use, summary=dataclasses.replace(use.summary, h_norm=(0.0, 0.1, 1.0, 2.0, 3.0)))
        for use in facts.uses
    ]
    assert "1e-07" in texts(charts.output_chart(dataclasses.replace(facts, uses=zero)))
