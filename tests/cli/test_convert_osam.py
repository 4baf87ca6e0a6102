"""``convert`` on OSAM checkpoints: a trained model goes out to the published form and comes in again."""

import json

import pytest
import torch
from safetensors.torch import load_file

SMALL = [
    *("--model.hidden-size", "8", "--model.mixer.buckets", "16", "--model.mixer.readout-hidden", "8"),
    *("--data.sequence-length", "16", "--train.batch-size", "4", "--train.precision", "fp32", "--train.compile", "off"),
    *("--train.eval-bytes", "64", "--steps", "8", "--train.telemetry-every", "4", "--quiet"),
]


@pytest.fixture
def trained(cli, tmp_path):
    """A run of the published recipe on few characters."""
    text = tmp_path / "text.txt"
    text.write_text("a rose is a rose. " * 200)
    result = cli("train", "osam-published", "--size", "tiny", "--data", text, "--out", tmp_path / "run", *SMALL)
    assert result.status == 0, result.err
    return tmp_path / "run"


def test_out_and_in_again(cli, trained, tmp_path):
    result = cli("convert", trained, "--to", "osam", "--out", tmp_path / "o.pt")
    assert (
        result.status == 0
        and result.out == f"{tmp_path}/o.pt: a checkpoint of OSAM's published program, 8 characters\n"
    )
    assert cli("convert", trained, "--to", "osam", "--out", tmp_path / "o2.pt", "--json").json["characters"] == 8
    facts = cli("convert", tmp_path / "o.pt", "--out", tmp_path / "model", "--json").json
    sizes = {"vocab_size": 8, "d_model": 8, "m": 16, "readout_hidden": 8, "enable_val": True, "kupdate": 1}
    assert facts.items() >= {"system": "OSAM", "tokenizer": True, **sizes}.items()
    before, after = (load_file(path / "model.safetensors") for path in (trained, tmp_path / "model"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        rows = 8 if name in ("lm_head.weight", "model.embed_tokens.weight") else None
        assert torch.equal(tensor[:rows], after[name][:rows]), name
    options = ["--prompt", "a rose", "--style", "published", "--temperature", "0", "--max-new-tokens", "6", "--json"]
    assert cli("generate", tmp_path / "model", *options).json["continuations"][0].isascii()


def test_telemetry_of_a_run(cli, trained):
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in records if record["kind"] == "telemetry"]
    assert [record["step"] for record in found] == [1, 5] and all(len(record["memory"]) == 1 for record in found)
    assert {"phi_norm", "s1_norm", "gate_feature", "omega"} <= found[0]["memory"][0].keys()
    assert cli("report", trained, "--out", trained / "page.html").status == 0


def test_contradictions(cli, trained, tmp_path):
    for options, status, words in (
        (["--to", "osam", "--loops", 2], 1, "--loops is about reading a model: leave it out with --to"),
        (["--to", "osam", "--kupdate", 2], 1, "--kupdate is about reading"),
        (["--to", "rhrm"], 2, "osam"),
        (["--heads", 2], 1, "is of none of the systems that are read"),
    ):
        result = cli("convert", trained, "--out", tmp_path / "o", *options)
        assert result.status == status and words in result.err and not (tmp_path / "o").exists(), options


def test_a_model_of_another_form_is_refused(cli, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a rose is a rose. " * 200)
    layout = ["--model.layout", "2"]
    assert (
        cli(
            "train", "osam-published", "--size", "tiny", "--data", text, "--out", tmp_path / "r", *SMALL, *layout
        ).status
        == 0
    )
    error = cli("convert", tmp_path / "r", "--to", "osam", "--out", tmp_path / "o.pt").error()
    assert "model.layout is '2' and the published program knows only '1'" in error
