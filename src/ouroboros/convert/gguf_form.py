"""Models that llama.cpp knows, in our terms: which parts each has, and what their tensors are called in a file.

A form is an architecture of llama.cpp. What it computes is said by a specification of ours, and how its files hold the
tensors by a list of entries, which is followed in one direction to write a file and in the other to read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ouroboros.config import AttentionSpec, BlockSpec, FeedForwardSpec, ModelSpec, RMSNormSpec, RopeSpec, fields_by_path
from ouroboros.convert.tensors import EMBEDDING, OUTPUT

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ouroboros.model.modeling import OuroborosForCausalLM
    from ouroboros.schedule import Visit


@dataclass(frozen=True, kw_only=True)
class Form:
    """An architecture of llama.cpp."""

    name: str
    """As files call it."""
    title: str
    """For people."""
    pairs_neighbours: bool = False
    """Whether its rotation pairs neighbouring channels of a head, where ours pairs its halves."""
    fuses: bool = False
    """Whether queries, keys and values are one matrix, and gate and up projection another."""
    biases: bool = False
    """Whether linear maps may have biases."""
    slows: bool = False
    """Whether slow rotations may be slowed further."""
    sandwich: bool = False
    """Whether sublayers have norms on both sides."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head."""


LLAMA = Form(name="llama", title="Llama", pairs_neighbours=True, biases=True, slows=True)
NANBEIGE = Form(name="nanbeige", title="Nanbeige", pairs_neighbours=True, slows=True)
QWEN3 = Form(name="qwen3", title="Qwen3", qk_norm=True)
PLAMO3 = Form(name="plamo3", title="PLaMo 3", fuses=True, sandwich=True, qk_norm=True)

_OUTSIDE = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", OUTPUT: "output.weight"}
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mixer_output_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp_output_layernorm": "post_ffw_norm",
}
"""What tensors of a block are called here and in files."""
_FUSED = {"attn_q": "attn_qkv", "attn_k": "attn_qkv", "attn_v": "attn_qkv", "ffn_gate": "ffn_up"}
"""What tensors are a part of where they are fused; parts stand in the order of the list above."""
_WITHOUT_KIND = ("post_attention_norm", "post_ffw_norm")
"""Names that the form with norms on both sides does not end in ``.weight``."""
_SLOWED = ("slowing", "slowing_context", "slowing_low", "slowing_high")
"""Settings of a rotation whose slow channels are slowed further."""
_PLACE = re.compile(r"model\.decoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def form_of(model: OuroborosForCausalLM) -> Form:
    """The form that comes nearest to a model with a layer for each visit."""
    settings = _first(model)[1]
    if settings.get("norm.placement") == "sandwich":
        return PLAMO3
    return QWEN3 if settings.get("mixer.qk_norm") == "before_rope" else LLAMA


def expected(model: OuroborosForCausalLM, form: Form, layout: str) -> ModelSpec:
    """What the form computes, with the settings of the first layer of ``model`` where the form has a choice.

    Parts of the stem that act on each embedding alone stay: they are worked into the table.
    """
    spec, (first, settings) = model.config.model_spec, _first(model)
    heads, rotary = first.mixer.heads(spec.hidden_size), first.mixer.rotary(spec.hidden_size)
    qkv_bias, out_bias, ffn_bias = (
        form.biases and bool(settings.get(name)) for name in ("mixer.qkv_bias", "mixer.out_bias", "ffn.bias")
    )
    mixer = AttentionSpec(
        num_heads=heads.queries,
        num_kv_heads=heads.cached,
        head_dim=heads.width,
        qk_norm="before_rope" if form.qk_norm else "none",
        qkv_bias=qkv_bias,
        out_bias=out_bias,
    )
    if rotary is not None:
        kept = ("base", "scale", *(_SLOWED if form.slows else ()))
        mixer = mixer.replace(rope=RopeSpec(**{name: getattr(rotary[0], name) for name in kept}))
    width = settings.get("ffn.intermediate_size", spec.hidden_size)
    return ModelSpec(
        layout=layout,
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        max_position_embeddings=spec.max_position_embeddings,
        block=BlockSpec(
            mixer=mixer,
            ffn=FeedForwardSpec(intermediate_size=width, bias=ffn_bias),
            norm=RMSNormSpec(placement="sandwich" if form.sandwich else "pre", eps=first.norm.eps),
        ),
        stem=tuple(part for part in spec.stem if part.by_token),
        tie_embeddings=spec.tie_embeddings,
    )


def _first(model: OuroborosForCausalLM) -> tuple[BlockSpec, dict[str, Any]]:
    """The block that is visited first, and its settings by path."""
    block = model.config.model_spec.blocks[model.schedule.visits[0].block]
    return block, fields_by_path(block)


def unrolled(model: OuroborosForCausalLM, visits: Sequence[Visit]) -> dict[str, Tensor]:
    """The tensors of ``model`` with those of a block once for each of ``visits``, and its stem, if it has one, worked
    into the table of embeddings. Tied embeddings are one tensor as long as they are the same."""
    from ouroboros.model.registers import NOWHERE
    from ouroboros.nn.visit import VisitContext

    spec, given = model.config.model_spec, model.state_dict()
    found = {name: given[name] for name in _OUTSIDE if name in given}
    for part in model.model.stem.values():
        found[EMBEDDING] = part(found[EMBEDDING][:, None], None, VisitContext(rotary=NOWHERE))[:, 0]
    if spec.tie_embeddings and not spec.stem:
        del found[OUTPUT]
    for name, tensor in given.items():
        if match := _PLACE.fullmatch(name):
            places = [slot for slot, visit in enumerate(visits) if visit.block == int(match[1])]
            found |= {f"model.decoder.layers.{slot}.{match[2]}.{match[3]}": tensor for slot in places}
    return found


@dataclass(frozen=True)
class _Entry:
    """A tensor of a file: tensors of ours above one another, with the number of heads whose rows change places."""

    name: str
    parts: Mapping[str, int | None]


def _entries(form: Form, spec: ModelSpec, names: Sequence[str]) -> list[_Entry]:
    heads = spec.block.mixer.heads(spec.hidden_size)
    turned = {"attn_q": heads.queries, "attn_k": heads.cached} if form.pairs_neighbours else {}
    order, found = list(_IN_BLOCK), dict[str, dict[str, int | None]]()
    for name in sorted(names, key=lambda name: order.index(m[2]) if (m := _PLACE.fullmatch(name)) else -1):
        there, rows = _OUTSIDE.get(name, name), None
        if match := _PLACE.fullmatch(name):
            inner = _IN_BLOCK[match[2]]
            rows = turned.get(inner)
            inner = _FUSED.get(inner, inner) if form.fuses else inner
            kind = "" if form.sandwich and inner in _WITHOUT_KIND else f".{match[3]}"
            there = f"blk.{match[1]}.{inner}{kind}"
        found.setdefault(there, {})[name] = rows
    return [_Entry(name, parts) for name, parts in found.items()]


def stored(form: Form, spec: ModelSpec, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file of ``spec``, by the names of llama.cpp."""
    import torch

    for entry in _entries(form, spec, list(state)):
        parts = [
            state[name] if rows is None else _turned(state[name], rows, 2, -1) for name, rows in entry.parts.items()
        ]
        yield entry.name, torch.cat(parts) if len(parts) > 1 else parts[0]


def restored(
    form: Form, spec: ModelSpec, shapes: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The way back: our tensors of ``shapes`` from those of a file."""
    found: dict[str, Tensor] = {}
    for entry in _entries(form, spec, list(shapes)):
        pieces = tensors[entry.name].split([shapes[name][0] for name in entry.parts])
        for (name, rows), piece in zip(entry.parts.items(), pieces, strict=True):
            found[name] = piece if rows is None else _turned(piece, rows, -1, 2)
    return found


def _turned(tensor: Tensor, heads: int, outer: int, inner: int) -> Tensor:
    """Rows of each head in the other order: halves and neighbours change places."""
    return tensor.unflatten(0, (heads, outer, inner)).transpose(1, 2).reshape(tensor.shape)
