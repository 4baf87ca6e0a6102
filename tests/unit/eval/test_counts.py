"""Each count is compared with a measurement: a wrong count or an untrained parameter is found."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ouroboros.accounting import Cost
from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.config.parts.loop import LoopEmbeddingSpec
from ouroboros.errors import OuroborosError
from ouroboros.eval import counts
from ouroboros.eval.finding import Mismatch
from ouroboros.eval.subject import Subject, build_perturbed, prepare
from ouroboros.nn.block import Block
from ouroboros.nn.ffn import FeedForward

SPEC = ModelSpec().replace(
    layout="1 (1)x2",
    vocab_size=31,
    hidden_size=16,
    mixer=AttentionSpec(num_heads=2),
    ffn=FeedForwardSpec(intermediate_size=24),
)


@pytest.fixture
def subject() -> Subject:
    torch.manual_seed(0)
    return prepare(build_perturbed(SPEC))


def miscount(monkeypatch: pytest.MonkeyPatch, **added: int) -> None:
    """Let the accounting be wrong by ``added``."""
    real = counts.cost

    def cost(*arguments: Any, **named: Any) -> Cost:
        right = real(*arguments, **named)
        return dataclasses.replace(right, **{name: getattr(right, name) + more for name, more in added.items()})

    monkeypatch.setattr(counts, "cost", cost)


@pytest.mark.parametrize(
    ("check", "added", "message"),
    [
        (counts.check_parameters, {"parameters": 1}, "parameters: "),
        (counts.check_flops, {"flops_per_token": 1}, "FLOPs, loops 1: "),
        (counts.check_cache_bytes, {"cache_values_per_token": 1}, "bytes of 3 more tokens of 3 sequences, loops 1"),
        (counts.check_cache_bytes, {"state_values": 1}, "bytes of 3 sequences of 17 tokens, loops 1"),
    ],
)
def test_wrong_count(
    check: Any, added: dict[str, int], message: str, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(subject)
    miscount(monkeypatch, **added)
    with pytest.raises(Mismatch, match=message):
        check(subject)


def test_arithmetic_that_is_not_counted(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, *rest: real(self, x + 0 * (x @ torch.ones(16, 16)), *rest))
    with pytest.raises(Mismatch, match="FLOPs"):
        counts.check_flops(subject)


class TestGradients:
    def test_not_reached(self, subject: Subject) -> None:
        subject.model.model.unused = nn.Parameter(torch.ones(3))
        with pytest.raises(Mismatch, match=r"no gradient: model\.unused"):
            counts.check_gradients(subject)

    def test_zero_throughout(self, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
        real = FeedForward.forward
        monkeypatch.setattr(FeedForward, "forward", lambda self, *inputs: 0 * real(self, *inputs))
        with pytest.raises(Mismatch, match=r"all zero: .*model\.decoder\.layers\.0\.mlp\.up_proj"):
            counts.check_gradients(subject)

    def test_not_finite(self, subject: Subject) -> None:
        with torch.no_grad():
            subject.model.model.embed_tokens.weight.fill_(torch.inf)
        with pytest.raises(Mismatch, match="not finite"):
            counts.check_gradients(subject)

    def test_neutral_start_is_no_failure(self) -> None:
        """Behind zero outputs nothing has a gradient until they move."""
        torch.manual_seed(0)
        subject = prepare(build_perturbed(SPEC.replace(loop=(LoopEmbeddingSpec(),))))
        with torch.no_grad():
            for block in subject.model.model.decoder.layers:
                block.self_attn.o_proj.weight.zero_()
        assert counts._zero_gradients(subject.model, subject) != []
        subject.model.zero_grad()
        assert "not all zero" in counts.check_gradients(subject)
        assert not subject.model.model.decoder.layers[0].self_attn.o_proj.weight.any()

    def test_one_token_suffices(self, subject: Subject) -> None:
        assert counts.check_gradients(Subject(subject.model, subject.ids[:, :1]))


class Passing(nn.Module):
    """Multiplies by 1, whatever its two numbers are; what it declares untrained is the test's choice."""

    PARAMETER_ROLES = {"seen": "scalar", "unseen": "scalar"}

    def __init__(self, *untrained: str) -> None:
        super().__init__()
        self.seen, self.unseen = (nn.Parameter(torch.tensor(0.3)) for _ in range(2))
        self.untrained = frozenset(untrained)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.seen - self.seen.detach() + 0 * self.unseen.detach())


def with_untrained(subject: Subject, *declared: str) -> Subject:
    """The subject, the two numbers of :class:`Passing` behind its final norm."""
    inner = subject.model.model
    inner.norm = nn.Sequential(inner.norm, Passing(*declared))  # pyrefly: ignore
    return subject


class TestUntrained:
    def test_the_right_declaration_passes_whatever_requires_a_gradient(self, subject: Subject) -> None:
        with_untrained(subject, "unseen")
        everything = sum(1 for _ in subject.model.parameters())
        for asked in (False, True):
            subject.model.requires_grad_(asked)
            said = counts.check_gradients(subject)
            assert said.startswith(f"{everything - 1} parameters") and said.endswith(
                "; 1 untrained by specification, without one"
            )
            groups = counts.check_optimizer_groups(subject)
            assert "1 scalar, " in groups and groups.endswith("; 1 untrained in none")

    def test_one_that_is_not_declared_fails(self, subject: Subject) -> None:
        with pytest.raises(Mismatch, match=r"^no gradient: model\.norm\.1\.unseen$"):
            counts.check_gradients(with_untrained(subject))

    def test_one_that_is_declared_and_trained_fails(self, subject: Subject) -> None:
        with pytest.raises(Mismatch, match=r"^declared untrained, but has a gradient: model\.norm\.1\.seen$"):
            counts.check_gradients(with_untrained(subject, "seen", "unseen"))

    def test_one_that_is_declared_and_in_a_group_fails(self, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
        with_untrained(subject, "unseen")
        monkeypatch.setattr("ouroboros.optim.groups.untrained_parameters", lambda model: set())
        with pytest.raises(Mismatch, match="parameters in groups"):
            counts.check_optimizer_groups(subject)

    def test_a_name_that_is_no_parameter_fails(self, subject: Subject) -> None:
        for check in (counts.check_gradients, counts.check_optimizer_groups):
            with pytest.raises(OuroborosError, match="'unsen' is no parameter; did you mean 'unseen'"):
                check(with_untrained(subject, "unsen"))


class TestOptimizerGroups:
    def test_parameter_without_a_role(self, subject: Subject) -> None:
        subject.model.model.extra = nn.Parameter(torch.ones(2, 2, 2))
        with pytest.raises(OuroborosError, match=r"model\.extra"):
            counts.check_optimizer_groups(subject)

    def test_parameter_in_no_group_or_two(self, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
        def groups(*chosen: list[Tensor]) -> None:
            optimizer = torch.optim.SGD(chosen[0], lr=0.1)
            rest = [torch.optim.SGD(more, lr=0.1) for more in chosen[1:]]
            monkeypatch.setattr(counts, "build_optimizers", lambda model, spec: [optimizer, *rest])

        monkeypatch.setattr(counts.copy, "deepcopy", lambda model: model)
        everything: list[Tensor] = list(subject.model.parameters())
        groups(everything)
        assert counts.check_optimizer_groups(subject).startswith("each in exactly one group: 1 embedding")
        groups(everything[1:])
        with pytest.raises(Mismatch, match=r"embed_tokens\.weight in 0 groups"):
            counts.check_optimizer_groups(subject)
        groups(everything, everything[:1])
        with pytest.raises(Mismatch, match=r"embed_tokens\.weight in 2 groups"):
            counts.check_optimizer_groups(subject)
        groups(everything, [torch.ones(2)])
        with pytest.raises(Mismatch, match="parameters in groups"):
            counts.check_optimizer_groups(subject)
