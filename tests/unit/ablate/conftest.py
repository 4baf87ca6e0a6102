"""A study of runs that take fractions of a second."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ouroboros.ablate.changes import changed
from ouroboros.ablate.study import Arm, Stage, Study
from ouroboros.config import Recipe
from ouroboros.recipes import recipe

MakeStudy = Callable[..., Study]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quick_processes(monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    """Processes of a study need not import torch anew."""
    monkeypatch.setattr(sys, "executable", python)


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for index in range(24):
        lines = (f"{index} and {n} are {index + n}, which is {(index * n) % 13} more\n" for n in range(12))
        (folder / f"{index}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def small(small_text: Path) -> Recipe:
    return changed(
        recipe("loop", "tiny"),
        {
            "model.hidden_size": 16,
            "model.block.mixer.num_heads": 2,
            "model.block.ffn.intermediate_size": 24,
            "data.sources": [str(small_text)],
            "data.sequence_length": 32,
            "data.valid_fraction": 0.1,
            "data.test_fraction": 0.1,
            "train.batch_size": 2,
            "train.precision": "fp32",
            "optim.muon_precision": "fp32",
            "train.eval_every": 0,
            "train.compile": "off",
        },
    )


@pytest.fixture
def study_of(small: Recipe) -> MakeStudy:
    """Makes a study with the arm ``lr``; arguments replace fields, and ``changes`` are those of more arms by name."""
    control = Arm(name="control", recipe=small)

    def make(changes: dict[str, dict[str, Any]] | None = None, **fields: Any) -> Study:
        named = {"lr": {"optim.lr": 0.02}} if changes is None else changes
        arms = tuple(Arm.changing(control, name, values) for name, values in named.items())
        usual = {"question": "Does it pay?", "seeds": (1, 2), "stages": (Stage(name="only", steps=2),)}
        return Study(**{"name": "small", "control": control, "arms": arms} | usual | fields)

    return make


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proof of life, which has its own tests and takes longer than the runs."""
    monkeypatch.setattr("ouroboros.ablate.runner.dead_arms", lambda *_: {})
