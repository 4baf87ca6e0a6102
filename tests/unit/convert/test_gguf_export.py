"""GGUF files of our models: there and back, and what is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from ouroboros.api import build
from ouroboros.config import RMSNormSpec, RopeSpec
from ouroboros.config.parts.loop import LoopGainSpec
from ouroboros.config.parts.stem import EmbeddingNormSpec, EmbeddingScaleSpec, SmearSpec
from ouroboros.convert import gguf_export
from ouroboros.convert.gguf_export import to_gguf, to_nanbeige_gguf
from ouroboros.convert.readers import convert
from ouroboros.data.tokenize import byte_tokenizer, train_bpe
from ouroboros.errors import OuroborosError
from ouroboros.model.reading import load_model
from ouroboros.recipes import recipe

HERE = Path()


def model_of(name: str = "loop-portable", mixer: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A tiny model of a recipe whose every number acts."""
    made = recipe(name, "tiny")
    changes["mixer"] = made.model.block.mixer.replace(**(mixer or {}))
    torch.manual_seed(0)
    model = build(dataclasses.replace(made, model=made.model.replace(hidden_size=32, **changes))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_there_and_back_with_every_block_once(tmp_path: Path) -> None:
    model, out = model_of(mixer={"num_heads": 4, "num_kv_heads": 2, "head_dim": 10}), tmp_path / "x.gguf"
    made = to_nanbeige_gguf(HERE, model, out, byte_tokenizer())
    assert made.proof.difference <= 1e-5 and made.family == "Nanbeige" and made.layers == 2
    assert made.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert out.stat().st_size < 4 * made.parameters + 16_000
    convert(out, tmp_path / "back")
    back = load_model(tmp_path / "back")
    assert back.schedule.notation == "(2)x2" and back.config.model_spec.tie_embeddings
    for name, tensor in model.state_dict().items():
        assert back.state_dict()[name].equal(tensor), name
    to_nanbeige_gguf(HERE, back, tmp_path / "again.gguf", byte_tokenizer())
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_a_layer_for_each_visit(tied: bool, tmp_path: Path) -> None:
    model = model_of(layout="1 (1)x2 1", tie_embeddings=tied, mixer={"rope": RopeSpec(base=500.0)})
    made = to_gguf(HERE, model, tmp_path / "x.gguf", None)
    assert made.family == "Llama" and made.layers == 4 and made.proof.difference <= 1e-5
    back = convert(tmp_path / "x.gguf", tmp_path / "back", no_tokenizer=True).model
    layers = back.model.decoder.layers
    assert layers[1].mlp.up_proj.weight.equal(layers[2].mlp.up_proj.weight)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("write", "family", "changes"),
    [
        (to_gguf, "Llama", {"mixer": {"qkv_bias": True, "out_bias": True}}),
        (to_gguf, "Llama", {"mixer": {"rope": RopeSpec(slowing=2.0, slowing_context=64)}}),
        (to_gguf, "Llama", {"mixer": {"rope": RopeSpec(scale=2.0)}, "stem": (EmbeddingScaleSpec(),)}),
        (to_gguf, "Qwen3", {"mixer": {"qk_norm": "before_rope"}}),
        (to_gguf, "PLaMo 3", {"name": "loop"}),
        (to_nanbeige_gguf, "Nanbeige", {"mixer": {"rope": RopeSpec(slowing=2.0, slowing_context=64)}}),
    ],
)
def test_what_transformers_does_not_read_is_read_back_here(
    write: Any, family: str, changes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(**changes)
    made = write(HERE, model, tmp_path / "x.gguf", train_bpe([b"ab ab ab"], 257))
    assert made.family == family and made.proof.difference <= 1e-5
    whole = gguf_export.read_tensors
    name = "blk.1.ffn_norm.weight"  # the scale of many others is normalised away
    monkeypatch.setattr(gguf_export, "read_tensors", lambda path: {**(x := whole(path)), name: x[name] * 1.5})
    with pytest.raises(OuroborosError, match="logits on 64 random tokens differ by"):
        write(HERE, model, tmp_path / "y.gguf", None)


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [
        (to_nanbeige_gguf, {"layout": "1 (1)x2"}, r"layout '1 \(1\)x2' is not one loop of all blocks, such as \(4\)x3"),
        (to_nanbeige_gguf, {"layout": "3"}, r"layout '3' is not one loop of all blocks"),
        (
            to_nanbeige_gguf,
            {"loop": (LoopGainSpec(),)},
            r"loop parts \(gain\) have no place in a GGUF file of Nanbeige",
        ),
        (
            to_gguf,
            {"norm": RMSNormSpec(placement="sandwich")},
            r"mixer.qk_norm = 'none' \(there 'before_rope'\): .*place in a GGUF file of PLaMo 3",
        ),
        (
            to_gguf,
            {"mixer": {"qk_norm": "before_rope", "qkv_bias": True}},
            r"mixer.qkv_bias = True \(there False\): .* GGUF file of Qwen3",
        ),
        (to_gguf, {"mixer": {"qk_norm": "after_rope"}}, r"mixer.qk_norm = 'after_rope' .*place in a GGUF file of Lla"),
        (to_nanbeige_gguf, {"mixer": {"qkv_bias": True}}, r"mixer.qkv_bias = True \(there False\)"),
        (to_gguf, {"mixer": {"rope": RopeSpec(fraction=0.5)}}, r"mixer.rope.fraction = 0.5 \(there 1.0\)"),
        (to_gguf, {"stem": (SmearSpec(), EmbeddingNormSpec())}, r"stem parts \(smear, norm\) are not those of"),
        (to_gguf, {"registers": 2}, r"registers have no place in a GGUF file of Llama"),
    ],
)
def test_what_has_no_place_is_named(write: Any, changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(OuroborosError, match=message):
        write(HERE, model_of(**changes), tmp_path / "x.gguf", None)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_file_that_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, model = tmp_path / "x.gguf", model_of()
    with pytest.raises(OuroborosError, match="no name for the way in which this"):
        to_gguf(HERE, model, out, train_bpe([b"ab ab ab"], 257 + 1))
    whole = gguf_export.write

    def wrong(path: Path, form: Any, spec: Any, state: Any, *rest: Any, **more: Any) -> str:
        wrong = {**state, "model.norm.weight": state["model.norm.weight"] * 1.01}
        return whole(path, form, spec, wrong, *rest, **more)

    monkeypatch.setattr(gguf_export, "write", wrong)
    with pytest.raises(OuroborosError, match=r"x.gguf, read back: logits on 64 random tokens differ by"):
        to_nanbeige_gguf(HERE, model, out, None)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    out.write_bytes(b"mine")
    with pytest.raises(OuroborosError, match=r"x.gguf exists; choose another path"):
        to_gguf(HERE, model, out, None)
    assert out.read_bytes() == b"mine"


@pytest.mark.parametrize("write", [to_gguf, to_nanbeige_gguf])
def test_a_file_of_the_same_name_elsewhere_is_not_read(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "x.gguf").write_bytes(b"GGUF, and nothing else")
    monkeypatch.chdir(tmp_path / "here")
    write(HERE, model_of(), tmp_path / "x.gguf", None)
    assert convert(tmp_path / "x.gguf", tmp_path / "back", no_tokenizer=True).sizes["identity"]
