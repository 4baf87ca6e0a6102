"""Published Deep Delta Learning checkpoints: their tensors and settings, and the same model here.

Sizes are read from shapes; what leaves no trace in a tensor (activations, the guard, the scale of the target, heads
where queries are not normalised) is taken from the settings, which a published checkpoint keeps in ``config.json``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ouroboros.config import ModelSpec
from ouroboros.convert.checkpoint import Checkpoint, Published
from ouroboros.convert.tensors import model_of
from ouroboros.errors import OuroborosError, check, first_line
from ouroboros.recipes.delta import OuroborosConfig

if TYPE_CHECKING:
    from ouroboros.model.modeling import OuroborosForCausalLM

logger = logging.getLogger(__name__)

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
_OUTPUT, _EMBEDDING, _EXPANSION = "lm_head.weight", "transformer.wte.weight", "input_embed.conv.weight"
_FILTERS = ("shortconv.weight", _EXPANSION)
"""Filters over tokens, stored as (width * values, taps), maybe with an axis of 1 between; ours are (taps, values,
width)."""
_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.+)")
_NOT_READ = {
    *("bias", "dropout", "scale_attn_by_inverse_layer_idx", "embedding_init_std", "hidden_init_std_factor"),
    *("ddl_state_read_init", "ddl_beta_init", "ouroboros_beta_init"),
}
"""Published settings that no published forward pass reads: without effect, or starting values."""
_HOUSEKEEPING = {
    *("_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id"),
    *("id2label", "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states"),
    *("pad_token_id", "problem_type", "return_dict", "tie_word_embeddings", "torch_dtype", "transformers_version"),
    "use_cache",
}
"""What transformers writes into every ``config.json``."""
_NO_TRACE = ("block_size", "rope_ratio", "ouroboros_k_eps", "ouroboros_v_sigmoid", "ouroboros_v_sigmoid_scale")
"""Fields that a published ``config.json`` always has, that decide logits or length, and that no tensor shows."""


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
    vocab_size, hidden_size = _shape(tensors, _EMBEDDING, 2)
    blocks = {int(found[1]) for name in tensors if (found := _BLOCK.fullmatch(name))}
    check(blocks == set(range(len(blocks))), f"the tensors hold blocks {sorted(blocks)}, not all from 0 on")
    found: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(blocks),
        "use_qk_rmsnorm": first + "attn.q_rms.weight" in tensors,
        "use_k_shift": first + "attn.c_k.shift_proj.weight" in tensors,
        "use_v_shift": first + "attn.c_v.shift_proj.weight" in tensors,
        "use_output_gate": first + "attn.g_proj.weight" in tensors,
        "using_groupnorm": first + "attn.subln.weight" in tensors,
        "ouroboros_beta_single_linear": first + "ddl_attn.beta_in.weight" not in tensors,
    }
    if not found["ouroboros_beta_single_linear"]:
        found["ouroboros_beta_hidden_size"] = _shape(tensors, first + "ddl_attn.beta_in.weight", 2)[0]
    if found["use_qk_rmsnorm"]:
        (found["head_dim"],) = _shape(tensors, first + "attn.q_rms.weight", 1)
        found["num_attention_heads"] = _shape(tensors, first + "attn.c_q.weight", 2)[0] // found["head_dim"]
    if first + "compress.read" in tensors:
        token = first + "compress.shortconv.weight" in tensors
        filters = first + f"compress.{'shortconv.' if token else ''}weight"
        found |= {
            "ouroboros_value_channels": _shape(tensors, first + "compress.read", 1)[0],
            "ouroboros_compressor": "token" if token else "channel",
            "ouroboros_state_shortconv_kernel_size": _shape(tensors, filters, 2, 3)[-1],
            "ouroboros_embedding_conv": _EXPANSION in tensors,
        }
        if _EXPANSION in tensors:
            found["input_embed_shortconv_kernel_size"] = _shape(tensors, _EXPANSION, 2, 3)[-1]
    else:
        found["ouroboros_value_channels"] = 1
    return found


def _shape(tensors: Mapping[str, Tensor], name: str, *axes: int) -> tuple[int, ...]:
    """The shape of the tensor ``name``, which has one of these numbers of axes, none of them empty."""
    check(name in tensors, f"not the tensors of a Deep Delta Learning model: {name} is missing")
    shape = tuple(tensors[name].shape)
    expected = " or ".join(map(str, axes))
    check(len(shape) in axes and min(shape) > 0, f"{name} has shape {shape}, expected {expected} axes, none empty")
    return shape


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
        if name.endswith(_FILTERS):
            channels = spec.hidden_size * spec.delta.values
            check(
                tensor.ndim in (2, 3) and tensor.shape[0] == channels and tensor.numel() == channels * tensor.shape[-1],
                f"{name} has shape {tuple(tensor.shape)}, expected filters of {channels} channels",
            )
        state[our_name(name)] = our_layout(name, tensor, spec.delta.values)
    return {**state, "lm_head.weight": embedding}


def to_model(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], *, eos_token_id: int | None = None
) -> OuroborosForCausalLM:
    """The published model with these tensors, float32, in evaluation mode; arguments and errors as :func:`to_spec`."""
    spec = to_spec(tensors, settings)
    return model_of(spec, to_state(tensors, spec), eos_token_id=eos_token_id)


def convert(checkpoint: Checkpoint, *, config: Path | None = None, eos_token_id: int | None = None) -> Published:
    """The model of a published checkpoint.

    Args:
        checkpoint: what was read.
        config: its settings; by default ``config.json`` beside the weights.
        eos_token_id: end-of-text token for the configuration; by default that of the settings.

    Raises:
        OuroborosError: no settings, or such as cannot be read; else as :func:`to_model`.
    """
    path = checkpoint.path.with_name("config.json") if config is None else config
    stored = _read_settings(path)
    tensors = checkpoint.tensors()
    if _OUTPUT in tensors:  # one matrix under two names, of which safetensors keeps one
        tensors.setdefault(_EMBEDDING, tensors[_OUTPUT])
    settings = {name: value for name, value in stored.items() if name not in _HOUSEKEEPING | _NOT_READ}
    model = to_model(
        tensors, settings, eos_token_id=stored.get("eos_token_id") if eos_token_id is None else eos_token_id
    )
    spec = model.config.model_spec
    _warn_of_defaults(path, settings, spec)
    return Published(model=model, sizes=_sizes(spec), summary=_summary(spec))


def _read_settings(path: Path) -> dict[str, Any]:
    """The object in the JSON file ``path``."""
    hint = "the guard, the scale of the target and more leave no trace in the weights"
    check(path.is_file(), f"{path} is missing, and {hint}: put the published config.json there or give --config FILE")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OuroborosError(f"settings {path}: cannot be read: {first_line(error)}") from None
    check(isinstance(found, dict), f"settings {path}: holds a {type(found).__name__}, not an object of settings")
    return found


def _warn_of_defaults(path: Path, settings: Mapping[str, Any], spec: ModelSpec) -> None:
    """Say which settings were not given and could not be seen."""
    silent = _NO_TRACE if spec.residual == "delta" else _NO_TRACE[:2]
    missing = [name for name in silent if _under(name, settings) is None]
    if missing:
        taken = ", ".join(f"{name} {getattr(OuroborosConfig(), name)}" for name in missing)
        logger.warning("%s leaves open what the weights do not show, taken as published: %s", path, taken)


def _sizes(spec: ModelSpec) -> dict[str, Any]:
    """Sizes and chief settings under the published names."""
    found: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": int(spec.layout),
        "num_attention_heads": spec.mixer.num_heads,
        "head_dim": spec.mixer.head_dim,
        "block_size": spec.max_position_embeddings,
        "residual": spec.residual,
    }
    if spec.residual == "delta":
        found["value_channels"] = spec.delta.values
    if spec.residual == "delta" and spec.delta.expanded:
        found |= {"compressor": spec.delta.compressor, "embedding_conv": spec.delta.embedding_conv}
    return found


def _summary(spec: ModelSpec) -> str:
    sizes = _sizes(spec)
    state = {"additive": "additive twin"}.get(spec.residual, "vector state")
    if "compressor" in sizes:
        state = f"{spec.delta.values} value channels, {spec.delta.compressor} compressor"
        state += ", embedding convolution" if spec.delta.embedding_conv else ""
    return (
        f"width {spec.hidden_size}, {spec.layout} blocks, {sizes['num_attention_heads']} heads of {sizes['head_dim']},"
        f" {state}, vocabulary {spec.vocab_size:,}"
    )
