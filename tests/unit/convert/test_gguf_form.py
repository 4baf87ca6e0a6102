"""How files of llama.cpp hold tensors: their names, their order, and the way back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from ouroboros.api import build
from ouroboros.convert.gguf_form import (
    LLAMA,
    NANBEIGE,
    PLAMO3,
    QWEN3,
    Form,
    expected,
    form_of,
    restored,
    stored,
    unrolled,
)
from ouroboros.recipes import recipe

HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}


def model_of(name: str, mixer: dict[str, Any] | None = None) -> Any:
    """A tiny model of a recipe whose every number acts."""
    made = recipe(name, "tiny")
    spec = made.model.replace(hidden_size=16, mixer=made.model.block.mixer.replace(**HEADS, **(mixer or {})))
    torch.manual_seed(0)
    model = build(dataclasses.replace(made, model=spec)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("name", "mixer", "form"),
    [
        ("gpt", {}, LLAMA),
        ("gpt", {"qkv_bias": True}, LLAMA),
        ("gpt", {"qk_norm": "before_rope"}, QWEN3),
        ("loop", {}, PLAMO3),
        ("loop-portable", {}, NANBEIGE),
    ],
)
def test_every_tensor_comes_back(name: str, mixer: dict[str, Any], form: Form) -> None:
    model = model_of(name, mixer)
    visits = model.schedule.visits
    assert form is NANBEIGE or form_of(model) is form
    spec, state = expected(model, form, str(len(visits))), unrolled(model, visits)
    found = dict(stored(form, spec, state))
    assert sum(tensor.numel() for tensor in found.values()) == sum(tensor.numel() for tensor in state.values())
    back = restored(form, spec, {name: tensor.shape for name, tensor in state.items()}, found)
    assert back.keys() == state.keys() and all(back[name].equal(tensor) for name, tensor in state.items())


def test_the_rows_of_queries_and_keys_are_pairs_of_neighbours() -> None:
    """Channel 0 of a head is followed by the one that it is rotated with, which we have half a head later."""
    model = model_of("gpt", {"qkv_bias": True})
    state = unrolled(model, model.schedule.visits)
    found = dict(stored(LLAMA, expected(model, LLAMA, "3"), state))
    for name in "qk":
        for kind in ("weight", "bias"):
            rows = state[f"model.decoder.layers.1.self_attn.{name}_proj.{kind}"]
            order = [6 * (row // 6) + (row % 6) // 2 + 3 * (row % 2) for row in range(len(rows))]
            assert found[f"blk.1.attn_{name}.{kind}"].equal(rows[order])


def test_maps_that_are_one_matrix() -> None:
    model = model_of("loop")
    state = unrolled(model, model.schedule.visits)
    found = dict(stored(PLAMO3, expected(model, PLAMO3, "4"), state))
    layer = {name.rpartition("layers.2.")[2]: tensor for name, tensor in state.items() if "layers.2." in name}
    joined = torch.cat([layer[f"self_attn.{name}_proj.weight"] for name in "qkv"])
    assert found["blk.2.attn_qkv.weight"].equal(joined) and "blk.2.attn_q.weight" not in found
    joined = torch.cat([layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up")])
    assert found["blk.2.ffn_up.weight"].equal(joined) and "blk.2.ffn_gate.weight" not in found
    assert found["blk.2.ffn_norm.weight"].equal(layer["post_attention_layernorm.weight"])
    assert found["blk.2.post_attention_norm"].equal(layer["mixer_output_layernorm.weight"])
    assert found["blk.2.post_ffw_norm"].equal(layer["mlp_output_layernorm.weight"])


def test_a_stem_is_worked_into_the_table() -> None:
    """The output matrix stays what it was, so that one matrix becomes two."""
    model = model_of("loop")
    state = unrolled(model, model.schedule.visits)
    table = model.model.embed_tokens.weight.detach()
    assert state["lm_head.weight"].equal(table)
    torch.testing.assert_close(
        state["model.embed_tokens.weight"].square().mean(-1), torch.ones(len(table)), rtol=0, atol=1e-3
    )
    assert "lm_head.weight" not in unrolled(model_of("gpt"), model.schedule.visits[:1])
