"""``export``, and ``convert`` of what it goes back to."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config

from ouroboros.api import build, load
from ouroboros.config import DataSpec, Recipe, to_dict
from ouroboros.config.parts.loop import RecurrenceGateSpec
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.pack.artifact import expected_tensors
from ouroboros.pack.header import Facts
from ouroboros.pack.quantize import quantize
from ouroboros.pack.write import write_artifact
from ouroboros.recipes import recipe


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    """A tiny random one with a tokenizer of bytes."""
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "head_dim": 6}
    torch.manual_seed(0)
    config = Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "donor")
    byte_tokenizer().save(tmp_path / "donor")
    return tmp_path / "donor"


def test_there_and_back(cli: Any, donor: Path, tmp_path: Path) -> None:
    facts = cli("convert", donor, "--out", tmp_path / "ours", "--layout", "1 (1)x2", "--keep", "0,2", "--json").json
    assert facts["system"] == "Qwen3" and not facts["identity"] and facts["layers"] == [0, 2] and facts["tokenizer"]
    assert facts["proof"]["difference"] <= facts["proof"]["tolerance"] == 1e-4
    assert cli("generate", tmp_path / "ours", "--prompt", "a", "--max-new-tokens", "2", "--json").status == 0
    back = cli("export", tmp_path / "ours", "--to", "donor", tmp_path / "back", "--json").json
    assert back["layers"] == 3 and back["family"] == "Qwen3" and back["proof"]["difference"] < 1e-4
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    result = cli("export", tmp_path / "ours", "--to", "donor", tmp_path / "bare", "--no-tokenizer")
    assert "bare: Qwen3, 3 layers" in result.out and not (tmp_path / "bare" / "tokenizer.json").exists()


def test_refusals(cli: Any, donor: Path, tmp_path: Path) -> None:
    assert "donor.json" not in cli("export", tmp_path / "none", "--to", "donor", tmp_path / "x").error()
    assert "gguff" in cli("export", donor, "--to", "gguff", tmp_path / "x").error(2)
    cli("convert", donor, "--out", tmp_path / "ours")
    (tmp_path / "ours" / "donor.json").unlink()
    assert "has no donor.json" in cli("export", tmp_path / "ours", "--to", "donor", tmp_path / "x").error()
    (donor / "tokenizer.json").unlink()
    assert "--no-tokenizer" in cli("convert", donor, "--out", tmp_path / "y").error()
    assert cli("convert", donor, "--out", tmp_path / "y", "--no-tokenizer").status == 0
    assert (
        "--layout is about reading"
        in cli("convert", donor, "--out", tmp_path / "z", "--to", "osam", "--layout", "3").error()
    )


LLAMA_SIZES = ("--model.hidden-size", "16", "--model.mixer.num-heads", "2", "--model.ffn.intermediate-size", "24")
QUICK = ("--steps", "3", "--data.sequence-length", "32", "--train.batch-size", "4", "--train.compile", "off", "--quiet")


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes.txt").write_text("".join(f"{n} times {n % 7} is {n * (n % 7)}\n" for n in range(300)))
    return tmp_path / "notes.txt"


def test_a_trained_loop_becomes_a_llama(cli: Any, notes: Path, tmp_path: Path) -> None:
    plain = ("--model.norm.placement", "pre", "--model.mixer.qk-norm", "none", "--model.stem.no-norm")
    options = (*LLAMA_SIZES, *QUICK, "--data", notes, "--train.low-rank.rank", "2")
    assert cli("train", "loop", "--size", "tiny", *plain, *options, "--out", tmp_path / "run").status == 0
    result = cli("export", tmp_path / "run", "--to", "llama", tmp_path / "llama")
    assert re.search(r"llama: Llama, 4 layers, .* logits on 64 random tokens differ by \S+ of the largest", result.out)
    again = cli("export", tmp_path / "run", "--to", "llama", tmp_path / "again", "--json").json
    assert again["proof"]["difference"] <= 1e-5 and again["family"] == "Llama"
    ours, tokenizer = load(tmp_path / "run")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "llama")("3 times", return_tensors="pt").input_ids
    assert ids.equal(tokenizer("3 times", return_tensors="pt").input_ids)
    with torch.no_grad():
        want = ours(ids).logits
        assert (theirs(ids).logits - want).abs().max() <= 1e-5 * want.abs().max()
    assert cli("train", "loop", "--size", "tiny", *options, "--out", tmp_path / "own").status == 0
    error = cli("export", tmp_path / "own", "--to", "llama", tmp_path / "x").error()
    assert "stem parts (norm) are not those of Llama" in error and not (tmp_path / "x").exists()


def test_a_run_that_began_from_a_converted_model_goes_back(cli: Any, notes: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=4096)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "donor")
    byte_tokenizer().save(tmp_path / "donor")
    layout = "2 (1)x2 2"
    cli("convert", tmp_path / "donor", "--out", tmp_path / "ours", "--layout", layout, "--keep", "0-2,4-5")
    facts = cli("export", tmp_path / "ours", "--to", "llama", tmp_path / "llama", "--json").json
    assert facts["layers"] == 6 and facts["proof"]["difference"] <= 1e-5
    options = ("--model.layout", layout, *LLAMA_SIZES, "--model.no-tie-embeddings", *QUICK, "--data", notes)
    for before, run in (("ours", "first"), ("first", "second")):
        begun = cli("train", "gpt", "--from", tmp_path / before, *options, "--out", tmp_path / run)
        assert begun.status == 0, begun.err
        assert (tmp_path / run / "donor.json").read_bytes() == (tmp_path / "ours" / "donor.json").read_bytes()
    back = cli("export", tmp_path / "second", "--to", "donor", tmp_path / "back", "--json").json
    assert back["layers"] == 6 and back["family"] == "Llama"
    (tmp_path / "second" / "model.safetensors").unlink()  # a run that has checkpoints alone
    assert cli("export", tmp_path / "second", "--to", "donor", tmp_path / "checkpoint").status == 0
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("back", "checkpoint"))
    assert all(one[name].equal(tensor) for name, tensor in other.items())


def test_files_of_llama_cpp(cli: Any, notes: Path, tmp_path: Path) -> None:
    """Written, read by ``convert``, and the same to the bit; every block once where the form allows it."""
    run, small, large = tmp_path / "run", tmp_path / "loop.gguf", tmp_path / "unrolled.gguf"
    options = (*LLAMA_SIZES, *QUICK, "--data", notes, "--out", run)
    assert cli("train", "loop-portable", "--size", "tiny", *options).status == 0
    result = cli("export", run, "--to", "nanbeige-gguf", small)
    assert re.search(
        r"gguf: Nanbeige, 2 layers, .* logits on 64 random tokens differ by \S+ of the largest", result.out
    )
    facts = cli("export", run, "--to", "gguf", large, "--json").json
    assert facts["family"] == "Llama" and facts["layers"] == 4 and facts["proof"]["difference"] <= 1e-5
    once = small.stat().st_size - large.stat().st_size
    assert once < -2 * 4 * (4 * 16 * 16 + 3 * 16 * 24)  # four bytes of each matrix of two blocks
    assert "loop.gguf exists; choose another path" in cli("export", run, "--to", "gguf", small).error()
    facts = cli("convert", small, "--out", tmp_path / "back", "--json").json
    assert facts["system"] == "Nanbeige" and facts["layout"] == "(2)x2" and facts["tokenizer"]
    words = ("--prompt", "3 times", "--max-new-tokens", "20", "--temperature", "0", "--json")
    written = [cli("generate", path, *words).json["continuations"] for path in (run, tmp_path / "back")]
    assert written[0] == written[1]
    error = cli("export", tmp_path / "back", "--to", "donor", tmp_path / "x").error()
    assert "its donor repeats the stack of its layers" in error and "--to nanbeige-gguf writes that form" in error
    assert "(2)x2" in cli("convert", small, "--out", tmp_path / "x", "--layout", "1 (1)x2").error()
    assert "leave --heal out" in cli("convert", small, "--out", tmp_path / "x", "--heal", "--data", notes).error()


def run_alone(directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The exported program in a process of its own, which finds nothing of this library."""
    hidden = "import sys, runpy; sys.modules['ouroboros'] = sys.modules['torch'] = None; sys.argv = sys.argv[1:];"
    command = [sys.executable, "-I", "-c", f"{hidden} runpy.run_path(sys.argv[0], run_name='__main__')"]
    words = [*command, str(directory / "run.py"), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=100)


def pack_of(made: Recipe, path: Path) -> Path:
    """A packed file of codes of 6 bits, of a model that looks far around and whose every part does something."""
    torch.manual_seed(0)
    weights, tensors = build(made).state_dict(), {}
    for name in expected_tensors(made.model):
        value = torch.randn_like(weights[name]) * (0.1 if weights[name].ndim == 1 else 0.3) + ("norm" in name)
        tensors[name] = quantize(value, 6) if value.ndim > 1 else value.half()
    write_artifact(path, made.model, tensors, byte_tokenizer(), Facts(recipe=to_dict(made)), eos_token_id=256)
    return path


def test_a_packed_file_runs_without_the_library(cli: Any, command: Any, notes: Path, tmp_path: Path) -> None:
    made = recipe("loop", "tiny")
    model = made.model.replace(hidden_size=32, max_position_embeddings=96, loop=(RecurrenceGateSpec(),))
    made = dataclasses.replace(made, model=model, data=DataSpec(sequence_length=40))
    pack, alone = pack_of(made, tmp_path / "small.pack"), tmp_path / "alone"
    facts = command("export", pack, "--to", "standalone", alone, "--json").json
    assert facts["proof"]["difference"] <= 1e-5
    assert facts["bytes"] == sum(path.stat().st_size for path in alone.iterdir())
    assert (alone / "model.pack").read_bytes() == pack.read_bytes()
    assert "bytes in all" in cli("export", pack, "--to", "standalone", tmp_path / "again").out

    words = ("--prompt", "3 times", "--max-new-tokens", "60", "--temperature", "0", "--json")
    (wanted,) = cli("generate", pack, *words).json["continuations"]
    written = run_alone(alone, "3 times", "--tokens", 60)
    assert (written.returncode, written.stderr, written.stdout) == (0, "", f"3 times{wanted}\n")
    facts = cli("eval", pack, "--data", notes, "--json").json
    scored = run_alone(alone, "--score", notes)
    assert scored.returncode == 0, scored.stderr
    match = re.fullmatch(r"([\d,]+) bytes, window (\d+): (\S+) bits/byte\n", scored.stdout)
    assert match and int(match[1].replace(",", "")) == facts["bytes"] and int(match[2]) == facts["window"] == 40
    assert float(match[3]) == pytest.approx(facts["bits_per_byte"], abs=1e-4)

    (alone / "model.pack").write_bytes(pack.read_bytes()[:-1])
    broken = run_alone(alone, "a")
    assert broken.returncode == 1 and broken.stdout == "" and broken.stderr.count("\n") == 1
    assert broken.stderr.startswith("error: ") and "cut off" in broken.stderr
    assert run_alone(alone).returncode == 2


def test_what_the_standalone_program_lacks_is_named(cli: Any, tmp_path: Path) -> None:
    made = recipe("gpt", "tiny")
    spec = made.model.replace(hidden_size=16, mixer=made.model.block.mixer.replace(k_shift=True))
    pack = pack_of(dataclasses.replace(made, model=spec), tmp_path / "small.pack")
    error = cli("export", pack, "--to", "standalone", tmp_path / "x").error()
    assert "model.block.mixer.k_shift is True, which the standalone program does not know" in error
    assert not (tmp_path / "x").exists()
