"""Weights of the published program in our names: a pretrained model, and what a checkpoint of it holds besides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ouroboros.config import ModelSpec
from ouroboros.convert import bases
from ouroboros.errors import check
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
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
    r"halter\.0\.": f"{_STEERING}.halt.first.",
    r"halter\.2\.": f"{_STEERING}.halt.second.",
    r"halter\.4\.": f"{_STEERING}.halt.last.",
}
"""Beginnings of names in a published checkpoint, and ours."""


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
    donor: Mapping[str, Tensor], own: Mapping[str, Tensor], spec: ModelSpec, settings: Published
) -> OuroborosForCausalLM:
    """The published system on a pretrained model.

    Args:
        donor: the pretrained model's tensors, in the names of a transformers checkpoint.
        own: what a published checkpoint holds: controller, gate and norms, or static diagonals.
        spec: the pretrained model, whose layout is a number of blocks.
        settings: which layers are kept, and sizes.

    Raises:
        OuroborosError: a tensor that the model needs is missing.
    """
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(settings.model(spec)))
    tensors = donor_tensors(donor, settings.sources(spec)) | bases_of(donor, settings, spec)
    named = {ours: tensor for name, tensor in own.items() if (ours := our_name(name)) is not None}
    # A model of fixed depth has no halting network, and its checkpoint may have one.
    tensors |= {name: tensor for name, tensor in named.items() if ".halt." not in name or name in model.state_dict()}
    missing, unknown = model.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if not (spec.tie_embeddings and name == "lm_head.weight")]
    check(not missing, f"the checkpoint lacks {', '.join(missing)}")
    check(not unknown, f"the checkpoint has {', '.join(unknown)}, which the model has not")
    return model
