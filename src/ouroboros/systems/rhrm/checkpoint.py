"""Published R-HRM checkpoints as models of this library.

A published checkpoint is a flat dictionary of tensors and nothing else, so every size is read from shapes; the number
of loops leaves no trace in it and has to be given. Both published revisions are read: rotary positions with a norm of
queries and keys, and the earlier learned table of positions without that norm.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ouroboros.config import FeedForwardSpec
from ouroboros.config.parts.latent import BottleneckAttentionSpec
from ouroboros.config.parts.stem import LearnedPositionsSpec
from ouroboros.convert.checkpoint import Checkpoint, Published
from ouroboros.convert.readers import Option, Reader
from ouroboros.convert.tensors import RenameTable, model_of, shape_of
from ouroboros.errors import check
from ouroboros.systems.rhrm import SYSTEM
from ouroboros.systems.rhrm.recipe import PUBLISHED_SIZES, rhrm_published

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.model.modeling import OuroborosForCausalLM

logger = logging.getLogger(__name__)

_IN_BLOCK = {
    "ln1.scale": "input_layernorm.weight",
    "ln2.scale": "post_attention_layernorm.weight",
    "attn.q_down.weight": "self_attn.q_a_proj.weight",
    "attn.kv_down.weight": "self_attn.kv_a_proj.weight",
    "attn.q_up.weight": "self_attn.q_b_proj.weight",
    "attn.k_up.weight": "self_attn.k_b_proj.weight",
    "attn.v_up.weight": "self_attn.v_b_proj.weight",
    "attn.out_proj.weight": "self_attn.o_proj.weight",
    "attn.q_norm.scale": "self_attn.q_norm.weight",
    "attn.k_norm.scale": "self_attn.k_norm.weight",
    "ffn.w1.weight": "mlp.gate_proj.weight",
    "ffn.w1.bias": "mlp.gate_proj.bias",
    "ffn.w2.weight": "mlp.up_proj.weight",
    "ffn.w2.bias": "mlp.up_proj.bias",
    "ffn.w3.weight": "mlp.down_proj.weight",
    "ffn.w3.bias": "mlp.down_proj.bias",
}
_EMBEDDING, _POSITIONS, _REGISTERS = "token_embedding.weight", "position_embedding.weight", "reasoning_tokens"
_QUERY_NORM, _KEY_NORM = "shared_block.attn.q_norm.scale", "shared_block.attn.k_norm.scale"
NAMES = {
    _EMBEDDING: "model.embed_tokens.weight",
    _POSITIONS: "model.stem.positions.weight",
    _REGISTERS: "model.registers",
    "ln_f.scale": "model.norm.weight",
    **{f"shared_block.{theirs}": f"model.decoder.layers.0.{ours}" for theirs, ours in _IN_BLOCK.items()},
}
"""Published name: ours."""
TABLE = RenameTable(
    system=SYSTEM.title,
    names=NAMES,
    optional=(_POSITIONS, _REGISTERS, _QUERY_NORM, _KEY_NORM),
    repeated={"lm_head.weight": _EMBEDDING},
    derived=("rotary_emb.inv_freq",),
)


def sizes_of(tensors: Mapping[str, Tensor], heads: int | None = None) -> dict[str, int]:
    """What the tensors of a checkpoint say about its sizes, under their published names.

    Args:
        tensors: published names to tensors, see :meth:`~ouroboros.convert.checkpoint.Checkpoint.tensors`.
        heads: attention heads, needed where no norm of queries tells their width (the first revision) and the width
            is not one of the published presets'.

    Raises:
        OuroborosError: tensors are missing or unknown, contradict each other or ``heads``, or leave ``heads`` open.
    """
    TABLE.check(tensors)
    vocab_size, d_model = shape_of(tensors, _EMBEDDING, 2)
    inner, d_latent = shape_of(tensors, "shared_block.attn.q_up.weight", 2)
    registers = tuple(tensors[_REGISTERS].shape) if _REGISTERS in tensors else (1, 0, d_model)
    fits = len(registers) == 3 and registers[0] == 1
    check(fits, f"{_REGISTERS} has shape {registers}, expected (1, tokens, {d_model})")
    if _QUERY_NORM in tensors:
        read = inner // shape_of(tensors, _QUERY_NORM, 1)[0]
        check(heads is None or heads == read, f"the checkpoint has {read} heads, not {heads}")
        heads = read
    elif heads is None:
        heads, _ = _preset(d_model, "heads")
    check(heads >= 1 and inner % heads == 0, f"{heads} heads do not divide the {inner} channels of the queries")
    return {
        "d_model": d_model,
        "heads": heads,
        "head_dim": inner // heads,
        "d_ff": shape_of(tensors, "shared_block.ffn.w1.weight", 2)[0],
        "d_latent": d_latent,
        "prefix_tokens": registers[1],
        "vocab_size": vocab_size,
    }


def _preset(width: int, missing: str) -> tuple[int, int]:
    """Heads and loops of the published preset of this width, where a checkpoint leaves one of them open."""
    check(
        width in PUBLISHED_SIZES,
        f"the number of {missing} leaves no trace in this checkpoint, and width {width} is no published preset's"
        f" ({', '.join(map(str, PUBLISHED_SIZES))}): give --{missing}",
    )
    return PUBLISHED_SIZES[width]


def to_model(
    tensors: Mapping[str, Tensor], *, loops: int, heads: int | None = None, eos_token_id: int | None = None
) -> OuroborosForCausalLM:
    """The published model with these tensors, float32, in evaluation mode.

    Args:
        tensors: published names to tensors.
        loops: visits of the one block.
        heads: attention heads; only the first revision needs them, see :func:`sizes_of`.
        eos_token_id: end-of-text token for the configuration.

    Raises:
        OuroborosError: names or shapes that do not belong together, an output matrix that is not the embedding, weights
            that are not finite.
    """
    sizes, state = sizes_of(tensors, heads), TABLE.renamed(tensors)
    positions: dict[str, Any] = {}
    if _POSITIONS in tensors:
        positions = {"stem": (LearnedPositionsSpec(),), "max_position_embeddings": shape_of(tensors, _POSITIONS, 2)[0]}
    registers = state.pop(NAMES[_REGISTERS], None)
    if registers is not None and sizes["prefix_tokens"]:
        state[NAMES[_REGISTERS]] = registers[0]
    published = rhrm_published().model
    mixer = BottleneckAttentionSpec(
        num_heads=sizes["heads"],
        head_dim=sizes["head_dim"],
        latent_rank=sizes["d_latent"],
        qk_norm="before_rope" if _QUERY_NORM in tensors else "none",
    )
    spec = published.replace(
        layout=f"(1)x{loops}",
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["d_model"],
        mixer=mixer,
        ffn=FeedForwardSpec(intermediate_size=sizes["d_ff"], bias=True),
        dropout=0.0,
        registers=sizes["prefix_tokens"],
        **positions,
    )
    return model_of(spec, state, eos_token_id=eos_token_id)


def convert(
    checkpoint: Checkpoint, *, loops: int | None = None, heads: int | None = None, eos_token_id: int | None = None
) -> Published:
    """What the reader does (:class:`~ouroboros.convert.readers.Reader`). Without ``loops`` they are taken for those of
    the published preset of this width, and a warning says that this is a guess.

    Raises:
        OuroborosError: as :func:`to_model`; no ``loops`` and a width of no preset.
    """
    tensors = checkpoint.tensors()
    sizes = sizes_of(tensors, heads)
    if loops is None:
        _, loops = _preset(sizes["d_model"], "loops")
        logger.warning(
            "the number of loops leaves no trace in a checkpoint: %d, as in the published preset of width %d;"
            " give --loops if it was trained with another number",
            loops,
            sizes["d_model"],
        )
    return Published(
        model=to_model(tensors, loops=loops, heads=heads, eos_token_id=eos_token_id),
        sizes={**sizes, "loops": loops, "positions": "learned" if _POSITIONS in tensors else "rope"},
        summary=f"width {sizes['d_model']}, {sizes['heads']} heads, {loops} loops, {sizes['prefix_tokens']} registers,"
        f" vocabulary {sizes['vocab_size']:,}",
    )


READER = Reader(
    system=SYSTEM.title,
    recognises=lambda checkpoint: checkpoint.has("shared_block."),
    convert=convert,
    options={
        "loops": Option(
            int,
            "Number of loops it was trained with, which a file does not say; by default that of the published preset of"
            " its width.",
        ),
        "heads": Option(
            int, "Number of attention heads; only the first revision needs it, in a width that no published preset has."
        ),
    },
)
