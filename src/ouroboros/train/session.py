"""One session of training: steps, validation, checkpoints, export; :mod:`ouroboros.train.run` starts sessions."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ouroboros.config import to_dict
from ouroboros.data.stream import StreamLoader
from ouroboros.errors import Diverged, OuroborosError
from ouroboros.files import system_errors
from ouroboros.model.pretrained import todays_names
from ouroboros.train import checkpoint as checkpoints
from ouroboros.train.begin import Begun
from ouroboros.train.checkpoint import Checkpoint, checkpoint_path, retain
from ouroboros.train.guard import PERSISTS, Alarm
from ouroboros.train.log import MetricsLog, Progress
from ouroboros.train.meter import Meter
from ouroboros.train.rundir import RECIPE, STATE, WEIGHTS, RunDirectory
from ouroboros.train.state import copy_tensors, gathered, model_tensors, pack_optimizers, unpack_optimizers
from ouroboros.train.stop import Counters, NotFinite, SourceFailed, StopControl
from ouroboros.train.threads import Threads, using_threads
from ouroboros.train.trainer import StepResult, Trainer
from ouroboros.train.validate import ValidationFailed, Validator

logger = logging.getLogger(__name__)

OPTIMIZER, AVERAGES, TEACHER = "optimizer.safetensors", "ema.safetensors", "teacher.safetensors"
"""In a checkpoint, beside the weights: the state of the optimisers, and the averaged weights and those that are learned
from in a last phase, if there are any."""
LOW_RANK = "low_rank.safetensors"
"""The factors of low-rank training and the matrices they are added to; the weights beside it are the sums."""
GROUPS = "optimizer.json"
"""Which parameters and settings :data:`OPTIMIZER` belongs to."""


@dataclass(frozen=True)
class RunResult:
    """How a session of training ended."""

    run: Path
    counters: Counters
    finished: bool
    """The budget is spent, or validation ended the run, and the model is exported; False after an interruption."""
    reason: str | None
    """What stopped the session before its budget was spent: a signal, ``target_loss`` or ``patience``."""
    loss: float | None
    is_main: bool = True
    """Whether this is the process that reports, of those that trained together."""
    message: str | None = None
    """Why validation ended the run, in words and numbers."""
    exported_step: int | None = None
    """The step whose weights are exported: the last one, or the best validation's with ``train.patience``."""
    asked: str | None = None
    """The signal that came too late to stop this session; who trains several models stops before the next."""


def train(
    trainer: Trainer, run: RunDirectory, progress: Progress, *, resumed_at: int | None, begun: Begun | None = None
) -> RunResult:
    """Train until the budget is spent, validation ends the run or a signal asks to stop; checkpoint and log on the way.

    Args:
        trainer, run, progress: of the run, its directory, and where progress is shown.
        resumed_at: the step of the checkpoint that the run goes on from.
        begun: what a new run took from another model, for the records.

    Raises:
        OuroborosError: losses stayed non-finite, validation kept failing, or the stability guard stopped the run; what
            was trained before is saved.
    """
    main, spec = trainer.workers.is_main, trainer.recipe.train
    loss = None
    with contextlib.ExitStack() as stack:
        metrics = MetricsLog(run.metrics_file if main else None, resume_step=resumed_at)
        shown = stack.enter_context(progress) if main else Progress(quiet=True)
        control = stack.enter_context(StopControl(shown.message))
        stack.enter_context(using_threads(trainer.choices.threads_now or trainer.choices.threads))
        validator = Validator(trainer, metrics, shown)
        shown.message(_opening(trainer, resumed_at) + validator.goal())
        if begun is not None:
            shown.message(begun.describe())
            metrics.write(begun.record())
        meter = Meter(trainer)
        seconds = trainer.warm_up()
        if seconds > 1:
            shown.message(f"compiled in {seconds:.0f} s")
        threads = trainer.threads()
        if trainer.guard.goes_back and trainer.guard.state.good is None:
            trainer.guard.state.good = trainer.counters.step
            save_checkpoint(trainer, run)
        while not trainer.done:
            result = _step(trainer, run)
            loss = result.loss
            if main:
                _report(meter, result, metrics, shown)
            if result.alarm is not None:
                _guard(trainer, run, result.alarm, metrics, shown)
            if threads is not None:
                _adapt(trainer, threads, result, metrics)
            last, best = trainer.done, False
            if validator.due(last):
                best = _validate(validator, run)
                last = trainer.done  # a target reached, patience lost, or the time it took
            stop = trainer.workers.any(control.requested)
            keep = best and (spec.checkpoint_every or spec.patience)
            regular = spec.checkpoint_every and trainer.counters.step % spec.checkpoint_every == 0
            if regular:
                trainer.guard.saved(trainer.counters.step)
            if stop or last or keep or regular:
                save_checkpoint(trainer, run)
            if stop and not last:
                return RunResult(run.path, trainer.counters, False, control.reason or "another process", loss, main)
        finished = _finish(trainer, run, loss, metrics, shown)
        return dataclasses.replace(finished, asked=control.reason)


def _finish(trainer: Trainer, run: RunDirectory, loss: float | None, metrics: MetricsLog, shown: Progress) -> RunResult:
    """Export the model of a run that has ended."""
    main, early, exported = trainer.workers.is_main, trainer.early_stop, None
    if early is not None:
        record = {"reason": early.reason, "message": early.message}
        metrics.write({"kind": "early_stop", "step": trainer.counters.step, **record})
        shown.message(f"stopped early: {early.message}")
    if main or trainer.shards is not None:
        exported = _choose_weights(trainer, run, shown)
        export(trainer, run)
    trainer.workers.barrier()
    why, message = (None, None) if early is None else (early.reason, early.message)
    return RunResult(run.path, trainer.counters, True, why, loss, main, message, exported)


def _step(trainer: Trainer, run: RunDirectory) -> StepResult:
    """Take one step; if it ends the run, save what was trained or the batch that was at fault."""
    every = trainer.recipe.train.telemetry_every
    try:
        return trainer.step(telemetry=bool(every) and trainer.counters.step % every == 0)
    except SourceFailed as error:
        hint = " --data.skip-bad-records --allow-changes" if "skip_bad_records" in str(error) else ""
        raise _saved(trainer, run, error, hint) from error
    except NotFinite as error:
        crew = trainer.workers
        kept = run.path / ("bad-batch.npy" if crew.is_main else f"bad-batch-{crew.rank}.npy")
        np.save(kept, error.batch, allow_pickle=False)
        raise Diverged(f"{error}; the batch is in {kept}") from None


def _guard(trainer: Trainer, run: RunDirectory, alarm: Alarm, metrics: MetricsLog, shown: Progress) -> None:
    """Report an unusual step; where several in a row ask for it, go back to the last good checkpoint, and on from there
    or not."""
    guard, spec = trainer.guard, trainer.recipe.train.guard
    state, step = guard.state, trainer.counters.step
    if alarm.new:
        metrics.write(alarm.record())
    # A single unusual batch is recorded, and alarms nobody before it lasts; where it began is known at the first.
    told = guard.first if alarm.in_a_row == PERSISTS and guard.first is not None else alarm
    if alarm.in_a_row == PERSISTS or (alarm.new and alarm.usual is None):
        shown.message(f"step {told.step:,}: {told.message}")
    if alarm.in_a_row != PERSISTS or not guard.goes_back or state.good is None:
        return
    saved = checkpoints.load(checkpoint_path(run.checkpoints, state.good))
    restore_tensors(trainer, saved)
    trainer.counters.bad_in_a_row = 0
    guard.went_back(saved.documents[STATE]["guard"])
    goes_on = spec.action == "rollback" and state.rollbacks < spec.rollbacks
    if goes_on:
        state.rollbacks += 1
        state.lr_factor *= spec.lr_factor
    done = {"to_step": state.good, "goes_on": goes_on, "rollbacks": state.rollbacks, "lr_factor": state.lr_factor}
    metrics.write({"kind": "rollback", "step": step, **done})
    if not goes_on:
        why = f"step {step:,}: {alarm.message}; the weights are those of step {state.good:,} again"
        raise _saved(trainer, run, Diverged(why), f" --optim.lr {trainer.recipe.optim.lr / 2:g} --allow-changes")
    shown.message(
        f"step {step:,}: rollback {state.rollbacks} of {spec.rollbacks} to the weights of step {state.good:,}; the"
        f" learning rate is multiplied by {state.lr_factor:g}, and the text between is not read again"
    )


def _adapt(trainer: Trainer, threads: Threads, result: StepResult, metrics: MetricsLog) -> None:
    """Compute on with fewer threads while other programs use the processor; a change is recorded with its step."""
    count = threads.observe(result.seconds, trainer.visits(result.loops))
    if count is None:
        return
    torch.set_num_threads(count)
    trainer.choices = dataclasses.replace(trainer.choices, threads_now=None if count == threads.chosen else count)
    metrics.write({"kind": "threads", "step": trainer.counters.step, "threads": count})


def _validate(validator: Validator, run: RunDirectory) -> bool:
    """Validate; if that has failed too often, save what was trained before the run ends."""
    try:
        return validator.run()
    except ValidationFailed as error:
        raise _saved(validator.trainer, run, error) from error


def _saved(trainer: Trainer, run: RunDirectory, error: OuroborosError, hint: str = "") -> OuroborosError:
    """Save what was trained before the ``error`` that ends the run, and say so with it."""
    kind = Diverged if isinstance(error, Diverged) else OuroborosError
    save_checkpoint(trainer, run)
    done = f"step {trainer.counters.step:,} is saved"
    return kind(f"{error}; {done}: `ouroboros resume {run.path}{hint}` goes on from there")


def _choose_weights(trainer: Trainer, run: RunDirectory, shown: Progress) -> int:
    """The step whose weights are exported: with ``train.patience`` the best validation's, which are then loaded."""
    c = trainer.counters
    main = trainer.workers.is_main
    if main and trainer.average is not None and not trainer.average.updates:
        logger.warning("the run ended before any weights were averaged; the last ones are exported")
    if not trainer.recipe.train.patience or c.best_step is None or c.best_step == c.step:
        return c.step
    try:
        restore_weights(trainer, checkpoints.load(checkpoint_path(run.checkpoints, c.best_step)))
    except OuroborosError as error:
        if main:
            logger.warning("the weights of the best validation cannot be had, the last ones are exported: %s", error)
        return c.step
    shown.message(
        f"exporting the weights of step {c.best_step:,}, the best validation ({c.best_bits_per_byte:.4f} bits/byte)"
    )
    return c.best_step


def _opening(trainer: Trainer, resumed_at: int | None) -> str:
    """One line that says what is about to run and what was chosen for it."""
    trained, own = set(trainer.optimized), list(trainer.model.parameters())
    untrained = sum(p.numel() for p in own if p not in trained)
    never = f" ({untrained:,} of them never trained)" if untrained else ""
    if trainer.low_rank.factors:
        never += f" and {sum(p.numel() for p in trained.difference(own)):,} of low-rank factors"
    begun = "" if resumed_at is None else f"resumed at step {resumed_at}; "
    total = f"{sum(p.numel() for p in own):,} parameters{never}"
    return (
        f"{trainer.recipe.name} {trainer.model.schedule.notation}: {begun}{total},"
        f" {trainer.step_tokens:,} tokens/step, {str(trainer.dtype).removeprefix('torch.')}, {trainer.compiled},"
        f" {trainer.choices.describe()},"
        f" {trainer.workers.world_size} process(es)"
    )


def _report(meter: Meter, result: StepResult, metrics: MetricsLog, shown: Progress) -> None:
    """Show progress, and write the metrics of every ``log_every`` th step."""
    step = meter.trainer.counters.step
    shown.update(meter.status(result))
    slowed = meter.slowed(result)
    if slowed is not None:
        shown.message(slowed)
    if result.telemetry is not None:
        metrics.write({"kind": "telemetry", "step": step, **result.telemetry})
    if step % meter.trainer.recipe.train.log_every == 0 or result.skipped or step == 1:
        metrics.write(meter.record(result))
        if isinstance(meter.trainer.loader, StreamLoader):
            metrics.write({"kind": "stream", "step": step, "sources": meter.trainer.loader.sources()})


def save_checkpoint(trainer: Trainer, run: RunDirectory) -> None:
    """Write a checkpoint, then remove those that retention does not keep. The main process writes, and is sent what
    others have a part of."""
    tensors, groups = pack_optimizers(trainer.optimizers, trainer.names)
    files = {WEIGHTS: model_tensors(trainer.model), OPTIMIZER: tensors}
    if trainer.average is not None:
        files[AVERAGES] = trainer.average.state_tensors()
    if trainer.low_rank.factors:
        files[LOW_RANK] = trainer.low_rank.state_tensors()
    if trainer.teacher is not None:
        files[TEACHER] = trainer.teacher.state_tensors()
    files = {name: gathered(content, keep=trainer.workers.is_main) for name, content in files.items()}
    if trainer.workers.is_main:
        documents = {STATE: trainer.state(), GROUPS: groups, RECIPE: to_dict(trainer.recipe)}

        def extra(directory: Path) -> None:
            trainer.model.config.save_pretrained(directory)
            trainer.model.generation_config.save_pretrained(directory)
            trainer.data.tokenizer.save(directory)

        checkpoints.save(run.checkpoints, trainer.counters.step, files=files, documents=documents, extra=extra)
        guard = trainer.guard.state
        retain(run.checkpoints, trainer.recipe.train.keep_last, trainer.counters.best_step, guard.good, guard.candidate)
    trainer.workers.barrier()


def restore(trainer: Trainer, saved: Checkpoint) -> None:
    """Put the trainer where the checkpoint was."""
    restore_tensors(trainer, saved)
    trainer.load_state(saved.documents[STATE])


def restore_tensors(trainer: Trainer, saved: Checkpoint) -> None:
    """Put weights and optimisers where the checkpoint was; counters and the position in the text stay."""
    restore_weights(trainer, saved)
    groups = todays_names(saved.documents[GROUPS])
    unpack_optimizers(trainer.optimizers, trainer.names, todays_names(saved.tensors(OPTIMIZER)), groups)


def restore_weights(trainer: Trainer, saved: Checkpoint) -> None:
    """Put the model's weights, their average and what they learn from, if there are such, where the checkpoint's are.

    Raises:
        OuroborosError: the checkpoint is of another model.
    """
    weights = todays_names(saved.tensors(WEIGHTS, trainer.device))
    copy_tensors(model_tensors(trainer.model), weights, f"{saved.path}: its weights belong to another model")
    if trainer.low_rank.factors:
        trainer.low_rank.load(todays_names(saved.tensors(LOW_RANK, trainer.device)))
    if trainer.average is not None:
        averages = todays_names(saved.tensors(AVERAGES, trainer.device))
        trainer.average.load(trainer.model, averages, saved.documents[STATE]["ema_updates"])
    trainer.teacher = None
    if (saved.path / TEACHER).is_file():
        trainer.teach(trainer.model).load(saved.tensors(TEACHER, trainer.device))


def export(trainer: Trainer, run: RunDirectory) -> None:
    """Write the finished model into the run directory; each file appears whole, the weights last. The main process
    writes, and is sent what others have a part of."""
    work = run.path / ".export.tmp"
    if not trainer.workers.is_main:
        with trainer.evaluation_weights():
            return
    shutil.rmtree(work, ignore_errors=True)
    try:
        with system_errors():
            with trainer.evaluation_weights() as model:
                model.save_pretrained(work)
            trainer.data.tokenizer.save(work)
        for path in sorted(work.iterdir(), key=lambda p: p.name == WEIGHTS):
            path.replace(run.path / path.name)
    except OSError as error:
        why = error.strerror or error
        raise OuroborosError(f"cannot write the model to {run.path}: {why}; its checkpoint is safe") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
