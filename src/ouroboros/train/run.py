"""Runs: training that is started in a directory, interrupted at any instant, and resumed exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import shutil
from collections.abc import Iterator, Set
from pathlib import Path

import torch
from torch import nn

from ouroboros.config import Recipe, fields_by_path, from_dict
from ouroboros.data.documents import name_formats
from ouroboros.data.prepared import PreparedData
from ouroboros.data.shards import prepare
from ouroboros.errors import OuroborosError, check
from ouroboros.files import remove_leftovers, write_whole
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.train.begin import Source, take
from ouroboros.train.distributed import Workers, workers
from ouroboros.train.lock import run_lock
from ouroboros.train.log import Progress
from ouroboros.train.precision import Choices, choose_device
from ouroboros.train.rundir import RECIPE, STATE, RunDirectory
from ouroboros.train.session import RunResult, restore, save_checkpoint, train
from ouroboros.train.stop import check_budget
from ouroboros.train.trainer import Trainer

logger = logging.getLogger(__name__)

_LEFT_OVER = re.compile(r"\.lock|data|\.data\.tmp-.*|\.recipe\.json\.tmp.*")
"""What a start that was killed before its first step leaves in a directory."""


def start(recipe: Recipe, out: Path, *, source: Source | None = None, progress: Progress | None = None) -> RunResult:
    """Train ``recipe`` in the new directory ``out``.

    Args:
        recipe: what to train, and how.
        out: the run directory.
        source: a model whose weights the run begins from. ``recipe.data.tokenizer`` has to be that model's.
        progress: where progress is shown.

    Raises:
        OuroborosError: no budget, ``out`` exists or cannot be written, data that cannot be used, a source that does not
            fit.
    """
    check_budget(recipe.train)
    run = RunDirectory(out)
    with workers() as crew:
        made: list[Path] = []
        if crew.is_main:
            _refuse_existing(run)
            made = make_directory(out)
        crew.barrier()
        with _locked(run, crew), contextlib.ExitStack() as undo:
            if crew.is_main:
                _refuse_existing(run)  # again: another process may have had it meanwhile
                undo.callback(remove_new, out, made, {entry.name for entry in out.iterdir()} - {".lock"})
            recipe = dataclasses.replace(recipe, data=name_formats(recipe.data, quiet=not crew.is_main))
            data = _prepare(recipe, run, crew, shows_progress=progress is not None and not progress.quiet)
            recipe = resolve(recipe, data)
            model = new_model(recipe, data)
            begun = None if source is None else take(model, source)
            trainer = Trainer(recipe, model, data, crew)
            trainer.loader.peek_hash()  # a source that cannot be streamed is found while there is no run yet
            if begun is not None:
                save_checkpoint(trainer, run)  # a run that is stopped early needs the other model no more
            if crew.is_main:
                for name, content in {} if source is None else source.beside.items():
                    write_whole(run.path / name, content)
                run.write_recipe(recipe)
            undo.pop_all()  # from here on the directory is a run, which can be resumed
            return train(trainer, run, progress or Progress(quiet=True), resumed_at=None, begun=begun)


def resume(
    out: Path, *, recipe: Recipe | None = None, allow_changes: bool = False, progress: Progress | None = None
) -> RunResult:
    """Continue the run in ``out`` from its newest good checkpoint, bit for bit.

    A run that was stopped before its first checkpoint begins again; one that was stopped before its model was written
    writes it.

    Args:
        out: the run directory.
        recipe: what to run; by default ``recipe.json`` as it is now.
        allow_changes: go on although the recipe differs from the checkpoint's.
        progress: where progress is shown.

    Raises:
        OuroborosError: not a run, finished already, in use, the recipe or a source changed (each is named), no good
            checkpoint.
    """
    run = RunDirectory(out)
    wanted = recipe or run.read_recipe()
    with workers() as crew, _locked(run, crew):
        newest = run.newest()
        if newest is None:
            saved = run.read_recipe()
        else:
            saved = from_dict(Recipe, newest.documents[RECIPE], where=str(newest.path / RECIPE))
        changes = recipe_changes(saved, wanted)
        check(
            not changes or allow_changes,
            f"resume {out}: the recipe has changed since the checkpoint ({'; '.join(changes)});"
            " undo that, or add --allow-changes",
        )
        for change in changes:
            logger.warning("resume with a changed recipe: %s", change)
        data = _prepare(wanted, run, crew, resumed=True)
        choices = None if newest is None else Choices.from_dict(newest.documents[STATE])
        trainer = Trainer(wanted, new_model(wanted, data), data, crew, choices=choices)
        if newest is not None:
            restore(trainer, newest)
        check(not (trainer.done and run.weights_file.is_file()), f"resume {out}: the run is complete {_how(trainer)}")
        if crew.is_main:
            run.write_recipe(wanted)
            run.weights_file.unlink(missing_ok=True)  # of the shorter run; its last checkpoint has them
        return train(trainer, run, progress or Progress(quiet=True), resumed_at=trainer.counters.step)


def _how(trainer: Trainer) -> str:
    """How a complete run ended, and how to go on with it."""
    steps, early = trainer.counters.step, trainer.early_stop
    if early is None:
        return f"({steps} steps); to go on, raise its budget, for example --train.steps N --allow-changes"
    other = "--train.target-loss None" if early.reason == "target_loss" else "--train.patience 0"
    return f"({steps} steps), stopped early: {early.message}; to go on, for example {other} --allow-changes"


def resolve(recipe: Recipe, data: PreparedData) -> Recipe:
    """``recipe`` with the vocabulary of the tokenizer, and a context at least as long as the training windows."""
    longest = max(recipe.model.max_position_embeddings, recipe.data.sequence_length)
    model = dataclasses.replace(recipe.model, vocab_size=data.tokenizer.vocab_size, max_position_embeddings=longest)
    return dataclasses.replace(recipe, model=model)


def recipe_changes(old: Recipe, new: Recipe) -> list[str]:
    """What differs, one ``field: old -> new`` each."""
    before, after = fields_by_path(old), fields_by_path(new)
    keys = sorted(before.keys() | after.keys())
    changes = [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]
    if not changes and list(before) != list(after):  # parts in a list act in its order
        orders = [", ".join(str(part.kind) for part in (*spec.model.stem, *spec.model.loop)) for spec in (old, new)]
        changes = [f"the order of parts: {' -> '.join(orders)}"]
    return changes


def _prepare(
    recipe: Recipe, run: RunDirectory, crew: Workers, *, resumed: bool = False, shows_progress: bool = False
) -> PreparedData:
    """Prepare on the main process, then open everywhere; on resume this checks that no source has changed."""
    data = None
    if crew.is_main:
        data = prepare(recipe.data, run.data, resumed=resumed, shows_progress=shows_progress)
    crew.barrier()
    return prepare(recipe.data, run.data, resumed=resumed) if data is None else data


def new_model(recipe: Recipe, data: PreparedData) -> OuroborosForCausalLM:
    """The model at its start, which the seed decides, on its device."""
    torch.manual_seed(recipe.train.seed)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(recipe.model, eos_token_id=data.tokenizer.eos_id))
    nn.Module.to(model, choose_device())
    return model


def _refuse_existing(run: RunDirectory) -> None:
    """Only a new or empty directory will do, or one that holds prepared data and nothing else."""
    out = run.path
    if run.is_run:
        name = run.read_recipe().name
        raise OuroborosError(
            f"{out} holds a run of recipe {name!r}; continue it with `ouroboros resume {out}` or choose another --out"
        )
    if out.exists() and (not out.is_dir() or any(not _LEFT_OVER.fullmatch(entry.name) for entry in out.iterdir())):
        raise OuroborosError(f"{out} exists and is not an empty directory; choose another --out")


def make_directory(out: Path) -> list[Path]:
    """Make ``out``; returns the directories that were not there before, innermost first."""
    try:
        missing = [path for path in (out, *out.parents) if not path.exists()]
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OuroborosError(f"cannot make the run directory {out}: {error.strerror}") from None
    return missing


def remove_new(out: Path, made: list[Path], present: Set[str] = frozenset()) -> None:
    """Leave things as they were before a run that could not begin: without what is in ``out`` besides the entries that
    were ``present``, and without the directories that were ``made``."""
    for entry in list(out.iterdir()):
        if entry.name not in present:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for path in made:
        # Another process may have put something there meanwhile.
        with contextlib.suppress(OSError):
            path.rmdir()


@contextlib.contextmanager
def _locked(run: RunDirectory, crew: Workers) -> Iterator[None]:
    """The run's lock, held by the main process."""
    if not run.path.is_dir():
        run.read_recipe()  # raises with the right words
    with run_lock(run.path) if crew.is_main else contextlib.nullcontext():
        if crew.is_main:
            remove_leftovers(run.path)
        yield
