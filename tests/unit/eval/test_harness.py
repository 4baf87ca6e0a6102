"""Running the harness: what it takes, what it leaves alone, how failures come out."""

from __future__ import annotations

import pytest
import torch

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.eval import harness
from ouroboros.eval.finding import Finding
from ouroboros.eval.harness import CHECKS, run_harness
from ouroboros.eval.subject import Subject, build_perturbed
from ouroboros.recipes import recipe

SPEC = ModelSpec().replace(
    layout="(1)x2",
    vocab_size=31,
    hidden_size=16,
    mixer=AttentionSpec(num_heads=2),
    ffn=FeedForwardSpec(intermediate_size=24),
)


def outcome(findings: list[Finding]) -> list[tuple[str, bool, str]]:
    return [(finding.name, finding.ok, finding.detail) for finding in findings]


def test_same_seed_same_findings() -> None:
    first, again = run_harness(SPEC, seed=3, quick=True), run_harness(SPEC, seed=3, quick=True)
    assert outcome(first) == outcome(again)
    assert all(finding.ok and finding.seconds >= 0 for finding in first)
    assert outcome(run_harness(SPEC, seed=4, quick=True)) != outcome(first)


def test_a_model_is_left_as_it_is() -> None:
    model = build_perturbed(SPEC).train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert all(finding.ok for finding in run_harness(model, quick=True))
    assert torch.equal(torch.rand(1), expected), "the global random state is restored"
    assert model.training and model.schedule.loops == 2
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_model_is_checked_with_its_own_weights() -> None:
    model = build_perturbed(SPEC)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    failed = {finding.name for finding in run_harness(model, quick=True) if not finding.ok}
    assert {"causal", "cached == uncached", "left padding", "gradients"} <= failed
    assert not {"parameter count", "FLOPs", "cache bytes"} & failed


def test_a_fresh_model_with_neutral_parts_passes() -> None:
    torch.manual_seed(0)
    from ouroboros.model.configuration import OuroborosConfig
    from ouroboros.model.modeling import OuroborosForCausalLM

    model = OuroborosForCausalLM(OuroborosConfig.from_spec(SPEC.replace(zero_init_outputs=True)))
    assert [finding.name for finding in run_harness(model, quick=True) if not finding.ok] == []


def test_recipes_and_half_precision_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "CHECKS", {"cached == uncached": CHECKS["cached == uncached"]})
    assert [finding.ok for finding in run_harness(recipe("gpt", "tiny"))] == [True]
    model = build_perturbed(SPEC).bfloat16()
    assert [finding.ok for finding in run_harness(model)] == [True]
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("context", [1, 2, 12])
def test_short_contexts_pass(context: int) -> None:
    spec = SPEC.replace(max_position_embeddings=context)
    assert [finding.name for finding in run_harness(spec, quick=True) if not finding.ok] == []


def test_a_failure_ends_no_other_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(subject: Subject) -> str:
        raise RuntimeError("broken")

    monkeypatch.setattr(harness, "CHECKS", {"a": breaks, "b": lambda subject: "fine"})
    assert outcome(run_harness(SPEC)) == [("a", False, "RuntimeError: broken"), ("b", True, "fine")]


def test_training_mode_is_restored_after_a_failure_outside_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(subject: Subject) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "CHECKS", {"a": interrupted})
    model = build_perturbed(SPEC).train()
    with pytest.raises(KeyboardInterrupt):
        run_harness(model)
    assert model.training
