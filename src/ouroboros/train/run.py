"""Runs: a directory in which training can be started, interrupted at any instant, and resumed exactly.

``RUN/`` holds ``recipe.json``, ``data/`` (prepared shards), ``checkpoints/``, ``metrics.jsonl`` and, when training has ended, the
model itself as a transformers directory (``config.json``, ``model.safetensors``, tokenizer).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ouroboros.config import Recipe, check, from_json, to_dict, to_json
from ouroboros.data.prepared import PreparedData
from ouroboros.data.shards import prepare
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.train import checkpoint as checkpoints
from ouroboros.train.checkpoint import Checkpoint, load_newest, retain
from ouroboros.train.distributed import Workers, workers
from ouroboros.train.lock import RunLock
from ouroboros.train.log import MetricsLog, Progress, Status
from ouroboros.train.loop import Counters, NotFinite, Trainer
from ouroboros.train.precision import choose_device, matmul_peak
from ouroboros.train.state import pack_optimizers, restore_rng, rng_state, unpack_optimizers
from ouroboros.train.stop import Budget, StopControl
from ouroboros.train.validate import validate, validation_sample

logger = logging.getLogger(__name__)

RECIPE = "recipe.json"
_BUDGET = ("steps", "tokens", "minutes")


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


def start(recipe: Recipe, out: Path, *, progress: Progress | None = None) -> RunResult:
    """Train ``recipe`` in the new directory ``out``.

    Raises:
        OuroborosError: no budget, ``out`` exists or cannot be written, data that cannot be used.
    """
    Budget.from_spec(recipe.train)
    with workers() as crew:
        if crew.is_main:
            _refuse_existing(out)
            _make_directory(out)
        crew.barrier()
        with _locked(out, crew):
            data = _prepare(recipe, out, crew)
            recipe = resolve(recipe, data)
            if crew.is_main:
                _write_atomically(out / RECIPE, to_json(recipe).encode())
            trainer = _trainer(recipe, data, crew)
            return _train(trainer, out, progress or Progress(quiet=True), resumed_at=None)


def resume(
    out: Path, *, recipe: Recipe | None = None, allow_changes: bool = False, progress: Progress | None = None
) -> RunResult:
    """Continue the run in ``out`` from its newest good checkpoint, bit for bit.

    Args:
        out: the run directory.
        recipe: what to run; by default ``recipe.json`` as it is now.
        allow_changes: go on although the recipe differs from the checkpoint's.
        progress: where progress is shown.

    Raises:
        OuroborosError: not a run, finished already, in use, the recipe or a source changed (each is named), no good
            checkpoint.
    """
    wanted = recipe or read_recipe(out)
    with workers() as crew, _locked(out, crew):
        newest = load_newest(out / "checkpoints")
        saved = from_json(Recipe, json.dumps(newest.documents[RECIPE]), where=str(newest.path / RECIPE))
        changes = recipe_changes(saved, wanted)
        check(
            not changes or allow_changes,
            f"resume {out}: the recipe has changed since the checkpoint ({'; '.join(changes)});"
            " undo that, or add --allow-changes",
        )
        for change in changes:
            logger.warning("resume with a changed recipe: %s", change)
        data = _prepare(wanted, out, crew)
        dtype = getattr(torch, newest.documents["state.json"]["dtype"])
        trainer = _trainer(wanted, data, crew, dtype=dtype)
        _restore(trainer, newest)
        check(
            not trainer.done,
            f"resume {out}: the run is complete ({trainer.counters.step} steps);"
            " to go on, raise its budget, for example --train.steps N --allow-changes",
        )
        if crew.is_main:
            _write_atomically(out / RECIPE, to_json(wanted).encode())
        return _train(trainer, out, progress or Progress(quiet=True), resumed_at=newest.step)


def read_recipe(out: Path) -> Recipe:
    """The resolved recipe of the run in ``out``."""
    path = out / RECIPE
    if not path.is_file():
        what = "is not a run directory (no recipe.json)" if out.is_dir() else "does not exist"
        raise OuroborosError(f"{out} {what}; start a run with `ouroboros train RECIPE --data SRC --out {out}`")
    return from_json(Recipe, path.read_text(encoding="utf-8"), where=str(path))


def resolve(recipe: Recipe, data: PreparedData) -> Recipe:
    """``recipe`` with the vocabulary of the tokenizer, and a context at least as long as the training windows."""
    longest = max(recipe.model.max_position_embeddings, recipe.data.sequence_length)
    model = dataclasses.replace(
        recipe.model, vocab_size=data.tokenizer.vocab_size, max_position_embeddings=longest
    )
    return dataclasses.replace(recipe, model=model)


def recipe_changes(old: Recipe, new: Recipe) -> list[str]:
    """What differs, one ``field: old -> new`` each."""

    def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from flatten(inner, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, value

    before, after = dict(flatten(to_dict(old))), dict(flatten(to_dict(new)))
    keys = sorted(before.keys() | after.keys())
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


def _prepare(recipe: Recipe, out: Path, crew: Workers) -> PreparedData:
    """Prepare on the main process, then open everywhere; on resume this checks that no source has changed."""
    if crew.is_main:
        data = prepare(recipe.data, out / "data")
        crew.barrier()
        return data
    crew.barrier()
    return prepare(recipe.data, out / "data")


def _trainer(recipe: Recipe, data: PreparedData, crew: Workers, dtype: torch.dtype | None = None) -> Trainer:
    torch.manual_seed(recipe.train.seed)
    np.random.seed(recipe.train.seed % 2**32)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(recipe.model, eos_token_id=data.tokenizer.eos_id))
    model.to(choose_device())
    trainer = Trainer(recipe, model, data, crew, dtype=dtype)
    # Processes share the initial weights but not the dropout masks.
    torch.manual_seed(recipe.train.seed * 65_537 + crew.rank + 1)
    return trainer


def _train(trainer: Trainer, out: Path, progress: Progress, *, resumed_at: int | None) -> RunResult:
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
        while not trainer.done:
            wanted = spec.telemetry_every and trainer.counters.step % spec.telemetry_every == 0
            try:
                result = trainer.step(telemetry=bool(wanted))
            except NotFinite as error:
                np.save(out / "bad-batch.npy", error.batch, allow_pickle=False)
                raise OuroborosError(f"{error}; the batch is in {out / 'bad-batch.npy'}") from None
            loss = result.loss
            _log(trainer, result, metrics, shown)
            step, last = trainer.counters.step, trainer.done
            if sample and (step % spec.eval_every == 0 or last):
                _validate(trainer, sample, metrics, shown)
            stop = trainer.workers.any(control.requested)
            if stop or last or (spec.checkpoint_every and step % spec.checkpoint_every == 0):
                save_checkpoint(trainer, out)
            if stop and not last:
                return RunResult(out, trainer.counters, False, control.reason or "another process", loss)
        if main:
            export(trainer, out)
        trainer.workers.barrier()
    return RunResult(out, trainer.counters, True, None, loss)


def _opening(trainer: Trainer, resumed_at: int | None) -> str:
    """One line that says what is about to run and what was chosen."""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    begun = "" if resumed_at is None else f"resumed at step {resumed_at}; "
    return (
        f"{trainer.recipe.name} {trainer.model.schedule.notation}: {begun}{parameters:,} parameters,"
        f" {trainer.step_tokens:,} tokens/step, {str(trainer.dtype).removeprefix('torch.')}, {trainer.compiled},"
        f" {trainer.workers.world_size} process(es)"
    )


def _log(trainer: Trainer, result: Any, metrics: MetricsLog | None, shown: Progress) -> None:
    """Write the metrics of a step, every ``log_every`` steps, and show progress."""
    c = trainer.counters
    if metrics is None:
        return
    seconds, tokens = trainer.__dict__.setdefault("_logged", (0.0, 0)) if c.step > 1 else (0.0, 0)
    rate = (c.tokens - tokens) / max(c.seconds - seconds, 1e-9)
    bits = result.loss / np.log(2) / trainer.bytes_per_token
    peak = matmul_peak(trainer.device.type, trainer.dtype) * trainer.workers.world_size
    if result.telemetry is not None:
        metrics.write({"kind": "telemetry", "step": c.step, "loops": result.telemetry})
    if c.step % trainer.recipe.train.log_every == 0 or result.skipped or c.step == 1:
        metrics.write(
            {
                "kind": "train",
                "step": c.step,
                "tokens": c.tokens,
                "seconds": round(c.seconds, 3),
                "loss": result.loss,
                "bits_per_byte": bits,
                "lr": result.lr_factor * trainer.recipe.optim.lr,
                "grad_norm": result.grad_norm,
                "loops": result.loops,
                "skipped": c.skipped,
                "tokens_per_second": rate,
                "peak_share": rate * trainer.flops_per_token / peak,
            }
        )
        trainer.__dict__["_logged"] = (c.seconds, c.tokens)
    shown.update(
        Status(
            step=c.step,
            progress=trainer.budget.progress(c.step, c.tokens, c.seconds),
            loss=result.loss,
            bits_per_byte=float(bits),
            tokens_per_second=rate,
            peak_share=rate * trainer.flops_per_token / peak,
            note=f"{c.skipped} steps skipped" if c.skipped else "",
        )
    )


def _validate(trainer: Trainer, sample: list[bytes], metrics: MetricsLog | None, shown: Progress) -> None:
    """Score the sample on the main process; all learn whether it is the best so far."""
    import time

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
    if c.best_bits_per_byte is None or bits < c.best_bits_per_byte:
        c.best_bits_per_byte, c.best_step = bits, c.step
    c.seconds += time.perf_counter() - begun


def save_checkpoint(trainer: Trainer, out: Path) -> None:
    """Write a checkpoint, then remove those that retention does not keep. The main process writes."""
    crew, spec = trainer.workers, trainer.recipe.train
    if crew.is_main:
        tensors, document = pack_optimizers(trainer.optimizers, trainer.names)
        random_tensors, random_document = rng_state()
        files = {"model.safetensors": dict(trainer.model.named_parameters()), "optimizer.safetensors": tensors}
        files["rng.safetensors"] = random_tensors
        if trainer.ema is not None:
            files["ema.safetensors"] = trainer.ema.state_tensors()
        documents = {
            "state.json": trainer.state(),
            "optimizer.json": document,
            "rng.json": random_document,
            RECIPE: to_dict(trainer.recipe),
        }

        def extra(directory: Path) -> None:
            trainer.model.config.save_pretrained(directory)
            trainer.model.generation_config.save_pretrained(directory)
            trainer.data.tokenizer.save(directory)

        checkpoints.save(out / "checkpoints", trainer.counters.step, files=files, documents=documents, extra=extra)
        retain(out / "checkpoints", spec.keep_last, trainer.counters.best_step)
    crew.barrier()


def _restore(trainer: Trainer, saved: Checkpoint) -> None:
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
    restore_rng(saved.tensors("rng.safetensors"), saved.documents["rng.json"])


def export(trainer: Trainer, out: Path) -> None:
    """Write the finished model into the run directory; each file appears whole, the weights last."""
    work = out / f".export.tmp-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        with trainer.evaluation_weights() as model:
            model.save_pretrained(work)
        trainer.data.tokenizer.save(work)
        for path in sorted(work.iterdir(), key=lambda p: p.name == "model.safetensors"):
            path.replace(out / path.name)
    except OSError as error:
        raise OuroborosError(f"cannot write the model to {out}: {error.strerror or error}; its checkpoint is safe") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _refuse_existing(out: Path) -> None:
    if (out / RECIPE).is_file():
        name = read_recipe(out).name
        raise OuroborosError(f"{out} holds a run of recipe {name!r}; continue it with `ouroboros resume {out}` or choose another --out")
    if out.exists() and (not out.is_dir() or any(entry.name != ".lock" for entry in out.iterdir())):
        raise OuroborosError(f"{out} exists and is not an empty directory; choose another --out")


def _make_directory(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OuroborosError(f"cannot make the run directory {out}: {error.strerror}") from None


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OuroborosError(f"cannot write {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def _locked(out: Path, crew: Workers) -> Iterator[None]:
    """The run's lock, held by the main process."""
    if not out.is_dir():
        read_recipe(out)  # raises with the right words
    with RunLock(out) if crew.is_main else contextlib.nullcontext():
        yield
