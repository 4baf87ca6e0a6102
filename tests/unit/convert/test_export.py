"""Back to the donor's class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from ouroboros.api import build
from ouroboros.config import AttentionSpec, BlockOverride, FeedForwardSpec, ModelSpec, Recipe, RMSNormSpec, RopeSpec
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.feed_forward import NoFeedForwardSpec
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.config.parts.loop import LoopNormSpec
from ouroboros.config.parts.norm import LayerNormSpec
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.config.parts.stem import EmbeddingNormSpec
from ouroboros.convert.export import UNROLLED_TOLERANCE, read_record, to_donor, to_llama
from ouroboros.convert.readers import convert
from ouroboros.data.tokenize import load_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.model.modeling import OuroborosForCausalLM
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
        (loop.model.replace(loop=(LoopNormSpec(),)), r"loop parts \(norm\) have no place in Llama"),
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


PLAIN = ModelSpec(layout="1 (2)x3 1", hidden_size=24, max_position_embeddings=96).replace(
    mixer=AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=10), ffn=FeedForwardSpec(intermediate_size=40)
)


def random_model(spec: ModelSpec) -> OuroborosForCausalLM:
    """Attention is far from uniform, and no gain or bias at its start."""
    torch.manual_seed(0)
    model = build(Recipe(name="x", model=spec)).eval()
    for key, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else 0.3)
        if parameter.ndim == 1 and "norm" in key:
            parameter.data.add_(1.0)
    return model


def mixer(**options: Any) -> AttentionSpec:
    return PLAIN.block.mixer.replace(**options)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "dropout": 0.2},
        {"layout": "(1)x4", "mixer": AttentionSpec(num_heads=2)},
        {"mixer": mixer(qkv_bias=True, out_bias=True, dropout=0.1), "ffn": FeedForwardSpec(bias=True)},
        {"mixer": mixer(rope=RopeSpec(base=500.0, scale=3.0)), "norm": RMSNormSpec(eps=1e-3)},
        {"mixer": mixer(rope=RopeSpec(slowing=4.0, slowing_context=32))},
    ],
    ids=str,
)
def test_a_looped_model_is_a_llama_of_a_layer_for_each_visit(changes: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(PLAIN.replace(**changes))
    made = to_llama(tmp_path, model, tmp_path / "llama", None)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    assert made.family == "Llama" and made.layers == len(theirs.model.layers) == model.schedule.num_visits
    assert made.proof.difference <= UNROLLED_TOLERANCE == 1e-5 and theirs.generation_config.eos_token_id == 256
    ids = torch.randint(0, 257, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, there = model(ids).logits, theirs(ids).logits
    assert (ours - there).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": mixer(qk_norm="before_rope")}, r"mixer.qk_norm = 'before_rope' \(there 'none'\): this has no place"),
        ({"mixer": mixer(window=8)}, "mixer.window = 8"),
        ({"mixer": mixer(qkv_bias=True)}, "mixer.qkv_bias = True"),
        ({"mixer": mixer(rope=RopeSpec(loop_scales=(2.0, 1.0)))}, "mixer.rope.loop_scales"),
        ({"mixer": OsamSpec(buckets=24, readout_hidden=8)}, "mixer.kind = 'osam' .there 'attention'"),
        ({"ffn": NoFeedForwardSpec()}, "ffn.kind = 'none'"),
        ({"ffn": FeedForwardSpec(kind="gelu")}, "ffn.kind = 'gelu'"),
        ({"norm": LayerNormSpec()}, "norm.kind = 'layer'"),
        ({"norm": RMSNormSpec(placement="sandwich")}, "norm.placement = 'sandwich'"),
        ({"norm": RMSNormSpec(gain=False)}, "norm.gain = False"),
        ({"residual": DeltaSpec()}, "residual.kind = 'delta'"),
        ({"stem": (EmbeddingNormSpec(),)}, r"stem parts \(norm\) are not those of Llama \(none\)"),
        ({"head": LinearHeadSpec(logit_softcap=9.0)}, "logit_softcap = 9.0"),
        ({"loop": (LoopNormSpec(),)}, r"loop parts \(norm\) have no place in Llama"),
        ({"registers": 2}, "registers have no place in Llama"),
        (
            {"overrides": (BlockOverride(where="1", set={"ffn.intermediate_size": 48}),)},
            r"ffn.intermediate_size = 48 \(there 40\)",
        ),
    ],
    ids=str,
)
def test_what_llama_lacks_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OuroborosError, match=message) as caught:
        to_llama(tmp_path, random_model(PLAIN.replace(**changes)), tmp_path / "llama", None)
    assert "\n" not in str(caught.value) and not (tmp_path / "llama").exists()


def test_logits_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ouroboros.convert.export.UNROLLED_TOLERANCE", 1e-12)
    with pytest.raises(OuroborosError, match="Llama, written: logits on 64 .*, and at most 1e-12 is allowed"):
        to_llama(tmp_path, random_model(PLAIN), tmp_path / "llama", None)
    assert not (tmp_path / "llama").exists()
