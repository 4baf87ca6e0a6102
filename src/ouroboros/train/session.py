"""One session of training: steps, validation, checkpoints, export; :mod:`ouroboros.train.run` starts sessions."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ouroboros.config import to_dict
from ouroboros.errors import OuroborosError, check
from ouroboros.train import checkpoint as checkpoints
from ouroboros.train.checkpoint import Checkpoint, retain, system_errors
from ouroboros.train.log import MetricsLog, Progress
from ouroboros.train.loop import Counters, NotFinite, StepResult, Trainer
from ouroboros.train.meter import Meter
from ouroboros.train.state import pack_optimizers, unpack_optimizers
from ouroboros.train.stop import StopControl
from ouroboros.train.validate import validate, validation_sample

logger = logging.getLogger(__name__)

RECIPE = "recipe.json"
WEIGHTS = "model.safetensors"
"""The last file of a finished model to appear in the run directory."""


@dataclass(frozen=True)
class RunResult:
    """How a session of training ended."""

    run: Path
    counters: Counters
    finished: bool
    """The budget is spent and the model is exported; False after an interruption."""
    reason: str | None
    """The signal that stopped the session."""
    loss: float | None
    is_main: bool = True
    """Whether this is the process that reports, of those that trained together."""


def train(trainer: Trainer, out: Path, progress: Progress, *, resumed_at: int | None) -> RunResult:
    """Train until the budget is spent or a signal asks to stop; checkpoint, validate and log on the way."""
    main = trainer.workers.is_main
    spec = trainer.recipe.train
    sample = validation_sample(trainer.data, spec.eval_bytes) if spec.eval_every else []
    if spec.eval_every and not sample:
        logger.warning("the data has no validation split; validation is off")
    loss = None
    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(MetricsLog(out / "metrics.jsonl", resume_step=resumed_at)) if main else None
        shown = stack.enter_context(progress) if main else Progress(quiet=True)
        control = stack.enter_context(StopControl(shown.message))
        shown.message(_opening(trainer, resumed_at))
        meter = Meter(trainer)
        seconds = trainer.warm_up()
        if seconds > 1:
            shown.message(f"compiled in {seconds:.0f} s")
        while not trainer.done:
            wanted = spec.telemetry_every and trainer.counters.step % spec.telemetry_every == 0
            try:
                result = trainer.step(telemetry=bool(wanted))
            except NotFinite as error:
                kept = out / ("bad-batch.npy" if main else f"bad-batch-{trainer.workers.rank}.npy")
                np.save(kept, error.batch, allow_pickle=False)
                raise OuroborosError(f"{error}; the batch is in {kept}") from None
            loss = result.loss
            if metrics is not None:
                _report(meter, result, metrics, shown)
            step, last = trainer.counters.step, trainer.done
            best = False
            if sample and (step % spec.eval_every == 0 or last):
                best = _validate(trainer, sample, metrics, shown)
            stop = trainer.workers.any(control.requested)
            if stop or last or (spec.checkpoint_every and (best or step % spec.checkpoint_every == 0)):
                save_checkpoint(trainer, out)
            if stop and not last:
                return RunResult(out, trainer.counters, False, control.reason or "another process", loss, main)
        if main:
            export(trainer, out)
        trainer.workers.barrier()
    return RunResult(out, trainer.counters, True, None, loss, main)


def _opening(trainer: Trainer, resumed_at: int | None) -> str:
    """One line that says what is about to run and what was chosen."""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    begun = "" if resumed_at is None else f"resumed at step {resumed_at}; "
    return (
        f"{trainer.recipe.name} {trainer.model.schedule.notation}: {begun}{parameters:,} parameters,"
        f" {trainer.step_tokens:,} tokens/step, {str(trainer.dtype).removeprefix('torch.')}, {trainer.compiled},"
        f" {trainer.workers.world_size} process(es)"
    )


def _report(meter: Meter, result: StepResult, metrics: MetricsLog, shown: Progress) -> None:
    """Show progress, and write the metrics of every ``log_every`` th step."""
    step = meter.trainer.counters.step
    shown.update(meter.status(result))
    if result.telemetry is not None:
        metrics.write({"kind": "telemetry", "step": step, "loops": result.telemetry})
    if step % meter.trainer.recipe.train.log_every == 0 or result.skipped or step == 1:
        metrics.write(meter.record(result))


def _validate(trainer: Trainer, sample: list[bytes], metrics: MetricsLog | None, shown: Progress) -> bool:
    """Score the sample on the main process; true, on all of them, if it is the best so far."""
    begun = time.perf_counter()
    c = trainer.counters
    bits = float("inf")
    if trainer.workers.is_main:
        found = validate(trainer, sample)
        bits = found.bits_per_byte
        assert metrics is not None
        metrics.write({"kind": "valid", "step": c.step, "bits_per_byte": bits, "stderr": found.stderr})
        shown.message(f"step {c.step:,}: validation {bits:.4f} bits/byte")
    bits = trainer.workers.sum(bits if trainer.workers.is_main else 0.0)[0]
    best = math.isfinite(bits) and (c.best_bits_per_byte is None or bits < c.best_bits_per_byte)
    if best:
        c.best_bits_per_byte, c.best_step = bits, c.step
    c.seconds += time.perf_counter() - begun
    return best


def save_checkpoint(trainer: Trainer, out: Path) -> None:
    """Write a checkpoint, then remove those that retention does not keep. The main process writes."""
    crew, spec = trainer.workers, trainer.recipe.train
    if crew.is_main:
        tensors, document = pack_optimizers(trainer.optimizers, trainer.names)
        files = {"model.safetensors": dict(trainer.model.named_parameters()), "optimizer.safetensors": tensors}
        if trainer.ema is not None:
            files["ema.safetensors"] = trainer.ema.state_tensors()
        documents = {
            "state.json": trainer.state(),
            "optimizer.json": document,
            RECIPE: to_dict(trainer.recipe),
        }

        def extra(directory: Path) -> None:
            trainer.model.config.save_pretrained(directory)
            trainer.model.generation_config.save_pretrained(directory)
            trainer.data.tokenizer.save(directory)

        checkpoints.save(out / "checkpoints", trainer.counters.step, files=files, documents=documents, extra=extra)
        retain(out / "checkpoints", spec.keep_last, trainer.counters.best_step)
    crew.barrier()


def restore(trainer: Trainer, saved: Checkpoint) -> None:
    """Put the trainer where the checkpoint was."""
    weights = saved.tensors("model.safetensors", trainer.device)
    parameters = dict(trainer.model.named_parameters())
    check(weights.keys() == parameters.keys(), f"{saved.path}: its weights belong to another model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            check(parameter.shape == weights[name].shape, f"{saved.path}: weight {name} has another shape")
            parameter.copy_(weights[name])
    tensors = saved.tensors("optimizer.safetensors", trainer.device)
    unpack_optimizers(trainer.optimizers, trainer.names, tensors, saved.documents["optimizer.json"])
    state = saved.documents["state.json"]
    if trainer.ema is not None:
        trainer.ema.load(saved.tensors("ema.safetensors", trainer.device), state["ema_updates"])
    trainer.load_state(state)


def export(trainer: Trainer, out: Path) -> None:
    """Write the finished model into the run directory; each file appears whole, the weights last."""
    work = out / ".export.tmp"
    shutil.rmtree(work, ignore_errors=True)
    try:
        with system_errors():
            with trainer.evaluation_weights() as model:
                model.save_pretrained(work)
            trainer.data.tokenizer.save(work)
        for path in sorted(work.iterdir(), key=lambda p: p.name == WEIGHTS):
            path.replace(out / path.name)
    except OSError as error:
        raise OuroborosError(
            f"cannot write the model to {out}: {error.strerror or error}; its checkpoint is safe"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
