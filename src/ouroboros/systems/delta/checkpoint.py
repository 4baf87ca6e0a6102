"""Published Deep Delta Learning checkpoints as models of this library.

Sizes and settings are those of its ``config.json``. Which compressor a model has, and whether it has the embedding
convolution, is told by its tensors: these were model files of their own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.config.codec import from_dict
from ouroboros.config.parts.residual import AdditiveResidualSpec
from ouroboros.convert.checkpoint import Checkpoint, Published
from ouroboros.convert.readers import Option, Reader
from ouroboros.convert.tensors import RenameTable, model_of
from ouroboros.errors import check
from ouroboros.systems.delta import SYSTEM
from ouroboros.systems.delta.config import OuroborosConfig

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
    *("_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id"),
    *("id2label", "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states"),
    *("pad_token_id", "problem_type", "return_dict", "tie_word_embeddings", "torch_dtype", "transformers_version"),
    "use_cache",
}
"""Published settings that no forward pass reads: without effect, starting values, what transformers writes into every
``config.json``."""
_NO_TRACE = ("block_size", "rope_ratio", "ouroboros_k_eps", "ouroboros_v_sigmoid", "ouroboros_v_sigmoid_scale")
"""Published settings that decide logits or length."""


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
        tensors: published names to tensors, which tell the published model files apart.
        settings: published field names to values; null is as not given, and what no forward pass reads is passed over.

    Raises:
        OuroborosError: tensors that are missing or unknown, a bad setting.
    """
    TABLE.check(tensors)
    given = {name: value for name, value in settings.items() if value is not None and name not in _NOT_READ}
    if given.get("ddl_state_dv_shortconv_causal") is False:  # a switch that did nothing, at its default
        del given["ddl_state_dv_shortconv_causal"]
    token = "readout.shortconv.weight" in tensors
    told = {"ouroboros_compressor": "token" if token else "channel", "ouroboros_embedding_conv": _EXPANSION in tensors}
    return from_dict(OuroborosConfig, {**told, **given})


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
    if not any(".ddl_" in name for name in tensors):
        spec = spec.replace(residual=AdditiveResidualSpec())
    read = {
        name: our_layout(name, tensor, config.ouroboros_value_channels)
        for name, tensor in tensors.items()
        # A model with a constant target stores the map to the target all the same.
        if not (config.ouroboros_v_constant and re.search(r"\.ddl_.*\.v_proj\.", name))
    }
    return model_of(spec, TABLE.renamed(read), eos_token_id=eos_token_id)


def convert(checkpoint: Checkpoint, *, config: Path | None = None, eos_token_id: int | None = None) -> Published:
    """What the reader does (:class:`~ouroboros.convert.readers.Reader`) with the settings in the file ``config``, by
    default ``config.json`` beside the weights.

    Raises:
        OuroborosError: no settings, or such as cannot be read; else as :func:`read_config` and :func:`to_model`.
    """
    missing = ": put the published config.json there or give --config FILE"
    path, settings = checkpoint.settings(config, missing)
    tensors = checkpoint.tensors()
    if _OUTPUT in tensors:  # one matrix under two names, of which safetensors keeps one
        tensors.setdefault(_EMBEDDING, tensors[_OUTPUT])
    eos_token_id = settings.get("eos_token_id") if eos_token_id is None else eos_token_id
    read, delta = read_config(tensors, settings), any(".ddl_" in name for name in tensors)
    left = [] if not delta else [name for name in _NO_TRACE if name not in OuroborosConfig.migrate(settings)]
    if left:
        logger.warning("%s leaves open what no tensor shows, taken as published: %s", path, ", ".join(left))
    model = to_model(tensors, read, eos_token_id=eos_token_id)
    residual = f"delta, value channels: {read.ouroboros_value_channels}" if delta else "additive"
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "block_size")
    return Published(
        model=model,
        sizes={**{name: getattr(read, name) for name in names}, "residual": residual},
        summary=f"width {read.hidden_size}, {read.num_hidden_layers} blocks, {read.num_attention_heads} heads of"
        f" {read.head_dim}, residual {residual}, vocabulary {read.vocab_size:,}",
    )


READER = Reader(
    system=SYSTEM.title,
    recognises=lambda checkpoint: checkpoint.has("transformer.h."),
    convert=convert,
    options={"config": Option(Path, "File with its settings; by default config.json beside the weights is read.")},
)
