"""Training of matrices by low-rank additions."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from ouroboros.config import to_dict
from ouroboros.config.parts.loop import FlowSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.loss import logits_loss
from ouroboros.model.reading import load_model
from ouroboros.optim import parameter_roles
from ouroboros.train.log import Progress
from ouroboros.train.run import resume, start
from ouroboros.train.rundir import RunDirectory

RANK = {"train.low_rank.rank": 2, "train.low_rank.alpha": 6.0}
MLP = {**RANK, "train.low_rank.where": ["*mlp*"]}


class Crash(Exception):
    """Stands for a process that ends without a word."""


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def sums(low_rank):
    return {name: low_rank.starts[name] + 3.0 * B @ A for name, (A, B) in low_rank.factors.items()}


def test_it_begins_as_the_model_itself_and_moves_factors_and_all_that_is_not_named(make, trainer_of):
    plain, trainer = trainer_of(make()), trainer_of(make(**MLP))
    before, factors = weights(trainer.model), {name: f.detach().clone() for f, name in trainer.low_rank.names.items()}
    assert all(torch.equal(p, before[name]) for name, p in plain.model.named_parameters())
    assert plain.step().loss == trainer.step().loss
    trainer.step()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before) and len(trainer.low_rank.factors) == 3 * 3
    assert all(not torch.equal(factor, factors[name]) for factor, name in trainer.low_rank.names.items())
    for name, value in sums(trainer.low_rank).items():
        torch.testing.assert_close(trainer.model.get_parameter(name).detach(), value.detach())
        assert torch.equal(trainer.low_rank.starts[name], before[name])
        change = trainer.model.get_parameter(name).detach() - before[name]
        assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2


def test_every_matrix_is_meant_where_none_is_named(make, trainer_of):
    trainer = trainer_of(make(**RANK))
    roles = parameter_roles(trainer.model)
    assert set(trainer.low_rank.factors) == {name for name, role in roles.items() if role == "matrix"}
    held = {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    factors = set(trainer.low_rank.names)
    assert held == factors | {p for name, p in trainer.model.named_parameters() if roles[name] != "matrix"}
    assert set(trainer.optimized) == held


def test_gradients_are_those_of_the_factors(make, trainer_of):
    """As automatic differentiation finds them through the sum, over micro-batches and visits."""
    trainer = trainer_of(make(**MLP, **{"train.accumulation": 2}))
    with torch.no_grad():
        for _, B in trainer.low_rank.factors.values():
            B.normal_()
    trainer.low_rank.merge()
    batch = copy.deepcopy(trainer.loader).next_batch()
    trainer._gradients(batch, None, None)
    trainer.low_rank.take_gradients()
    assert all(trainer.model.get_parameter(name).grad is None for name in trainer.low_rank.factors)
    windows = torch.from_numpy(batch)
    values = {**dict(trainer.model.named_parameters()), **sums(trainer.low_rank)}
    given = {"input_ids": windows[:, :-1], "use_cache": False}
    found = torch.func.functional_call(trainer.model, values, (), given, tie_weights=True)
    loss, _ = logits_loss(found.logits, windows[:, 1:], 0.0)
    factors = list(trainer.low_rank.names)
    for factor, want in zip(factors, torch.autograd.grad(loss, factors), strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(factor.grad, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"train.precision": "bf16"},
        {"train.activation_checkpointing": True},
        {"train.quantize.mode": "round", "train.quantize.bits": 4},
        {"optim.matrix_optimizer": "adamw"},
    ],
    ids=str,
)
def test_beside_other_options_the_weights_stay_the_sums(options, make, trainer_of):
    trainer = trainer_of(make(**MLP, **options))
    before = weights(trainer.model)
    for _ in range(3):
        assert not trainer.step().skipped
    for name, value in sums(trainer.low_rank).items():
        weight = trainer.model.get_parameter(name).detach()
        assert weight.dtype == torch.float32 and not torch.equal(weight, before[name])
        torch.testing.assert_close(weight, value.detach())


def test_a_compiled_run_learns_the_same(make, trainer_of):
    trainers = [trainer_of(make(**MLP, **{"train.compile": how})) for how in ("off", "on")]
    if not trainers[1].compiled.endswith("per block"):
        pytest.skip("no compiler here")
    losses = [[trainer.step().loss for _ in range(4)] for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][3] != losses[0][0]


def test_matrices_left_out_are_trained_by_their_factors_alone(make, trainer_of):
    options = {**MLP, "optim.left_out": ["*_proj.weight", "*embed_tokens.weight"]}
    trainer = trainer_of(make(**options))
    before = weights(trainer.model)
    trainer.step()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("mlp" in name or "norm" in name for name in moved)
    assert set(trainer.low_rank.factors) <= moved


def test_a_step_of_fewer_loops_leaves_the_matrices_of_later_loops_alone(make, trainer_of):
    trainer = trainer_of(make(**RANK, **{"model.loop": [to_dict(FlowSpec(rank=4))], "train.loops.max": 2}))
    trainer._gradients(copy.deepcopy(trainer.loader).next_batch(), 1, None)
    trainer.low_rank.take_gradients()
    without = [name for name, (A, B) in trainer.low_rank.factors.items() if A.grad is None and B.grad is None]
    assert len(without) == 1 and without[0].endswith("flow.up.1.weight")


def test_a_bad_step_changes_nothing(make, trainer_of, monkeypatch):
    trainer = trainer_of(make(**RANK))
    trainer.step()
    before = weights(trainer.model) | trainer.low_rank.state_tensors()
    before = {name: tensor.clone() for name, tensor in before.items()}
    monkeypatch.setattr("ouroboros.train.trainer.clip_and_norm", lambda parameters, limit: float("nan"))
    assert trainer.step().skipped
    after = weights(trainer.model) | trainer.low_rank.state_tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_run_resumes_bit_for_bit_and_exports_the_sum(everything, stop_at, sha, tmp_path):
    recipe = everything(**MLP, **{"train.checkpoint_every": 2})
    start(recipe, tmp_path / "whole")
    run = tmp_path / "parts"
    with pytest.raises(Crash):
        start(recipe, run, progress=stop_at(5, Crash))
    checkpoint = RunDirectory(run).newest().path
    saved = load_file(checkpoint / "low_rank.safetensors")
    opened = dict(load_model(checkpoint).named_parameters())  # a checkpoint is a plain model
    names = [name.removesuffix(".start") for name in saved if name.endswith(".start")]
    assert len(saved) == 3 * len(names) > 0
    for name in names:
        merged = saved[f"{name}.start"] + 3.0 * saved[f"{name}.B"] @ saved[f"{name}.A"]
        torch.testing.assert_close(opened[name].detach(), merged)
    resume(run)
    assert sha(run) == sha(tmp_path / "whole")
    plain = everything(**{"train.steps": 1})
    start(plain, tmp_path / "plain")
    exported = [load_file(path / "model.safetensors").keys() for path in (run, tmp_path / "plain")]
    assert exported[0] == exported[1]


def test_what_is_exported_computes_what_was_trained(make, trainer_of, tmp_path):
    recipe = make(**RANK)
    start(recipe, tmp_path / "run")
    trainer = trainer_of(recipe)
    for _ in range(6):
        trainer.step()
    ids = torch.arange(40)[None]
    with torch.no_grad(), trainer.evaluation_weights() as model:
        want = model.eval()(ids).logits
        assert torch.equal(load_model(tmp_path / "run")(ids).logits, want)


def test_the_average_is_one_of_the_sums(make, trainer_of):
    trainer = trainer_of(make(**RANK, **{"train.average_every": 1, "train.average_start": 0.0}))
    seen = []
    for _ in range(3):
        trainer.step()
        seen.append(weights(trainer.model))
    with trainer.evaluation_weights() as model:
        for name in trainer.low_rank.factors:
            mean = torch.stack([one[name] for one in seen]).mean(0)
            torch.testing.assert_close(model.get_parameter(name).detach(), mean)


def test_the_opening_line_counts_what_is_trained(make, tmp_path):
    said = []

    class Heard(Progress):
        def message(self, text):
            said.append(text)

    start(make(**MLP, **{"optim.left_out": ["*embed_tokens.weight"]}), tmp_path / "run", progress=Heard(quiet=True))
    numbers = 3 * 3 * 16 * 24
    line = f"{numbers + 257 * 16:,} of them never trained) and {3 * 3 * 2 * (16 + 24):,} of low-rank factors"
    assert any(line in text for text in said), said


def test_what_cannot_be_is_refused(make, trainer_of, tmp_path):
    with pytest.raises(OuroborosError, match=r"train\.low_rank\.where: '\*nrom\*' is the name of no such parameter"):
        trainer_of(make(**RANK, **{"train.low_rank.where": ["*nrom*"]}))
    start(make(**{"train.checkpoint_every": 3}), tmp_path / "run")
    with pytest.raises(OuroborosError, match=r"has no file low_rank.safetensors|other parameters|parameter groups"):
        resume(tmp_path / "run", recipe=make(**RANK, **{"train.steps": 9}), allow_changes=True)
