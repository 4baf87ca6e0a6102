"""Attention that another tool computes, through transformers' interface, and which models it can be computed for.

By default a model computes its attention itself (:func:`ouroboros.nn.attention.attend`). Where the configuration names
another implementation, as vLLM does and whoever registers a function with transformers, or where a call brings a paged
cache, as continuous batching does, each visit asks :data:`ALL_ATTENTION_FUNCTIONS` instead. Such a tool keeps keys and
values by the number of a layer, so every visit has a number of its own, however often its block is used.

Shapes: B batch, T query length, S key length, H query heads, K key/value heads, C channels per head.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ouroboros.config import ModelSpec
from ouroboros.errors import check
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.nn.visit import Attend
from ouroboros.schedule import Visit

OWN = (None, "sdpa", "eager")
"""Implementations that mean the model's own attention."""
PAGED = "cache"
"""The keyword of a paged cache, as transformers names it."""
PAGED_EAGER = "paged|eager"
"""What transformers makes of ``eager`` for continuous batching."""
VLLM = "vllm"
"""The implementation that vLLM registers."""


class AttentionCall(nn.Module):
    """One visit's call of the implementation that the configuration names; has no parameters.

    vLLM looks for modules of this form: they name a configuration and a layer, and their ``forward`` asks the interface
    once.

    Args:
        config: names the implementation at the time of each call.
        layer_idx: the cache entry, a number for each visit.
    """

    is_causal = True

    def __init__(self, config: OuroborosConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float, **kwargs: Any
    ) -> Tensor:
        """What all heads return, (B, H, T, C), for queries of this shape and keys and values (B, K, S, C)."""
        B, H, T, C = query.shape
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"]
        )
        y, _ = attention_interface(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return y.reshape(B, T, H, C).transpose(1, 2)


def attention_calls(config: OuroborosConfig) -> nn.ModuleList:
    """One call for each visit, in order; none where :func:`refusal` says why.

    Raises:
        OuroborosError: the configuration names another implementation than ours, and the model does not fit it.
    """
    spec = config.model_spec
    if config._attn_implementation not in OWN:
        check_fits(spec, config._attn_implementation)
    fits = not refusal(spec)
    return nn.ModuleList(AttentionCall(config, visit.slot) for visit in config.schedule.visits if fits)


class OtherAttention(NamedTuple):
    """Another implementation of attention than ours, for one call of a model."""

    calls: nn.ModuleList
    """For every visit."""
    options: dict[str, Any]
    """Further keywords of the call, which all of them are given."""
    masked: bool
    """Whether it sees what a mask says. Without one it knows by itself which tokens see each other: it keeps the cache,
    and a row may hold pieces of several texts."""

    def at(self, visit: Visit) -> Attend:
        """What computes the attention of this visit."""
        return functools.partial(self.calls[visit.slot], **self.options)


def other_attention(
    calls: nn.ModuleList, spec: ModelSpec, name: str | None, options: dict[str, Any], loops: int | None
) -> OtherAttention | None:
    """The implementation ``name``, or what further ``options`` of a call ask for; None for the model's own.

    Raises:
        OuroborosError: it does not fit the model; names the part and the reason. Or the call asks for other ``loops``.
    """
    if name in OWN and PAGED not in options:
        return None
    check_fits(spec, name)
    check(loops is None, f"loops cannot change in a call with attention of {_title(name)}: use model.with_loops(n)")
    return OtherAttention(calls, options, masked=PAGED not in options and name in ALL_MASK_ATTENTION_FUNCTIONS)


def check_fits(spec: ModelSpec, name: str | None) -> None:
    """Refuse a model whose attention the implementation ``name`` cannot compute.

    Raises:
        OuroborosError: names the part and the reason.
    """
    reason = refusal(spec) or (_refusal_of_vllm(spec) if name == VLLM else "")
    check(not reason, f"{_title(name)} cannot run this model: {reason}")


def _title(name: str | None) -> str:
    if name == VLLM:
        return "vLLM"
    return "continuous batching" if name in (*OWN, PAGED_EAGER) else f"attn_implementation {name!r}"


def refusal(spec: ModelSpec) -> str:
    """Why no other tool can compute the attention of this model and keep its cache; empty where one can."""
    return next(_reasons(spec), "")


def _reasons(spec: ModelSpec) -> Iterator[str]:
    width = spec.hidden_size
    for block in spec.blocks:
        mixer, residual = block.mixer, block.residual
        if mixer.own_attention:
            yield f"mixer {mixer.kind!r} {mixer.own_attention}"
        if mixer.recent_values(width):
            yield f"mixer {mixer.kind!r} mixes neighbouring tokens, which no cache of keys and values remembers"
        if residual.reader_values(width) or residual.start_values(width):
            yield f"residual {residual.kind!r} mixes neighbouring tokens, which no cache of keys and values remembers"
        if mixer.heads(width) != spec.block.mixer.heads(width):
            yield "its blocks differ in their heads, and all layers of such a cache are alike"
    for part in (*spec.stem, *spec.loop):
        if part.recent_values(width):
            yield f"{part.kind!r} mixes neighbouring tokens, which no cache of keys and values remembers"
    for part in spec.loop:
        if part.saves:
            yield f"loop part {part.kind!r} lets positions stop, whose keys and values then stand for later loops"
    yield from (part.sees_later for part in spec.parts if part.sees_later)
    if spec.registers:
        yield "registers stand in front of every text, and such a cache has no room for them"
    if spec.share_last_kv:
        yield "share_last_kv lets loops read entries that they do not write"


def _refusal_of_vllm(spec: ModelSpec) -> str:
    """Why vLLM, which brings a head and norms of its own, would compute something else."""
    if spec.head != ModelSpec().head:
        return (
            f"head {spec.head.kind!r} is not the plain product with the output matrix, which is all that vLLM computes"
        )
    if any(block.norm.factor != 1 for block in spec.blocks):
        return "norm.depth_scale is a factor that vLLM's norms do not have"
    return ""
