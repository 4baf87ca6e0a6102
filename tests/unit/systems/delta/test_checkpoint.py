"""Published Deep Delta Learning tensors: names, axes and what they say about sizes. The golden cases do the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros.config import ModelSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.delta import TokenCompressor
from ouroboros.systems.delta.checkpoint import TABLE, our_layout, read_config, to_model

D, V, K, HEADS, WIDTH, HIDDEN = 12, 2, 3, 2, 4, 32
SETTINGS = {
    "vocab_size": 9,
    "hidden_size": D,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "head_dim": WIDTH,
    "ddl_value_channels": V,
    "ddl_state_shortconv_kernel_size": K,
    "input_embed_shortconv_kernel_size": K,
    "ddl_k_eps": 1e-5,
    "block_size": 16,
}


def tensors(**changes: Tensor | None) -> dict[str, Tensor]:
    """An expanded model with the token compressor; a change of None removes a tensor."""
    torch.manual_seed(0)
    block = {
        "ln_1.weight": (D,),
        "ln_2.weight": (D,),
        "attn.c_q.weight": (HEADS * WIDTH, D),
        "attn.c_k.weight": (HEADS * WIDTH, D),
        "attn.c_v.weight": (HEADS * WIDTH, D),
        "attn.c_proj.weight": (D, HEADS * WIDTH),
        "attn.q_rms.weight": (WIDTH,),
        "attn.k_rms.weight": (WIDTH,),
        "mlp.c_fc1.weight": (HIDDEN, D),
        "mlp.c_fc2.weight": (HIDDEN, D),
        "mlp.c_proj.weight": (D, HIDDEN),
        "compress.shortconv.weight": (D * V, K),
        "compress.read": (V,),
    }
    for name in ("ddl_attn", "ddl_mlp"):
        block |= {f"{name}.beta.weight": (1, D), f"{name}.beta.bias": (1,)}
        block |= {f"{name}.v_proj.weight": (V, D), f"{name}.v_proj.bias": (V,)}
    shapes: dict[str, tuple[int, ...]] = {f"transformer.h.0.{name}": shape for name, shape in block.items()}
    shapes |= {"transformer.wte.weight": (9, D), "ln_f.weight": (D,), "input_embed.conv.weight": (D * V, 1, K)}
    shapes |= {"readout.shortconv.weight": (D * V, K), "readout.read": (V,)}
    found: dict[str, Any] = {name: torch.randn(shape) for name, shape in shapes.items()} | changes
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def model_of(given: dict[str, Tensor], settings: dict[str, Any], **options: Any) -> OuroborosForCausalLM:
    return to_model(given, read_config(given, settings), **options)


def spec_of(given: dict[str, Tensor], settings: dict[str, Any]) -> ModelSpec:
    return model_of(given, settings).model.spec


def test_settings_and_tensors_become_the_specification() -> None:
    spec = spec_of(tensors(), SETTINGS)
    assert (spec.vocab_size, spec.hidden_size, spec.layout, spec.max_position_embeddings) == (9, D, "1", 16)
    mixer, residual = spec.block.mixer, spec.block.residual
    assert (mixer.num_heads, mixer.head_dim, spec.block.ffn.intermediate_size) == (HEADS, WIDTH, HIDDEN)
    assert (residual.values, residual.kernel, residual.compressor) == (V, K, "token")
    assert (residual.embedding_conv, residual.embedding_kernel, residual.eps) == (True, K, 1e-5)
    idle = {"ddl_state_dv_shortconv_causal": False, "model_type": "ddl", "q_activation": None}
    assert spec_of(tensors(), {**SETTINGS, **idle}) == spec


def test_the_model_computes_with_the_tensors() -> None:
    given = tensors()
    output = {**given, "lm_head.weight": given["transformer.wte.weight"]}
    model = model_of(output, SETTINGS, eos_token_id=3)
    assert model.config.eos_token_id == 3 and not model.training
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in given.values())
    ids = torch.randint(0, 9, (2, 6))
    assert torch.equal(model(ids).logits, model_of(given, SETTINGS)(ids).logits)


def test_filters_change_their_axes() -> None:
    """Channel ``i V + j`` of a stored filter is value channel j of width i."""
    given = tensors()
    name = "transformer.h.0.compress.shortconv.weight"
    part = model_of(given, SETTINGS).model.decoder.layers[0].compressor
    assert isinstance(part, TokenCompressor)
    for i, j, s in ((0, 0, 0), (5, 1, 2), (11, 0, 1)):
        assert part.weight[s, j, i] == given[name][i * V + j, s]
        assert (
            our_layout("input_embed.conv.weight", given["input_embed.conv.weight"], V)[s, j, i]
            == (given["input_embed.conv.weight"][i * V + j, 0, s])
        )
    assert TABLE.ours("transformer.h.11.attn.o_norm.weight") == "model.decoder.layers.11.self_attn.head_norm.weight"


def test_without_residual_parameters_it_is_the_additive_twin() -> None:
    twin = {
        name: t for name, t in tensors().items() if not any(p in name for p in ("ddl_", "compress", "read", "conv"))
    }
    assert spec_of(twin, SETTINGS).block.residual.kind == "additive"
    assert model_of(twin, SETTINGS)(torch.zeros(1, 2, dtype=torch.long)).logits.shape == (1, 2, 9)


def test_constant_targets_ignore_the_stored_map() -> None:
    spec = spec_of(tensors(), {**SETTINGS, "ddl_v_constant": True})
    assert spec.block.residual.value == "constant"


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"transformer.wte.weight": None}, {}, "transformer.wte.weight missing"),
        ({"ln_f.weight": None}, {}, "ln_f.weight missing"),
        ({"transformer.h.0.ln_1.weight": None}, {}, "do not belong together: .*input_layernorm"),
        ({"transformer.h.2.ln_1.weight": torch.ones(D)}, {}, "do not belong together: .*layers.2.input_layernorm"),
        ({"lm_head.weight": torch.ones(9, D)}, {}, "lm_head.weight differs from transformer.wte.weight"),
        ({}, {"hidden_size": 24}, "do not belong together: "),
        ({}, {"ddl_value_channels": 4}, "do not belong together: "),
        ({}, {"model_tipe": "ddl"}, "unknown key 'model_tipe'"),
        ({}, {"ddl_state_dv_shortconv_causal": True}, "unknown key"),
        ({"readout.shortconv.weight": torch.ones(9, K)}, {}, r"shape \(9, 3\), expected filters of 2 value channels"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message) as caught:
        model_of(tensors(**changes), {**SETTINGS, **settings})
    assert "\n" not in str(caught.value)
