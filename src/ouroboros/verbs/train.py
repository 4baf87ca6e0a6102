"""``ouroboros train RECIPE`` and ``ouroboros resume RUN``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Generic, NamedTuple, TypeVar

import tyro

from ouroboros.config import DataSpec, ModelSpec, OptimSpec, Recipe, TrainSpec
from ouroboros.errors import check
from ouroboros.recipes import RECIPES, presets
from ouroboros.recipes import recipe as make_recipe
from ouroboros.verbs.options import (
    Json,
    Quiet,
    Run,
    collect,
    emit_json,
    log_to_stderr,
    quiet_transformers,
    say,
    signal_status,
)
from ouroboros.verbs.parts import parse_with_parts, refuse_idle
from ouroboros.verbs.show import named

if TYPE_CHECKING:
    from ouroboros.train.begin import Source
    from ouroboros.train.session import RunResult

Options = TypeVar("Options", bound="RecipeOptions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """A recipe with what is changed of it, its text and its budget, for the verbs that train one."""

    recipe: tyro.conf.Positional[str]
    """Recipe name, see `ouroboros recipes`."""
    out: Path
    """Run directory; must be new or empty."""
    sources: Annotated[list[str], tyro.conf.arg(name="data")] = dataclasses.field(default_factory=list)
    """Sources: files, directories, globs, python:, periodic:, needle: or hf:NAME, each with an optional =WEIGHT."""
    size: str | None = None
    """The size: tiny, small, base or another one that `ouroboros recipes` lists. None lets the hardware choose among a
    recipe's presets, and means small for recipes without them."""
    steps: int | None = None
    """Stop after this many optimiser steps."""
    tokens: int | None = None
    """Stop after this many training tokens."""
    minutes: float | None = None
    """Stop after this many minutes."""
    seed: int | None = None
    """Seed of initialisation, order and dropout."""
    quiet: Quiet = False
    json: Json = False
    model: ModelSpec = dataclasses.field(default_factory=ModelSpec)
    optim: OptimSpec = dataclasses.field(default_factory=OptimSpec)
    train: TrainSpec = dataclasses.field(default_factory=TrainSpec)
    text: Annotated[DataSpec, tyro.conf.arg(name="data")] = dataclasses.field(default_factory=DataSpec)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(RecipeOptions):
    """Train a recipe on text. Everything of the recipe can be set: --model.*, --optim.*, --train.*, --data.*"""

    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Begin from the weights of this model, a run directory or a transformers directory, and read text by its
    tokenizer. What the recipe adds begins at its own start. The sizes of the two have to be the same."""
    from_blocks: str | None = None
    """With --from, where the two have different numbers of blocks: for each block of the recipe the number of the
    block that it takes, or new; for example 0-3,new,4-8."""
    from_partly: bool = False
    """With --from: leave weights of that model that have no place in the recipe's. Otherwise they are an error."""


class Given(NamedTuple, Generic[Options]):
    """What a command line asks for."""

    options: Options
    recipe: Recipe
    default: Recipe
    """The recipe without what is changed of it."""
    choice: str
    """One line that says which size the hardware chose, if it did."""


def read_recipe(cls: type[Options], verb: str, arguments: Sequence[str]) -> Given[Options]:
    """The options of ``verb`` and the recipe that they make.

    Raises:
        OuroborosError: an unknown recipe, size or option, no text, or an option that changes nothing.
    """
    default, choice = _default(*named(arguments))
    options = _parse(cls, verb, arguments, default)
    if options.recipe != default.name:  # the recipe came after an option
        default, choice = _default(options.recipe, options.size)
        options = _parse(cls, verb, arguments, default)
    check(bool(options.sources), f"{verb}: name the text with --data, for example --data notes.txt or --data python:")
    given = {k: getattr(options, k) for k in ("steps", "tokens", "minutes", "seed") if getattr(options, k) is not None}
    recipe = Recipe(
        name=default.name,
        description=default.description,
        model=options.model,
        data=dataclasses.replace(options.text, sources=tuple(options.sources)),
        optim=options.optim,
        train=dataclasses.replace(options.train, **given),
    )
    refuse_idle(recipe, default, arguments)
    return Given(options, recipe, default, choice)


def train(arguments: Sequence[str]) -> int:
    """The verb ``train``."""
    options, recipe, default, choice = read_recipe(TrainOptions, "train", arguments)
    check(
        options.source is not None or not (options.from_blocks or options.from_partly),
        "train: --from-blocks and --from-partly change nothing here; they need --from MODEL",
    )
    log_to_stderr()
    quiet_transformers()
    source = None
    if options.source is not None:
        check(
            recipe.data.tokenizer == default.data.tokenizer,
            "train: --from brings the tokenizer of its model; leave --data.tokenizer out",
        )
        source, recipe = _source(options, recipe)
    from torch.distributed import get_node_local_rank

    from ouroboros.train.log import Progress
    from ouroboros.train.run import start

    if choice and not options.quiet and get_node_local_rank(fallback_rank=0) == 0:
        sys.stderr.write(f"{choice}\n")
    result = start(recipe, options.out, source=source, progress=Progress(quiet=options.quiet))
    return _report(result, options.json)


def _source(options: TrainOptions, recipe: Recipe) -> tuple[Source, Recipe]:
    """The model to begin from, and the recipe with its tokenizer."""
    from ouroboros.api import open_model
    from ouroboros.convert.donors import record_beside
    from ouroboros.train.begin import Source

    opened = open_model(options.source or Path())
    beside = record_beside(opened.path)
    source = Source(str(options.source), opened.model, options.from_blocks, options.from_partly, beside)
    bytes_alone = opened.recipe is not None and opened.recipe.data.tokenizer == "bytes"  # they need no file
    name = "bytes" if bytes_alone else str(opened.directory)
    return source, dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tokenizer=name))


def _default(name: str, size: str | None) -> tuple[Recipe, str]:
    """The recipe, and one line that says which size the hardware chose, if it did."""
    choices = presets(name)
    if size is not None or not choices:
        return make_recipe(name, size or "small"), ""
    from ouroboros.train.hardware import choose_size

    size, reason = choose_size(choices)
    return make_recipe(name, size), f"{name}: size {size} ({reason}); choose another with --size"


def _parse(cls: type[Options], verb: str, arguments: Sequence[str], default: Recipe) -> Options:
    start_from = cls(
        recipe=tyro.MISSING,
        out=tyro.MISSING,
        model=default.model,
        optim=default.optim,
        train=default.train,
        text=default.data,
    )
    return parse_with_parts(cls, verb, collect(arguments, "--data"), start_from, others=RECIPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """Continue an interrupted run from its newest good checkpoint."""

    run: Run
    allow_changes: bool = False
    """Go on although the recipe differs from the checkpoint's; every change is named."""
    quiet: Quiet = False
    json: Json = False
    model: ModelSpec = dataclasses.field(default_factory=ModelSpec)
    optim: OptimSpec = dataclasses.field(default_factory=OptimSpec)
    train: TrainSpec = dataclasses.field(default_factory=TrainSpec)
    data: DataSpec = dataclasses.field(default_factory=DataSpec)


def _parse_resume(arguments: Sequence[str], recipe: Recipe) -> ResumeOptions:
    start_from = ResumeOptions(
        run=tyro.MISSING, model=recipe.model, optim=recipe.optim, train=recipe.train, data=recipe.data
    )
    runs = [word for word in arguments if Path(word).is_dir()]
    return parse_with_parts(ResumeOptions, "resume", arguments, start_from, others=runs)


def resume(arguments: Sequence[str]) -> int:
    """The verb ``resume``."""
    if not arguments or arguments[0].startswith("-") or "--help" in arguments or "-h" in arguments:
        # The run is not the first word, or there is none: any recipe's defaults serve to find it, or to say so.
        run = _parse_resume(arguments, make_recipe("loop")).run
    else:
        run = Path(arguments[0])
    from ouroboros.train.log import Progress
    from ouroboros.train.run import resume as resume_run
    from ouroboros.train.rundir import RunDirectory

    saved = RunDirectory(run).read_recipe()
    options = _parse_resume(arguments, saved)
    recipe = dataclasses.replace(
        saved, model=options.model, optim=options.optim, train=options.train, data=options.data
    )
    refuse_idle(recipe, saved, arguments)
    log_to_stderr()
    quiet_transformers()
    result = resume_run(
        options.run, recipe=recipe, allow_changes=options.allow_changes, progress=Progress(quiet=options.quiet)
    )
    return _report(result, options.json)


def _report(result: RunResult, as_json: bool) -> int:
    """Say how the session ended; the status tells a finished run from an interrupted one."""
    if result.is_main:
        _announce(result, as_json)
    if result.finished:
        return 0
    return signal_status(result.reason)


def _announce(result: RunResult, as_json: bool) -> None:
    c = result.counters
    if as_json:
        emit_json(
            {
                "run": str(result.run),
                "finished": result.finished,
                "stopped_by": result.reason,
                "stopped_because": result.message,
                "exported_step": result.exported_step,
                "loss": result.loss,
                **dataclasses.asdict(c),
            }
        )
    elif result.finished:
        best = "" if c.best_bits_per_byte is None else f", best validation {c.best_bits_per_byte:.4f} bits/byte"
        say(f"{result.run}: finished, {c.step:,} steps, {c.tokens:,} tokens, {c.seconds / 60:.1f} minutes{best}")
        if result.message is not None:
            say(f"stopped early: {result.message}")
        if result.exported_step != c.step:
            say(f"the model is that of step {result.exported_step:,}, the best validation")
    else:
        say(f"{result.run}: stopped by {result.reason} at step {c.step:,}; go on with `ouroboros resume {result.run}`")
