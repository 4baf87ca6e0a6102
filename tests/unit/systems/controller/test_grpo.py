"""The objective against the equations of the paper, and the trainer: what it learns, and exact resume."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ouroboros.api import build, open_model, recipe
from ouroboros.config import OptimSpec
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.systems.controller import grpo
from ouroboros.systems.controller.completions import Problem, Writer, written
from ouroboros.systems.controller.grpo import RewardSpec, RewardTrainer, advantages, divergence, objective, train
from ouroboros.train.log import read_metrics
from ouroboros.train.rundir import RunDirectory

ADAM = OptimSpec(matrix_optimizer="adamw", lr=3e-3, schedule="constant", warmup_fraction=0, weight_decay=0)
PROBLEMS = [Problem(f"Question: {n}?\nAnswer:", f" #### {n}") for n in range(5)]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([1, 0, 0, 0], [3**0.5] + [-(3**-0.5)] * 3), ([1, 1], [0, 0]), ([0.1] * 3, [0, 0, 0]), ([0, 1], [-1, 1])],
)
def test_advantages(rewards: list[float], expected: list[float]) -> None:
    assert advantages(rewards) == pytest.approx(expected)


def by_hand(new, old, start, lengths, gains, clip, kl) -> float:
    """Equations 3 and 4, token by token."""
    total = 0.0
    for i, length in enumerate(lengths):
        for t in range(length):
            ratio = math.exp(new[i][t]) / math.exp(old[i][t])
            clipped = max(min(ratio, 1 + clip), 1 - clip)
            q = math.exp(start[i][t]) / math.exp(new[i][t])
            total += (min(ratio * gains[i], clipped * gains[i]) - kl * (q - math.log(q) - 1)) / length / len(lengths)
    return -total


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_objective_is_that_of_the_paper(kl: float) -> None:
    torch.manual_seed(0)
    lengths, gains = [4, 1, 3], [1.2, -0.9, -0.3]
    mask = written([torch.zeros(length) for length in lengths])
    new, old, start = (-2 * torch.rand(3, 4, dtype=torch.float64) * mask for _ in range(3))
    expected = by_hand(*(x.tolist() for x in (new, old, start)), lengths, gains, 0.2, kl)
    found = objective(new, old, start if kl else None, mask, torch.tensor(gains), clip=0.2, kl=kl)
    assert found.item() == pytest.approx(expected)


def test_clipped_tokens_have_no_gradient() -> None:
    """Those that have moved beyond the range in the direction of their advantage, and no others."""
    ratio = torch.tensor([[1.5, 1.1, 0.5], [1.5, 0.9, 0.5]], dtype=torch.float64)
    new = ratio.log().requires_grad_()
    args = (torch.zeros(2, 3, dtype=torch.float64), None, torch.ones(2, 3), torch.tensor([1.0, -1.0]))
    objective(new, *args, clip=0.2, kl=0.0).backward()
    assert (new.grad != 0).tolist() == [[False, True, True], [True, True, False]]
    assert (new.grad[0] <= 0).all() and (new.grad[1] >= 0).all()


def test_the_rewarded_token_of_a_toy_policy_becomes_likelier() -> None:
    logits = torch.zeros(5, requires_grad=True)
    tokens = torch.tensor([[0], [1], [1], [3]])
    new = logits.log_softmax(-1)[tokens]
    gains = torch.tensor(advantages([1.0, 0.0, 0.0, 0.0]))
    objective(new, new.detach(), None, torch.ones(4, 1), gains, clip=0.2, kl=0.0).backward()
    rises = -logits.grad
    assert rises[0] > 0 > rises[3] > rises[1]  # token 1 was sampled twice
    torch.testing.assert_close(rises[[2, 4]], torch.zeros(2))  # not sampled: advantages add up to nothing


def test_divergence_is_unbiased() -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(1, 7).log_softmax(-1) for _ in range(2))
    assert (divergence(p, q) >= 0).all() and not divergence(p, p).any()
    expectation = (p.exp() * divergence(p, q)).sum()
    torch.testing.assert_close(expectation, (p.exp() * (p - q)).sum())


def trainer(*, optim: OptimSpec = ADAM, tokens: int = 6, **options) -> RewardTrainer:
    torch.manual_seed(0)
    writer = Writer(build(recipe("controller", "tiny")), byte_tokenizer(), max_new_tokens=tokens)
    return RewardTrainer(writer, PROBLEMS, RewardSpec(**{"steps": 4, "prompts": 2, "group": 8, **options}), optim)


@pytest.fixture
def lower(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that an untrained model gets now and then: for a first byte below 128."""
    monkeypatch.setattr(grpo, "reward", lambda text, reference, plain: float(text[:1].isascii() and text != ""))


def weight_of_lower(trained: RewardTrainer) -> float:
    with torch.no_grad():
        prompt = trained.writer.ids(PROBLEMS[0].prompt)
        return float(trained.writer.model(prompt[None]).logits[0, -1].softmax(-1)[:128].sum())


@pytest.mark.parametrize("updates", [1, 2])
def test_what_is_rewarded_becomes_more_probable(lower: None, updates: int) -> None:
    it = trainer(kl=0.0, updates=updates, steps=6, group=32, tokens=1)
    before = weight_of_lower(it)
    records = [it.step() for _ in range(6)]
    assert weight_of_lower(it) > before + 0.05
    assert all(record["mixed_groups"] > 0 and record["kl"] is None for record in records)


def test_groups_that_agree_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo, "reward", lambda *_, **__: 1.0)
    it = trainer(kl=0.0)
    before = {name: p.clone() for name, p in it.writer.model.named_parameters()}
    assert it.step()["grad_norm"] == 0
    assert all(torch.equal(p, before[name]) for name, p in it.writer.model.named_parameters())


def test_only_what_is_not_left_out_moves(lower: None) -> None:
    it = trainer(optim=OptimSpec(matrix_optimizer="adamw", left_out=("model.embed_tokens.*", "*.norm*")))
    before = {name: p.clone() for name, p in it.writer.model.named_parameters()}
    it.step()
    moved = {name for name, p in it.writer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= {it.names[p] for p in it.optimized}
    assert not any("embed_tokens" in name or ".norm" in name for name in moved)


def test_divergence_holds_the_model_back(lower: None) -> None:
    far, near = (trainer(kl=kl, steps=6, group=32, tokens=1) for kl in (0.0, 20.0))
    records = [(far.step(), near.step()) for _ in range(6)]
    assert records[0][1]["kl"] == pytest.approx(0, abs=1e-6) and records[-1][1]["kl"] > 0
    assert weight_of_lower(near) < weight_of_lower(far) - 0.05


def test_a_run_is_repeated_and_resumed_bit_for_bit(lower: None, tmp_path: Path) -> None:
    whole, again = trainer(), trainer()
    train(whole, tmp_path / "whole", every=10)
    for _ in range(2):
        again.step()
    again.save(RunDirectory(tmp_path / "cut"))
    resumed = trainer()
    train(resumed, tmp_path / "cut", every=1)
    expected = dict(whole.writer.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in resumed.writer.model.named_parameters())
    left, right = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    strip = [{k: v for k, v in record.items() if k != "seconds"} for record in left[2:]]
    assert strip == [{k: v for k, v in record.items() if k != "seconds"} for record in right]
    opened = open_model(tmp_path / "cut").model  # a checkpoint is a model of every command
    assert all(torch.equal(p, expected[name]) for name, p in opened.named_parameters())


def test_all_problems_come_before_one_comes_again() -> None:
    it = trainer(prompts=5, group=2, kl=0.0, steps=2, tokens=1)
    drawn, write = [], Writer.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Writer, "write", lambda self, prompts, **how: drawn.append(prompts) or write(self, prompts, **how)
        )
        it.step(), it.step()
    assert sorted(drawn[0]) == sorted(drawn[1]) == sorted(p.prompt for p in PROBLEMS) and drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"group": 1}, "group must be >= 2"), ({"temperature": 0}, "temperature must be > 0"), ({"kl": -1}, "kl must")],
)
def test_bad_settings(options: dict, message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        trainer(**options)
