"""Score-first training: what it computes, that it helps, and that the model is itself afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.errors import OuroborosError
from ouroboros.eval.adapt import ScoreFirst, adaptation, judge
from ouroboros.eval.subject import build_perturbed
from ouroboros.eval.windows import Procedure, Windows, evaluating, target_nats
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.systems.crawler.slot import Slot


@pytest.fixture
def model() -> OuroborosForCausalLM:
    torch.manual_seed(0)
    spec = ModelSpec(layout="(1)x2", vocab_size=11, hidden_size=12)
    return build_perturbed(
        spec.replace(mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=16))
    ).eval()


def nats_of(model: OuroborosForCausalLM, sequences: list[Tensor], procedure: Procedure) -> Tensor:
    with evaluating(model):
        return torch.cat([target_nats(found, sequences) for found in procedure(model, sequences)])


def test_each_window_is_scored_before_it_is_learned(model: OuroborosForCausalLM) -> None:
    ids = torch.randint(0, 11, (22,))
    other, expected = copy.deepcopy(model), []
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.0)
    for start, end, first in ((0, 8, 0), (4, 12, 8), (8, 16, 12), (12, 20, 16), (16, 21, 20)):
        for step in range(3):
            logits = other(input_ids=ids[None, start:end]).logits[0, first - start :]
            losses = torch.nn.functional.cross_entropy(logits, ids[first + 1 : end + 1], reduction="none")
            if step == 0:
                expected += losses.tolist()
            if step < 2:
                losses.mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    found = nats_of(model, [ids], ScoreFirst(8, 4, steps=2, lr=0.01))
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_what_repeats_is_learned_across_sequences_and_forgotten_at_the_end(model: OuroborosForCausalLM) -> None:
    sequences = [torch.tensor([1, 2, 3, 4, 5] * 8)] * 2
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    plain, found = (nats_of(model, sequences, p) for p in (Windows(8, 4), ScoreFirst(8, 4, lr=0.01)))
    assert found.mean() < 0.9 * plain.mean() and found[39:].mean() < found[:39].mean()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_are_put_back_when_scoring_stops_early(model: OuroborosForCausalLM) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with evaluating(model):
        scoring = ScoreFirst(8, 4, lr=0.01)(model, [torch.arange(30) % 11])
        next(scoring), next(scoring)
        assert any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
        scoring.close()  # pyrefly: ignore
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_adaptations_are_judged(model: OuroborosForCausalLM) -> None:
    for name, legal in (("ttt", True), ("slot", True), ("slot-published", False)):
        assert [finding.ok for finding in judge(model, name, lr=0.1)] == [legal] * 4


def test_adaptations_by_name() -> None:
    assert adaptation("ttt", 8, 4, steps=None, lr=0.5) == ScoreFirst(8, 4, lr=0.5)
    assert adaptation("slot", 8, 4, steps=3, lr=None) == Slot(8, 4, steps=3)
    with pytest.raises(OuroborosError, match="unknown adaptation 'slott'; did you mean 'slot'"):
        adaptation("slott", 8, 4)
    with pytest.raises(OuroborosError, match="steps must be >= 1, got 0"):
        adaptation("ttt", 8, 4, steps=0)
    with pytest.raises(OuroborosError, match="learning rate must be > 0, got -1"):
        adaptation("slot", 8, 4, lr=-1.0)
