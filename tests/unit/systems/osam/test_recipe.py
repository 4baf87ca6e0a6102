"""OSAM's recipes: sizes that build, the published counts, what the one changes of the other."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ouroboros.accounting import cost
from ouroboros.api import build
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.optim import parameter_roles, untrained_parameters
from ouroboros.recipes import recipe, sizes


def published_count(V: int, d: int, m: int, r: int) -> int:
    """All tensors of the published program."""
    return 2 * V * d + 3 * d**2 + (m * r + r) + (r * d + d) + 2 * d + 2 * (d**2 + d) + 2 * d + 5


@pytest.mark.parametrize("name", ["osam", "osam-published"])
def test_every_size_builds_with_the_parameters_that_are_counted(name: str) -> None:
    for size in sizes(name):
        made = recipe(name, size)
        with torch.device("meta"):
            model = OuroborosForCausalLM(OuroborosConfig.from_spec(made.model))
        assert sum(p.numel() for p in model.parameters()) == cost(made.model).parameters
        assert made.train.batch_size * made.data.sequence_length > 0


def test_the_published_model_has_the_published_numbers() -> None:
    """With the 17 characters of the published corpus; the ids of unknown characters and the end of text add two rows of
    the embedding and the head."""
    for size, d, m, r in (("default", 64, 2048, 128), ("quick-start", 128, 4096, 128)):
        spec = dataclasses.replace(recipe("osam-published", size).model, vocab_size=17)
        assert (spec.hidden_size, spec.block.mixer.buckets, spec.block.mixer.readout_hidden) == (d, m, r)
        assert cost(spec).parameters == published_count(17, d, m, r)
        assert cost(dataclasses.replace(spec, vocab_size=19)).parameters == published_count(17, d, m, r) + 2 * 2 * d
        without = spec.replace(mixer=dataclasses.replace(spec.block.mixer, value_path=False))
        # The published program keeps the unused value path: a projection, a norm, two maps and a gate.
        assert cost(spec).parameters - cost(without).parameters == d**2 + 2 * d + 2 * (d**2 + d) + 1
        # Of 2 m + 2 d m numbers of state 2 d + 2 d^2 are free.
        assert cost(spec).state_values == 2 * d + 2 * d**2 == (2 * m + 2 * d * m) // 32
    assert published_count(17, 64, 2048, 128) == 293_573
    assert recipe("osam-published", "default").model.block.mixer == OsamSpec()


def test_the_published_start() -> None:
    torch.manual_seed(0)
    made = recipe("osam-published")
    model = build(made)
    embed, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert embed.std().item() == pytest.approx(1.0, rel=0.05)
    assert head.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)  # that of a uniform draw within 1 / 8
    assert model.model.norm.eps == 1e-5 and model.model.decoder.layers[0].self_attn.value_norm.eps == 1e-5
    roles = parameter_roles(model)
    scalars = {name.rpartition(".")[2] for name, role in roles.items() if role == "scalar"}
    assert scalars == {"theta_q_raw", "theta_k_raw", "omega_raw", "gate_feature_raw", "gate_value_raw"}
    untrained = {name.partition("self_attn.")[2] for name in untrained_parameters(model)}
    assert untrained == {"k_proj.weight", "v_proj.weight", "theta_k_raw"}
    optim = made.optim
    assert (optim.lr, optim.scalar_lr, optim.weight_decay, optim.decay) == (3e-3, 3e-2, 1e-2, "all")
    assert optim.betas == (0.9, 0.95) and optim.clip_norm == 1.0 and optim.schedule == "constant"


def test_the_recipe_as_it_should_be_trains_everything() -> None:
    made = recipe("osam", "tiny")
    assert not untrained_parameters(build(made))
    mixer, published = made.model.block.mixer, OsamSpec()
    changed = {f.name for f in dataclasses.fields(OsamSpec) if getattr(mixer, f.name) != getattr(published, f.name)}
    assert changed == {
        *("buckets", "readout_hidden", "detach_state", "independent_hashes", "sketch_values", "frequencies", "decay"),
        *("time_scales", "normalisation", "gate_cap", "gate_start"),
    }
