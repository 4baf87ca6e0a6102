"""The study of the published findings about the Controller: every kind of cell runs, and what is finished is kept."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import controller_hypotheses as study
import pytest
import torch
from controller_cells import CONTROLS, LAYERS, Bench, Cell, Sizes, misled, share_of_rate, write_texts

ARMS = (
    *("controller, depth 2", "static, depth 2", "two ahead", "random bases", "depth drawn", "coda trained"),
    *("ours, controller", "bfloat16, published rate", "refiner, no gate, saddle", "refiner, gate, b_zero"),
)
SMALL = Sizes(donor_steps=1, updates=2, windows=2, max_bytes=20_000)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two texts of unlike words."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    found = []
    for name, words in (("in", ("def", "return", "self")), ("out", ("the", "a", "of"))):
        found.append(folder / f"{name}.txt")
        found[-1].write_text("\n".join(" ".join(draw.choices(words, k=9)) for _ in range(700)), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, texts: list[Path]) -> Bench:
    """A donor that has hardly been trained."""
    return Bench(tmp_path_factory.mktemp("bench"), texts, SMALL)


def run(out: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    data = ["--data", str(texts[0]), "--other", str(texts[1]), "--seeds", "2"]
    sizes = ["--donor-steps", "1", "--updates", "1", "--windows", "1", "--max-bytes", "20000"]
    monkeypatch.setattr("sys.argv", ["study", "--out", str(out), *data, *sizes, *more])
    study.main()


def test_goes_on_where_it_stopped(
    tmp_path: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = dict(study.plan())
    monkeypatch.setattr(study, "plan", lambda: [(name, cells[name]) for name in ARMS])
    run(tmp_path, texts, monkeypatch)
    first = json.loads(capsys.readouterr().out)
    assert first == json.loads((tmp_path / "hypotheses.json").read_bytes())
    assert first["not_reached"] == [] and {f"H{number}" for number in range(3, 12)} < first.keys()
    gap = first["H7"]["controller, depth 2"]["in"]["minus cut"]
    assert gap["low"] <= gap["mean"] <= gap["high"]
    assert first["H6"]["refiners"]["refiner, no gate, saddle"]["heads moved"]["mean"] == 0
    assert first["H6"]["refiners"]["refiner, gate, b_zero"]["heads moved"]["mean"] > 0
    assert first["H6"]["no norm"]["in"] == {}  # was not asked for

    monkeypatch.setattr(Bench, "run", lambda *_: pytest.fail("a finished cell is trained again"))
    run(tmp_path, texts, monkeypatch, "--minutes", "0")
    assert json.loads(capsys.readouterr().out) == first
    with pytest.raises(SystemExit, match="other settings \\(updates\\)"):
        run(tmp_path, texts, monkeypatch, "--updates", "3")


def test_stops_when_time_is_over(bench: Bench, tmp_path: Path) -> None:
    table = study.Table([0])
    assert len(study.train(bench, table, tmp_path, -1)) == len(study.plan()) and not table.results
    assert table.mean("two ahead") == table.minus("two ahead", "no gate") == {}


def test_cells_have_names_of_their_own() -> None:
    cells = [cell for _, cell in study.plan()]
    assert len({cell.name for cell in cells}) == len(cells)
    assert Cell(depth=8, gate="none", seed=2).name == "depth-8_gate-none_seed-2"


def test_the_better_rate_by_validation_is_taken() -> None:
    table = study.Table([0])
    for rate, loss in zip(study.RATES, (2.0, 1.0), strict=True):
        table.results[Cell(depth=1, rate=rate)] = {"valid next": loss, "in next": 3 - loss}
    assert table.values("controller, depth 1") == [2.0]
    del table.results[Cell(depth=1, rate=study.RATES[1])]
    assert table.values("controller, depth 1") == [1.0]


def test_a_wrong_input_changes_what_the_controller_makes(bench: Bench) -> None:
    model = bench.model(Cell(depth=1))
    with torch.no_grad():  # at its start it makes zeros of every input
        for name, parameter in model.named_parameters():
            if ".heads." in name:
                torch.nn.init.normal_(parameter)
    right = bench.losses(model)["in next"]
    wrong = {how: _misled(bench, model, how) for how in CONTROLS}
    assert len({right, *wrong.values()}) == 4 and bench.losses(model)["in next"] == right


def _misled(bench: Bench, model: Any, how: str) -> float:
    with misled(model, how):
        return bench.losses(model)["in next"]


def test_cut_is_the_start_without_norm_and_gate(bench: Bench) -> None:
    assert bench.losses(bench.model(Cell(depth=1, gate="none", norm=False))) == bench.losses(bench.cut())
    assert len(bench.donor.schedule.visits) == LAYERS


def test_rate_rises_and_falls() -> None:
    shares = [share_of_rate(update, 40) for update in range(40)]
    assert max(shares) == shares[4] == 1 and shares[0] == 0.25 and shares[-1] < 0.01


def test_code_and_prose_are_parted(tmp_path: Path) -> None:
    files = write_texts(tmp_path, [Path(argparse.__file__)])
    code, prose = (file.read_text(encoding="utf-8") for file in files)
    assert "Command-line parsing library" in prose and "Command-line parsing library" not in code
    assert "class ArgumentParser(" in code and len(code) > 3 * len(prose)
