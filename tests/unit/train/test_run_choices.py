"""What a run chose, or changed, is recorded and kept on resume."""

import json
import signal

import torch

from ouroboros.train.log import read_metrics
from ouroboros.train.run import resume, start
from ouroboros.train.threads import Threads


def test_what_was_chosen_is_recorded_and_kept_on_resume(make, stop_at, tmp_path, monkeypatch, caplog):
    """Precisions and threads decide how sums are rounded: a resumed run takes those it began with."""
    recipe = make(**{"optim.muon_precision": "auto", "train.precision": "auto", "train.checkpoint_every": 2})

    def measured(dtype, threads):
        monkeypatch.setattr("ouroboros.train.trainer.choose_dtype", lambda spec, device: dtype)
        monkeypatch.setattr("ouroboros.train.trainer.choose_muon_dtype", lambda model, spec, factors: dtype)
        monkeypatch.setattr("ouroboros.train.trainer.choose_threads", lambda step: threads)

    def recorded():
        newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
        state = json.loads((newest / "state.json").read_text())
        return {key: state[key] for key in ("dtype", "muon_dtype", "threads", "compile")}

    measured(torch.bfloat16, 3)
    start(recipe, tmp_path / "run", progress=stop_at(3, signal.SIGTERM))
    chosen = {"dtype": "bfloat16", "muon_dtype": "bfloat16", "threads": 3, "compile": "off"}
    assert recorded() == chosen
    measured(torch.float32, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        resume(tmp_path / "run", progress=stop_at(4, signal.SIGTERM))
        assert recorded() == chosen and caplog.text == ""
        torch.set_num_threads(2)
        resume(tmp_path / "run")
        assert recorded() == chosen | {"threads": 2} and "the run had 3 threads, here are 2" in caplog.text
    finally:
        torch.set_num_threads(before)


def test_a_change_of_threads_is_recorded_with_its_step_and_kept_on_resume(make, stop_at, tmp_path, monkeypatch):
    """Other programs came at step 2: what was computed with how many threads can be told afterwards."""
    monkeypatch.setattr("ouroboros.train.trainer.choose_threads", lambda step: 2)
    monkeypatch.setattr(Threads, "observe", lambda self, *_: self._try(1) if self.now > 1 and steps() == 2 else None)

    def steps():
        return len([r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"])

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        recipe = make(**{"train.checkpoint_every": 3, "train.log_every": 1})
        start(recipe, tmp_path / "run", progress=stop_at(3, signal.SIGTERM))
        assert torch.get_num_threads() == 2
        records = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert [r for r in records if r["kind"] == "threads"] == [{"kind": "threads", "step": 2, "threads": 1}]
        newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
        state = json.loads((newest / "state.json").read_text())
        assert (state["threads"], state["threads_now"]) == (2, 1)
        used = []
        monkeypatch.setattr(Threads, "observe", lambda self, *_: used.append((self.chosen, self.now)))
        resume(tmp_path / "run")
        assert set(used) == {(2, 1)}
    finally:
        torch.set_num_threads(before)


def test_threads_are_measured_by_a_pass_of_the_trainer(make, trainer_of, monkeypatch):
    """Where there is one thread, as in these tests, nothing is measured."""
    measured = []
    monkeypatch.setattr("ouroboros.train.trainer.choose_threads", lambda step: measured.append(step()) or 1)
    trainer = trainer_of(make())
    assert len(measured) == 1 and all(p.grad is None for p in trainer.model.parameters())
