"""Published Deep Delta Learning checkpoints: their tensors and settings, and the same model here.

Sizes are read from shapes; what leaves no trace in a tensor (heads, activations, the guard, the scale of the target) is
taken from the settings, which a published checkpoint keeps in ``config.json``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ouroboros.config import ModelSpec
from ouroboros.convert.tensors import model_of
from ouroboros.errors import check
from ouroboros.recipes.delta import OuroborosConfig

if TYPE_CHECKING:
    from ouroboros.model.modeling import OuroborosForCausalLM

_RESIDUALS = {"ddl_attn": "mixer_residual", "ddl_mlp": "mlp_residual"}
_READ = {"read": "read", "weight": "weight", "shortconv.weight": "weight"}
BLOCK_NAMES = {
    "ln_1.weight": "input_layernorm.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "attn.c_q.weight": "self_attn.q_proj.weight",
    "attn.c_k.weight": "self_attn.k_proj.weight",
    "attn.c_k.linear.weight": "self_attn.k_proj.weight",
    "attn.c_k.shift_proj.weight": "self_attn.k_shift.proj.weight",
    "attn.c_v.weight": "self_attn.v_proj.weight",
    "attn.c_v.linear.weight": "self_attn.v_proj.weight",
    "attn.c_v.shift_proj.weight": "self_attn.v_shift.proj.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "attn.q_rms.weight": "self_attn.q_norm.weight",
    "attn.k_rms.weight": "self_attn.k_norm.weight",
    "attn.g_proj.weight": "self_attn.gate_proj.weight",
    "attn.subln.weight": "self_attn.head_norm.weight",
    "attn.o_norm.weight": "self_attn.head_norm.weight",
    "mlp.c_fc1.weight": "mlp.gate_proj.weight",
    "mlp.c_fc2.weight": "mlp.up_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
    **{f"compress.{theirs}": f"compressor.{ours}" for theirs, ours in _READ.items()},
    **{
        f"{theirs}.{name}": f"{ours}.{mine}"
        for theirs, ours in _RESIDUALS.items()
        for name, mine in {
            "beta.weight": "gate.proj.weight",
            "beta.bias": "gate.proj.bias",
            "beta_in.weight": "gate.hidden_proj.weight",
            "beta_out.weight": "gate.proj.weight",
            "beta_out.bias": "gate.proj.bias",
            "v_proj.weight": "value_proj.weight",
            "v_proj.bias": "value_proj.bias",
        }.items()
    },
}
"""Published name within a block: ours."""
OUTER_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "input_embed.conv.weight": "model.expansion.weight",
    "ln_f.weight": "model.norm.weight",
    **{f"readout.{theirs}": f"model.readout.{ours}" for theirs, ours in _READ.items()},
}
"""Published name outside the blocks: ours."""
_OUTPUT, _EMBEDDING = "lm_head.weight", "transformer.wte.weight"
_FILTERS = ("shortconv.weight", "input_embed.conv.weight")
"""Filters over tokens, stored as (width * values, taps), maybe with an axis of 1 between; ours are (taps, values,
width)."""
_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.+)")


def our_name(name: str) -> str:
    """Our name of the published tensor ``name``.

    Raises:
        OuroborosError: no tensor of a published model has this name.
    """
    inside = _BLOCK.fullmatch(name)
    if inside and inside[2] in BLOCK_NAMES:
        return f"model.decoder.layers.{int(inside[1])}.{BLOCK_NAMES[inside[2]]}"
    check(name in OUTER_NAMES, f"not the tensors of a Deep Delta Learning model: {name} is unknown")
    return OUTER_NAMES[name]


def our_layout(name: str, tensor: Tensor, values: int) -> Tensor:
    """The published tensor (or its gradient) ``name`` with our axes; ``values`` is the number of value channels."""
    if not name.endswith(_FILTERS):
        return tensor
    return tensor.reshape(-1, values, tensor.shape[-1]).permute(2, 1, 0).contiguous()


def to_spec(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> ModelSpec:
    """The specification of the model with these tensors; without residual parameters it is the additive twin.

    Args:
        tensors: published names to tensors.
        settings: published field names to values, see :class:`~ouroboros.recipes.delta.OuroborosConfig`.

    Raises:
        OuroborosError: tensors that are missing or contradict the settings; a bad setting.
    """
    read = _read_sizes(tensors)
    config = OuroborosConfig(**{**settings, **{k: v for k, v in read.items() if _under(k, settings) is None}})
    for name, value in read.items():
        given = getattr(config, name)
        check(given == value, f"{name} is {given} in the settings, but the tensors say {value}")
    spec = config.spec
    if "transformer.h.0.ddl_attn.v_proj.weight" in tensors or any(".ddl_attn.beta" in name for name in tensors):
        return spec
    return dataclasses.replace(spec, residual="additive")


def _under(name: str, settings: Mapping[str, Any]) -> Any:
    """The setting ``name``, also under the name with the other prefix."""
    return settings.get(name, settings.get(name.replace("ouroboros_", "ddl_", 1)))


def _read_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The published fields that shapes and names decide."""
    first = "transformer.h.0."
    for name in (_EMBEDDING, first + "mlp.c_fc1.weight"):
        check(name in tensors, f"not the tensors of a Deep Delta Learning model: {name} is missing")
    blocks = {int(found[1]) for name in tensors if (found := _BLOCK.fullmatch(name))}
    check(blocks == set(range(len(blocks))), f"the tensors hold blocks {sorted(blocks)}, not all from 0 on")
    found: dict[str, Any] = {
        "vocab_size": tensors[_EMBEDDING].shape[0],
        "hidden_size": tensors[_EMBEDDING].shape[1],
        "num_hidden_layers": len(blocks),
        "use_qk_rmsnorm": first + "attn.q_rms.weight" in tensors,
        "use_k_shift": first + "attn.c_k.shift_proj.weight" in tensors,
        "use_v_shift": first + "attn.c_v.shift_proj.weight" in tensors,
        "use_output_gate": first + "attn.g_proj.weight" in tensors,
        "using_groupnorm": first + "attn.subln.weight" in tensors,
        "ouroboros_beta_single_linear": first + "ddl_attn.beta_in.weight" not in tensors,
    }
    if not found["ouroboros_beta_single_linear"]:
        found["ouroboros_beta_hidden_size"] = tensors[first + "ddl_attn.beta_in.weight"].shape[0]
    if found["use_qk_rmsnorm"]:
        found["head_dim"] = tensors[first + "attn.q_rms.weight"].numel()
        query = tensors.get(first + "attn.c_q.weight")
        check(query is not None, f"not the tensors of a Deep Delta Learning model: {first}attn.c_q.weight is missing")
        assert query is not None
        found["num_attention_heads"] = query.shape[0] // found["head_dim"]
    if first + "compress.read" in tensors:
        token = first + "compress.shortconv.weight" in tensors
        kernel = tensors[first + f"compress.{'shortconv.' if token else ''}weight"].shape[-1]
        conv = tensors.get("input_embed.conv.weight")
        found |= {
            "ouroboros_value_channels": tensors[first + "compress.read"].numel(),
            "ouroboros_compressor": "token" if token else "channel",
            "ouroboros_state_shortconv_kernel_size": kernel,
            "ouroboros_embedding_conv": conv is not None,
        }
        if conv is not None:
            found["input_embed_shortconv_kernel_size"] = conv.shape[-1]
    return found


def to_state(tensors: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The tensors under our names, with our axes.

    Raises:
        OuroborosError: unknown names, an output matrix that is not the embedding, numbers that are not finite.
    """
    embedding, state = tensors[_EMBEDDING], {}
    output = tensors.get(_OUTPUT, embedding)
    check(
        output.shape == embedding.shape and torch.equal(output, embedding),
        f"{_OUTPUT} differs from {_EMBEDDING}: a published model has one matrix for both",
    )
    unused = "v_proj." if spec.delta.value == "constant" else None  # stored by the published code, never read
    for name, tensor in tensors.items():
        if name == _OUTPUT or name.endswith("inv_freq") or (unused and ".ddl_" in name and unused in name):
            continue
        check(bool(torch.isfinite(tensor).all()), f"tensor {name!r} holds NaN or infinity")
        state[our_name(name)] = our_layout(name, tensor, spec.delta.values)
    return {**state, "lm_head.weight": embedding}


def to_model(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], *, eos_token_id: int | None = None
) -> OuroborosForCausalLM:
    """The published model with these tensors, float32, in evaluation mode; arguments and errors as :func:`to_spec`."""
    spec = to_spec(tensors, settings)
    return model_of(spec, to_state(tensors, spec), eos_token_id=eos_token_id)
