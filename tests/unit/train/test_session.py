"""Sessions: what is saved, kept, measured and exported, and what happens when a disk fails."""

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

from ouroboros.api import load_model, model_directory
from ouroboros.errors import OuroborosError
from ouroboros.train import session
from ouroboros.train.checkpoint import load, verify
from ouroboros.train.log import read_metrics
from ouroboros.train.loop import Trainer
from ouroboros.train.run import resume, start


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_last_checkpoints_and_the_best_are_kept(make, tmp_path, monkeypatch):
    scores = iter([5.0, 3.0, 4.0, 4.5, 4.2])
    monkeypatch.setattr(
        session, "validate", lambda trainer, sample: type("S", (), {"bits_per_byte": next(scores), "stderr": None})
    )
    recipe = make(**{"train.steps": 5, "train.eval_every": 1, "train.checkpoint_every": 1, "train.keep_last": 2})
    result = start(recipe, tmp_path / "run")
    assert (result.counters.best_step, result.counters.best_bits_per_byte) == (2, 3.0)
    assert checkpoints(tmp_path / "run") == ["step-00000002", "step-00000004", "step-00000005"]
    assert all(verify(path) == [] for path in (tmp_path / "run" / "checkpoints").iterdir())


def test_a_score_that_is_no_number_is_never_the_best(make, tmp_path, monkeypatch):
    scores = iter([float("nan"), 3.0, float("inf")])
    monkeypatch.setattr(
        session, "validate", lambda trainer, sample: type("S", (), {"bits_per_byte": next(scores), "stderr": None})
    )
    result = start(make(**{"train.steps": 3, "train.eval_every": 1, "train.checkpoint_every": 1}), tmp_path / "run")
    assert result.finished and result.counters.best_step == 2


def test_checkpoints_are_self_contained_models(make, stop_at, tmp_path):
    run = tmp_path / "run"
    start(make(**{"train.ema_decay": 0.5}), run, progress=stop_at(2, signal.SIGTERM))
    newest = run / "checkpoints" / "step-00000002"
    assert model_directory(run) == newest
    saved = load(newest)
    assert saved.documents["recipe.json"]["name"] == "small" and saved.documents["state.json"]["counters"]["step"] == 2
    assert {path.name for path in newest.iterdir()} >= {"ema.safetensors", "tokenizer.json", "config.json"}
    names = load_file(newest / "model.safetensors").keys()
    assert set(names) == {name for name, _ in load_model(newest).named_parameters()}


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
    loss = Trainer.loss

    def poisoned(self, *arguments):
        return loss(self, *arguments) * (torch.nan if self.counters.step == 3 else 1.0)

    monkeypatch.setattr(Trainer, "loss", poisoned)
    result = start(make(**{"train.log_every": 50}), tmp_path / "run")
    assert result.finished and result.counters.skipped == 1
    logged = [(r["step"], r["loss"], r["skipped"]) for r in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert logged[1:] == [(4, None, 1)]


def test_persistent_nan_stops_the_run_and_keeps_the_batch(make, tmp_path, monkeypatch, sha):
    recipe = make(**{"train.max_bad_steps": 2, "train.checkpoint_every": 2})
    start(recipe, tmp_path / "whole")
    loss = Trainer.loss
    batches = []

    def poisoned(self, windows, *arguments):
        batches.append(windows.numpy())
        return loss(self, windows, *arguments) * (torch.nan if self.counters.step >= 2 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "loss", poisoned)
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
    assert model_directory(run) == run / "checkpoints" / "step-00000006"
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
