"""Published R-HRM checkpoints: what their tensors say, and the same model here.

A published checkpoint is a flat dictionary of tensors and nothing else, so every size is read from shapes; the number
of loops leaves no trace in it and has to be given. Both published revisions are read: rotary positions with a norm of
queries and keys, and the earlier learned table of positions without that norm.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ouroboros.config import BottleneckAttentionSpec, FeedForwardSpec, ModelSpec, NormSpec, RopeSpec
from ouroboros.convert.checkpoint import Checkpoint, Published
from ouroboros.convert.tensors import model_of
from ouroboros.errors import check

if TYPE_CHECKING:
    from ouroboros.model.modeling import OuroborosForCausalLM

logger = logging.getLogger(__name__)

_BLOCK = "model.decoder.layers.0."
NAMES = {
    "reasoning_tokens": "model.registers",
    "token_embedding.weight": "model.embed_tokens.weight",
    "position_embedding.weight": "model.embed_positions.weight",
    "ln_f.scale": "model.norm.weight",
    "shared_block.ln1.scale": _BLOCK + "input_layernorm.weight",
    "shared_block.ln2.scale": _BLOCK + "post_attention_layernorm.weight",
    "shared_block.attn.q_down.weight": _BLOCK + "self_attn.q_a_proj.weight",
    "shared_block.attn.kv_down.weight": _BLOCK + "self_attn.kv_a_proj.weight",
    "shared_block.attn.q_up.weight": _BLOCK + "self_attn.q_b_proj.weight",
    "shared_block.attn.k_up.weight": _BLOCK + "self_attn.k_b_proj.weight",
    "shared_block.attn.v_up.weight": _BLOCK + "self_attn.v_b_proj.weight",
    "shared_block.attn.out_proj.weight": _BLOCK + "self_attn.o_proj.weight",
    "shared_block.attn.q_norm.scale": _BLOCK + "self_attn.q_norm.weight",
    "shared_block.attn.k_norm.scale": _BLOCK + "self_attn.k_norm.weight",
    "shared_block.ffn.w1.weight": _BLOCK + "mlp.gate_proj.weight",
    "shared_block.ffn.w1.bias": _BLOCK + "mlp.gate_proj.bias",
    "shared_block.ffn.w2.weight": _BLOCK + "mlp.up_proj.weight",
    "shared_block.ffn.w2.bias": _BLOCK + "mlp.up_proj.bias",
    "shared_block.ffn.w3.weight": _BLOCK + "mlp.down_proj.weight",
    "shared_block.ffn.w3.bias": _BLOCK + "mlp.down_proj.bias",
}
"""Published tensor name: ours."""

_POSITIONS = "position_embedding.weight"
_OPTIONAL = {"reasoning_tokens", _POSITIONS, "shared_block.attn.q_norm.scale", "shared_block.attn.k_norm.scale"}
_OUTPUT, _FREQUENCIES = "lm_head.weight", "shared_block.attn.rotary_emb.inv_freq"
_DERIVED = {_OUTPUT, _FREQUENCIES}
"""Stored, but decided by other tensors: the output matrix is the embedding, the frequencies follow from the width."""

_PUBLISHED = {256: (4, 4), 512: (8, 8), 768: (12, 12)}
"""Width: heads and loops of the published presets."""


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """The sizes of a published model, in the names of its source."""

    d_model: int
    heads: int
    loops: int | None
    """None: not known."""
    head_dim: int
    d_ff: int
    d_latent: int
    prefix_tokens: int
    vocab_size: int


def published_sizing(d_model: int) -> Sizing:
    """What the published chat takes a checkpoint to be: everything from the width of its embedding.

    Widths other than 256, 512 and 768 are taken for 8 heads and 8 loops, whatever was trained.
    """
    heads, loops = _PUBLISHED.get(d_model, (8, 8))
    return Sizing(
        d_model=d_model,
        heads=heads,
        loops=loops,
        head_dim=d_model // heads,
        d_ff=4 * d_model,
        d_latent=d_model // 4,
        prefix_tokens=5,
        vocab_size=50_257,
    )


def shape_sizing(tensors: Mapping[str, Tensor], heads: int | None = None) -> Sizing:
    """What the tensors of a checkpoint say about its sizes; ``loops`` stays unknown.

    Args:
        tensors: published names to tensors, see :meth:`~ouroboros.convert.checkpoint.Checkpoint.tensors`.
        heads: attention heads, needed where no norm of queries tells their width (the first revision) and the width
            is not one of the published presets'.

    Raises:
        OuroborosError: tensors are missing or unknown, contradict each other or ``heads``, or leave ``heads`` open.
    """
    _check_names(tensors)
    vocab_size, d_model = _matrix(tensors, "token_embedding.weight")
    inner, d_latent = _matrix(tensors, "shared_block.attn.q_up.weight")
    d_ff, _ = _matrix(tensors, "shared_block.ffn.w1.weight")
    prefix = tensors.get("reasoning_tokens")
    check(
        prefix is None or (prefix.ndim == 3 and prefix.shape[0] == 1),
        f"reasoning_tokens has shape {_shape(prefix)}, expected (1, tokens, {d_model})",
    )
    norm = tensors.get("shared_block.attn.q_norm.scale")
    if norm is not None:
        read = inner // norm.numel()
        check(
            heads is None or heads == read, f"the checkpoint has {read} heads of {norm.numel()} channels, not {heads}"
        )
        heads = read
    elif heads is None:
        check(
            d_model in _PUBLISHED,
            f"the number of heads leaves no trace in this revision, and width {d_model} is no published preset's:"
            " give --heads",
        )
        heads = _PUBLISHED[d_model][0]
    check(heads >= 1 and inner % heads == 0, f"{heads} heads do not divide the {inner} channels of the queries")
    return Sizing(
        d_model=d_model,
        heads=heads,
        loops=None,
        head_dim=inner // heads,
        d_ff=d_ff,
        d_latent=d_latent,
        prefix_tokens=0 if prefix is None else prefix.shape[1],
        vocab_size=vocab_size,
    )


def published_loops(d_model: int) -> int:
    """The loops of the published preset of this width; a warning says that this is a guess.

    Raises:
        OuroborosError: no preset has this width.
    """
    check(
        d_model in _PUBLISHED,
        f"the number of loops leaves no trace in a checkpoint, and width {d_model} is no published preset's"
        f" ({', '.join(map(str, _PUBLISHED))}): give --loops",
    )
    loops = _PUBLISHED[d_model][1]
    logger.warning(
        "the number of loops leaves no trace in a checkpoint: %d, as in the published preset of width %d;"
        " give --loops if it was trained with another number",
        loops,
        d_model,
    )
    return loops


def to_spec(
    tensors: Mapping[str, Tensor],
    *,
    loops: int,
    heads: int | None = None,
    logit_scale: float = 0.1,
    norm_eps: float = 1e-8,
    rope_base: float = 10_000.0,
) -> ModelSpec:
    """The specification of the model whose tensors these are; see :func:`to_model`."""
    sizing = shape_sizing(tensors, heads)
    positions = tensors.get(_POSITIONS)
    spec = ModelSpec(
        layout=f"(1)x{loops}",
        vocab_size=sizing.vocab_size,
        hidden_size=sizing.d_model,
        mixer=BottleneckAttentionSpec(
            num_heads=sizing.heads,
            head_dim=sizing.head_dim,
            latent_rank=sizing.d_latent,
            qk_norm="before_rope" if "shared_block.attn.q_norm.scale" in tensors else "none",
            rope=RopeSpec(base=rope_base),
        ),
        ffn=FeedForwardSpec(kind="swiglu", intermediate_size=sizing.d_ff, bias=True),
        norm=NormSpec(eps=norm_eps),
        registers=sizing.prefix_tokens,
        register_std=1.0,
        logit_scale=logit_scale,
        tie_embeddings=True,
    )
    if positions is not None:
        return dataclasses.replace(spec, positions="learned", max_position_embeddings=positions.shape[0])
    return spec


def to_model(
    tensors: Mapping[str, Tensor],
    *,
    loops: int,
    heads: int | None = None,
    logit_scale: float = 0.1,
    norm_eps: float = 1e-8,
    rope_base: float = 10_000.0,
    eos_token_id: int | None = None,
) -> OuroborosForCausalLM:
    """The published model with these tensors, float32, in evaluation mode.

    Args:
        tensors: published names to tensors.
        loops: visits of the one block.
        heads: attention heads; only the first revision needs them, see :func:`shape_sizing`.
        logit_scale: factor of the logits.
        norm_eps: added to the mean square in every norm.
        rope_base: wavelength base of the rotary embedding, unused with a learned table of positions.
        eos_token_id: end-of-text token for the configuration.

    Raises:
        OuroborosError: names or shapes that do not belong together, an output matrix that is not the embedding, weights
            that are not finite.
    """
    spec = to_spec(tensors, loops=loops, heads=heads, logit_scale=logit_scale, norm_eps=norm_eps, rope_base=rope_base)
    _check_derived(tensors, spec)
    for name, tensor in tensors.items():
        check(bool(torch.isfinite(tensor).all()), f"tensor {name!r} holds NaN or infinity")
    state = {NAMES[name]: tensor for name, tensor in tensors.items() if name in NAMES}
    if spec.registers:
        state["model.registers"] = state["model.registers"][0]
    else:
        state.pop("model.registers", None)
    state["lm_head.weight"] = tensors["token_embedding.weight"]
    return model_of(spec, state, eos_token_id=eos_token_id)


def convert(
    checkpoint: Checkpoint, *, loops: int | None = None, heads: int | None = None, eos_token_id: int | None = None
) -> Published:
    """The model of a published checkpoint.

    Args:
        checkpoint: what was read.
        loops: visits of the block; None takes those of the published preset of this width, with a warning.
        heads: attention heads, see :func:`shape_sizing`.
        eos_token_id: end-of-text token for the configuration.

    Raises:
        OuroborosError: as :func:`to_model`; no ``loops`` and a width of no preset.
    """
    tensors = checkpoint.tensors()
    sizing = shape_sizing(tensors, heads)
    visits = published_loops(sizing.d_model) if loops is None else loops
    model = to_model(tensors, loops=visits, heads=heads, eos_token_id=eos_token_id)
    sizes = dataclasses.asdict(dataclasses.replace(sizing, loops=visits))
    return Published(
        model=model,
        sizes={**sizes, "positions": model.config.model_spec.positions},
        summary=f"width {sizing.d_model}, {sizing.heads} heads, {visits} loops, {sizing.prefix_tokens} registers,"
        f" vocabulary {sizing.vocab_size:,}",
    )


def _check_names(tensors: Mapping[str, Tensor]) -> None:
    missing = sorted(NAMES.keys() - _OPTIONAL - tensors.keys())
    unknown = sorted(tensors.keys() - NAMES.keys() - _DERIVED)
    check(not missing, f"not the tensors of an R-HRM model: {', '.join(missing[:5])} missing")
    check(not unknown, f"not the tensors of an R-HRM model: {', '.join(unknown[:5])} unknown")


def _check_derived(tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """What is stored twice agrees with what it follows from."""
    output, embedding = tensors.get(_OUTPUT), tensors["token_embedding.weight"]
    check(
        output is None or (output.shape == embedding.shape and torch.equal(output, embedding)),
        f"{_OUTPUT} differs from token_embedding.weight: a published model has one matrix for both",
    )
    stored = tensors.get(_FREQUENCIES)
    if stored is not None and spec.positions == "rope":
        width = spec.mixer.width(spec.hidden_size)
        expected = spec.mixer.rope.base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        fits = stored.shape == expected.shape and torch.allclose(stored.double(), expected, rtol=1e-5, atol=0)
        check(fits, f"{_FREQUENCIES} is not that of base {spec.mixer.rope.base:g} and {width} channels")


def _matrix(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    shape = tensors[name].shape
    check(len(shape) == 2, f"{name} has shape {_shape(tensors[name])}, expected a matrix")
    return shape[0], shape[1]


def _shape(tensor: Tensor | None) -> str:
    return "()" if tensor is None else str(tuple(tensor.shape))
