"""Runs that were written before a block was a specification of its own are opened and resumed."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from ouroboros.api import load_model
from ouroboros.train.log import Progress, read_metrics
from ouroboros.train.run import resume

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
LOSSES = {
    "loop": [5.354272842407227, 5.320709228515625, 5.259777069091797],
    "delta": [5.4546217918396, 5.329739093780518, 5.303839206695557],
    "osam": [5.331473350524902, 5.310851097106934, 5.251708030700684],
}
"""Of steps 4 to 6, as the version that wrote the runs went on from step 3."""


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_of_before_goes_on_as_it_would_have(name: str, tmp_path: Path) -> None:
    with tarfile.open(FIXTURES / f"run-before-blocks-{name}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert resume(tmp_path / name, progress=Progress(quiet=True)).finished
    trained = [record for record in read_metrics(tmp_path / name / "metrics.jsonl") if record["kind"] == "train"]
    assert [record["loss"] for record in trained][3:] == pytest.approx(LOSSES[name], abs=2e-5)
    load_model(tmp_path / name)


@pytest.mark.parametrize("name", LOSSES)
def test_a_model_of_before_is_opened(name: str, tmp_path: Path) -> None:
    with tarfile.open(FIXTURES / f"run-before-blocks-{name}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    load_model(tmp_path / name / "checkpoints" / "step-00000003")
