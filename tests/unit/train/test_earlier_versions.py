"""Run directories that earlier versions wrote still open, resume and finish with the numbers they had then.

``tests/fixtures/run-0.1`` was stopped at step 3 of 6, with everything in use that has state: two optimisers, averaged
weights, mixed sources, random loop counts, corruption. ``expected.json`` has the losses of its last steps as that
version computed them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ouroboros.api import open_model
from ouroboros.train.log import read_metrics
from ouroboros.train.run import resume

FIXTURE = Path(__file__).parents[2] / "fixtures" / "run-0.1"


def test_a_run_of_version_0_1_opens_resumes_and_finishes_as_it_would_have(tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(FIXTURE, run)
    expected = json.loads((run / "expected.json").read_text())
    (run / "expected.json").unlink()
    opened = open_model(run)
    assert opened.directory.name == "step-00000003" and opened.recipe is not None and opened.recipe.name == "small"
    assert opened.model.schedule.notation == "1 (1)x2 1" and opened.tokenizer.encode(b"ab").tolist() == [97, 98]
    result = resume(run)
    assert result.finished and result.counters.step == 6 and "not there any more" in caplog.text
    records = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["loss"] for record in records[3:]] == pytest.approx(expected["losses"], rel=1e-3)
    valid = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "valid"]
    assert valid[-1]["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-3)
    norm = torch.cat([p.detach().flatten() for p in open_model(run).model.parameters()]).norm()
    assert norm.item() == pytest.approx(expected["norm"], rel=1e-3)
