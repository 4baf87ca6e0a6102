"""The trainer: gradients, loop counts, non-finite steps, compilation."""

import copy
import dataclasses
import json
import math
import shutil
from collections import Counter
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from torch import nn

from ouroboros.api import build
from ouroboros.errors import OuroborosError
from ouroboros.model.loss import logits_loss
from ouroboros.optim import build_optimizers, untrained_parameters
from ouroboros.recipes import RECIPES, SIZES, recipe
from ouroboros.train.trainer import NotFinite, Trainer

NO_CLIP = {"optim.clip_norm": 0.0}


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def equal(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("matrix_optimizer", ["muon", "adamw"])
def test_every_parameter_of_every_recipe_is_in_one_group(name, size, matrix_optimizer):
    """Counted here anew; on the meta device no memory is used."""
    chosen = recipe(name, size)
    with torch.device("meta"):
        model = build(chosen)
    optimizers = build_optimizers(model, dataclasses.replace(chosen.optim, matrix_optimizer=matrix_optimizer))
    members = Counter(id(p) for o in optimizers for group in o.param_groups for p in group["params"])
    left_out = {name for name, _ in model.named_parameters() for p in chosen.optim.left_out if fnmatch(name, p)}
    untrained = {id(model.get_parameter(name)) for name in {*untrained_parameters(model)} | left_out}
    assert members == Counter(id(p) for p in model.parameters() if id(p) not in untrained)
    decayed = {id(p) for o in optimizers for g in o.param_groups if g["weight_decay"] for p in g["params"]}
    # Maps to a few numbers and filters are two-dimensional, but no matrices to orthogonalise or decay.
    tables = ("embed_tokens", "embed.weight", "positions", "ngram.table", "registers")
    others = (*tables, "residual.gate.proj", "value_proj", "compressor", "model.readout")
    others += ("entrance", "skips", "controller.steps", "loops.0.embedding", "loops.0.norm")
    matrices = (id(p) for n, p in model.named_parameters() if p.ndim == 2 and not any(part in n for part in others))
    assert decayed == (set(members) if chosen.optim.decay == "all" else set(matrices) - untrained)


def test_the_loss_is_the_mean_next_token_cross_entropy(make, trainer_of):
    trainer = trainer_of(make())
    windows = torch.from_numpy(trainer.loader.next_batch())
    with torch.no_grad():
        logits = trainer.model(windows[:, :-1]).logits
        picked = logits.log_softmax(-1).gather(-1, windows[:, 1:, None])
        parts = windows[:, :-1], windows[:, 1:]
        objective, loss = trainer.losses(*parts)
        assert objective.item() == loss.item() and loss.item() == pytest.approx(-picked.mean().item(), rel=1e-6)
        assert trainer.losses(*parts, loops=4)[1].item() != loss.item()


def test_accumulation_gives_the_gradient_of_the_whole_batch(make, trainer_of):
    found = {}
    for parts in (1, 2, 4):
        trainer = trainer_of(make(**{"train.accumulation": parts}))
        trainer.model.zero_grad()
        loss = trainer._gradients(trainer.loader.next_batch(), None, None)
        found[parts] = loss, {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    for parts in (2, 4):
        assert found[parts][0] == pytest.approx(found[1][0], rel=1e-6)
        for name, gradient in found[1][1].items():
            torch.testing.assert_close(found[parts][1][name], gradient, rtol=1e-4, atol=1e-7)


SMOOTHED = {"train.label_smoothing": 0.1}


def test_smoothing_is_that_of_torch_and_the_loss_is_reported_without_it(make, trainer_of):
    trainer = trainer_of(make(**SMOOTHED, **{"train.accumulation": 2}))
    batch = torch.from_numpy(trainer.loader.next_batch())
    loss = trainer._gradients(batch.numpy(), None, None)
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    logits, targets = trainer.model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)
    expected = nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    expected.backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)
    objective, plain = trainer.losses(batch[:, :-1], batch[:, 1:])
    torch.testing.assert_close(objective, expected, rtol=1e-6, atol=0)
    assert plain.item() == pytest.approx(loss, rel=1e-6) and not plain.requires_grad
    assert objective.item() != pytest.approx(plain.item(), rel=1e-5)


def test_smoothing_trains_towards_another_goal_from_the_same_first_loss(make, trainer_of):
    fast = {"optim.lr": 0.02, "optim.schedule": "constant"}
    plain, smoothed = trainer_of(make(**fast)), trainer_of(make(**fast, **{"train.label_smoothing": 0.5}))
    losses = [(plain.step().loss, smoothed.step().loss) for _ in range(12)]
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-6) and losses[-1][1] > losses[-1][0] + 0.1


def test_corrupted_inputs_have_untouched_targets(make, trainer_of, monkeypatch):
    trainer = trainer_of(make(**{"train.corruption": 0.3, "train.accumulation": 2}))
    batch = copy.deepcopy(trainer.loader).next_batch()
    seen = []
    losses = trainer.losses
    monkeypatch.setattr(trainer, "losses", lambda *given: seen.append(given[:2]) or losses(*given))
    trainer.step()
    inputs, targets = (torch.cat(part).numpy() for part in zip(*seen, strict=True))
    assert np.array_equal(targets, batch[:, 1:])
    changed = (inputs != batch[:, :-1]).mean()
    assert 0.15 < changed < 0.45
    again = trainer.corruption(torch.from_numpy(batch[:, :-1]), 0, 0).numpy()
    assert np.array_equal(inputs, again)  # rows of the batch, whatever the micro-batches
    other = trainer.corruption(torch.from_numpy(batch[:, :-1]), 1, 0).numpy()
    assert not np.array_equal(inputs, other)


def test_corruption_draws_by_step_so_steps_may_be_taken_by_another_trainer(make, trainer_of):
    changes = {"train.corruption": 0.3, "train.accumulation": 2}
    whole, first, second = (trainer_of(make(**changes)) for _ in range(3))
    expected = [whole.step().loss for _ in range(4)]
    found = [first.step().loss for _ in range(2)]
    second.load_state(first.state())
    with torch.no_grad():
        for mine, other in zip(second.model.parameters(), first.model.parameters(), strict=True):
            mine.copy_(other)
    for mine, other in zip(second.optimizers, first.optimizers, strict=True):
        mine.load_state_dict(other.state_dict())
    assert found + [second.step().loss for _ in range(2)] == expected
    assert trainer_of(make(**changes, **{"train.seed": 1})).step().loss != expected[0]
    assert trainer_of(make()).step().loss != expected[0]


def test_a_step_reports_the_norm_before_clipping_and_counts(make, trainer_of):
    trainer = trainer_of(make(**{"optim.clip_norm": 1e-3, "train.steps": 10}))
    expected = trainer_of(make(**{"optim.clip_norm": 0.0, "train.steps": 10})).step().grad_norm
    result = trainer.step()
    assert result.grad_norm == expected > 0.01 and math.isfinite(result.loss) and not result.skipped
    assert result.loops is None and result.telemetry is None
    assert result.lr_factor == 1.0  # progress 0.05: after warm-up
    assert (trainer.counters.step, trainer.counters.tokens, trainer.step_tokens) == (1, 128, 128)
    assert trainer.loader.state_dict()["samples"] == 4 and trainer.counters.seconds > 0
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    expected = trainer.data.count("train", "bytes") / trainer.data.count("train", "tokens")
    assert trainer.bytes_per_token == pytest.approx(expected) and 0.9 < expected < 1


def test_what_is_left_out_stays_and_does_not_throttle_the_clip(make, trainer_of):
    """The published program added up gradients of parameters that nothing updates; here they have none."""
    pattern = {"optim.left_out": ["*mlp*"], "optim.clip_norm": 0.01, "optim.schedule": "constant"}
    trainer = trainer_of(make(**pattern))
    names = [name for name, _ in trainer.model.named_parameters() if "mlp" in name]
    assert names and set(trainer.optimized) == {p for n, p in trainer.model.named_parameters() if n not in names}
    before = weights(trainer)
    trainer._gradients(copy.deepcopy(trainer.loader).next_batch(), None, None)
    norms = {n: p.grad.norm().item() for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert not norms.keys() & set(names)
    trainer.model.zero_grad(set_to_none=True)
    result = trainer.step()
    assert result.grad_norm == pytest.approx(math.hypot(*norms.values()), rel=1e-4)
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.step()
    after = weights(trainer)
    assert {name for name in after if torch.equal(before[name], after[name])} == set(names)


def test_the_momentum_of_muon_follows_the_step(make, trainer_of):
    trainer = trainer_of(make(**{"optim.muon_momentum_warmup": 4, "optim.muon_momentum_start": 0.55}))
    found = []
    for _ in range(6):
        trainer.step()
        found.append(trainer.optimizers[0].param_groups[0]["momentum"])
    assert found == pytest.approx([0.55, 0.65, 0.75, 0.85, 0.95, 0.95])


def test_the_learning_rate_is_that_of_the_middle_of_the_step(make, trainer_of):
    spec = {"train.steps": 4, "optim.warmup_fraction": 0.25, "optim.decay_fraction": 0.5}
    trainer = trainer_of(make(**spec))
    assert [trainer.step().lr_factor for _ in range(4)] == pytest.approx([0.5, 1.0, 0.75, 0.25])
    assert trainer.done


ONE_CYCLE = {
    "optim.schedule": "one_cycle",
    "optim.warmup_fraction": 0.4,
    "optim.start_lr": 0.04,
    "optim.final_lr": 0.1,
    "optim.momentum_cycle": [0.85, 0.95],
}


@pytest.mark.parametrize("budget", [{"train.steps": 10}, {"train.steps": None, "train.tokens": 1280}])
def test_one_cycle_has_its_ends_at_the_first_and_last_step(budget, make, trainer_of):
    trainer = trainer_of(make(**ONE_CYCLE, **budget))
    found = [trainer.step() for _ in range(10)]
    assert trainer.done
    factors, betas = [r.lr_factor for r in found], [r.beta for r in found]
    assert [factors[0], factors[3], factors[9]] == pytest.approx([0.04, 1.0, 0.1])
    assert [betas[0], betas[3], betas[9]] == pytest.approx([0.95, 0.85, 0.95])
    used = {group["betas"] for o in trainer.optimizers for group in o.param_groups if "betas" in group}
    assert used == {(betas[9], 0.95)}


def test_one_cycle_of_a_timed_run_counts_its_steps_at_the_pace_so_far(make, trainer_of):
    trainer = trainer_of(make(**ONE_CYCLE, **{"train.steps": None, "train.minutes": 1.0}))
    assert trainer.step().lr_factor == pytest.approx(0.04)
    trainer.counters.step, trainer.counters.seconds = 3, 18.0  # ten steps at 6 s each
    assert trainer.step().lr_factor == pytest.approx(1.0)
    trainer.counters.step, trainer.counters.seconds = 9, 54.0
    assert trainer.step().lr_factor == pytest.approx(0.1)


def test_telemetry_is_taken_on_request_alone(make, trainer_of):
    trainer = trainer_of(make(**{"train.accumulation": 2}))
    assert [len((trainer.step(telemetry=True).telemetry or {})["loops"]), trainer.step().telemetry] == [2, None]
    plain = trainer_of(make(**{"model.layout": "2"}))
    assert plain.step(telemetry=True).telemetry is None


def test_the_curriculum_switches_loops_on_late(make, trainer_of):
    trainer = trainer_of(make(**{"train.steps": 6, "train.loops.curriculum": [[0.0, 1], [0.5, 2], [0.9, 3]]}))
    assert [trainer.step().loops for _ in range(6)] == [1, 1, 1, 2, 2, 3]


def test_random_loop_counts_are_used(make, trainer_of, monkeypatch):
    trainer = trainer_of(make(**{"train.steps": 9, "train.loops.sampling": "uniform", "train.loops.max": 5}))
    used = []
    losses = trainer.losses
    monkeypatch.setattr(trainer, "losses", lambda *given: used.append(given[2]) or losses(*given))
    taken = [trainer.step().loops for _ in range(9)]
    assert used == taken and len(set(taken)) > 2
    assert taken == [trainer.sampler.loops(step, 0.0) for step in range(9)]


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({}, True),
        ({"model.loop": [{"kind": "inject"}]}, False),
        ({"model.layout": "(1)x2 1"}, False),
        ({"train.loops.backprop": 2}, False),
        ({"train.loops.backprop": 2, "train.loops.sampling": "uniform", "train.loops.max": 3}, True),
        ({"train.loops.curriculum": [[0.0, 1]]}, False),
        ({"train.loops.backprop": 2, "train.loops.curriculum": [[0.0, 1], [0.5, 3]]}, True),
        ({"model.layout": "3"}, False),
    ],
)
def test_truncated_backpropagation_needs_a_way_to_the_prelude(change, refused, make, trainer_of):
    recipe = make(**{"train.loops.backprop": 1, **change})
    if refused:
        with pytest.raises(
            OuroborosError, match=r"train\.loops\.backprop=\d leaves the blocks before the loop .*loop\.inject"
        ):
            trainer_of(recipe)
        return
    trainer = trainer_of(recipe)
    trainer._gradients(trainer.loader.next_batch(), trainer.sampler.loops(0, 0.0), None)
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())


def test_activation_checkpointing_changes_no_gradient(make, trainer_of):
    found = []
    for on in (False, True):
        trainer = trainer_of(make(**{"train.activation_checkpointing": on, "model.block.dropout": 0.1}))
        torch.manual_seed(5)
        trainer._gradients(trainer.loader.next_batch(), None, None)
        found.append({n: p.grad for n, p in trainer.model.named_parameters()})
        assert trainer.model.model.gradient_checkpointing is on
    assert equal(*found)


def test_a_batch_must_divide(make, trainer_of):
    with pytest.raises(OuroborosError, match=r"batch_size \(4\) must be a multiple of train\.accumulation \(3\)"):
        trainer_of(make(**{"train.accumulation": 3}))


def poison(trainer: Trainer, steps: set[int], monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Make the loss non-finite at these steps."""
    losses = trainer.losses

    def poisoned(*arguments):
        by = factor if trainer.counters.step in steps else 1.0
        return tuple(value * by for value in losses(*arguments))

    monkeypatch.setattr(trainer, "losses", poisoned)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_non_finite_step_is_skipped_counted_and_logged(factor, make, trainer_of, monkeypatch, caplog):
    trainer = trainer_of(make(**{"train.ema_decay": 0.9, **NO_CLIP}))
    trainer.step()
    optimizer_before = copy.deepcopy([o.state_dict()["state"] for o in trainer.optimizers])
    before = weights(trainer)
    poison(trainer, {1}, monkeypatch, factor)
    result = trainer.step()
    assert result.skipped and not math.isfinite(result.loss)
    assert equal(before, weights(trainer)) and trainer.average.updates == 1
    for then, now in zip(optimizer_before, [o.state_dict()["state"] for o in trainer.optimizers], strict=True):
        assert all(torch.equal(then[i][k], now[i][k]) for i in then for k in then[i])
    assert (trainer.counters.skipped, trainer.counters.bad_in_a_row, trainer.counters.step) == (1, 1, 2)
    assert "step 2: non-finite loss or gradient, step skipped (1 so far)" in caplog.text
    assert not trainer.step().skipped  # the next batch is another one
    assert not equal(before, weights(trainer)) and trainer.counters.bad_in_a_row == 0
    assert trainer.counters.skipped == 1 and trainer.loader.state_dict()["samples"] == 12


def test_a_non_finite_gradient_under_a_finite_loss_is_skipped_too(make, trainer_of, monkeypatch):
    trainer = trainer_of(make())
    before = weights(trainer)
    trainer.model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    result = trainer.step()
    assert result.skipped and math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
    assert equal(before, weights(trainer))


def test_a_poisoned_weight_stops_training_with_its_batch(make, trainer_of):
    trainer = trainer_of(make(**{"train.max_bad_steps": 3}))
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = math.nan
    expected = copy.deepcopy(trainer.loader)
    trainer.step(), trainer.step()
    with pytest.raises(NotFinite, match=r"3 steps in a row .* lower optim\.lr") as caught:
        trainer.step()
    batches = [expected.next_batch() for _ in range(3)]
    assert np.array_equal(caught.value.batch, batches[-1]) and trainer.counters.skipped == 3


def test_state_is_restored_and_checked(make, trainer_of, text):
    trainer = trainer_of(make(**{"train.ema_decay": 0.5}))
    trainer.step()
    state = trainer.state()
    assert state["ema_updates"] == 1 and state["dtype"] == "float32" and state["counters"]["step"] == 1
    following = trainer.loader.next_batch()
    other = trainer_of(make(**{"train.ema_decay": 0.5}))
    other.load_state(state)
    assert other.counters.step == 1 and np.array_equal(other.loader.next_batch(), following)
    with pytest.raises(OuroborosError, match="next training batch is not the recorded one"):
        other.load_state({**state, "next_batch": "0" * 64})


@pytest.mark.parametrize(
    ("budget", "progress"), [({"train.steps": 4}, 0.25), ({"train.steps": None, "train.tokens": 256}, 0.5)]
)
def test_progress_and_expected_length(budget, progress, make, trainer_of):
    trainer = trainer_of(make(**budget))
    trainer.step()
    assert trainer.progress() == progress and trainer.progress(0.5) == progress * 1.5 and not trainer.done
    tokens = 128 / progress
    assert trainer.expected_seconds == pytest.approx(tokens * trainer.flops_per_token / 0.33e9)
    timed = trainer_of(make(**{"train.steps": None, "train.minutes": 2.0}))
    assert timed.expected_seconds == 120.0


def test_a_failing_compiler_is_reported_and_done_without(make, trainer_of, monkeypatch, caplog):
    plain = trainer_of(make())
    expected = plain.step().loss
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")

    def failing(*_, **__):
        from torch._inductor.exc import InductorError

        raise InductorError(RuntimeError("no such header"), None)

    def compile_to_failure(block: nn.Module, **_: object) -> None:
        block._compiled_call_impl = failing

    monkeypatch.setattr(nn.Module, "compile", compile_to_failure)
    trainer = trainer_of(make(**{"train.compile": "on"}))
    assert trainer.compiled == "compile: per block"
    assert trainer.step().loss == expected
    assert trainer.compiled == "compile: off (the compiler failed)"
    assert "compile: failed" in caplog.text and "no such header" in caplog.text and "runs uncompiled" in caplog.text
    caplog.clear()
    trainer.step()
    assert caplog.text == ""


def test_warming_up_leaves_no_trace(make, trainer_of, monkeypatch):
    """Compilation is set-up: no step, no data, no gradient, and no other random numbers in what follows."""
    plain, warmed = (trainer_of(make(**{"model.block.dropout": 0.1})) for _ in range(2))
    monkeypatch.setattr(warmed, "compiled", "compile: per block")
    before = weights(warmed)
    assert warmed.warm_up() > 0 and equal(before, weights(warmed))
    assert (warmed.counters.step, warmed.counters.seconds, warmed.loader.state_dict()["samples"]) == (0, 0.0, 0)
    assert all(parameter.grad is None for parameter in warmed.model.parameters())
    assert warmed.step().loss == plain.step().loss


def test_other_failures_of_a_compiled_model_are_not_hidden(make, trainer_of, monkeypatch):
    trainer = trainer_of(make(**{"train.compile": "off"}))
    trainer.compiled = "compile: per block"

    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(trainer, "losses", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.step()


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
@pytest.mark.timeout(300)
# torch's own tracing looks at gradients of intermediate results.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_run_computes_the_same_and_is_evaluated_uncompiled(make, trainer_of):
    """And smoothed losses compiled are smoothed losses: one start of the compiler serves both."""
    changes = {"train.steps": 4, "model.layout": "(1)x2", "train.compile": "off"}
    plain = trainer_of(make(**changes))
    compiled = trainer_of(make(**{**changes, "train.compile": "on"}))
    assert compiled.compiled == "compile: per block"
    compiled.warm_up()
    for _ in range(3):
        assert compiled.step().loss == pytest.approx(plain.step().loss, rel=1e-3)
    assert compiled.compiled == "compile: per block"  # no silent way back
    with compiled.evaluation_weights() as model:
        assert [block._compiled_call_impl for block in model.model.decoder.layers] == [None]
    assert all(block._compiled_call_impl is not None for block in compiled.model.model.decoder.layers)
    targets, found = torch.arange(10).view(2, 5), []
    for of in (logits_loss, torch.compile(logits_loss, dynamic=False)):
        logits = torch.linspace(-3, 3, 2 * 5 * 11).sin().view(2, 5, 11).requires_grad_()
        smoothed, loss = of(logits, targets, 0.1)
        smoothed.backward()
        found.append((smoothed.detach(), loss, logits.grad))
    torch.testing.assert_close(*found)


@pytest.fixture
def questions(tmp_path):
    """Options of training on the answers of short questions."""
    path = tmp_path / "qa.jsonl"
    rows = [{"question": f"What is {n} and {n + 1}?", "answer": f"It is {2 * n + 1}."} for n in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data.sources": [f"{path}@qa"], "data.loss": "answers"}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_on_answers_is_the_mean_over_their_tokens(make, trainer_of, questions, smoothing):
    trainer = trainer_of(make(**questions, **{"train.label_smoothing": smoothing}))
    windows = trainer.loader.next_batch()
    learned = torch.from_numpy(windows[:, 1:] >= 0)
    assert 0.2 < learned.float().mean() < 0.6
    loss = trainer._gradients(windows, None, None)
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    ids = torch.from_numpy(np.where(windows < 0, ~windows, windows))
    logits, targets = trainer.model(ids[:, :-1]).logits, ids[:, 1:]
    nn.functional.cross_entropy(logits[learned], targets[learned], label_smoothing=smoothing).backward()
    assert loss == pytest.approx(nn.functional.cross_entropy(logits[learned], targets[learned]).item(), rel=1e-6)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_answers_of_unequal_micro_batches_weigh_by_their_tokens(make, trainer_of, questions):
    found = {}
    for parts in (1, 2, 4):
        trainer = trainer_of(make(**questions, **{"train.accumulation": parts}))
        batch = trainer.loader.next_batch()
        batch[1] = np.where(batch[1] < 0, batch[1], ~batch[1])  # a window without an answer
        loss = trainer._gradients(batch, None, None)
        found[parts] = loss, {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    for parts in (2, 4):
        assert found[parts][0] == pytest.approx(found[1][0], rel=1e-6)
        for name, gradient in found[1][1].items():
            torch.testing.assert_close(found[parts][1][name], gradient, rtol=1e-4, atol=1e-7)
    hidden = np.where(batch < 0, batch, ~batch)
    trainer.model.zero_grad()
    assert trainer._gradients(hidden, None, None) == 0.0
    assert all(not p.grad.any() for p in trainer.model.parameters() if p.grad is not None)


def test_loss_on_answers_trains_them(make, trainer_of, questions):
    fast = {"optim.lr": 0.02, "optim.schedule": "constant"}
    trainer = trainer_of(make(**questions, **fast))
    losses = [trainer.step().loss for _ in range(12)]
    assert losses[-1] < losses[0] - 0.5
