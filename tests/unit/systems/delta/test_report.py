"""The report's section on the delta residuals."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ouroboros.api import build
from ouroboros.config import Recipe, to_json
from ouroboros.data.prepared import open_prepared
from ouroboros.data.shards import prepare
from ouroboros.recipes import recipe
from ouroboros.report import report_from_run
from ouroboros.report.page import to_html
from ouroboros.report.run import Run
from ouroboros.schedule import parse
from ouroboros.systems.delta import report as module
from ouroboros.systems.delta.measure import record
from ouroboros.systems.delta.report import Look, headline, lead, look_at, sample_size, section, table
from ouroboros.train.rundir import RunDirectory

DeltaModel = Callable[..., tuple[Any, Recipe, torch.Tensor]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, delta_model: DeltaModel) -> Path:
    """A finished run of a delta model."""
    place = tmp_path_factory.mktemp("made")
    model, made, _ = delta_model()
    (place / "a.txt").write_text("Some words and more words of a text. " * 60)
    data = dataclasses.replace(made.data, sources=("a.txt",), sequence_length=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        prepare(data, "run/data")
    made = dataclasses.replace(made, data=data)
    model.save_pretrained(place / "run")
    (place / "run" / "recipe.json").write_text(to_json(made))
    (place / "run" / "metrics.jsonl").write_text("")
    return place / "run"


def test_a_run_is_looked_at_on_its_held_out_text(run: Path) -> None:
    found = section(Run(run, RunDirectory(run).read_recipe(), []))
    assert found is not None
    tokens = len(open_prepared(run / "data").tokens("test", 0)) // 16 * 16
    looked_at = f"the run's finished model on {tokens:,} tokens of its test text ({tokens // 16} sequences of 16);"
    assert looked_at in found.lead and len(found.charts) == 14 and len(found.tables[0].rows) == 6
    report = report_from_run(run)
    assert [one.ident for one in report.sections] == ["data", "residual"]
    html = to_html(report)
    assert 'id="residual"' in html and found.headline in html and html.count('class="chart"') == 14
    assert html.count("<tr>") == 1 + 6 and len(html) < 600_000


def test_a_plain_model_is_not_even_loaded(tmp_path: Path) -> None:
    assert section(Run(tmp_path, recipe("gpt", "tiny"), [])) is None


def test_a_run_that_cannot_be_looked_at_says_so(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "model.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        report = report_from_run(copy)
    assert [one.ident for one in report.sections] == ["data"]
    assert "the part about the delta residuals is left out" in caplog.text
    assert any("says nothing of the delta residuals: files of the run" in note for note in report.notes)
    shutil.rmtree(copy / "data")
    assert report_from_run(copy).sections == []


def test_large_models_are_looked_at_on_less(monkeypatch: pytest.MonkeyPatch) -> None:
    small = recipe("gpt", "tiny")
    assert np.prod(sample_size(small)) == module.MAX_TOKENS
    monkeypatch.setattr(module, "MAX_RECORDED", 6 * small.model.hidden_size * 300)
    assert np.prod(sample_size(small)) <= 300 and sample_size(small)[0] >= 1


def test_uses_are_placed_by_visit_and_sublayer(look: Look) -> None:
    assert [(one.visit.slot, one.sublayer) for one in look.records[:3]] == [(0, "mixer"), (0, "mlp"), (1, "mixer")]
    numbers, places = look.drawn()
    assert numbers == list(range(6)) and places.tolist() == [-0.25, 0.25, 0.75, 1.25, 1.75, 2.25]
    numbers, places = look.drawn("mlp")
    assert numbers == [1, 3, 5] and places.tolist() == [0.25, 1.25, 2.25]


def test_readings_of_every_compressor(delta_model: DeltaModel, look: Look) -> None:
    model, _, _ = delta_model("1 (1)x2", values=3)
    assert list(look.readings) == ["block 0", "block 1", "read-out"]
    assert look.readings["block 0"][0].tolist() == pytest.approx([1 / 3] * 3)
    assert torch.equal(look.readings["read-out"][1], model.model.readout.folded().mean(0))
    model, made, ids = delta_model("1", values=2, compressor="token", kernel=2)
    with torch.no_grad():
        model.model.readout.weight.fill_(0.25)
    assert look_at(model, made, ids).readings["read-out"][1].tolist() == pytest.approx([0.25, 0.25])


def test_before_training_is_a_new_model_of_the_seed(delta_model: DeltaModel, look: Look) -> None:
    model, made, ids = delta_model("1 (1)x2", values=3)
    state = torch.get_rng_state()
    found = look_at(model, made, ids)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(made.train.seed)
    start = record(build(made), ids)
    assert look.gates_before == found.gates_before
    assert found.gates_before == pytest.approx([one.beta.double().quantile(0.5).item() for one in start])
    assert found.lengths_before == [one.state_norm_after.mean().item() for one in start]


def test_forced_gates_within_a_budget(delta_model: DeltaModel, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(look.forced) == 18 and look.forced_tokens == 24
    model, made, ids = delta_model("1")
    monkeypatch.setattr(module, "FORCED_FLOPS", 1)
    assert look_at(model, made, ids).forced_tokens == 2 * ids.shape[1]
    for name in ("MAX_FORCED_FLOPS", "MAX_FORCED_VISITS"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 1)
            found = look_at(model, made, ids)
        assert found.forced == [] and found.forced_tokens == 0
    assert "left out" in lead(found, "a sample")


def test_headline_counts_residuals(look: Look) -> None:
    def gates(*medians: float) -> str:
        other = dataclasses.replace(look)
        vars(other)["median_gates"] = medians
        return headline(other)

    assert gates(0.1, 0.7, 1.2, 1.6) == (
        "Of 4 residuals, 1 keeps (median gate below 0.5), 2 erase and 1 reflects (1.5 or more);"
        " 2 have a median gate above 1, so they turn round what lies along their direction."
    )
    assert gates(0.1, 0.2).endswith("0 erase and 0 reflect (1.5 or more); 0 have a median gate above 1.")
    assert "1 has a median gate above 1, so it turns round what lies along its direction." in gates(0.1, 1.2)


def test_control_that_only_writes(delta_model: DeltaModel) -> None:
    model, made, ids = delta_model("1", erase=False)
    found = look_at(model, made, ids)
    assert found.readings == {} and "only writes" in lead(found, "a sample")
    assert headline(found) == (
        "Of 2 residuals none erases, because this control only writes; the median gate is below 0.5 in 0, from 0.5 to"
        " 1.5 in 2, and 1.5 or more in 0."
    )


def test_lead_says_what_was_looked_at(look: Look) -> None:
    text = lead(look, "this sample")
    assert "The pictures are of this sample;" in text and "2 blocks, 3 visits" in text
    assert "at even distances" not in text and "left out" not in text
    assert "visits" not in lead(dataclasses.replace(look, schedule=parse("3")), "x")
    assert "Of the 40 visits 32 at even distances" in lead(dataclasses.replace(look, schedule=parse("40")), "x")


def test_amounts_and_shares_of_all_uses(look: Look) -> None:
    assert look.means("written") == [one.written.mean().item() for one in look.records]
    gates = torch.stack([one.beta for one in look.records])
    assert look.share(lambda one: one.beta < 0.7) == pytest.approx((gates < 0.7).double().mean().item())
    assert look.quantiles("beta")[2][2] == look.median_gates[2] == pytest.approx(gates[2].double().quantile(0.5).item())


def test_table_has_a_line_for_each_residual(look: Look) -> None:
    found = table(look)
    assert [row[0] for row in found.rows[:2]] == ["0 attention", "0 feed-forward"] and len(found.rows) == 6
    assert all(len(row) == len(found.head) == 9 for row in found.rows)
