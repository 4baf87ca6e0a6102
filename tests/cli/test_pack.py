"""`ouroboros pack` as a user runs it: budgets, scores, and errors of one line."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ouroboros.api import build
from ouroboros.config import AttentionSpec, FeedForwardPart, ModelSpec, Recipe
from ouroboros.config.part import _KINDS, part
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.nn.part import Projection

SMALL = ["--max-bytes", "300", "--calibration-tokens", "256"]


@pytest.fixture(scope="module")
def larger(text, tmp_path_factory, given_back, tiny):
    """A run whose model has about 90 kB with eight bits."""
    from ouroboros.cli import main

    run = tmp_path_factory.mktemp("larger") / "run"
    options = ["--data", str(text), "--out", str(run), "--size", "tiny", "--steps", "2", "--quiet", *tiny]
    with given_back():
        assert (
            main(["train", "loop", *options, "--model.hidden-size", "64", "--model.ffn.intermediate-size", "128"]) == 0
        )
    return run


def test_budgets_through_the_real_command(larger, command, tmp_path):
    """64 kB bind and are used; 256 kB hold the model with eight bits whole."""
    small, large = (tmp_path / name for name in ("small.pack", "large.pack"))
    found = command("pack", larger, "--budget", "64kB", "--out", small, "--json", *SMALL)
    assert found.status == 0, found.err
    facts = found.json
    assert facts["file"] == str(small) and facts["bytes"] == small.stat().st_size
    assert 0.97 * 64_000 <= facts["bytes"] <= 64_000
    assert facts["feasible"] and facts["fallbacks"] == [] and facts["method"] == "loop-aware"
    assert facts["calibration"]["text"] == "training text" and facts["calibration"]["tokens"] >= 200
    assert abs(facts["bits_per_byte_after"] - facts["bits_per_byte_before"]) < 0.2
    claimed = command("inspect", small, "--json").json["score"]
    assert claimed["bits_per_byte"] == facts["bits_per_byte_after"]
    assert claimed["data_sha256"] == facts["held_out"]["data_sha256"]

    told = command("pack", larger, "--budget", "256kB", "--out", large, *SMALL)
    assert told.status == 0, told.err
    assert 64_000 < large.stat().st_size <= 256_000
    assert {t["stored"] for t in command("inspect", large, "--json").json["tensors"]} == {"int8", "float16"}
    assert "of the packed file, read by another process: " in told.out
    assert "int8" in told.out and "matrix, looped" in told.out


def test_bits_for_all_and_text_of_ones_own(trained, text, cli, tmp_path):
    out = tmp_path / "four.pack"
    given = ["--calibration", text, "--held-out", text]
    facts = cli("pack", trained, "--bits", 4, "--out", out, *given, "--json", *SMALL).json
    assert facts["calibration"]["text"] == str(text) and facts["budget"] is None
    assert {width for group in facts["groups"] for width in group["stored"]} == {"int4", "float16"}
    assert sum(group["numbers"] for group in facts["groups"]) == facts["numbers"]
    same = tmp_path / "again.pack"
    assert cli("pack", trained, "--bits", 4, "--out", same, *given, *SMALL).status == 0
    assert same.read_bytes() == out.read_bytes()


def test_a_model_without_text_writes_its_own(trained, cli, tmp_path):
    out = tmp_path / "six.pack"
    assert cli("pack", trained, "--bits", 8, "--mode", "rounding", "--out", out, *SMALL).status == 0
    again = cli("pack", out, "--bits", 6, "--out", tmp_path / "again.pack", "--json", *SMALL)
    assert again.status == 0, again.err
    assert again.json["calibration"]["text"] == "written by the model"
    assert again.json["bits_per_byte_before"] is None and again.json["bits_per_byte_after"] is None


def test_an_impossible_budget_ends_with_the_smallest_file(trained, cli, tmp_path):
    out = tmp_path / "smallest.pack"
    found = cli("pack", trained, "--budget", 2000, "--out", out, "--json", *SMALL)
    assert found.status == 1
    facts = json.loads(found.out)
    assert not facts["feasible"] and facts["bytes"] == out.stat().st_size > 2000
    assert found.err == (
        f"error: no file of this model has 2,000 bytes or less: {out} is the smallest there is, with"
        f" {facts['bytes']:,}\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --budget and --bits"),
        (["--budget", "1MB", "--bits", "6"], "give one of --budget and --bits"),
        (["--budget", "much"], "budget 'much' is no size"),
        (["--bits", "9"], "--bits must be 2 to 8"),
        (["--bits", "8", "--mode", "rounding", "--calibration", "x"], "--calibration changes nothing"),
        (["--bits", "8", "--calibration", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_one_line(trained, cli, tmp_path, options, message):
    out = tmp_path / "m.pack"
    assert message in cli("pack", trained, "--out", out, *options).error()
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_to_calibrate(larger, cli, tmp_path):
    found = cli("pack", larger, "--bits", 8, "--calibration-tokens", 64, "--out", tmp_path / "m.pack")
    assert "64 tokens leave" in found.error() and "its 128 inputs rank-deficient" in found.error()


def test_no_place_to_write(trained, cli, tmp_path):
    assert "make it first" in cli("pack", trained, "--bits", 8, "--out", tmp_path / "no" / "m.pack").error()
    assert ".bin is an ending of pickles" in cli("pack", trained, "--bits", 8, "--out", tmp_path / "m.bin").error()
    assert "is a directory" in cli("pack", trained, "--bits", 8, "--out", tmp_path).error()


@pytest.mark.parametrize(
    ("number", "status", "line"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n")]
)
def test_stopped_while_the_file_is_scored(trained, spawn, tmp_path, monkeypatch, number, status, line):
    """What was there stays, nothing half-written is left, and the process that scores ends too."""
    out, scratch = tmp_path / "m.pack", tmp_path / "scratch"
    scratch.mkdir()
    out.write_bytes(b"before")
    given = ["--bits", 8, "--mode", "rounding", "--out", out, *SMALL, "--quiet"]
    monkeypatch.setenv("TMPDIR", str(scratch))
    with spawn("pack", trained, *given, start_new_session=True) as process:
        waiting = time.monotonic() + 60
        while not glob.glob(f"{scratch}/ouroboros-*/*.txt") and time.monotonic() < waiting:
            time.sleep(0.02)
        time.sleep(0.5)  # the text is written just before the other process is started
        assert any(tmp_path.glob(".m.pack.tmp-*"))
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # a terminal sends it to both processes
        else:
            process.send_signal(number)
        said = process.communicate(timeout=60)
    assert (process.returncode, *said) == (status, "", line)
    assert sorted(tmp_path.iterdir()) == [out, scratch] and out.read_bytes() == b"before"
    assert list(scratch.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("where", ["ouroboros.verbs.pack._score_again", "pathlib.Path.write_bytes"])
def test_a_full_disk(trained, cli, tmp_path, monkeypatch, where):
    def full(path, content, *_):
        if isinstance(content, bytes):
            with path.open("wb") as file:
                file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(where, full)
    out = tmp_path / "m.pack"
    found = cli("pack", trained, "--bits", 8, "--mode", "rounding", "--out", out, *SMALL, "--quiet")
    assert found.error() == f"cannot write {out}: No space left on device"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def alone(larger, tmp_path_factory):
    """The same model as a directory of transformers, without a text: it is not scored, so packing is quick."""
    directory = tmp_path_factory.mktemp("alone") / "model"
    directory.mkdir()
    for path in larger.iterdir():
        if path.is_file() and path.name not in ("recipe.json", "metrics.jsonl"):
            shutil.copy(path, directory / path.name)
    return directory


QUICK = ["--calibration", "random", "--calibration-tokens", "256"]


def stored(cli, file):
    """How each tensor is stored, by name."""
    return {tensor["name"]: tensor["stored"] for tensor in cli("inspect", file, "--json").json["tensors"]}


def test_other_bits_for_some_tensors(alone, cli, tmp_path):
    """By pattern and by place, the first that fits decides; with a budget the others share what is left."""
    out = tmp_path / "mixed.pack"
    mixed = ["--bits-of", "*.layers.1.mlp.*=3", "--bits-of", "looped=8", "outside=4"]
    facts = cli("pack", alone, "--bits", 6, *mixed, "--out", out, "--json", *QUICK).json
    groups = {group["name"]: group["stored"] for group in facts["groups"]}
    assert groups["matrix, once"] == ["int6"] and groups["embedding, outside"] == ["int4"]
    assert groups["matrix, looped"] == ["int3", "int8"]
    of = stored(cli, out)
    assert of["model.decoder.layers.1.mlp.up_proj.weight"] == "int3"
    assert of["model.decoder.layers.1.self_attn.q_proj.weight"] == "int8"
    method = cli("inspect", out, "--json").json["method"]
    assert method == {"mode": "loop-aware", "bits": 6, "bits_of": ["*.layers.1.mlp.*=3", "looped=8", "outside=4"]}

    found = cli("pack", alone, "--budget", "64kB", "--bits-of", "looped=8", "--out", out, "--json", *QUICK)
    assert found.status == 0 and found.json["feasible"] and 0.97 * 64_000 <= out.stat().st_size <= 64_000
    groups = {group["name"]: group["stored"] for group in found.json["groups"]}
    assert groups["matrix, looped"] == ["int8"] and groups["matrix, once"] != ["int8"]


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ("looped", "pack: --bits-of: 'looped' is not WHICH=BITS"),
        ("looped=16", "pack: --bits-of: 'looped=16' is not WHICH=BITS"),
        ("*.expert.*=4", "pack: --bits-of: '*.expert.*=4' decides for no tensor that gets codes"),
        ("*norm*=4", "pack: --bits-of: '*norm*=4' decides for no tensor that gets codes"),
    ],
)
def test_bits_for_nothing(alone, cli, tmp_path, bits, message):
    assert message in cli("pack", alone, "--bits", 6, "--bits-of", bits, "--out", tmp_path / "m.pack").error()
    assert list(tmp_path.iterdir()) == []


def test_calibration_by_what_the_model_writes_or_by_chance(alone, text, cli, tmp_path, monkeypatch):
    """Both need no text; a file of such a name is given with its folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(text, tmp_path / "generated")
    told = {}
    for given in ("generated", "random", "./generated"):
        options = ["--bits", 8, "--calibration", given, "--calibration-tokens", 256, "--out", "m.pack", "--json"]
        told[given] = cli("pack", alone, *options).json["calibration"]
    assert {name: facts["text"] for name, facts in told.items()} == {
        "generated": "written by the model",
        "random": "random ids",
        "./generated": "./generated",
    }
    assert all(facts["tokens"] >= 256 for facts in told.values())
    assert len({facts["ids_sha256"] for facts in told.values()}) == 3
    for given in ("generated", "random"):
        few = ["--bits", 8, "--calibration", given, "--calibration-tokens", 64, "--out", "few.pack"]
        assert "64 tokens leave" in cli("pack", alone, *few).error()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(alone, cli, tmp_path, value):
    """Also where no code would be made of them."""
    model = tmp_path / "model"
    shutil.copytree(alone, model)
    for name in ("model.decoder.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
        weights = load_file(alone / "model.safetensors")
        weights[name].view(-1)[3] = value
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        for how in (["--bits", 8], ["--bits", 8, "--mode", "rounding"], ["--budget", "64kB"]):
            found = cli("pack", model, *how, "--out", tmp_path / "m.pack").error()
            assert f"weight {name!r} holds NaN or infinity" in found
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class OwnProduct(nn.Module):
    """A feed-forward network that applies its map otherwise than torch's linear, and has a parameter without a role."""

    def __init__(self, spec, width):
        super().__init__()
        self.proj = Projection(width, width, bias=False)
        if spec.strange:
            self.strange = nn.Parameter(torch.zeros(width, 4, 4))

    def forward(self, x, visit):
        return x @ self.proj.weight.T


@dataclass(frozen=True, kw_only=True)
class OwnProductSpec(FeedForwardPart):
    kind: Literal["own_product"] = "own_product"
    strange: bool = False

    def parameters(self, width):
        return width * width + 16 * width * self.strange

    def flops(self, width):
        return 2 * width * width


@pytest.fixture
def foreign(tmp_path):
    """Writes a model with a part that is not the library's; the part is gone afterwards."""
    part(module=OwnProduct)(OwnProductSpec)

    def write(**options):
        spec = ModelSpec(layout="1 (1)x2", vocab_size=257, hidden_size=32, max_position_embeddings=64)
        spec = spec.replace(mixer=AttentionSpec(num_heads=2), ffn=OwnProductSpec(**options))
        build(Recipe(name="foreign", model=spec)).save_pretrained(tmp_path / "foreign")
        byte_tokenizer().save(tmp_path / "foreign")
        return tmp_path / "foreign"

    yield write
    del _KINDS[FeedForwardPart]["own_product"]


def test_fallbacks_are_an_error_unless_they_are_allowed(foreign, cli, tmp_path):
    """A map that is not seen at work has to be rounded, which nobody asked for."""
    model, out = foreign(), tmp_path / "m.pack"
    error = cli("pack", model, "--bits", 6, "--out", out, "--quiet", *QUICK).error()
    assert "layers.0.mlp.proj.weight: rounded, as it is read by" in error and "allow fallbacks" in error
    assert not out.exists()
    allowed = cli("pack", model, "--bits", 6, "--out", out, "--json", "--allow-fallbacks", *QUICK)
    assert allowed.status == 0 and len(allowed.json["fallbacks"]) == 2
    told = cli("pack", model, "--bits", 6, "--out", out, "--quiet", "--allow-fallbacks", *QUICK).out
    assert told.count("not as planned: model.decoder.layers.") == 2
    rounding = cli("pack", model, "--bits", 6, "--out", out, "--json", "--mode", "rounding")
    assert rounding.status == 0 and rounding.json["fallbacks"] == []


def test_a_tensor_without_a_role_is_named(foreign, cli, tmp_path):
    error = cli("pack", foreign(strange=True), "--bits", 6, "--out", tmp_path / "m.pack", "--quiet", *QUICK).error()
    assert "model.decoder.layers.0.mlp.strange" in error and "PARAMETER_ROLES" in error
