"""Runs a study: every cell once, control and arms in turn, in one process or several.

The study's directory holds ``study.json`` (the study, and what its cells have in common), ``data/`` (prepared texts)
and ``STAGE/ARM/seed-N/``, which are run directories. The same study is given again to go on with it, or to add arms,
seeds and stages.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ouroboros.ablate.alive import dead_arms
from ouroboros.ablate.cells import Cell, Stopped, held_out, result_of, train_hash
from ouroboros.ablate.changes import differences
from ouroboros.ablate.cluster import run_on_cluster
from ouroboros.ablate.pool import run_all
from ouroboros.ablate.record import (
    FIXED,
    Result,
    check_comparable,
    code_version,
    environment,
)
from ouroboros.ablate.statistics import Paired, paired_runs
from ouroboros.ablate.study import Arm, Stage, Study
from ouroboros.api import build
from ouroboros.config import DataSpec, Recipe, from_dict, to_dict
from ouroboros.data.documents import name_formats
from ouroboros.data.prepared import PreparedData
from ouroboros.data.shards import prepare
from ouroboros.errors import OuroborosError, check
from ouroboros.eval.score import data_hash, with_text
from ouroboros.files import read_object, remove_leftovers, write_whole
from ouroboros.optim import choose_muon_dtype
from ouroboros.train.lock import run_lock
from ouroboros.train.precision import choose_device, choose_dtype, compile_pays, expected_seconds
from ouroboros.train.run import make_directory

MANIFEST, TEXTS, RATES, ALIVE = "study.json", "data", "rates.json", "alive.json"
"""In a study's directory: the study, prepared texts, how fast recipes train where that was measured, and what was found
about arms before they cost anything."""
Tell = Callable[[str], None]


def run_study(
    study: Study,
    out: Path,
    *,
    workers: int = 1,
    cluster: str | None = None,
    tell: Tell = lambda line: None,
    dead: dict[str, str] | None = None,
) -> tuple[Result, ...]:
    """Run what is not there yet of ``study`` in the directory ``out``; returns the results of all stages.

    Arms that are dead in part, or that compute the same as the control, are said and left out, and so are the seeds
    with which an arm diverges.

    Args:
        study: what to run.
        out: a new directory, or that of the same study.
        workers: processes that run cells at the same time, each with its share of this process's threads. One means
            this process.
        cluster: run cells as tasks of the Ray cluster at this address instead, see
            :func:`ouroboros.ablate.cluster.run_on_cluster`.
        tell: receives a line for each cell.
        dead: receives the arms that are left out, each with the reason.

    Raises:
        Stopped: a signal asked to stop; what was done is kept.
        OuroborosError: the text cannot be used; the control is dead in part, or every arm is dead; ``out`` holds
            results of other data, code or settings; a cell failed.
    """
    check(workers >= 1, f"--workers must be >= 1, got {workers}")
    with study_directory(out):
        threads = max(1, torch.get_num_threads() // workers)
        cells = _Cells(study, out, threads)
        lifeless = dead_arms(study, cells.texts, out / ALIVE, tell)
        check(len(lifeless) < len(study.arms), f"study {study.name!r}: every arm is dead: {reasons(lifeless)}")
        if dead is not None:
            dead |= lifeless
        run = functools.partial(run_all, workers=workers)
        if cluster is not None:
            run = functools.partial(run_on_cluster, address=cluster, workers=workers)
        found: list[Result] = []
        names = [arm.name for arm in study.every_arm if arm.name not in lifeless]
        for number, stage in enumerate(study.stages):
            arms = [arm for arm in study.every_arm if arm.name in names and not (number and arm.repeat)]
            results = _run_stage(stage, cells.of(stage, arms), run, tell)
            found += results
            names = [study.control.name, *promoted(study, stage, results)]
        return tuple(found)


@contextlib.contextmanager
def study_directory(out: Path) -> Iterator[None]:
    """Within the context this process alone works in ``out``, which is made where there is none.

    Raises:
        OuroborosError: there is something else, or another process has it.
    """
    make_directory(out)
    others = [e.name for e in out.iterdir() if not e.name.startswith(".") and e.name not in (TEXTS, RATES)]
    check(
        (out / MANIFEST).is_file() or not others, f"{out} is no study's directory and not empty; choose another --out"
    )
    with run_lock(out):
        remove_leftovers(out)
        yield


def prepared_text(out: Path, spec: DataSpec) -> tuple[str, PreparedData]:
    """The text of a recipe, prepared once for all that read the same, and its place in ``out``."""
    spec = name_formats(spec)
    values = {name: value for name, value in to_dict(spec).items() if name != "sequence_length"}
    place = f"{TEXTS}/{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]}"
    return place, prepare(spec, out / place)


def _run_stage(stage: Stage, cells: Sequence[Cell], run: Callable[..., None], tell: Tell) -> list[Result]:
    """The results of a stage, in the order of its cells."""
    done: dict[str, Result] = {}
    failed: list[str] = []

    def take(cell: Cell, answer: Mapping[str, Any]) -> None:
        if "result" in answer:
            result = done[cell.run] = from_dict(Result, answer["result"], where=cell.name)
            packed = "" if result.packed is None else f", packed {result.packed.score.bits_per_byte:.4f}"
            tell(
                f"{cell.name}: {result.bits_per_byte:.4f} bits/byte{packed}, {result.seconds:.0f} s of training"
                f" ({len(done)} of {len(cells)})"
            )
        elif "stopped" in answer:
            raise Stopped(f"{answer['error']}; the same command goes on from here", answer["stopped"])
        elif "diverged" in answer:
            tell(f"{answer['error']}; the study goes on without this arm")
        elif answer["lasting"]:
            raise OuroborosError(f"{answer['error']}; what was done is kept, and the same command goes on from here")
        else:
            failed.append(answer["error"])
            tell(answer["error"])

    waiting = []
    for cell in cells:
        result = result_of(cell)
        if result is None:
            waiting.append(cell)
        else:
            done[cell.run] = result
    if waiting and done:
        tell(f"stage {stage.name}: {len(done)} of {len(cells)} cells are there already")
    if waiting:
        run(waiting, take=take)
    check(
        not failed, f"{len(failed)} of {len(cells)} cells of stage {stage.name} failed: {failed[0] if failed else ''}"
    )
    results = [done[cell.run] for cell in cells if cell.run in done]
    check_comparable(results)
    return results


def promoted(study: Study, stage: Stage, results: Sequence[Result]) -> list[str]:
    """The arms that the stage's gate lets through to the next stage; those that diverged are not among them.

    Raises:
        OuroborosError: the control has no results, or lacks a seed.
    """
    compared = {name: pair.difference for name, pair in pairs(study, stage, results).items()}
    found = {arm.name: compared[arm.name] for arm in study.arms if arm.name in compared}
    return list(found) if stage.gate is None else stage.gate.passing(found)


def pairs(study: Study, stage: Stage, results: Sequence[Result], *, packed: bool = False) -> dict[str, Paired]:
    """Each arm of a stage minus the control, by name; an arm that diverged with one of the seeds is left out.

    Raises:
        OuroborosError: the control has no results, or lacks a seed.
    """
    runs: dict[str, list[Result]] = {}
    for result in results:
        if result.stage == stage.name:
            runs.setdefault(result.arm, []).append(result)
    control, seeds = runs.pop(study.control.name, []), set(study.seeds_of(stage))
    missing = sorted(seeds - {result.seed for result in control})
    check(
        not missing,
        f"stage {stage.name}: the control {study.control.name!r} has no result of seed {missing[:1]}: without it there"
        " is nothing to compare with; a control that diverges needs another recipe",
    )
    whole = {name: found for name, found in runs.items() if {result.seed for result in found} >= seeds}
    return {name: paired_runs(found, control, packed=packed) for name, found in whole.items()}


class _Cells:
    """Makes the cells of a study, once its text is prepared and nothing in its directory belongs to another one."""

    def __init__(self, study: Study, out: Path, threads: int) -> None:
        self.study, self.out, self.threads = study, out, threads
        path = out / MANIFEST
        stored = _stored(path) if path.is_file() else None
        self._data: dict[str, str] = {}
        self.texts: dict[str, PreparedData] = {}
        """By the name of an arm."""
        self._hashes: dict[str, dict[str, str]] = {}
        hashes = {arm.name: self._prepare(arm) for arm in study.every_arm}
        _check_held_out(study, hashes)
        self.precisions = stored["precisions"] if stored else _precisions(study.control.recipe)
        kept = stored.get("compile", {}) if stored else {}
        self.compiles: dict[str, Literal["on", "off"]] = {
            stage.name: kept.get(stage.name) or self._compiles(stage) for stage in study.stages
        }
        now = {
            "study": to_dict(study),
            "code": code_version(),
            "environment": environment(threads, *self.precisions),
            "precisions": self.precisions,
            "compile": {**kept, **self.compiles},
            "data": hashes,
        }
        if stored is not None and any(out.glob("*/*/seed-*")):
            _refuse_other(stored, now, out)
        write_whole(path, (json.dumps(now, indent=2) + "\n").encode())

    def of(self, stage: Stage, arms: Sequence[Arm]) -> list[Cell]:
        """The cells of a stage, all arms of a seed before the next seed."""
        control = self.study.control.recipe
        return [
            Cell(
                root=str(self.out.resolve()),
                run=f"{stage.name}/{arm.name}/seed-{seed}",
                stage=stage.name,
                arm=arm.name,
                seed=seed,
                recipe=stage.recipe(arm.recipe, seed),
                data=self._data[arm.name],
                precision=self.precisions[0],
                muon_precision=self.precisions[1],
                compile=self.compiles[stage.name],
                threads=self.threads,
                processes=arm.processes,
                split=stage.split,
                window=control.data.sequence_length,
                score_bytes=self.study.score_bytes,
                packing=self.study.packing,
            )
            for seed in self.study.seeds_of(stage)
            for arm in arms
        ]

    def _compiles(self, stage: Stage) -> Literal["on", "off"]:
        """Whether the runs of a stage are compiled, by its control: near the limit, runs could choose differently."""
        recipe = stage.recipe(self.study.control.recipe, self.study.seeds_of(stage)[0])
        dtype = torch.bfloat16 if self.precisions[0] == "bf16" else torch.float32
        device = choose_device()
        return "on" if compile_pays(expected_seconds(recipe, device, dtype), device, dtype) else "off"

    def _prepare(self, arm: Arm) -> dict[str, str]:
        """Prepare the text of an arm, shared with those that read the same; the hashes of its parts."""
        place, data = prepared_text(self.out, arm.recipe.data)
        self._data[arm.name], self.texts[arm.name] = place, data
        if place not in self._hashes:
            splits = sorted({stage.split for stage in self.study.stages})
            texts = {split: data_hash(with_text(held_out(data, split), self.study.score_bytes)) for split in splits}
            self._hashes[place] = {"train": train_hash(data), **texts}
        return self._hashes[place]


def _precisions(recipe: Recipe) -> list[Any]:
    """The precision of training, and that of Muon, for all runs: measured anew, equal runs could choose otherwise."""
    torch.manual_seed(0)
    dtypes = (choose_dtype(recipe.train, choose_device()), choose_muon_dtype(build(recipe), recipe.optim))
    return ["bf16" if dtype == torch.bfloat16 else "fp32" for dtype in dtypes]


def _check_held_out(study: Study, hashes: Mapping[str, Mapping[str, str]]) -> None:
    """All arms are scored on the same text, or they could not be compared."""
    control = hashes[study.control.name]
    for name, parts in hashes.items():
        other = [part for part in parts if part != "train" and parts[part] != control[part]]
        check(
            not other,
            f"arm {name!r}: its {other[0] if other else ''} text is not that of the control {study.control.name!r};"
            " give both the same sources and the same shares of held-out text",
        )


def _refuse_other(stored: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Refuse to mix the results in ``out`` with those of other data, code, machine or settings.

    Raises:
        OuroborosError: names all that differs.
    """
    found = []
    if stored["code"] != now["code"]:
        found.append(f"the code was {stored['code']} and is {now['code']}")
    for name in FIXED:
        before, after = stored["environment"].get(name), now["environment"][name]
        if before != after:
            found.append(f"{name} was {before} and is {after}")
    for arm, parts in stored["data"].items():
        for part, digest in now["data"].get(arm, {}).items():
            if parts.get(part, digest) != digest:
                found.append(f"the {part} text of arm {arm} was {parts[part][:12]} and is {digest[:12]}")
    found += _other_settings(stored["study"], now["study"])
    check(
        not found,
        f"{out}: holds results that cannot be mixed with new ones: {'; '.join(found)}; undo that, or choose another"
        " --out",
    )


def _stored(path: Path) -> dict[str, Any]:
    """What a study's directory says of itself."""
    try:
        return read_object(path)
    except OuroborosError as error:
        raise OuroborosError(f"{path}: is damaged; choose another --out") from error


def _said(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items() if part is not None)
    return "none" if value is None else str(value)


def reasons(left_out: Mapping[str, str]) -> str:
    """Why arms were left out, in one line."""
    return "; ".join(f"{name}: {reason}" for name, reason in left_out.items())


def _other_settings(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two studies besides arms, seeds and stages that came or went."""
    found = [
        f"{n} was {_said(stored[n])} and is {_said(now[n])}" for n in ("packing", "score_bytes") if stored[n] != now[n]
    ]
    if stored["control"]["name"] != now["control"]["name"]:
        found.append(f"the control was {stored['control']['name']} and is {now['control']['name']}")
    before = {arm["name"]: arm for arm in (stored["control"], *stored["arms"])}
    for arm in (now["control"], *now["arms"]):
        if arm["name"] in before:
            counts = before[arm["name"]]["processes"], arm["processes"]
            found += [f"arm {arm['name']}: processes was {counts[0]} and is {counts[1]}"] if len({*counts}) > 1 else []
            recipes = [from_dict(Recipe, values["recipe"], where=MANIFEST) for values in (before[arm["name"]], arm)]
            changes = differences(*recipes)
            found += [f"arm {arm['name']}: {path} was {old} and is {new}" for path, (old, new) in changes.items()]
    stages = {stage["name"]: stage for stage in stored["stages"]}
    for stage in now["stages"]:
        for name, value in stages.get(stage["name"], {}).items():
            if name != "seeds" and value != stage[name]:
                found.append(f"stage {stage['name']}: {name} was {value} and is {stage[name]}")
    return found
