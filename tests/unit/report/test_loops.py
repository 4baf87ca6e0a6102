"""The section on what loops do."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ouroboros.api import build
from ouroboros.config import FeedForwardSpec, LoopPart, Recipe, to_json
from ouroboros.config.parts.halt import HaltSpec
from ouroboros.config.parts.loop import BridgeSpec, LoopEmbeddingSpec, LoopGainSpec, RecurrenceGateSpec
from ouroboros.config.parts.modulated import ControllerSpec, StaticDiagonalsSpec, modulated
from ouroboros.data.shards import prepare
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.eval.subject import perturb
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.recipes import recipe
from ouroboros.report import loops as module
from ouroboros.report import report_from_run
from ouroboros.report.content import Report
from ouroboros.report.healing import loops_of_arms
from ouroboros.report.loops import SENTENCES, has_something_to_say, loops_section, section_of
from ouroboros.report.page import to_html
from ouroboros.report.run import Run

ALL = (ControllerSpec(rank=2, style=4), RecurrenceGateSpec(), LoopGainSpec(), HaltSpec(hidden=4), BridgeSpec())


def made(*loop: LoopPart, layout: str = "1 loop:(1)x3 1") -> tuple[Recipe, OuroborosForCausalLM]:
    """A tiny recipe with loop parts, and its model with parts that do something."""
    found = recipe("gpt", "tiny")
    model = found.model.replace(layout=layout, hidden_size=16, ffn=FeedForwardSpec(intermediate_size=24))
    found = dataclasses.replace(found, model=modulated(model, loop, rank=2, alpha=2.0))
    torch.manual_seed(0)
    built = build(found).eval()
    perturb(built)
    return found, built


def look(*loop: LoopPart, **options: Any) -> Any:
    return section_of(made(*loop, **options)[1], byte_tokenizer(), SENTENCES, "a model")


def run_of(place: Path, *loop: LoopPart) -> Path:
    """A run directory with a model and its tokenizer, and without data."""
    found, model = made(*loop)
    model.save_pretrained(place / "run")
    byte_tokenizer().save(place / "run")
    (place / "run" / "recipe.json").write_text(to_json(found))
    (place / "run" / "metrics.jsonl").write_text("")
    return place / "run"


def test_everything_is_told_of_a_model_that_has_everything() -> None:
    section = look(*ALL)
    titles = [chart.title for chart in section.charts]
    assert titles == [
        "Length of what is handed to each map",
        *("Modulation of text 1", "Modulation of text 2"),
        *("How far each loop moves the state", "Cosine of a state with the one before the loop"),
        *("Gates, gains and probabilities", "Tokens that have halted", "Loops of each token"),
    ]
    handed, halted = section.tables
    assert [row[0] for row in handed.rows][:2] == ["q_proj", "k_proj"] and len(handed.rows) == 7
    assert len(halted.rows) == len(SENTENCES) and halted.rows[0][0].startswith("The\u2423capital")
    assert "between loops" in section.headline and "between tokens" in section.headline
    assert "the first of 3 loops changes the state by" in section.headline
    assert "4 texts of at most 24 tokens" in section.lead


def test_static_parts_look_at_no_text() -> None:
    section = look(StaticDiagonalsSpec(rank=2))
    assert not any("Modulation of text" in chart.title for chart in section.charts)
    assert "0.0 % between tokens, 0.0 % between texts" in section.headline
    assert all(row[-2:] == ["0.000", "0.000"] and row[1] != "0.000" for row in section.tables[0].rows)


def test_cores_at_their_start_are_zero() -> None:
    found, _ = made(ControllerSpec(rank=2, style=4))
    section = section_of(build(found).eval(), byte_tokenizer(), SENTENCES, "a model")
    assert section is not None and section.headline.startswith("What loop parts hand to the blocks is zero; the first")
    assert "What the loops do" in to_html(Report(title="a page", sections=[section])), "nothing divides by zero"


def test_two_segments_and_parts_that_hand_nothing() -> None:
    section = look(LoopGainSpec(), layout="(1)x2 1 (1)x3")
    assert (
        section.headline.startswith("Part 1: the first of 2 loops changes") and "Part 3: the first" in section.headline
    )
    assert len(section.charts) == 6 and section.charts[0].title == "How far each loop moves the state (part 1)"
    assert section.tables == []


def test_a_part_is_asked_and_not_known() -> None:
    """The question is what the module of a part overrides."""
    for part, expected in ((LoopGainSpec(), True), (HaltSpec(), True), (LoopEmbeddingSpec(), False)):
        spec = made(part)[0].model
        assert has_something_to_say(spec) == expected
    assert look(LoopEmbeddingSpec()) is None and not has_something_to_say(recipe("gpt", "tiny").model)


def test_a_page_of_a_run_has_it(tmp_path: Path) -> None:
    page = to_html(report_from_run(run_of(tmp_path, *ALL)))
    assert page.count('class="chart"') == 8 and 'id="inside-loops"' in page and "built-in sentences" in page
    assert len(page) < 400_000


def test_gates_of_a_run_are_loaded_with_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published tool showed those of the start."""
    seen: list[Any] = []
    monkeypatch.setattr(module, "charts", lambda look, many: seen.append(look) or [])
    run = run_of(tmp_path, RecurrenceGateSpec())
    model = made(RecurrenceGateSpec())[1]
    gate: Any = model.model.decoder.loops[0].gate  # pyrefly: ignore
    gate.proj.weight.data.zero_()
    gate.proj.bias.data.fill_(3.0)
    model.save_pretrained(run)
    report_from_run(run)
    assert seen[0].texts[0][0].told["gate"].tolist() == pytest.approx([float(torch.tensor(3.0).sigmoid())] * 24)


def test_held_out_text_of_the_run_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, LoopGainSpec())
    (tmp_path / "a.txt").write_text("Some words and more words of a text. " * 60)
    monkeypatch.chdir(tmp_path)
    found = made(LoopGainSpec())[0]
    prepare(dataclasses.replace(found.data, sources=("a.txt",), sequence_length=16), "run/data")
    section = loops_section(Run(run, found, []))
    assert section is not None and "the run's finished model on test text: 4 texts" in section.lead


def test_what_cannot_be_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert loops_section(Run(tmp_path, recipe("gpt", "tiny"), [])) is None, "is not even loaded"
    run = run_of(tmp_path, LoopGainSpec())
    (run / "model.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        report = report_from_run(run)
    assert "the part about what the loops do is left out" in caplog.text and report.sections == []
    model = made(LoopGainSpec())[1]
    for texts in ([], [b""], [np.array([9999])]):
        with pytest.raises(OuroborosError, match="no text, or it has tokens that the model does not know"):
            section_of(model, byte_tokenizer(), texts, "a model")


def test_the_page_of_a_healing_shows_the_best_arm_and_the_controller() -> None:
    models = {"healed": made(LoopGainSpec()), "controller": made(ControllerSpec(rank=2, style=4)), "norms": made()}

    def sections(best: str, *arms: str) -> list[str]:
        judge: Any = SimpleNamespace(
            texts={"news": [b"One.", b"Two.", b"Three."]},
            tokenizer=byte_tokenizer(),
            model_of=lambda arm: models[arm][1],
        )
        found = loops_of_arms(judge, [SimpleNamespace(name=arm) for arm in arms], best)  # pyrefly: ignore
        assert all("2 texts of at most 24 tokens" in section.lead for section in found)
        return [section.ident for section in found]

    assert sections("healed", "healed", "controller") == ["inside-loops-healed", "inside-loops-controller"]
    assert sections("controller", "controller") == ["inside-loops-controller"]
    assert sections("norms", "norms") == []
