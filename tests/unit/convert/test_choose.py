"""The choice by measurement, against models that are built for each candidate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ouroboros.config import AttentionSpec, BlockOverride, FeedForwardSpec, ModelSpec
from ouroboros.convert.choose import Candidate, Choice, choose
from ouroboros.convert.layers import chosen, cut, split
from ouroboros.convert.tensors import model_of
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.schedule import parse

LAYERS, IDS = 6, torch.randint(0, 19, (3, 11), generator=torch.Generator().manual_seed(1))
SPEC = ModelSpec(
    layout=str(LAYERS),
    vocab_size=19,
    hidden_size=16,
    init_std=0.3,
    overrides=(BlockOverride(where="1-2", set={"mixer.window": 3}),),
).replace(mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=24))


def donor() -> OuroborosForCausalLM:
    torch.manual_seed(0)
    return OuroborosForCausalLM(OuroborosConfig.from_spec(SPEC)).eval()


def loss(model: OuroborosForCausalLM) -> float:
    with torch.no_grad():
        return float(model(IDS, labels=IDS, use_cache=False).loss)


def angle(one: Tensor, other: Tensor) -> float:
    cosine = (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))
    return float(cosine.clamp(-1, 1).acos().mean()) / math.pi


@pytest.mark.parametrize("layout", ["1 (1)x3 1", "2 (2)x2", "(2)x2 1", "(1)x1"])
def test_each_candidate_is_its_model(layout: str) -> None:
    whole, schedule = donor(), parse(layout)
    found = choose(whole, IDS, schedule)
    place = split(schedule, LAYERS)
    assert found.donor_loss == pytest.approx(loss(whole), abs=1e-5) and found.tokens == 3 * 10
    starts = list(range(place.prelude, LAYERS - place.coda - place.looped + 1))
    assert [candidate.start for candidate in found.candidates] == starts
    once = layout.replace("x3", "x1").replace("x2", "x1")
    with torch.no_grad():
        states = whole.model(IDS, use_cache=False, output_hidden_states=True).hidden_states[:-1]
    states = (*states, _last(whole))
    for candidate in found.candidates:
        first, end = candidate.start, candidate.start + place.looped
        kept = place.kept([(layer,) for layer in range(first, end)])
        model = model_of(cut(SPEC, once, kept), chosen(whole.state_dict(), kept))
        assert candidate.loss == pytest.approx(loss(model), abs=1e-5)
        runs = [(place.middle.start, first), (end, place.middle.stop)]
        expected = sum(angle(states[a], states[b]) for a, b in runs if a < b)
        assert candidate.angular_distance == pytest.approx(expected, abs=1e-4)
        influence = sum(
            1 - float(F.cosine_similarity(states[n], states[n + 1], dim=-1).mean())
            for a, b in runs
            for n in range(a, b)
        )
        assert candidate.block_influence == pytest.approx(influence, abs=1e-4)
    assert found.best.loss == min(candidate.loss for candidate in found.candidates)


def _last(model: OuroborosForCausalLM) -> Tensor:
    """The state behind the last layer, before the norm."""
    found: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, given: found.append(given[0]))
    with torch.no_grad():
        model(IDS, use_cache=False)
    hook.remove()
    return found[0]


def test_a_layer_that_does_nothing_is_the_one_to_remove() -> None:
    """With its output projections at zero; the other of two is chosen, and the donor's loss is kept."""
    whole = donor()
    for layer in (2, 3, 4):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            torch.nn.init.zeros_(whole.model.decoder.layers[layer].get_submodule(name).weight)  # pyrefly: ignore
    found = choose(whole, IDS, parse("1 (1)x2 1"))
    assert found.best.start == 1 and found.best.loss == pytest.approx(found.donor_loss, abs=1e-5)
    assert found.best.angular_distance < 1e-3 and found.best.block_influence < 1e-3


def test_layouts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OuroborosError, match="layout '6' has no loop"):
        choose(donor(), IDS, parse("6"))
    with pytest.raises(OuroborosError, match="has 7 blocks and the donor 6 layers"):
        choose(donor(), IDS, parse("3 (1)x2 3"))


def test_the_table_marks_the_best() -> None:
    rows = [Candidate(start=n, loss=5 - n / 10, angular_distance=0.25, block_influence=1.5) for n in (8, 9)]
    lines = Choice(candidates=tuple(rows), donor_loss=3.0, tokens=5).table().splitlines()
    assert [line[0] for line in lines] == ["f", " ", "*", " "]
    assert lines[2].split() == ["*", "9", "4.100", "0.250", "1.500"] and len(set(map(len, lines[:3]))) == 1
