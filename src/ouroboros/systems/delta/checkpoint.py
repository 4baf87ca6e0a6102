"""Published Deep Delta Learning checkpoints as models of this library.

Sizes are read from shapes; what leaves no trace in a tensor (activations, the guard, the scale of the target, heads
where queries are not normalised) is taken from the settings, which a published checkpoint keeps in ``config.json``.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.config.parts.residual import AdditiveResidualSpec
from ouroboros.convert.checkpoint import Checkpoint, Published
from ouroboros.convert.readers import Option, Reader
from ouroboros.convert.tensors import RenameTable, model_of, shape_of
from ouroboros.errors import OuroborosError, check, first_line
from ouroboros.systems.delta import SYSTEM
from ouroboros.systems.delta.config import OuroborosConfig, our_fields

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.model.modeling import OuroborosForCausalLM

logger = logging.getLogger(__name__)

_READ = {"read": "read", "weight": "weight", "shortconv.weight": "weight"}
_RESIDUAL = {
    "beta.weight": "gate.proj.weight",
    "beta.bias": "gate.proj.bias",
    "beta_in.weight": "gate.hidden_proj.weight",
    "beta_out.weight": "gate.proj.weight",
    "beta_out.bias": "gate.proj.bias",
    "v_proj.weight": "value_proj.weight",
    "v_proj.bias": "value_proj.bias",
}
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
    **{f"ddl_attn.{theirs}": f"mixer_residual.{ours}" for theirs, ours in _RESIDUAL.items()},
    **{f"ddl_mlp.{theirs}": f"mlp_residual.{ours}" for theirs, ours in _RESIDUAL.items()},
}
"""Published name within a block: ours."""
_OUTPUT, _EMBEDDING, _EXPANSION = "lm_head.weight", "transformer.wte.weight", "input_embed.conv.weight"
OUTER_NAMES = {
    _EMBEDDING: "model.embed_tokens.weight",
    "ln_f.weight": "model.norm.weight",
    _EXPANSION: "model.expansion.weight",
    **{f"readout.{theirs}": f"model.readout.{ours}" for theirs, ours in _READ.items()},
}
"""Published name outside the blocks: ours."""
TABLE = RenameTable(
    system=SYSTEM.title,
    names=OUTER_NAMES
    | {f"transformer.h.{{}}.{theirs}": f"model.decoder.layers.{{}}.{ours}" for theirs, ours in BLOCK_NAMES.items()},
    optional=(_EXPANSION, *(f"readout.{name}" for name in _READ)),
    repeated={_OUTPUT: _EMBEDDING},
    derived=("inv_freq",),
)
_FILTERS = ("shortconv.weight", _EXPANSION)
"""Filters over tokens, stored as (width * values, taps), maybe with an axis of 1 between; ours are (taps, values,
width)."""
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
"""Fields that a published ``config.json`` always has, that decide logits or length, and that no tensor shows. The
additive twin has the first two alone."""


def our_layout(name: str, tensor: Tensor, values: int) -> Tensor:
    """The published tensor (or its gradient) ``name`` with our axes; ``values`` is the number of value channels.

    Raises:
        OuroborosError: filters of another shape.
    """
    if not name.endswith(_FILTERS):
        return tensor
    rows, taps = tensor.shape[0], tensor.shape[-1]
    check(
        tensor.ndim in (2, 3) and rows % values == 0 and tensor.numel() == rows * taps,
        f"{name} has shape {tuple(tensor.shape)}, expected filters of {values} value channels",
    )
    return tensor.reshape(-1, values, taps).permute(2, 1, 0).contiguous()


def read_config(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> OuroborosConfig:
    """The published configuration of the model with these tensors.

    Args:
        tensors: published names to tensors.
        settings: published field names to values, see :class:`~ouroboros.systems.delta.config.OuroborosConfig`; null
            is as not given.

    Raises:
        OuroborosError: tensors that are missing or unknown or contradict the settings; a bad setting.
    """
    TABLE.check(tensors)
    read = _read_sizes(tensors)
    given = {name: value for name, value in our_fields(settings).items() if value is not None}
    config = OuroborosConfig(**{**read, **given})
    for name, value in read.items():
        stated = getattr(config, name)
        check(stated == value, f"{name} is {stated} in the settings, but the tensors say {value}")
    return config


def _has_residuals(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the model has delta residuals; without their parameters it is the additive twin."""
    return any(".ddl_" in name for name in tensors)


def to_model(
    tensors: Mapping[str, Tensor], config: OuroborosConfig, *, eos_token_id: int | None = None
) -> OuroborosForCausalLM:
    """The published model with these tensors, float32, in evaluation mode.

    Args:
        tensors: published names to tensors.
        config: what :func:`read_config` says of them.
        eos_token_id: end-of-text token for the configuration.

    Raises:
        OuroborosError: names or shapes that do not belong together.
    """
    spec = config.spec
    if not _has_residuals(tensors):
        spec = spec.replace(residual=AdditiveResidualSpec())
    read = {
        name: our_layout(name, tensor, config.ouroboros_value_channels)
        for name, tensor in tensors.items()
        # A model with a constant target stores the map to the target all the same.
        if not (config.ouroboros_v_constant and re.search(r"\.ddl_.*\.v_proj\.", name))
    }
    return model_of(spec, TABLE.renamed(read), eos_token_id=eos_token_id)


def _read_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The published fields that shapes and names decide."""
    first = "transformer.h.0."
    vocab_size, hidden_size = shape_of(tensors, _EMBEDDING, 2)
    blocks = {int(found[1]) for name in tensors if (found := re.match(r"transformer\.h\.(\d+)\.", name))}
    check(blocks == set(range(len(blocks))), f"the tensors hold blocks {sorted(blocks)}, not all from 0 on")
    expanded, two_layers = first + "compress.read" in tensors, first + "ddl_attn.beta_in.weight" in tensors
    found: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(blocks),
        "use_qk_rmsnorm": first + "attn.q_rms.weight" in tensors,
        "use_k_shift": first + "attn.c_k.shift_proj.weight" in tensors,
        "use_v_shift": first + "attn.c_v.shift_proj.weight" in tensors,
        "use_output_gate": first + "attn.g_proj.weight" in tensors,
        "using_groupnorm": first + "attn.subln.weight" in tensors,
        "ouroboros_beta_single_linear": not two_layers,
        "ouroboros_value_channels": shape_of(tensors, first + "compress.read", 1)[0] if expanded else 1,
    }
    if two_layers:
        found["ouroboros_beta_hidden_size"] = shape_of(tensors, first + "ddl_attn.beta_in.weight", 2)[0]
    if found["use_qk_rmsnorm"]:
        (found["head_dim"],) = shape_of(tensors, first + "attn.q_rms.weight", 1)
        found["num_attention_heads"] = shape_of(tensors, first + "attn.c_q.weight", 2)[0] // found["head_dim"]
    if expanded:
        token = first + "compress.shortconv.weight" in tensors
        filters = first + f"compress.{'shortconv.' if token else ''}weight"
        found |= {
            "ouroboros_compressor": "token" if token else "channel",
            "ouroboros_state_shortconv_kernel_size": shape_of(tensors, filters, 2, 3)[-1],
            "ouroboros_embedding_conv": _EXPANSION in tensors,
        }
        if _EXPANSION in tensors:
            found["input_embed_shortconv_kernel_size"] = shape_of(tensors, _EXPANSION, 2, 3)[-1]
    return found


def convert(checkpoint: Checkpoint, *, config: Path | None = None, eos_token_id: int | None = None) -> Published:
    """What the reader does (:class:`~ouroboros.convert.readers.Reader`) with the settings in the file ``config``, by
    default ``config.json`` beside the weights.

    Raises:
        OuroborosError: no settings, or such as cannot be read; else as :func:`read_config` and :func:`to_model`.
    """
    path = checkpoint.path.with_name("config.json") if config is None else config
    stored = _read_settings(path)
    tensors = checkpoint.tensors()
    if _OUTPUT in tensors:  # one matrix under two names, of which safetensors keeps one
        tensors.setdefault(_EMBEDDING, tensors[_OUTPUT])
    settings = {name: value for name, value in stored.items() if name not in _HOUSEKEEPING | _NOT_READ}
    eos_token_id = stored.get("eos_token_id") if eos_token_id is None else eos_token_id
    read, delta = read_config(tensors, settings), _has_residuals(tensors)
    model = to_model(tensors, read, eos_token_id=eos_token_id)
    _warn_of_defaults(path, settings, _NO_TRACE if delta else _NO_TRACE[:2])
    sizes, summary = _described(read, delta)
    return Published(model=model, sizes=sizes, summary=summary)


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


def _warn_of_defaults(path: Path, settings: Mapping[str, Any], silent: tuple[str, ...]) -> None:
    """Say which of the fields ``silent``, which cannot be seen in the weights, the settings leave open."""
    given = our_fields(settings)
    missing = [name for name in silent if given.get(name) is None]
    if missing:
        taken = ", ".join(f"{name} {getattr(OuroborosConfig, name)}" for name in missing)
        logger.warning("%s leaves open what the weights do not show, taken as published: %s", path, taken)


def _described(config: OuroborosConfig, delta: bool) -> tuple[dict[str, Any], str]:
    """The sizes and chief settings under their published names, and the same in words."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "block_size")
    sizes: dict[str, Any] = {name: getattr(config, name) for name in names}
    sizes["residual"], state = ("delta", "vector state") if delta else ("additive", "additive twin")
    if delta:
        sizes["value_channels"] = config.ouroboros_value_channels
    if config.ouroboros_value_channels > 1:
        sizes["compressor"], sizes["embedding_conv"] = config.ouroboros_compressor, config.ouroboros_embedding_conv
        state = f"{config.ouroboros_value_channels} value channels, {config.ouroboros_compressor} compressor"
        state += ", embedding convolution" if config.ouroboros_embedding_conv else ""
    return sizes, (
        f"width {config.hidden_size}, {config.num_hidden_layers} blocks, {config.num_attention_heads} heads of"
        f" {config.head_dim}, {state}, vocabulary {config.vocab_size:,}"
    )


READER = Reader(
    system=SYSTEM.title,
    recognises=lambda checkpoint: checkpoint.has("transformer.h."),
    convert=convert,
    options={"config": Option(Path, "File with its settings; by default config.json beside the weights is read.")},
)
