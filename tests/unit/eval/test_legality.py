"""The four criteria accept fair procedures and reject unfair ones, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.errors import OuroborosError
from ouroboros.eval.adapt import ScoreFirst
from ouroboros.eval.legality import CRITERIA, check_procedure
from ouroboros.eval.subject import build_perturbed
from ouroboros.eval.windows import Procedure, Rolling, Scored, Windows, spans
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.systems.crawler.score import published_spans
from ouroboros.systems.crawler.slot import PUBLISHED, Slot

W, S = 8, 2
ONE, TWO, THREE, FOUR = CRITERIA


@pytest.fixture(scope="module")
def model() -> OuroborosForCausalLM:
    spec = ModelSpec(layout="(1)x2", vocab_size=23, hidden_size=12)
    torch.manual_seed(0)
    return build_perturbed(
        spec.replace(mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=16))
    ).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 23, (72,), generator=torch.Generator().manual_seed(1))


def failed(model: Any, procedure: Procedure, ids: Tensor) -> list[str]:
    findings = check_procedure(model, procedure, ids)
    assert [finding.name for finding in findings] == list(CRITERIA) and all(f.detail for f in findings)
    return [finding.name for finding in findings if not finding.ok]


def whole_window_training(model: Any, sequences: Sequence[Tensor]) -> Iterator[Scored]:
    """Train on all targets of a window, then score them; the weights are put back after each window."""
    for index, sequence in enumerate(sequences):
        for _, start, end, first in spans(len(sequence) - 1, W, W):
            before = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
            with torch.enable_grad():
                model(input_ids=sequence[None, start:end], targets=sequence[None, start + 1 : end + 1]).loss.backward()
            with torch.no_grad():
                for weight in model.parameters():
                    weight -= 0.1 * weight.grad
                    weight.grad = None
            logits = model(input_ids=sequence[None, start:end]).logits[0]
            model.load_state_dict(before)
            yield Scored(index, first, logits.log_softmax(-1))


def scored_after_update(model: Any, sequences: Sequence[Tensor]) -> Iterator[Scored]:
    """A count of each target is added before its own score: what lies behind it plays no part."""
    (sequence,) = sequences
    counts = torch.ones(23)
    for target, token in enumerate(sequence[1:].tolist()):
        counts[token] += 1
        yield Scored(0, target, (counts / counts.sum()).log()[None])


def left_in_the_model(model: Any, sequences: Sequence[Tensor]) -> Iterator[Scored]:
    """Score-first updates of a bias that nobody takes back."""
    for found in Windows(W, S)(model, sequences):
        yield Scored(found.sequence, found.first, (found.log_probs + model.lm_head.weight[:, 0]).log_softmax(-1))
    with torch.no_grad():
        model.lm_head.weight += 0.01


def unnormalised(model: Any, sequences: Sequence[Tensor]) -> Iterator[Scored]:
    for found in Windows(W, S)(model, sequences):
        yield found._replace(log_probs=found.log_probs + 0.01)


def dropped_tail(model: Any, sequences: Sequence[Tensor]) -> Iterator[Scored]:
    for found in Windows(W, W)(model, sequences):
        if len(found.log_probs) == W:
            yield found


LEGAL: dict[str, Procedure] = {
    "plain": Windows(W, W),
    "sliding": Windows(W, S),
    "rolling": Rolling(W, S),
    "slot for each window": Slot(W, S, batch_size=8),
    "slot with one vector, one window at a time": Slot(W, S, shared=True, batch_size=1),
    "score-first training": ScoreFirst(W, S, lr=0.01),
}
ILLEGAL: dict[str, tuple[Procedure, list[str]]] = {
    "slot with a shared vector": (
        dataclasses.replace(PUBLISHED(W, S), batch_size=8, lr=0.1),
        [ONE, TWO, THREE, FOUR],
    ),
    "the same without the tail": (Slot(W, S, shared=True, batch_size=8, lr=0.1), [ONE, TWO, THREE]),
    "whole-window training": (whole_window_training, [ONE, TWO, THREE]),
    "scored on adapted targets": (scored_after_update, [TWO, THREE]),
    "learning that stays": (left_in_the_model, [THREE]),
    "unnormalised": (unnormalised, [TWO]),
    "published tail": (Windows(W, S, plan=published_spans), [FOUR]),
    "dropped tail": (dropped_tail, [FOUR]),
}


@pytest.mark.parametrize("name", LEGAL)
def test_fair_procedures_pass(model: OuroborosForCausalLM, ids: Tensor, name: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert failed(model, LEGAL[name], ids) == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ILLEGAL)
def test_unfair_procedures_fail_by_name(model: OuroborosForCausalLM, ids: Tensor, name: str) -> None:
    procedure, expected = ILLEGAL[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert failed(model, procedure, ids) == expected
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_that_looks_ahead_is_found_whatever_reads_it(fakes: SimpleNamespace) -> None:
    ids = torch.randint(0, 257, (40,), generator=torch.Generator().manual_seed(0))
    assert failed(fakes.LookAhead(), Windows(W, S), ids)[:2] == [TWO, THREE]
    assert failed(fakes.Bigram(), Windows(W, S), ids) == []


def test_messages_name_targets(model: OuroborosForCausalLM, ids: Tensor) -> None:
    details = {f.name: f.detail for f in check_procedure(model, whole_window_training, ids)}
    assert "changes the log-probabilities of target" in details[ONE]
    assert "changing target" in details[TWO]
    (last,) = [f.detail for f in check_procedure(model, dropped_tail, ids) if not f.ok]
    assert last == "target 64 of 71 is scored 0 times"


def test_too_little_to_try(model: OuroborosForCausalLM, ids: Tensor) -> None:
    with pytest.raises(OuroborosError, match="at least 3 ids, got 2"):
        check_procedure(model, Windows(W, W), ids[:2])
