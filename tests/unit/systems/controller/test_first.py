"""The first generation's layouts, names and order of channels; the numbers are in tests/golden."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ouroboros.config import ModelSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.rope import rotate
from ouroboros.systems.controller.first import FirstGeneration, baseline, halves, our_name, renamed

DONOR = ModelSpec(layout="5", vocab_size=11, hidden_size=8)


def test_layouts() -> None:
    settings = FirstGeneration(depth=3, halt_hidden=4)
    shared, refiner = settings.shared(DONOR), settings.refiner(DONOR)
    assert shared.layout == settings.uncontrolled(DONOR).layout == "loop:(1)x3" and not shared.tie_embeddings
    assert refiner.layout == "4 loop:1 (loop)x3" and refiner.tie_embeddings
    assert [part.kind for part in refiner.loop] == ["matrix_controller", "halt"]
    assert [block.mixer.kind for block in refiner.blocks] == ["attention"] * 4 + ["generated_attention"]
    gated = dataclasses.replace(settings, norm_rows=5, halt_hidden=None).refiner(DONOR.replace(layout="1"))
    assert gated.layout == "loop:1 (loop)x3" and [part.kind for part in gated.loop][1:] == ["norm", "gate"]


def test_the_loop_of_a_refiner_begins_behind_the_intact_model() -> None:
    """With a gate that keeps the old state, what is left is the pretrained model."""
    small = FirstGeneration(depth=2, bases=2, state=4, steps=4, confidence=0, hidden=4, style=4, norm_rows=2)
    refiner = OuroborosForCausalLM(OuroborosConfig.from_spec(small.refiner(DONOR))).eval()
    torch.nn.init.constant_(refiner.get_parameter("model.decoder.loops.0.gate.proj.bias"), -200.0)
    intact = OuroborosForCausalLM(OuroborosConfig.from_spec(DONOR)).eval()
    assert not intact.load_state_dict(refiner.state_dict(), strict=False).missing_keys
    ids = torch.randint(0, 11, (2, 7))
    with torch.no_grad():
        expected = baseline(intact, ids)
        torch.testing.assert_close(refiner(ids).logits, expected)
        assert torch.equal(intact(ids).logits, expected)
        intact.model.norm.weight.copy_(torch.linspace(0.5, 3.0, 8))
        assert not torch.allclose(baseline(intact, ids), baseline(intact, ids, twice=True), rtol=0.1, atol=1e-3)


def test_names() -> None:
    layer, loop = "model.decoder.layers.4", "model.decoder.loops.0"
    for theirs, ours in {
        "controller.heads.up_proj.basis_A1": f"{layer}.mlp.bases.up_proj.A1",
        "controller.heads.o_proj.coeff_proj_B.weight": f"{loop}.matrix_controller.heads_B.o_proj.weight",
        "core_block.attn_norm.weight": f"{layer}.input_layernorm.weight",
        "core_block.attention.q_proj.base_linear.bias": f"{layer}.self_attn.q_proj.bias",
        "core_block.ffn.down_proj.base_linear.weight": f"{layer}.mlp.down_proj.weight",
        "recurrence_gate.gate_proj.bias": f"{loop}.gate.proj.bias",
        "embed_tokens.weight": "model.embed_tokens.weight",
        "lm_head.weight": "lm_head.weight",
        "something": None,
    }.items():
        assert our_name(theirs, 4) == ours
    with pytest.raises(OuroborosError, match="something is no tensor of the first generation"):
        renamed({"something": torch.zeros(1)}, DONOR, 4, adjacent=False)


def test_halves_are_the_same_rotation_of_other_pairs() -> None:
    heads, width = 2, 6
    q = torch.randn(heads * width, 1)
    angle = torch.randn(width // 2)
    turned = q.view(heads, width // 2, 2)
    even, odd = turned.unbind(-1)
    published = torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), dim=-1)
    ours = halves(q, heads).view(1, heads, 1, width)
    found = rotate(ours, torch.cat((angle, angle)).cos(), torch.cat((angle, angle)).sin())
    torch.testing.assert_close(found.view(-1, 1), halves(published.reshape(-1, 1), heads))
    assert torch.equal(halves(q.T, heads, axis=1), halves(q, heads).T)
