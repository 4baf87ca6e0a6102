"""Sessions: what is saved, kept, measured and exported, and what happens when a disk fails."""

import dataclasses
import errno
import json
import logging
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ouroboros.api import open_model
from ouroboros.config import Recipe, from_dict
from ouroboros.errors import OuroborosError
from ouroboros.model.reading import load_model
from ouroboros.nn.ffn import FeedForward
from ouroboros.train import session
from ouroboros.train.checkpoint import load, verify
from ouroboros.train.log import Progress, read_metrics
from ouroboros.train.run import resume, start
from ouroboros.train.rundir import RunDirectory
from ouroboros.train.trainer import Trainer


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_last_checkpoints_and_the_best_are_kept(make, tmp_path, scores):
    scores(5.0, 3.0, 4.0, 4.5, 4.2)
    recipe = make(**{"train.steps": 5, "train.eval_every": 1, "train.checkpoint_every": 1, "train.keep_last": 2})
    result = start(recipe, tmp_path / "run")
    assert (result.counters.best_step, result.counters.best_bits_per_byte) == (2, 3.0)
    assert checkpoints(tmp_path / "run") == ["step-00000002", "step-00000004", "step-00000005"]
    assert all(verify(path) == [] for path in (tmp_path / "run" / "checkpoints").iterdir())


def test_a_score_that_is_no_number_is_never_the_best(make, tmp_path, scores):
    scores(float("nan"), 3.0, float("inf"))
    result = start(make(**{"train.steps": 3, "train.eval_every": 1, "train.checkpoint_every": 1}), tmp_path / "run")
    assert result.finished and result.counters.best_step == 2


def test_checkpoints_are_self_contained_models(make, stop_at, tmp_path):
    run = tmp_path / "run"
    start(make(**{"train.ema_decay": 0.5}), run, progress=stop_at(2, signal.SIGTERM))
    newest = run / "checkpoints" / "step-00000002"
    assert open_model(run).directory == newest
    saved = load(newest)
    assert saved.documents["recipe.json"]["name"] == "small" and saved.documents["state.json"]["counters"]["step"] == 2
    assert {path.name for path in newest.iterdir()} >= {"ema.safetensors", "tokenizer.json", "config.json"}
    names = load_file(newest / "model.safetensors").keys()
    assert set(names) == {name for name, _ in load_model(newest).named_parameters()}


@pytest.fixture
def frozen_parts(monkeypatch):
    """Feed-forward networks with a matrix that is untrained by specification and a table of the returned value."""
    real, table = FeedForward.__init__, torch.arange(4.0)

    def build(self, *arguments, **options):
        real(self, *arguments, **options)
        self.untrained = frozenset({"up_proj.weight"})
        self.up_proj.weight.requires_grad_(False)
        self.register_buffer("table", table.clone())

    monkeypatch.setattr(FeedForward, "__init__", build)
    return table


def test_untrained_parameters_and_tables_go_through_a_whole_run(frozen_parts, everything, stop_at, sha, tmp_path):
    """Averaged weights, telemetry, validation, checkpoints, resume and export."""
    recipe, run = everything(**{"train.activation_checkpointing": True}), tmp_path / "run"
    start(recipe, tmp_path / "whole")
    start(recipe, run, progress=stop_at(5, signal.SIGTERM))
    newest = run / "checkpoints" / "step-00000005"
    saved, averaged, moments = (load_file(newest / f"{name}.safetensors") for name in ("model", "ema", "optimizer"))
    assert [sum("up_proj" in name for name in part) for part in (saved, averaged, moments)] == [3, 0, 0]
    early = load_model(newest).state_dict()
    frozen_parts.zero_()  # what counts from here on is what was saved
    resume(run)
    assert sha(run) == sha(tmp_path / "whole")
    for tensors in (early, load_model(run).state_dict()):
        tables = [value for name, value in tensors.items() if name.endswith("mlp.table")]
        assert len(tables) == 3 and all(torch.equal(table, torch.arange(4.0)) for table in tables)
        assert all(torch.equal(tensors[name], saved[name]) for name in saved if "up_proj" in name)


def test_the_mean_of_the_last_weights_is_what_is_exported(make, tmp_path, caplog):
    every = {"train.steps": 8, "train.checkpoint_every": 1, "train.keep_last": 9}
    run = tmp_path / "run"
    start(make(**every, **{"train.average_every": 2, "train.average_start": 0.4}), run)
    steps = [load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for step in (4, 6, 8)]
    exported = load_file(run / "model.safetensors")
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, torch.stack([step[name] for step in steps]).mean(0))
    assert not any(torch.equal(exported["model.norm.weight"], step["model.norm.weight"]) for step in steps)
    start(make(**every, **{"train.average_every": 5}), tmp_path / "none")
    assert "ended before any weights were averaged" in caplog.text
    last = tmp_path / "none" / "checkpoints" / "step-00000008" / "model.safetensors"
    assert (tmp_path / "none" / "model.safetensors").read_bytes() == last.read_bytes()


def test_metrics_are_written_as_asked(make, tmp_path):
    every = {"train.steps": 7, "train.log_every": 3, "train.eval_every": 4, "train.telemetry_every": 5}
    start(make(**every), tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = {kind: [r["step"] for r in records if r["kind"] == kind] for kind in ("train", "valid", "telemetry")}
    assert steps == {"train": [1, 3, 6], "valid": [4, 7], "telemetry": [1, 6]}
    train = [r for r in records if r["kind"] == "train"]
    assert [r["tokens"] for r in train] == [128, 384, 768] and train[1]["seconds"] > train[0]["seconds"]
    assert all(r["tokens_per_second"] > 0 and r["grad_norm"] > 0 and r["bits_per_byte"] > 3 for r in train)
    telemetry = next(r for r in records if r["kind"] == "telemetry")["loops"]
    assert [loop["loop"] for loop in telemetry] == [0, 1] and telemetry[0]["cosine"] is None
    assert set(telemetry[1]) == {"segment", "loop", "state_norm", "update_ratio", "cosine", "grad_norm"}


def test_without_a_validation_split_validation_is_off(make, tmp_path, caplog):
    start(make(**{"train.eval_every": 1, "data.valid_fraction": 0.0}), tmp_path / "run")
    assert "no validation split; validation is off" in caplog.text
    assert not [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "valid"]


def test_skipped_steps_are_logged_whatever_the_interval(make, tmp_path, monkeypatch):
    losses = Trainer.losses

    def poisoned(self, *arguments):
        return tuple(x * (torch.nan if self.counters.step == 3 else 1.0) for x in losses(self, *arguments))

    monkeypatch.setattr(Trainer, "losses", poisoned)
    result = start(make(**{"train.log_every": 50}), tmp_path / "run")
    assert result.finished and result.counters.skipped == 1
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert [(r["step"], r["loss"], r["skipped"]) for r in records[1:]] == [(4, None, 1)]


def test_persistent_nan_stops_the_run_and_keeps_the_batch(make, tmp_path, monkeypatch, sha):
    recipe = make(**{"train.max_bad_steps": 2, "train.checkpoint_every": 2})
    start(recipe, tmp_path / "whole")
    losses = Trainer.losses
    batches = []

    def poisoned(self, inputs, targets, *arguments):
        batches.append(np.concatenate([inputs.numpy()[:, :1], targets.numpy()], axis=1))
        return tuple(
            x * (torch.nan if self.counters.step >= 2 else 1.0) for x in losses(self, inputs, targets, *arguments)
        )

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "losses", poisoned)
        with pytest.raises(OuroborosError, match=r"2 steps in a row .*; the batch is in .*bad-batch\.npy$"):
            start(recipe, tmp_path / "run")
    kept = np.load(tmp_path / "run" / "bad-batch.npy", allow_pickle=False)
    assert kept.shape == (4, 33) and np.array_equal(kept, batches[-1])
    assert checkpoints(tmp_path / "run") == ["step-00000002"]
    assert resume(tmp_path / "run").finished and sha(tmp_path / "run") == sha(tmp_path / "whole")


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_while_exporting_loses_nothing(make, sha, tmp_path, monkeypatch):
    start(make(), tmp_path / "whole")
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("ouroboros.model.modeling.OuroborosForCausalLM.save_pretrained", full)
        with pytest.raises(
            OuroborosError, match=r"cannot write the model to .*No space left on device; its checkpoint"
        ):
            start(make(), run)
    assert not [path.name for path in run.iterdir() if "tmp" in path.name] and not (run / "config.json").exists()
    assert open_model(run).directory == run / "checkpoints" / "step-00000006"
    assert resume(run).finished and sha(run) == sha(tmp_path / "whole")


def test_a_full_disk_while_saving_keeps_the_earlier_checkpoint(make, sha, tmp_path, monkeypatch):
    recipe = make(**{"train.checkpoint_every": 2})
    start(recipe, tmp_path / "whole")
    run = tmp_path / "run"
    save = session.pack_optimizers

    def fails_at_four(optimizers, names):
        if (run / "checkpoints" / "step-00000002").exists():
            monkeypatch.setattr("ouroboros.train.checkpoint._write_tensors", full)
        return save(optimizers, names)

    with monkeypatch.context() as patch:
        patch.setattr(session, "pack_optimizers", fails_at_four)
        with pytest.raises(OuroborosError, match=r"cannot save checkpoint .*step-00000004: No space left on device"):
            start(recipe, run)
        monkeypatch.undo()
    assert checkpoints(run) == ["step-00000002"]
    assert resume(run).finished and sha(run) == sha(tmp_path / "whole")


def test_export_appears_whole_with_the_weights_last(make, tmp_path, monkeypatch):
    moved = []
    replace = Path.replace

    def recording(self: Path, target: Path) -> Path:
        if self.parent.name == ".export.tmp":
            moved.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", recording)
    start(make(**{"train.steps": 1}), tmp_path / "run")
    assert moved[-1] == "model.safetensors" and set(moved) >= {"config.json", "tokenizer.json"}


def test_a_signal_at_the_last_step_finishes_the_run(make, stop_at, tmp_path):
    assert start(make(), tmp_path / "run", progress=stop_at(6, signal.SIGTERM)).finished


def test_handlers_are_given_back(make, stop_at, tmp_path, caplog):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with caplog.at_level(logging.INFO):
        start(make(), tmp_path / "run", progress=stop_at(1, signal.SIGTERM))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json").read_text())
    assert state["counters"]["step"] == 1


EACH = {"train.steps": 8, "train.eval_every": 1}


def told(run: Path, kind: str) -> list[dict]:
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind]


class Told(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def test_a_target_reached_ends_the_run_with_a_checkpoint_and_a_model(make, tmp_path, scores, sha):
    """2.2 + 2 * 0.1 is above 2.3, 2.0 + 2 * 0.1 is not; the target is said at the start, the reason at the end."""
    run, shown = tmp_path / "run", Told()
    scores(1.5, 1.1, 1.0, stderr=0.1)
    recipe = make(**EACH, **{"train.target_loss": 2.3})
    result = start(recipe, run, progress=shown)
    assert result.finished and (result.reason, result.counters.step, result.exported_step) == ("target_loss", 3, 3)
    sentence = (
        "validation 2.0000 nats per token (1.0000 bits per byte) is at or below the target 2.3,"
        " two standard errors (0.2000) included"
    )
    assert result.message == sentence and shown.lines[-1] == f"stopped early: {sentence}"
    # One token of this text is one byte.
    assert shown.lines[0].endswith("; stops at 2.3 nats per token (3.3182 bits per byte) of validation or below")
    assert told(run, "early_stop") == [
        {"kind": "early_stop", "step": 3, "reason": "target_loss", "message": sentence},
    ]
    assert "step-00000003" in checkpoints(run) and load_model(run).schedule.loops == 2
    with pytest.raises(
        OuroborosError, match=r"the run is complete \(3 steps\), stopped early: .* --train.target-loss None"
    ):
        resume(run)
    scores(*[1.0] * 5)
    saved = from_dict(Recipe, load(run / "checkpoints" / "step-00000003").documents["recipe.json"])
    again = dataclasses.replace(saved, train=dataclasses.replace(saved.train, target_loss=None))
    assert resume(run, recipe=again, allow_changes=True).counters.step == 8
    scores(*[3.0] * 8)
    start(make(**EACH), tmp_path / "whole")
    assert sha(run) == sha(tmp_path / "whole")  # the stop left no trace


def test_a_target_needs_a_standard_error(make, tmp_path, scores, caplog):
    scores(*[0.1] * 8, stderr=None)
    result = start(make(**EACH, **{"train.target_loss": 2.3}), tmp_path / "run")
    assert result.reason is None and result.counters.step == 8
    assert caplog.text.count("train.target_loss cannot be confirmed") == 1 and "raise train.eval_bytes" in caplog.text


def test_a_model_that_was_not_written_before_a_kill_is_written_by_resume(make, tmp_path, scores, monkeypatch):
    run = tmp_path / "run"
    scores(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(session, "export", full)
        with pytest.raises(OSError):
            start(make(**EACH, **{"train.target_loss": 2.3}), run)
    result = resume(run)
    assert result.finished and (result.reason, result.counters.step) == ("target_loss", 1)
    assert (run / "model.safetensors").is_file()


@pytest.mark.parametrize(("patience", "steps", "reason"), [(2, 4, "patience"), (9, 6, None)])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_with_patience_the_best_weights_are_exported(patience, steps, reason, decay, make, tmp_path, scores):
    """Also where the budget ended the run, and without checkpoints on the way."""
    run, shown = tmp_path / "run", Told()
    scores(3.0, 2.0, 2.5, 2.6, 2.7, 2.8)
    changes = {"train.steps": 6, "train.patience": patience, "train.ema_decay": decay, "optim.lr": 0.01}
    result = start(make(**{**EACH, **changes}), run, progress=shown)
    assert (result.counters.step, result.reason, result.exported_step) == (steps, reason, 2)
    exported = load_file(run / "model.safetensors")
    file = "ema.safetensors" if decay else "model.safetensors"
    best, last = (load_file(run / "checkpoints" / f"step-0000000{step}" / file) for step in (2, steps))
    names = [name for name in exported if name in best]
    assert names and all(torch.equal(exported[name], best[name]) for name in names)
    assert not all(torch.equal(exported[name], last[name]) for name in names)
    assert "exporting the weights of step 2, the best validation (2.0000 bits/byte)" in shown.lines
    if reason:
        words = "2 validations in a row without a new best, which is 2.0000 bits per byte at step 2"
        assert result.message == words and "stops after 2 validations without a new best" in shown.lines[0]
        with pytest.raises(OuroborosError, match=r"stopped early: 2 validations .* --train.patience 0 --allow-changes"):
            resume(run)


def test_a_best_checkpoint_that_is_gone_is_said_and_the_last_weights_are_exported(make, tmp_path, scores, caplog):
    run = tmp_path / "run"
    scores(2.0, 2.5, 2.6)

    class Removes(Told):
        def update(self, status):
            if status.step == 3:
                (run / "checkpoints" / "step-00000001" / "model.safetensors").unlink()

    result = start(make(**EACH, **{"train.patience": 2}), run, progress=Removes())
    assert result.exported_step == 3 and "the last ones are exported" in caplog.text


def test_a_resumed_run_counts_validations_as_if_it_had_not_stopped(make, tmp_path, scores, stop_at, sha):
    sequence = [3.0, 2.9, OSError("gone"), 2.95, 3.0, RuntimeError("odd"), 2.99]
    recipe = make(**EACH, **{"train.patience": 3})
    scores(*sequence)
    whole = start(recipe, tmp_path / "whole")
    scores(*sequence)
    for step in (4, 6):
        (start if step == 4 else lambda _, run, progress: resume(run, progress=progress))(
            recipe, tmp_path / "run", progress=stop_at(step, signal.SIGTERM)
        )
    parts = resume(tmp_path / "run")
    assert (whole.reason, whole.counters.step, whole.counters.failed_validations) == ("patience", 7, 2)
    assert dataclasses.replace(parts.counters, seconds=0.0) == dataclasses.replace(whole.counters, seconds=0.0)
    assert sha(tmp_path / "run") == sha(tmp_path / "whole")


@pytest.mark.parametrize(
    "error", [RuntimeError("out of\nmemory"), MemoryError(), OuroborosError("odd"), OSError("gone")]
)
def test_a_failed_validation_is_reported_and_training_goes_on(error, make, tmp_path, scores, caplog, sha):
    scores(*[3.0] * 4)
    changes = {"train.steps": 4, "train.eval_every": 1, "train.max_bad_validations": 2, "model.block.dropout": 0.1}
    start(make(**changes), tmp_path / "whole")
    scores(error, 3.0, error, 2.0)
    result = start(make(**changes), tmp_path / "run")
    assert result.finished and (result.counters.failed_validations, result.counters.best_step) == (2, 4)
    assert result.counters.failed_validations_in_a_row == 0 and sha(tmp_path / "run") == sha(tmp_path / "whole")
    name = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    assert f"step 1: validation failed ({name}): 1 in a row, 2 end the run" in caplog.text
    failed = told(tmp_path / "run", "valid_failed")
    assert [(r["step"], r["error"], r["in_a_row"]) for r in failed] == [(1, name, 1), (3, name, 1)]
    assert [r["nats_per_token"] for r in told(tmp_path / "run", "valid")] == [6.0, 4.0]


def test_validation_that_keeps_failing_saves_and_stops(make, tmp_path, scores, sha):
    run = tmp_path / "run"
    recipe = make(**EACH, **{"train.max_bad_validations": 2})
    scores(3.0, RuntimeError("one"), OSError("the disk is gone"))
    message = r"2 validations in a row failed, the last one with OSError: the disk is gone; step 3 is saved: `ouroboros"
    with pytest.raises(OuroborosError, match=message):
        start(recipe, run)
    assert "step-00000003" in checkpoints(run) and not (run / "model.safetensors").exists()
    scores(*[3.0] * 8)
    assert resume(run).counters.step == 8
    scores(*[3.0] * 8)
    start(recipe, tmp_path / "whole")
    assert sha(run) == sha(tmp_path / "whole")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TypeError("a defect")])
def test_what_is_no_failure_of_validation_is_not_swallowed(error, make, tmp_path, scores):
    scores(error)
    with pytest.raises(type(error)):
        start(make(**EACH), tmp_path / "run")


def test_the_time_validation_takes_may_end_a_timed_run(make, tmp_path, monkeypatch):
    """Its last step is then saved all the same."""
    real = session.Validator.run

    def slow(self) -> bool:
        best = real(self)
        self.trainer.counters.seconds += 60.0
        return best

    monkeypatch.setattr(session.Validator, "run", slow)
    result = start(make(**{"train.steps": None, "train.minutes": 1.0, "train.eval_every": 2}), tmp_path / "run")
    assert result.counters.step == 2 and checkpoints(tmp_path / "run") == ["step-00000002"]


def streamed(path: Path, broken: int | None = None) -> dict:
    """Options of a streamed run over records, one of them broken if asked for."""
    rows = [json.dumps({"text": f"Record {n} of the stream says {n * n}, and no more."}) for n in range(150)]
    if broken is not None:
        rows[broken] = '{"text": "cut off he'
    path.write_text("\n".join(rows) + "\n")
    return {"data.sources": [str(path)], "data.stream": True, "data.max_bytes": 3000, "train.steps": 60}


def test_a_broken_record_loses_nothing_that_was_trained(make, sha, tmp_path, monkeypatch):
    monkeypatch.setattr("ouroboros.data.stream.sleep", lambda seconds: pytest.fail("waited"))
    options = streamed(tmp_path / "r.jsonl", broken=120)
    start(make(**options, **{"data.skip_bad_records": True}), tmp_path / "whole")
    run = tmp_path / "run"
    with pytest.raises(OuroborosError, match=r"r\.jsonl:121: not JSON") as caught:
        start(make(**options), run)
    hint = "--data.skip-bad-records --allow-changes` goes on from there"
    (kept,) = checkpoints(run)
    assert int(kept.removeprefix("step-")) > 10 and hint in str(caught.value)
    assert f"step {int(kept.removeprefix('step-'))} is saved: `ouroboros resume {run} {hint}" in str(caught.value)
    with pytest.raises(OuroborosError, match=r"r\.jsonl:121: not JSON"):
        resume(run)
    recipe = RunDirectory(run).read_recipe()
    lenient = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, skip_bad_records=True))
    with pytest.raises(OuroborosError, match=r"data\.skip_bad_records: False -> True"):
        resume(run, recipe=lenient)
    assert resume(run, recipe=lenient, allow_changes=True).finished
    assert sha(run) == sha(tmp_path / "whole")


def test_a_mended_record_lets_a_streamed_run_go_on(make, sha, tmp_path):
    path = tmp_path / "r.jsonl"
    start(make(**streamed(path)), tmp_path / "whole")
    with pytest.raises(OuroborosError, match="not JSON"):
        start(make(**streamed(path, broken=120)), tmp_path / "run")
    streamed(path)
    assert resume(tmp_path / "run").finished and sha(tmp_path / "run") == sha(tmp_path / "whole")
