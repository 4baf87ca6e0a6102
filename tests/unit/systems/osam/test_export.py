"""OSAM's way back: files of the published program, and the models it cannot load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ouroboros.api import open_model
from ouroboros.config import AttentionSpec, BlockOverride, FeedForwardSpec, LayerNormSpec, RMSNormSpec, fields_by_path
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.config.parts.stem import EmbeddingNormSpec, LearnedPositionsSpec
from ouroboros.convert.readers import convert
from ouroboros.data.tokenize import byte_tokenizer, character_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.systems.osam.checkpoint import NAMES, VALUE_PATH, to_model
from ouroboros.systems.osam.export import FREE, from_model, write
from ouroboros.systems.osam.recipe import osam_published

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "data" / "osam"


def golden(name: str) -> dict[str, Tensor]:
    """Published tensors, under ``param.``, with ids and the logits recorded for them."""
    return load_file(GOLDEN / f"{name}.safetensors")


def parameters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}


@pytest.mark.parametrize("name", ["kupdate3", "odd_m_collisions", "hash_seed7"])
def test_out_and_in_again_is_the_same(name: str, tmp_path: Path) -> None:
    stoi = {character: index for index, character in enumerate(" abcdefghijklmnop")}
    content: dict[str, Any] = {"state_dict": parameters(golden(name)), "cfg": {}, "train_cfg": {"kupdate": 3}}
    content |= {"stoi": stoi, "itos": {index: character for character, index in stoi.items()}}
    torch.save(content, tmp_path / "osam.pt")
    convert(tmp_path / "osam.pt", tmp_path / "model")
    opened = open_model(tmp_path / "model")
    model, tokenizer = opened.model, opened.tokenizer
    assert write(model, tokenizer, tmp_path / "back.pt") == {"system": "OSAM", "characters": 17}
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == content.keys() and back["state_dict"].keys() == NAMES.keys()
    for key, tensor in content["state_dict"].items():
        assert back["state_dict"][key].dtype == tensor.dtype and torch.equal(back["state_dict"][key], tensor), key
    assert back["stoi"] == content["stoi"] and back["itos"] == content["itos"]
    assert back["train_cfg"]["kupdate"] == 3 and back["cfg"]["vocab_size"] == 17
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []
    with pytest.raises(OuroborosError, match="back.pt exists; choose another --out"):
        write(model, tokenizer, tmp_path / "back.pt")


def test_without_the_value_path_its_tensors_are_at_their_start(caplog: pytest.LogCaptureFixture) -> None:
    tensors = golden("no_valpath")
    state, ids, logits = parameters(tensors), tensors["input_ids"], tensors["logits"]
    model = to_model(state, {"enable_val": False})
    assert not any("value" in name or "v_proj" in name for name, _ in model.named_parameters())
    found, again = from_model(model), from_model(model)
    assert "value path: its published tensors, which are not used, are at their start" in caplog.text
    assert found.keys() == state.keys() and set(VALUE_PATH) < state.keys()
    assert all(torch.equal(found[name], again[name]) for name in found)
    for name in state.keys() - set(VALUE_PATH):
        assert torch.equal(found[name], state[name]), name
    torch.testing.assert_close(found["osam.Wv.weight"] @ found["osam.Wv.weight"].t(), torch.eye(16))
    assert found["osam.gate_val_raw"].item() == -2.5 and found["osam.v_proj.1.weight"].abs().max() <= 0.25
    back = to_model(found, {"enable_val": False})
    with torch.no_grad():
        torch.testing.assert_close(back(ids, use_cache=False).logits, logits, atol=5e-6, rtol=0)


def test_export_leaves_out_the_ids_that_are_not_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = character_tokenizer([b"some text"])
    assert text.unknown_id is not None
    base = osam_published("tiny").model
    spec = base.replace(vocab_size=text.vocab_size, mixer=base.block.mixer.replace(kupdate=2, detach_state=False))
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec, eos_token_id=text.eos_id)).eval().bfloat16()
    write(model, text, tmp_path / "o.pt")
    content = torch.load(tmp_path / "o.pt", weights_only=True)
    assert content["cfg"]["vocab_size"] == text.unknown_id == len(content["stoi"])
    assert content["cfg"]["use_freq_cache"] is content["train_cfg"]["freq_cache"] is False
    assert torch.equal(content["state_dict"]["head.weight"], model.lm_head.weight[: text.unknown_id].float())
    assert content["state_dict"]["osam.theta_q_raw"].shape == () and list(content["itos"].values()) == [*" emostx"]
    assert "reads the memory at every position, not at every 2-th" in caplog.text
    with pytest.raises(OuroborosError, match="tokenizer of this model is 'bytes' and .* only 'chars'"):
        write(model, byte_tokenizer(), tmp_path / "p.pt")
    with pytest.raises(OuroborosError, match="cannot write .*nowhere/p.pt"):
        write(model, text, tmp_path / "nowhere" / "p.pt")


OTHER = {
    "layout": {"layout": "2"},
    "overrides": {"overrides": (BlockOverride(where="0", set={"dropout": 0.5}),)},
    "registers": {"registers": 2, "mixer": OsamSpec(buckets=27, readout_hidden=5, detach_state=False)},
    "residual.kind": {"residual": DeltaSpec()},
    "tie_embeddings": {"tie_embeddings": True, "head_std": None},
    "head.logit_scale": {"head": LinearHeadSpec(logit_scale=0.5)},
    "head.logit_softcap": {"head": LinearHeadSpec(logit_softcap=3.0)},
    "stem": {"stem": (EmbeddingNormSpec(), LearnedPositionsSpec()), "max_position_embeddings": 64},
    "ffn.kind": {"ffn": FeedForwardSpec(intermediate_size=8)},
    "norm.kind": {"norm": RMSNormSpec(placement="final", eps=1e-5)},
    "norm.placement": {"norm": LayerNormSpec(eps=1e-5)},
    "norm.eps": {"norm": LayerNormSpec(placement="final", eps=1e-6)},
    "mixer.kind": {"mixer": AttentionSpec()},
    **{
        f"mixer.{name}": {"mixer": OsamSpec(**{"buckets": 64, "readout_hidden": 32, name: value})}
        for name, value in {
            "independent_hashes": True,
            "sketch_values": False,
            "frequencies": 2,
            "decay": True,
            "normalisation": "rms",
            "gate_cap": 0.5,
        }.items()
    },
}


@pytest.mark.parametrize("field", OTHER)
def test_another_form_is_refused_by_its_field(field: str) -> None:
    spec = osam_published("tiny").model.replace(**OTHER[field])
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec))
    with pytest.raises(OuroborosError, match=rf"model\.{field} is .* and the published program knows only") as caught:
        from_model(model)
    assert " is None and" not in str(caught.value)


def test_free_fields_are_fields() -> None:
    """A new field of the model is not among them, and so has to be as published."""
    assert set(FREE) <= fields_by_path(osam_published().model).keys()
    named = {name if name in FREE else name.removeprefix("block.") for name in fields_by_path(osam_published().model)}
    assert named - set(FREE) == {*OTHER, "topology.kind", "head.kind"}
