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

from ouroboros.config import Recipe, to_json
from ouroboros.data.prepared import open_prepared
from ouroboros.data.shards import prepare
from ouroboros.recipes import recipe
from ouroboros.report import report_from_run
from ouroboros.report.page import to_html
from ouroboros.report.run import Run
from ouroboros.systems.delta import report as module
from ouroboros.systems.delta.report import headline, lead, sample_size, section
from ouroboros.systems.delta.report_charts import Look
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
    assert looked_at in found.lead and len(found.charts) == 7
    report = report_from_run(run)
    assert [one.ident for one in report.sections] == ["data", "residual"]
    html = to_html(report)
    assert 'id="residual"' in html and found.headline in html and html.count('class="chart"') == 7
    assert len(html) < 400_000


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
    assert look.drawn == dict(enumerate([-0.25, 0.25, 0.75, 1.25, 1.75, 2.25]))


def test_headline_counts_residuals(look: Look) -> None:
    def gates(*medians: float) -> str:
        other = dataclasses.replace(look)
        vars(other)["median_gates"] = medians
        return headline(other)

    assert gates(0.1, 0.7, 1.2, 1.6) == (
        "Of 4 residuals, median gates below 0.5 (keep): 1; from 0.5 to 1.5 (erase): 2; 1.5 or more (reflect): 1; above"
        " 1, where what lies along the direction changes its sign: 2."
    )


def test_control_that_only_writes(look_of: Callable[..., Look]) -> None:
    found = look_of("1", erase=False)
    assert "X + b k v." in lead(found, "a sample")
    assert headline(found) == (
        "Of 2 residuals, median gates below 0.5: 0; from 0.5 to 1.5: 2; 1.5 or more: 0; above 1: 1."
    )


def test_lead_says_what_was_looked_at(look: Look) -> None:
    assert "The pictures are of this sample;" in lead(look, "this sample")
