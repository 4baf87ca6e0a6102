"""The stability guard: seeded failures are found and placed, healthy runs are left alone, and runs go back exactly."""

import dataclasses
import json
import math
import signal
import weakref
from typing import Any

import pytest
import torch

from ouroboros.config import GuardedTraining, Recipe
from ouroboros.errors import OuroborosError
from ouroboros.eval.switches import narrow
from ouroboros.nn.loop import LoopGain
from ouroboros.recipes import RECIPES, recipe
from ouroboros.schedule import parse
from ouroboros.train.guard import BACKWARD, GRADIENT, GROWS, LOSS, QUIET, STATE, UPDATE, Guard
from ouroboros.train.log import Progress, read_metrics
from ouroboros.train.run import resume, start
from ouroboros.train.trainer import Trainer

FAILS_AT = 12
LOOPED = {"model.layout": "1 (1)x4 1", "model.loop": [{"kind": "embedding"}, {"kind": "gain"}], "train.steps": 40}


def part(trainer: Trainer, kind: str):
    return trainer.model.model.decoder.loops[0][kind]


def alarms(trainer: Trainer, fail, *, at: int = FAILS_AT, steps: int = 10):
    """What is found in ``steps`` steps after ``fail`` at step ``at``, before which nothing is."""
    assert not [result for _ in range(at) if (result := trainer.step()).alarm is not None]
    fail(trainer)
    return [found for _ in range(steps) if (found := trainer.step().alarm) is not None]


def hundredfold(trainer: Trainer) -> None:
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] *= 100


def shipped(name: str, given: Recipe, **train: Any) -> Recipe:
    """A recipe of the library with a few thousand weights, and the data of ``given``."""
    tiny = recipe(name, "tiny")
    muon = {"muon_precision": "fp32"} if tiny.optim.matrix_optimizer == "muon" else {}
    optim = dataclasses.replace(tiny.optim, decay_steps=None, **muon)
    kept = {"loops": tiny.train.loops, "label_smoothing": tiny.train.label_smoothing, "batch_size": 2, **train}
    return dataclasses.replace(
        given, model=narrow(tiny.model), optim=optim, train=dataclasses.replace(given.train, **kept)
    )


@pytest.mark.parametrize("at", [0, FAILS_AT])
@pytest.mark.parametrize("name", ["loop", "rhrm"])
def test_a_learning_rate_that_is_a_hundred_times_too_high(name, at, make, trainer_of):
    found = alarms(trainer_of(shipped(name, make(), steps=40)), hundredfold, at=at)
    assert found and found[0].new and found[0].step <= at + 10 and "--optim.lr" in found[0].message
    assert found[0].value > 1.2 * found[0].usual


def test_the_loop_whose_gain_blows_the_state_up_is_named(make, trainer_of):
    def blow_up(trainer):
        with torch.no_grad():
            part(trainer, "gain").weight[2] = 50.0

    first, *_ = alarms(trainer_of(make(**LOOPED)), blow_up)
    assert (first.place, first.quantity, first.step) == ("loop 2 of segment 1", STATE, FAILS_AT + 1)
    assert first.value > 5 * first.usual


def test_a_state_that_grows_with_a_power_of_the_loops_is_named_once_from_the_start(make, trainer_of, monkeypatch):
    monkeypatch.setattr(LoopGain, "leave", lambda self, x, z, carried, loop: 3.0 * z)
    (found,) = alarms(trainer_of(make(**LOOPED)), lambda trainer: None, at=0, steps=3)
    assert (found.place, found.quantity, found.step) == ("loop 2 of segment 1", GROWS, 1) and found.value > 2


def test_a_weight_of_one_loop_that_is_no_number(make, trainer_of):
    def break_(trainer):
        with torch.no_grad():
            part(trainer, "embedding").weight[3, 5] = math.nan

    found = alarms(trainer_of(make(**LOOPED)), break_, steps=5)
    assert [(one.place, one.quantity, one.new) for one in found] == [
        ("loop 3 of segment 1", STATE, number == 0) for number in range(5)
    ]


def test_a_gradient_that_one_loop_multiplies(make, trainer_of, monkeypatch):
    leave = LoopGain.leave

    def steep(self, x, z, carried, loop):
        z = leave(self, x, z, carried, loop)
        if loop == 2 and getattr(self, "steep", False):
            z = z * 1000.0 - (z * 999.0).detach()
        return z

    monkeypatch.setattr(LoopGain, "leave", steep)
    first, *_ = alarms(trainer_of(make(**LOOPED)), lambda trainer: setattr(part(trainer, "gain"), "steep", True))
    assert (first.place, first.quantity, first.step) == ("loop 2 of segment 1", BACKWARD, FAILS_AT + 1)


@pytest.mark.parametrize("name", [name for name in sorted(RECIPES) if recipe(name, "tiny").model.schedule.is_looped])
def test_healthy_runs_raise_no_alarm(name, make, trainer_of):
    """More than twenty in all."""
    for seed in range(3):
        trainer = trainer_of(shipped(name, make(), steps=12, seed=seed))
        assert not [result.alarm.message for _ in range(12) if (result := trainer.step()).alarm is not None]


@pytest.mark.parametrize("parts", [{}, {"model.registers": 3, "train.accumulation": 2}])
def test_what_is_measured_follows_the_formulas(parts, make, trainer_of):
    trainer = trainer_of(make(**parts))
    decoder, seen = trainer.model.model.decoder, []
    hooks = [
        decoder.layers[1].register_forward_hook(lambda module, given, made: seen.append((given[0], made))),
        decoder.layers[1].register_forward_pre_hook(lambda module, given: given[0].retain_grad()),
    ]
    with trainer.guard.watching(trainer.model, None):
        trainer._gradients(trainer.loader.next_batch(), None, None)
    found = trainer.guard.measured(trainer.workers)
    assert [hook.remove() for hook in hooks] == [None, None]
    places = ["block 0", "loop 0 of segment 1", "loop 1 of segment 1", "block 2"]
    assert [place for quantity, place in found if quantity == STATE] == places
    assert [place for quantity, place in found if quantity == BACKWARD][:2] == places[:-3:-1]
    for loop in range(2):
        visits = seen[loop::2]  # of each micro-batch
        norms = [(after - before).norm() for before, after in visits]
        expected = {
            STATE: max(after.square().mean().sqrt() for _, after in visits),
            UPDATE: max(norms) / max(before.norm() for before, _ in visits),
            BACKWARD: max(before.grad.norm() for before, _ in visits),
        }
        for quantity, value in expected.items():
            assert found[quantity, f"loop {loop} of segment 1"] == pytest.approx(value.item(), rel=1e-5), quantity


def test_random_loops_and_truncated_gradients_have_places_of_their_own(make, trainer_of):
    changes = {"train.loops.sampling": "uniform", "train.loops.max": 5, "train.loops.backprop": 1}
    trainer = trainer_of(make(**changes, **{"model.loop": [{"kind": "inject"}]}))
    for loops in (1, 5):
        with trainer.guard.watching(trainer.model, loops):
            trainer._gradients(trainer.loader.next_batch(), loops, None)
        found = trainer.guard.measured(trainer.workers)
        assert sum("loop" in place for quantity, place in found if quantity == STATE) == loops
        assert "block 2" in {place for quantity, place in found if quantity == BACKWARD}


def judged(losses, gradients=None, guard=None):
    guard = guard or Guard(GuardedTraining(), parse("1"))
    gradients = [1.0] * len(losses) if gradients is None else gradients
    return [guard.judge(n, *pair, {}) for n, pair in enumerate(zip(losses, gradients, strict=True), start=1)]


def test_a_loss_that_jumps_or_drifts_away_is_unusual_and_noise_is_not():
    noisy = [3.0 + 0.5 * (-1) ** n for n in range(12)]
    assert not any(judged(noisy)) and judged([*noisy, 5.5])[-1].quantity == LOSS
    slow = judged([2.0] * 12 + [2.0 + 0.2 * n for n in range(30)])
    assert any(slow) and not any(slow[:18])


def test_a_gradient_norm_is_judged_after_some_steps():
    assert not any(judged([2.0] * 5, [1e-9, 1.0, 30.0, 2.0, 1.0]))
    alarm = judged([2.0] * 7, [1.0] * 6 + [50.0])[-1]
    assert alarm.quantity == GRADIENT and alarm.usual == pytest.approx(1.0)


def test_one_message_for_an_episode_and_a_lasting_change_becomes_usual():
    found = judged([2.0] * 10 + [9.0] * 40)
    assert [alarm.step for alarm in found if alarm is not None and alarm.new] == [11]
    assert not any(found[11 + QUIET :])


def test_a_spike_does_not_hide_what_follows():
    found = judged([2.0] * 10 + [9.0] + [2.0] * 5 + [9.0] * 6)
    assert [alarm.step for alarm in found if alarm is not None and alarm.new] == [11, 19]


def test_the_pass_is_not_kept_in_memory(make, trainer_of):
    trainer, outputs = trainer_of(make()), []
    trainer.blocks[2].register_forward_hook(lambda module, given, made: outputs.append(weakref.ref(made)))
    trainer.step()
    assert outputs and all(output() is None for output in outputs)


def test_what_the_guard_remembers_survives_json():
    losses = [2.0 + 0.3 * math.sin(n) for n in range(14)]
    first, second = (Guard(GuardedTraining(), parse("1")) for _ in range(2))
    judged(losses, guard=first)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.state == first.state and second.state.lowest is not None


@pytest.mark.parametrize("parts", [{}, {"train.accumulation": 2, "model.registers": 2}])
def test_off_and_watching_change_no_bit(parts, make, tmp_path, sha):
    for action in ("off", "warn"):
        start(make(**{"train.guard.action": action, **parts}), tmp_path / action)
    assert sha(tmp_path / "off") == sha(tmp_path / "warn")


@pytest.fixture
def failing(monkeypatch):
    """Losses that are much too high from step 14 on, three times."""
    losses, failures = Trainer.losses, {13, 14, 15}

    def high(self, *arguments, **options):
        factor = 10.0 if self.counters.step in failures else 1.0
        return tuple(x * factor for x in losses(self, *arguments, **options))

    monkeypatch.setattr(Trainer, "losses", high)
    return failures


GOES_BACK = {"train.guard.action": "rollback", "train.steps": 22, "train.checkpoint_every": 3, "train.log_every": 1}


def records(run, kind):
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind]


def test_a_rollback_takes_the_last_good_weights_and_a_lower_rate(failing, make, tmp_path):
    class Spy(Progress):
        said: list[str] = []

        def message(self, text):
            self.said.append(text)

    spy = Spy(quiet=True)
    result = start(make(**GOES_BACK, **{"train.guard.lr_factor": 0.25}), tmp_path / "run", progress=spy)
    assert result.finished and result.counters.step == 22
    (alarm,), (back,) = records(tmp_path / "run", "guard"), records(tmp_path / "run", "rollback")
    assert (alarm["step"], alarm["quantity"]) == (14, LOSS) and alarm["message"] in "".join(spy.said)
    # Of the checkpoints of steps 3, 6, 9 and 12, ten usual steps have followed the first alone.
    assert (back["step"], back["to_step"], back["lr_factor"], back["goes_on"]) == (16, 3, 0.25, True)
    assert any("rollback 1 of 3 to the weights of step 3" in text for text in spy.said)
    rates = {r["step"]: r["lr"] for r in records(tmp_path / "run", "train")}
    assert rates[17] < 0.3 * rates[16]


def test_a_run_resumes_exactly_before_and_behind_a_rollback(failing, make, stop_at, sha, tmp_path):
    recipe = make(**GOES_BACK, **{"train.keep_last": 1, "train.ema_decay": 0.9, "model.block.dropout": 0.1})
    start(recipe, tmp_path / "whole")
    assert [r["step"] for r in records(tmp_path / "whole", "rollback")] == [16]
    for at in (15, 17):
        run = tmp_path / str(at)
        start(recipe, run, progress=stop_at(at, signal.SIGTERM))
        resume(run)
        assert sha(run) == sha(tmp_path / "whole")
        assert len(records(run, "rollback")) == 1


def test_the_guard_stops_a_run_with_the_good_weights(failing, make, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(OuroborosError) as stopped:
        start(make(**{**GOES_BACK, "train.guard.action": "stop"}), run)
    message = str(stopped.value)
    assert "\n" not in message and "step 16: training becomes unstable" in message
    assert "of step 3 again; step 16 is saved" in message and "--optim.lr 0.0015 --allow-changes" in message
    good, last = (run / "checkpoints" / f"step-000000{step:02d}" / "model.safetensors" for step in (3, 16))
    assert good.read_bytes() == last.read_bytes()
    failing.clear()
    assert resume(run).finished


def test_rollbacks_are_bounded_and_go_back_to_the_start_where_nothing_is_proved(failing, make, tmp_path):
    failing |= {3, 4, 5, 8, 9, 10}
    with pytest.raises(OuroborosError, match="of step 0 again"):
        start(make(**{**GOES_BACK, "train.guard.rollbacks": 2}), tmp_path / "run")
    back = records(tmp_path / "run", "rollback")
    assert [(one["step"], one["goes_on"], one["lr_factor"]) for one in back] == [
        (6, True, 0.5),
        (11, True, 0.25),
        (16, False, 0.25),
    ]
    assert {one["to_step"] for one in back} == {0}


@pytest.mark.parametrize(("option", "value"), [("lr_factor", 0.0), ("lr_factor", 1.5), ("rollbacks", 0)])
def test_bad_options_are_refused(option, value, make):
    with pytest.raises(OuroborosError, match=f"train.guard.{option} must be"):
        make(**{f"train.guard.{option}": value})
