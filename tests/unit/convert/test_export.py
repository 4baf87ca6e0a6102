"""Back to the donor's class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ouroboros.api import build
from ouroboros.config.parts.loop import LoopNormSpec
from ouroboros.convert.export import read_record, to_donor
from ouroboros.convert.readers import convert
from ouroboros.data.tokenize import load_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.model.reading import load_model
from ouroboros.recipes import recipe

Make = Callable[..., Path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_there_and_back(name: str, dtype: torch.dtype, make: Make, tmp_path: Path) -> None:
    """Bit for bit; only gains that are stored less one lose what float32 cannot hold beside the one."""
    source, out = make(name, dtype=dtype), tmp_path / "back"
    convert(source, tmp_path / "ours")
    model, tokenizer = load_model(tmp_path / "ours"), load_tokenizer(tmp_path / "ours")
    made = to_donor(model, read_record(tmp_path / "ours"), out, tokenizer)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and made.layers == 4 and made.proof.difference < 1e-4
    for key, tensor in before.items():
        gain = name == "gemma3_text" and key.endswith("norm.weight")
        assert after[key].dtype == dtype and made.dtype == str(dtype).removeprefix("torch.")
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=1e-7 if gain else 0)
    settings = [json.loads((place / "config.json").read_text()) for place in (source, out)]
    assert settings[0] == settings[1]
    assert AutoTokenizer.from_pretrained(out).decode([104, 105]) == "hi"


def test_a_loop_is_written_as_layers(make: Make, tmp_path: Path) -> None:
    convert(make("gemma3_text"), tmp_path / "ours", layout="1 (2)x2 1", keep="0-3")
    model = load_model(tmp_path / "ours")
    made = to_donor(model, read_record(tmp_path / "ours"), tmp_path / "back", None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert made.layers == len(theirs.model.layers) == 6 and not list((tmp_path / "back").glob("tokenizer*"))
    ids = torch.randint(0, 257, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    again = to_donor(model.with_loops(1), read_record(tmp_path / "ours"), tmp_path / "once", None)
    assert again.layers == 4


def test_what_has_no_place_there(make: Make, tmp_path: Path) -> None:
    convert(make("llama"), tmp_path / "ours")
    record = read_record(tmp_path / "ours")
    loop = recipe("loop", "tiny")
    gpt = recipe("gpt", "tiny")
    changed = [
        (loop.model.replace(loop=(LoopNormSpec(),)), r"loop parts \(norm\) have no place in the donor's class"),
        (gpt.model.replace(registers=2), "registers have no place"),
        (gpt.model, r"ffn.intermediate_size"),
    ]
    for spec, message in changed:
        model = build(type(gpt)(name="x", model=spec))
        with pytest.raises(OuroborosError, match=message):
            to_donor(model, record, tmp_path / "back", None)
    assert not (tmp_path / "back").exists()


def test_without_a_record(tmp_path: Path) -> None:
    with pytest.raises(OuroborosError, match="has no donor.json: only what `ouroboros convert` made of a donor goes"):
        read_record(tmp_path)
    (tmp_path / "donor.json").write_text("{")
    with pytest.raises(OuroborosError, match="donor.json: cannot be read"):
        read_record(tmp_path)
