"""Weights of the published program in our names: a pretrained model, and what a checkpoint of it holds besides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ouroboros.config import ModelSpec
from ouroboros.convert import bases
from ouroboros.convert.tensors import model_of
from ouroboros.errors import check
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.systems.controller.first import FirstGeneration, renamed
from ouroboros.systems.controller.published import Published

_STEERING = "model.decoder.loops.0"
_OWN = {
    r"controller\.state_proj\.0\.": f"{_STEERING}.controller.state_proj.",
    r"controller\.step_embed\.weight": f"{_STEERING}.controller.steps",
    r"controller\.style_net\.0\.": f"{_STEERING}.controller.style_in.",
    r"controller\.style_net\.2\.": f"{_STEERING}.controller.style_out.",
    r"controller\.target_heads\.": f"{_STEERING}.controller.heads.",
    r"gate\.gate_proj\.": f"{_STEERING}.gate.proj.",
    r"step_norm\.weights": f"{_STEERING}.norm.weight",
    r"static_diags": f"{_STEERING}.static_diagonals.weight",
    r"halter\.(net\.)?0\.": f"{_STEERING}.halt.first.",
    r"halter\.(net\.)?2\.": f"{_STEERING}.halt.second.",
    r"halter\.(net\.)?4\.": f"{_STEERING}.halt.last.",
}
"""Beginnings of names in a published checkpoint, and ours."""
UNUSED = ("attn_scale.", "ffn_scale.")
"""What names of tensors that no one uses begin with."""
SHARED = "core_block."
"""What names of the first generation's shared block begin with."""


def our_name(name: str) -> str | None:
    """Our name of a tensor of a published checkpoint; None for the scale vectors that no one uses."""
    for theirs, ours in _OWN.items():
        if re.match(theirs, name):
            return ours + re.sub(f"^{theirs}", "", name)
    return None


def donor_tensors(donor: Mapping[str, Tensor], sources: list[int]) -> dict[str, Tensor]:
    """Tensors of a pretrained model in our names: block i is its layer ``sources[i]``."""
    found = {name: tensor for name, tensor in donor.items() if not name.startswith("model.layers.")}
    for block, layer in enumerate(sources):
        prefix = f"model.layers.{layer}."
        for name, tensor in donor.items():
            if name.startswith(prefix):
                found[f"model.decoder.layers.{block}.{name.removeprefix(prefix)}"] = tensor
    return found


def averaged_layer(donor: Mapping[str, Tensor], layers: Iterable[int]) -> dict[str, Tensor]:
    """The mean of some layers tensor by tensor in float32, by the names within a layer, as the first generation makes
    its one block. Layers are not aligned, so the weights are about 1 / sqrt(layers) as large as theirs."""
    of_layer = [donor_tensors(donor, [layer]) for layer in layers]
    prefix = "model.decoder.layers.0."
    names = [name for name in of_layer[0] if name.startswith(prefix)]
    return {
        name.removeprefix(prefix): torch.stack([tensors[name].float() for tensors in of_layer]).mean(0)
        for name in names
    }


def bases_of(donor: Mapping[str, Tensor], settings: Published, spec: ModelSpec) -> dict[str, Tensor]:
    """A and B of every modulated map in our names, of the layers that ``settings`` remove."""
    made = settings.model(spec)
    with torch.device("meta"):
        places = OuroborosForCausalLM(OuroborosConfig.from_spec(made)).state_dict()
    layers = donor_tensors(donor, list(range(spec.schedule.num_blocks)))
    return bases.bases_of(places, layers, made.schedule, tuple((layer,) for layer in settings.sources(spec)))


def to_model(
    donor: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    spec: ModelSpec,
    settings: Published,
    *,
    eos_token_id: int | None = None,
) -> OuroborosForCausalLM:
    """The published system on a pretrained model.

    Args:
        donor: the pretrained model's tensors, in the names of a transformers checkpoint.
        own: what a published checkpoint holds: controller, gate and norms, or static diagonals.
        spec: the pretrained model, whose layout is a number of blocks.
        settings: which layers are kept, and sizes.
        eos_token_id: for the configuration.

    Raises:
        OuroborosError: a tensor that the model needs is missing, or has another shape.
    """
    tensors = donor_tensors(donor, settings.sources(spec)) | bases_of(donor, settings, spec)
    unknown = [name for name in own if our_name(name) is None and not name.startswith(UNUSED)]
    check(not unknown, f"{', '.join(unknown[:5])}: no tensor of the published system")
    tensors |= {ours: tensor for name, tensor in own.items() if (ours := our_name(name)) is not None}
    return model_of(settings.model(spec), _without_halting(tensors, settings.halt_hidden), eos_token_id=eos_token_id)


def first_to_model(
    donor: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    spec: ModelSpec,
    settings: FirstGeneration,
    *,
    eos_token_id: int | None = None,
) -> OuroborosForCausalLM:
    """A model of the first generation: the shared block, which a checkpoint holds whole, or a refiner.

    Args:
        donor: as in :func:`to_model`; not needed for the shared block.
        own: what a published checkpoint holds: controller, halting network, norm and gate, or the shared block.
        spec: the pretrained model, whose layout is a number of blocks.
        settings: sizes.
        eos_token_id: for the configuration.

    Raises:
        OuroborosError: a tensor is missing, or is of no such model.
    """
    shared = any(name.startswith(SHARED) for name in own)
    layers = spec.schedule.num_blocks
    model = settings.shared(spec) if shared else settings.refiner(spec)
    block = 0 if shared else layers - 1
    tensors = renamed(own, model, block, adjacent=shared)
    if not shared:
        tensors |= donor_tensors(donor, list(range(layers)))
    return model_of(model, _without_halting(tensors, settings.halt_hidden), eos_token_id=eos_token_id)


def _without_halting(tensors: dict[str, Tensor], hidden: int | None) -> dict[str, Tensor]:
    """A model of fixed depth has no halting network, and its checkpoint may have one."""
    return {name: tensor for name, tensor in tensors.items() if hidden is not None or ".halt." not in name}
