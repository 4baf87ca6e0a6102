"""``ouroboros inspect``, and the other verbs on a packed file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ouroboros
from ouroboros.api import open_model
from ouroboros.config import to_dict
from ouroboros.pack.artifact import Artifact, expected_tensors
from ouroboros.pack.coded import Coded
from ouroboros.pack.header import Claim, Facts
from ouroboros.pack.write import write_artifact


def in_codes(tensor: torch.Tensor) -> Coded:
    """A matrix in codes of 8 bits."""
    steps = (tensor.detach().abs().amax(1, keepdim=True) / 127).half().clamp_min(1e-4)
    codes = (tensor.detach() / steps.float()).round().clamp(-127, 127).to(torch.int8)
    return Coded(codes=codes, scales=steps, bits=8, shape=tuple(tensor.shape))


@pytest.fixture(scope="module")
def packed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model in one file."""
    opened = open_model(trained)
    weights = opened.model.state_dict()
    tensors: dict[str, Any] = {name: weights[name] for name in expected_tensors(opened.spec)}
    tensors = {name: in_codes(t) if t.ndim == 2 else t.half() for name, t in tensors.items()}
    claim = Claim(bits_per_byte=3.5, bytes=800, loops=2, window=32, stride=32, data_sha256="ab" * 32)
    facts = Facts(recipe=to_dict(opened.recipe), provenance={"from": "\x1b[31mred"}, score=claim)
    path = tmp_path_factory.mktemp("packed") / "model.ouro"
    eos = opened.model.config.eos_token_id
    write_artifact(path, opened.spec, tensors, opened.tokenizer, facts, eos_token_id=eos)
    return path


def test_inspect_lists_every_tensor_and_every_byte(packed, cli):
    found = cli("inspect", packed, "--json").json
    artifact = Artifact(packed)
    assert found["bytes"] == packed.stat().st_size == sum(found["sections"].values())
    assert {t["name"] for t in found["tensors"]} == artifact.tensors().keys()
    assert found["numbers"] == sum(t["numbers"] for t in found["tensors"])
    held = sum(size for name, size in found["sections"].items() if name not in ("header", "tokenizer"))
    assert sum(t["bytes"] for t in found["tensors"]) == pytest.approx(held, abs=len(found["tensors"]))
    table = next(t for t in found["tensors"] if t["name"] == "model.embed_tokens.weight")
    assert table["stored"] == "int8" and table["groups"] == 1
    assert table["codec"] in ("range", "brotli", "brotli-columns")
    assert table["bits_per_weight"] == pytest.approx(8 * table["bytes"] / table["numbers"], abs=1e-4)
    assert found["score"]["bits_per_byte"] == 3.5 and found["recipe"]["name"] == "loop"

    text = cli("inspect", packed).out
    assert f"{found['bytes']:,} bytes" in text and "model.embed_tokens.weight" in text and "int8" in text
    assert '"bits_per_byte": 3.5' in text and "tokenizer" in text and "recipe: loop" in text
    assert "\x1b" not in text, "text from the file cannot disturb the terminal"


def test_the_other_verbs_take_the_file(packed, trained, text, cli):
    whole, small = (cli("eval", path, "--data", text, "--json").json for path in (trained, packed))
    assert small["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], abs=0.01)
    assert small["window"] == whole["window"] == 32, "the recipe in the file tells the length of training"
    made = cli("generate", packed, "--prompt", "ab", "--max-new-tokens", "4", "--json").json
    assert made["tokens"] == [4]
    shown = cli("show", packed, "--json").json
    assert shown["model"] == to_dict(open_model(trained).spec)
    assert cli("check", packed, "--quick").status == 0
    assert "no held-out data" in cli("eval", packed).error()


def test_chat_and_export_take_the_file(packed, cli, monkeypatch, tmp_path):
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n/quit\n"))
    assert cli("chat", packed, "--max-new-tokens", "3").status == 0
    out = cli("export", packed, "--to", "llama", tmp_path / "out")
    assert "Llama" in out.error()  # the recipe has parts that Llama lacks, and they are named


def test_load_reads_the_file(packed, trained):
    model, tokenizer = ouroboros.load(packed)
    again = open_model(packed)
    assert again.recipe == open_model(trained).recipe
    assert tokenizer("ab").input_ids == ouroboros.load(trained)[1]("ab").input_ids
    assert model.config.eos_token_id == open_model(trained).model.config.eos_token_id
    directory = again.directory
    assert directory.is_dir()
    del again
    assert not directory.exists(), "the tokenizer's files go with what was opened"


def test_a_file_without_a_tokenizer_says_so(packed, cli, tmp_path):
    artifact, path = Artifact(packed), tmp_path / "bare.ouro"
    write_artifact(path, artifact.spec, artifact.tensors())
    assert open_model(path).model.num_parameters() > 0 and open_model(path).recipe is None
    assert cli("generate", path, "--prompt", "a").error().startswith(f"{path}: holds no tokenizer")


def test_damaged_files_end_in_one_line(packed, cli, tmp_path):
    data, path = packed.read_bytes(), tmp_path / "bad.ouro"
    for content, message in (
        (data[:-1], "the sections have"),
        (data[:-5] + b"x" + data[-4:], "section 'tokenizer': damaged"),
        (data[:20] + b"x" + data[21:], "header: damaged"),
        (b"text", "is a file; give a run directory"),
    ):
        path.write_bytes(content)
        for words in (("inspect", path), ("eval", path, "--data", path), ("generate", path, "--prompt", "a")):
            assert message in cli(*words).error()
    assert "No such file" in cli("inspect", tmp_path / "none").error()
    assert "is a directory; inspect lists a packed file" in cli("inspect", tmp_path).error()
