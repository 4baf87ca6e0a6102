"""Runs that were written before a block was a specification of its own are opened and resumed.

Each was stopped at step 3 of 6: ``loop`` has every loop part, stem part and option of the head; ``delta`` and ``osam``
have the residual and the memory of these names; ``state`` has everything with state or draws: averaged weights, mixed
sources, random loop counts, corrupted inputs, dropout.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from ouroboros.api import open_model
from ouroboros.train.log import Progress, read_metrics
from ouroboros.train.run import resume

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
LOSSES = {
    "loop": [5.354272842407227, 5.320709228515625, 5.259777069091797],
    "delta": [5.4546217918396, 5.329739093780518, 5.303839206695557],
    "osam": [5.331473350524902, 5.310851097106934, 5.251708030700684],
    "state": [5.376079082489014, 5.324880599975586, 5.270646095275879],
}
"""Of steps 4 to 6, as the version that wrote the runs went on from step 3."""
SCORE = 7.5811045116056395
"""Bits per byte of the averaged weights of ``state`` at the end."""


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_of_before_opens_and_goes_on_as_it_would_have(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(FIXTURES / f"run-before-blocks-{name}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    run = tmp_path / name
    begun = open_model(run)
    assert begun.directory.name == "step-00000003" and begun.recipe is not None
    assert begun.tokenizer.encode(b"ab").tolist() == [97, 98]
    result = resume(run, progress=Progress(quiet=True))
    assert result.finished and result.counters.step == 6 and "not there any more" in caplog.text
    records = list(read_metrics(run / "metrics.jsonl"))
    trained = {record["step"]: record["loss"] for record in records if record["kind"] == "train"}
    assert list(trained) == [1, 2, 3, 4, 5, 6]
    assert list(trained.values())[3:] == pytest.approx(LOSSES[name], abs=2e-5)
    scores = [record["bits_per_byte"] for record in records if record["kind"] == "valid"]
    assert name != "state" or scores[-1] == pytest.approx(SCORE, abs=2e-5)
    finished = open_model(run)
    assert finished.directory == run and finished.recipe.model == begun.recipe.model
