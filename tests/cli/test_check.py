"""``check``: the table, the object, and a status that tells a good model from a bad one."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ouroboros.eval.harness import CHECKS
from ouroboros.optim import build_optimizers


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
    for options in ([], ["--liveness"]):
        assert "is neither a model directory nor a recipe" in cli("check", subject, *options).error()


def test_liveness_of_a_recipe(cli):
    table = cli("check", "--liveness", "gpt", "--size", "tiny")
    assert table.status == 0 and "DEAD" not in table.out
    assert "ok    model.embed_tokens.weight" in table.out and "16,448 numbers: changes logits" in table.out
    assert re.search(r"^ok +optim\.lr +changes training$", table.out, flags=re.MULTILINE)
    last = table.out.splitlines()[-1]
    assert re.fullmatch(r"0 of 176,640 parameters are dead; \d+ switches act, \d+ say why not, and 0 are dead", last)


def test_liveness_of_a_run(cli, trained, files):
    before = files(trained)
    result = cli("check", "--liveness", trained, "--quick", "--json")
    assert result.status == 0 and result.json["ok"] and files(trained) == before
    assert {"name": "model.layout", "acts": "function", "why": "", "dead": False} in result.json["switches"]
    assert all(life["function"] and life["gradient"] and life["moves"] for life in result.json["parameters"])
    assert not [switch for switch in result.json["switches"] if switch["name"].startswith("train.")]


def test_what_is_dead_is_an_error(cli, monkeypatch):
    """Norms that the optimiser does not hold."""

    def built(model, *arguments, **options):
        return [one for one in build_optimizers(model, *arguments, **options) if isinstance(one, torch.optim.Muon)]

    monkeypatch.setattr("ouroboros.eval.liveness.build_optimizers", built)
    table = cli("check", "--liveness", "gpt", "--size", "tiny", "--quick")
    assert table.status == 1
    assert re.search(
        r"^DEAD +model\.decoder\.layers\.\*\.input_layernorm\.weight +192 numbers: no optimiser", table.out, re.M
    )
    assert table.out.splitlines()[-1].startswith("16,896 of 176,640 parameters are dead; ")
    found = cli("check", "--liveness", "gpt", "--size", "tiny", "--quick", "--json")
    assert found.status == 1 and found.json["dead_parameters"] == 16_896 and not found.json["ok"]


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
