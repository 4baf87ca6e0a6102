"""``check``: the table, the object, and a status that tells a good model from a bad one."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from ouroboros.eval.harness import CHECKS


def test_a_recipe(cli):
    result = cli("check", "gpt", "--quick", "--json")
    facts = result.json
    assert result.status == 0 and facts["ok"] and facts["subject"] == "gpt"
    assert [finding["name"] for finding in facts["findings"]] == list(CHECKS)


def test_a_run_with_its_audit(cli, trained, files):
    before = files(trained)
    facts = cli("check", trained, "--quick", "--json").json
    names = [finding["name"] for finding in facts["findings"]]
    assert facts["ok"] and names[: len(CHECKS)] == list(CHECKS) and len(names) > len(CHECKS) + 3
    table = cli("check", trained, "--quick")
    assert table.status == 0 and f"{len(names)} of {len(names)} checks passed" in table.out
    assert all(any(name in line and line.startswith("ok") for line in table.out.splitlines()) for name in names)
    assert files(trained) == before


def test_overlap_of_training_and_held_out_text_fails(cli, trained, tmp_path):
    """The audit reads what the run holds: here the test part has become a piece of the training part."""
    import numpy as np

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    train, test = run / "data" / "0-train.raw", run / "data" / "0-test.raw"
    size = test.stat().st_size
    test.write_bytes(train.read_bytes()[:size])
    assert np.load(run / "data" / "0-test.raw.idx.npy")[-1] == size
    result = cli("check", run, "--quick")
    assert result.status == 1 and "FAIL" in result.out and "overlap" in result.out.lower()


@pytest.mark.parametrize("subject", ["lop", "nowhere/run"])
def test_what_is_neither(subject, cli):
    assert "is neither a model directory nor a recipe" in cli("check", subject).error()


def test_a_model_that_cannot_be_trusted(cli, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    weights = load_file(run / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, run / "model.safetensors", {"format": "pt"})
    assert "'model.norm.weight' holds NaN or infinity" in cli("check", run).error()
    del weights["model.norm.weight"]
    save_file(weights, run / "model.safetensors", {"format": "pt"})
    assert "the weights do not fit the configuration (missing keys: model.norm.weight)" in cli("check", run).error()
