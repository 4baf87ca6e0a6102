"""Names of published tensors, and what is missing; the numbers are in tests/golden."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ouroboros.config import ModelSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.systems.controller.checkpoint import our_name, to_model
from ouroboros.systems.controller.published import Published

SPEC = ModelSpec(layout="5", vocab_size=11, hidden_size=8)
SETTINGS = Published(prelude=1, looped=2, coda=1, depth=2, rank=2, static_rows=2, norm_steps=2)


def donor() -> dict[str, Tensor]:
    """A pretrained model's tensors in the names of transformers."""
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(SPEC))
    return {name.replace(".decoder.", "."): tensor for name, tensor in model.state_dict().items()}


def own() -> dict[str, Tensor]:
    return {
        "static_diags": torch.zeros(2, 7, 2),
        "gate.gate_proj.weight": torch.zeros(8, 16),
        "gate.gate_proj.bias": torch.full((8,), -2.0),
        "step_norm.weights": torch.ones(2, 8),
    }


def test_names() -> None:
    assert our_name("controller.target_heads.q_proj.weight") == "model.decoder.loops.0.controller.heads.q_proj.weight"
    assert our_name("gate.gate_proj.bias") == "model.decoder.loops.0.gate.proj.bias"
    assert our_name("halter.4.bias") == "model.decoder.loops.0.halt.last.bias"
    assert our_name("attn_scale.scale") is None


def test_blocks_are_the_layers_that_stay() -> None:
    tensors = donor()
    model = to_model(tensors, own() | {"halter.0.weight": torch.ones(1)}, SPEC, SETTINGS)
    for block, layer in enumerate((0, 2, 4)):
        found = model.get_parameter(f"model.decoder.layers.{block}.self_attn.q_proj.weight")
        assert torch.equal(found, tensors[f"model.layers.{layer}.self_attn.q_proj.weight"])


def test_what_is_missing_is_named() -> None:
    tensors = own()
    del tensors["step_norm.weights"]
    with pytest.raises(OuroborosError, match="Missing .*model.decoder.loops.0.norm.weight"):
        to_model(donor(), tensors, SPEC, SETTINGS)
