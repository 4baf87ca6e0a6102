"""The first generation: one block for all layers, or a last layer that is applied again (sections 6 and 7)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from ouroboros.config import BlockOverride, LoopPart, ModelSpec, to_dict
from ouroboros.config.parts.halt import HaltSpec
from ouroboros.config.parts.loop import LoopNormSpec, RecurrenceGateSpec
from ouroboros.config.parts.modulated import FFN_TARGETS, TARGETS
from ouroboros.convert.tensors import shape_of
from ouroboros.errors import check
from ouroboros.systems.controller.parts import GeneratedAttentionSpec, GeneratedFeedForwardSpec, MatrixControllerSpec
from ouroboros.systems.controller.published import LOOP

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.model.modeling import OuroborosForCausalLM


@dataclass(frozen=True, kw_only=True)
class FirstGeneration:
    """Sizes of what steers the loop; the defaults are the published ones for a model of 3B."""

    depth: int = 8
    """How often the block is applied; of a refiner, how often its last layer is applied again."""
    rank: int = 16
    alpha: float = 32.0
    bases: int = 8
    divisor: int = 48
    state: int = 512
    steps: int = 256
    confidence: int = 32
    hidden: int = 1024
    style: int = 64
    rows: int = 128
    """Rows of the Controller's table of steps."""
    norm_rows: int | None = None
    """Rows of the norm's gains in a refiner with norm and gate; None means one without."""
    halt_hidden: int | None = None
    """Width of the halting network; None means that all tokens take ``depth`` steps, else it is the most they take."""
    pooling: Literal["token", "prefix", "prompt", "all"] = "all"
    norm: bool = False
    """Normalise the state that the Controller sees."""
    start: Literal["b_zero", "saddle"] = "saddle"

    @classmethod
    def of(cls, own: Mapping[str, Tensor], **settings: Any) -> Self:
        """Sizes as the tensors of a published checkpoint have them.

        Args:
            own: the checkpoint; with norm and gate it is of a gated refiner, with a halting network of adaptive depth.
            settings: what the tensors do not tell: ``depth``, and ``alpha``, which is twice the rank by default.

        Raises:
            OuroborosError: a tensor is missing or has another number of axes, or the bases fit no divisor.
        """
        state, _ = shape_of(own, "controller.state_proj.0.weight", 2)
        rows, steps = shape_of(own, "controller.step_embed.weight", 2)
        confidence, _ = shape_of(own, "controller.halt_proj.0.weight", 2)
        hidden, _ = shape_of(own, "controller.style_net.0.weight", 2)
        style, _ = shape_of(own, "controller.style_net.4.weight", 2)
        bases, rank, _ = shape_of(own, f"controller.heads.{TARGETS[0]}.basis_A1", 3)
        inner = {}
        for target in TARGETS:
            _, met, inputs = shape_of(own, f"controller.heads.{target}.basis_A2", 3)
            inner[inputs] = met
            _, outputs, met = shape_of(own, f"controller.heads.{target}.basis_B1", 3)
            inner[outputs] = met
        fits = (n for n in range(1, max(inner) + 1) if all(max(1, size // n) == met for size, met in inner.items()))
        divisor = next(fits, None)
        check(
            divisor is not None,
            f"controller.heads: bases meet in {inner} numbers by channels of the map, as no divisor gives",
        )
        sizes: dict[str, Any] = {"rank": rank, "alpha": 2.0 * rank, "bases": bases, "divisor": divisor, "rows": rows}
        sizes |= {"state": state, "steps": steps, "confidence": confidence, "hidden": hidden, "style": style}
        for name, tensor in (("norm_rows", "step_norm.weight"), ("halt_hidden", "halter.net.0.bias")):
            sizes[name] = len(own[tensor]) if tensor in own else None
        return cls(**{**sizes, **settings})

    def uncontrolled(self, donor: ModelSpec) -> ModelSpec:
        """The shared block alone, as the first phase of training has it.

        Raises:
            OuroborosError: the pretrained model's layers differ.
        """
        check(
            not donor.overrides, "the layers of the pretrained model are not alike, and one block cannot stand for all"
        )
        return dataclasses.replace(donor, tie_embeddings=False, layout=f"{LOOP}:(1)x{self.depth}")

    def shared(self, donor: ModelSpec) -> ModelSpec:
        """One block that is applied to the embeddings, with an output matrix of its own."""
        alone = self.uncontrolled(donor)
        return self._steered(alone, alone.layout)

    def refiner(self, donor: ModelSpec) -> ModelSpec:
        """The whole pretrained model, whose last layer is applied again."""
        before = donor.schedule.num_blocks - 1
        return self._steered(donor, f"{before or ''} {LOOP}:1 ({LOOP})x{self.depth}".strip())

    def _steered(self, donor: ModelSpec, layout: str) -> ModelSpec:
        names = ("bases", "state", "steps", "confidence", "hidden", "style", "rows", "pooling", "norm", "start")
        loop: list[LoopPart] = [MatrixControllerSpec(**{name: getattr(self, name) for name in names})]
        if self.norm_rows is not None:
            loop += [LoopNormSpec(rows=self.norm_rows, eps=1e-6), RecurrenceGateSpec()]
        if self.halt_hidden is not None:
            loop.append(HaltSpec(hidden=self.halt_hidden, freeze=False))
        maps: dict[str, Any] = {name: getattr(self, name) for name in ("rank", "alpha", "bases", "divisor")}
        parts = _generated(donor, maps)
        if layout == donor.layout:  # every block is looped
            return donor.replace(loop=tuple(loop), **parts)
        override = BlockOverride(where=LOOP, set={name: to_dict(part) for name, part in parts.items()})
        overrides = (*donor.overrides, override)
        return dataclasses.replace(donor, layout=layout, loop=tuple(loop), overrides=overrides)


def _generated(donor: ModelSpec, maps: dict[str, Any]) -> dict[str, Any]:
    """The last block's mixer and feed-forward network with generated maps.

    Raises:
        OuroborosError: the block is no gated one with plain attention.
    """
    mixer, ffn = donor.blocks[-1].mixer, donor.blocks[-1].ffn
    kinds = f"mixer {mixer.kind!r} with ffn {ffn.kind!r}"
    fits = mixer.kind == "attention" and ffn.kind == "swiglu"
    check(fits, f"{kinds}: maps of attention with swiglu alone can be generated")
    plain: dict[str, Any] = {f.name: getattr(mixer, f.name) for f in dataclasses.fields(mixer) if f.name != "kind"}
    shared: dict[str, Any] = {name: getattr(ffn, name) for name in ("intermediate_size", "bias", "dropout")}
    return {
        "mixer": GeneratedAttentionSpec(**plain, **maps),
        "ffn": GeneratedFeedForwardSpec(**shared, **maps),
    }


_STEERING = "model.decoder.loops.0"
_CONTROLLER = f"{_STEERING}.matrix_controller"
_OWN = {
    r"controller\.state_proj\.0\.": f"{_CONTROLLER}.state_proj.",
    r"controller\.step_embed\.weight": f"{_CONTROLLER}.steps",
    r"controller\.halt_proj\.0\.": f"{_CONTROLLER}.halt_proj.",
    r"controller\.style_net\.0\.": f"{_CONTROLLER}.style_in.",
    r"controller\.style_net\.2\.": f"{_CONTROLLER}.style_middle.",
    r"controller\.style_net\.4\.": f"{_CONTROLLER}.style_out.",
    r"controller\.heads\.(\w+)\.coeff_proj_([AB])\.": rf"{_CONTROLLER}.heads_\2.\1.",
    r"controller\.heads\.(\w+)\.basis_([AB][12])": r"{block}.bases.\1.\2",
    r"halter\.net\.0\.": f"{_STEERING}.halt.first.",
    r"halter\.net\.2\.": f"{_STEERING}.halt.second.",
    r"halter\.net\.4\.": f"{_STEERING}.halt.last.",
    r"recurrence_gate\.gate_proj\.": f"{_STEERING}.gate.proj.",
    r"step_norm\.weight": f"{_STEERING}.norm.weight",
    r"core_block\.attn_norm\.": "{block}.input_layernorm.",
    r"core_block\.attention\.(\w+)\.base_linear\.": r"{block}.\1.",
    r"core_block\.ffn_norm\.": "{block}.post_attention_layernorm.",
    r"core_block\.ffn\.(\w+)\.base_linear\.": r"{block}.\1.",
    r"embed_tokens\.": "model.embed_tokens.",
    r"norm\.": "model.norm.",
    r"lm_head\.": "lm_head.",
}
"""Beginnings of names in a published checkpoint, and ours; ``{block}`` with a map's name is that map in its layer."""


def our_name(name: str, block: int) -> str | None:
    """Our name of a tensor of a published checkpoint whose looped block has this number; None if it is none."""
    for theirs, ours in _OWN.items():
        if (match := re.match(theirs, name)) is not None:
            found = match.expand(ours) + name[match.end() :]
            target = re.search(r"\w+_proj", found)
            within = "mlp." if target is not None and target[0] in FFN_TARGETS else "self_attn."
            layer = "" if "layernorm" in found else within
            return re.sub(r"\{block\}\.", f"model.decoder.layers.{block}.{layer}", found)
    return None


def halves(tensor: Tensor, heads: int, axis: int = 0) -> Tensor:
    """The outputs of a map to queries or keys whose rotation pairs neighbouring channels, in the order in which it
    pairs the first half of a head with the second.

    Args:
        tensor: the map's weight, its bias, or a matrix that adds to it.
        heads: queries' or keys'.
        axis: of the outputs.
    """
    shape = tensor.shape
    apart = tensor.unflatten(axis, (heads, shape[axis] // heads // 2, 2))
    return apart.transpose(axis + 1, axis + 2).reshape(shape)


def renamed(own: Mapping[str, Tensor], spec: ModelSpec, block: int, *, adjacent: bool) -> dict[str, Tensor]:
    """The tensors of a published checkpoint under our names.

    Args:
        own: the checkpoint.
        spec: the model that it is of.
        block: the number of its looped block.
        adjacent: whether rotation pairs neighbouring channels, as in the published shared block.

    Raises:
        OuroborosError: a tensor is of no such model.
    """
    found, heads = {}, spec.blocks[block].mixer.heads(spec.hidden_size)
    of = {"q_proj": heads.queries, "k_proj": heads.cached}
    for name, tensor in own.items():
        ours = our_name(name, block)
        check(ours is not None, f"{name} is no tensor of the first generation")
        assert ours is not None
        target = next((target for target in of if f".{target}." in ours), None)
        if adjacent and target is not None and ".decoder.layers." in ours and not ours.endswith((".A1", ".A2", ".B2")):
            tensor = halves(tensor, of[target], axis=1 if ours.endswith(".B1") else 0)
        found[ours] = tensor
    return found


def baseline(donor: OuroborosForCausalLM, ids: Tensor, *, twice: bool = False) -> Tensor:
    """Logits (B, T, V) of the pretrained model that a refiner is compared with, for token ids (B, T).

    Args:
        donor: the pretrained model as it is.
        ids: the text.
        twice: apply the final norm twice, as the published program does.
    """
    states = donor.model(ids, use_cache=False).last_hidden_state
    return donor.logits(donor.model.norm(states) if twice else states)
