"""A report about a single run directory.

Sections that belong to one published system are entries of the registry's place ``sections``. The name of an entry
says what its section is about, as the end of the sentence "The page says nothing of ...". The entry makes a
:class:`~ouroboros.report.content.Section` of a :class:`Run`, or None if it has nothing to say of it. It raises
:class:`OuroborosError` if files that it needs are missing or damaged; the page then goes without and says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from ouroboros.accounting import cost, training_flops
from ouroboros.config import Recipe, to_json
from ouroboros.data.prepared import PreparedData
from ouroboros.errors import OuroborosError, check
from ouroboros.files import read_text
from ouroboros.registry import found, load
from ouroboros.report.content import Arm, LoopPoint, Report, Section
from ouroboros.report.curves import points
from ouroboros.report.data import data_section
from ouroboros.report.guard import guard_section
from ouroboros.report.loops import loops_section
from ouroboros.report.text import bits, finite, plural
from ouroboros.schedule import parse
from ouroboros.train.log import read_metrics
from ouroboros.train.rundir import RunDirectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run directory whose recipe and metrics have been read: what the functions of the sections are given."""

    directory: Path
    recipe: Recipe
    metrics: Sequence[Mapping[str, Any]]
    """The records of ``metrics.jsonl``."""

    @cached_property
    def data(self) -> PreparedData | None:
        """The prepared data, None if there is none.

        Raises:
            OuroborosError: it is damaged, or of another release.
        """
        place = RunDirectory(self.directory)
        return place.open_data() if place.has_data else None


def report_from_run(run_dir: Path | str) -> Report:
    """What a run directory tells: its ``recipe.json``, ``metrics.jsonl`` and, if present, ``eval.json``.

    Args:
        run_dir: made by ``ouroboros train``.

    Raises:
        OuroborosError: the directory or one of its files is missing or damaged.
    """
    place = RunDirectory(Path(run_dir))
    recipe = place.read_recipe()
    try:
        metrics = read_metrics(place.metrics_file)
    except OSError as error:
        raise OuroborosError(f"{place.metrics_file}: cannot read: {error.strerror}; the run is damaged") from None
    run = Run(place.path, recipe, metrics)
    trained = parse(recipe.model.layout).loops
    every, notes = _read_scores(place.scores_file), []
    keys = ("data_sha256", "window", "stride")  # those of the last score, with which others can be compared
    scores = [score for score in every if all(score.get(key) == every[-1].get(key) for key in keys)]
    if len(scores) < len(every):
        notes.append(
            f"eval.json holds {len(every) - len(scores)} more scores on other text or windows, not shown here."
        )
    final = next((score for score in reversed(scores) if score.get("loops") in (trained, None)), {})
    steps, values = points(metrics, "valid", "step", "bits_per_byte")
    if not metrics:
        notes.append("The run has not logged anything yet.")
    if not final and values:
        notes.append(
            f"The score is the last validation of the run (step {steps[-1]:,.0f}), on a part of the validation text and"
            " without an interval; `ouroboros eval` gives a full one."
        )
    notes += _incidents(metrics)
    arm = arm_of(recipe, metrics, final or ({"bits_per_byte": values[-1]} if values else {}))
    reached = f"{recipe.name} reaches {bits(arm.bits_per_byte)} bits per byte on held-out text."
    curve = loop_points(scores, trained)
    return Report(
        title=f"{run.directory.resolve().name}: {recipe.name}",
        headline="" if arm.bits_per_byte is None else reached,
        subtitle=recipe.description,
        environment=_facts(recipe, final),
        arms=[arm],
        loop_curve={recipe.name: curve} if len(curve) > 1 else {},
        sections=_sections(run, notes),
        notes=notes,
    )


def _sections(run: Run, notes: list[str]) -> list[Section]:
    """The sections on the data and the loops and those of the systems; ``notes`` says which cannot be made."""
    entries: dict[str, Callable[[Run], Section | None]] = {
        "its stability": guard_section,
        "the data": data_section,
        "what the loops do": loops_section,
    }
    entries |= {name: load(target) for name, target in found("sections").items()}
    sections, lost = [], []
    for name, entry in entries.items():
        try:
            sections.append(entry(run))
        except OuroborosError as error:
            logger.warning("the part about %s is left out: %s", name, error)
            lost.append(name)
    if lost:  # without the messages, which may hold a path of the machine
        notes.append(
            f"The page says nothing of {' or '.join(lost)}: files of the run that this takes are missing, damaged or"
            " written by another release."
        )
    return [section for section in sections if section is not None]


def _read_scores(path: Path) -> list[dict[str, Any]]:
    """The scores of ``eval.json``: a list of objects, or one object."""
    values: Any = None
    if not path.is_file():
        return []
    with suppress(ValueError, RecursionError):
        values = json.loads(read_text(path))
    scores = [values] if isinstance(values, dict) else values
    good = isinstance(scores, list) and all(isinstance(one, dict) for one in scores)
    good = good and all(finite(one.get("bits_per_byte")) is not None for one in scores)
    check(good, f"{path}: expected scores as JSON; run `ouroboros eval` again or remove the file")
    return scores


def _incidents(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on an early end of the training and one on validations that failed."""
    found, last = [], max((r["step"] for r in metrics if r.get("kind") == "train"), default=0)
    # One that was followed by training, after a resume with other settings, was not the end.
    if ends := [r for r in metrics if r.get("kind") == "early_stop" and r["step"] >= last]:
        found.append(f"Training stopped early, at step {ends[-1]['step']:,}: {ends[-1]['message']}.")
    if failed := [r for r in metrics if r.get("kind") == "valid_failed"]:
        # Without the message, which may hold a path of the machine: metrics.jsonl has it.
        found.append(f"{plural(len(failed), 'validation')} failed, so the curve has gaps.")
    return found


def loop_points(scores: Sequence[Mapping[str, Any]], trained: int) -> list[LoopPoint]:
    """One point for each loop count, the newest score of each; ``trained`` is the count of the training."""
    by_loops = {s["loops"]: s for s in scores if isinstance(s.get("loops"), int)}
    return [
        LoopPoint(loops, score["bits_per_byte"], *(_interval(score) or (None, None)), loops == trained)
        for loops, score in sorted(by_loops.items())
    ]


def _interval(score: Mapping[str, Any]) -> tuple[float, float] | None:
    interval = score.get("interval")
    low, high = map(finite, interval if isinstance(interval, list) and len(interval) == 2 else (None, None))
    return None if low is None or high is None else (low, high)


def arm_of(recipe: Recipe, metrics: Sequence[Mapping[str, Any]], score: Mapping[str, Any]) -> Arm:
    """A trained model by its resolved recipe, the records of its training, and its score as JSON or nothing."""
    # A causal window of T tokens attends to (T + 1) / 2 positions on average.
    context = (recipe.data.sequence_length + 1) // 2
    price = cost(recipe.model, context=context)
    names = ("tokens", "seconds", "tokens_per_second")
    tokens, seconds, speeds = (points(metrics, "train", "step", name)[1] for name in names)
    return Arm(
        name=recipe.name,
        description=recipe.description,
        layout=recipe.model.layout,
        parameters=price.parameters,
        stored_bytes=-(-price.parameters * 6 // 8),
        training_flops_per_token=training_flops(recipe.model, recipe.train.loops, context),
        tokens=int(tokens[-1]) if tokens else None,
        minutes=seconds[-1] / 60 if seconds else None,
        tokens_per_second=median(speeds) if speeds else None,
        bits_per_byte=finite(score.get("bits_per_byte")),
        interval=_interval(score),
        metrics=metrics,
        recipe=to_json(recipe),
    )


def _facts(recipe: Recipe, score: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "data": ", ".join(recipe.data.sources),
        "tokenizer": recipe.data.tokenizer,
        "seed": recipe.train.seed,
        "precision": recipe.train.precision,
    }
    names = {"bytes": "bytes scored", "window": "window", "stride": "stride", "data_sha256": "sha256 of the text"}
    facts.update({label: score[key] for key, label in names.items() if score.get(key) is not None})
    return facts
