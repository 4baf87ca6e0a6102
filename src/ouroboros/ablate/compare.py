"""Does a recipe pay? It and its plain twins, equal in one thing, trained with paired seeds and judged.

A comparison is a study (:mod:`ouroboros.ablate.runner`) whose control is the recipe and whose arms are the twins. The
verdict is of the recipe against the better twin, the one with fewer bits per byte.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

from ouroboros.ablate.cells import NEAR, pack_again
from ouroboros.ablate.changes import fingerprint
from ouroboros.ablate.rates import training_rates
from ouroboros.ablate.record import Result
from ouroboros.ablate.runner import RATES, prepared_text, reasons, run_study, study_directory
from ouroboros.ablate.statistics import Outcome, paired_runs
from ouroboros.ablate.study import Arm, Packing, Stage, Study
from ouroboros.ablate.twins import Size, arm, opponent, twins_of
from ouroboros.accounting import cost
from ouroboros.config import Recipe
from ouroboros.data.prepared import PreparedData
from ouroboros.errors import check
from ouroboros.train.precision import choose_device, choose_dtype, compile_pays, expected_seconds
from ouroboros.train.run import resolve
from ouroboros.train.stop import check_budget

Match = Literal["parameters", "bytes", "flops", "time"]
MATCHES: tuple[Match, ...] = ("parameters", "bytes", "flops", "time")
EQUAL: dict[Match, str] = {
    "parameters": "stored parameters",
    "bytes": "packed bytes",
    "flops": "training FLOPs",
    "time": "training time",
}
"""What is equal, in words."""
UNEQUAL = 0.1
"""The share by which measured times of training may differ and still be called equal."""
SAME_BYTES = 0.01
"""The share by which packed files of one seed may differ and still be called equally large."""
ANSWER = "compare.json"
"""In the directory of a comparison that is complete."""
SPLIT: Literal["test"] = "test"
"""The held-out part that is scored."""
BITS, BESIDE = 6, 4096
"""The budget of packed files unless it is given: bits for each stored number, and bytes for what else is in a file."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is asked."""

    recipe: Recipe
    """With its text and budget; its seed is the first one."""
    against: Recipe | None = None
    """The recipe in place of plain twins."""
    matches: tuple[Match, ...] = ("parameters",)
    seeds: int = 3
    budget: int | None = None
    """Bytes of the packed files; None packs where bytes are to be equal alone."""

    def __post_init__(self) -> None:
        check(self.seeds >= 1, f"compare: --seeds must be >= 1, got {self.seeds}")
        check(self.budget is None or self.budget >= 1, f"compare: --budget must be >= 1, got {self.budget}")
        check_budget(self.recipe.train)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One arm: means over its seeds."""

    name: str
    layout: str
    parameters: int
    bytes: int
    """Of the file of weights, or of the packed file."""
    bits_per_byte: float
    steps: int
    seconds: float
    """Of training."""


@dataclass(frozen=True, kw_only=True)
class Twin(Side):
    """A twin, and the recipe minus it in bits per byte; the interval is 95 % and None with fewer than two seeds."""

    difference: float
    low: float | None
    high: float | None
    bootstrap_low: float | None
    bootstrap_high: float | None
    by_seed: tuple[float, ...]
    verdict: Outcome
    """Of the recipe against this twin."""
    deviation: float
    """By which share of the recipe's the twin has more of what should be equal, as measured."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The verdict at one match."""

    match: Match
    verdict: Outcome
    """Of the recipe against the better twin, as are the next four; none where what should be equal is not."""
    sentence: str
    difference: float
    low: float | None
    high: float | None
    better: str
    """The name of the better twin."""
    recipe: Side
    twins: tuple[Twin, ...]
    seeds: tuple[int, ...]
    scored_bytes: int
    """Of held-out text."""
    scored_sha256: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def compare(
    asked: Comparison, out: Path, *, processes: int = 1, tell: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Run a comparison in ``out``, or what is left of it; returns what it found at each match.

    Each is :class:`Judged` as JSON values, and has the same of packed files as ``packed``. Where packed bytes are
    equal these are the answer, and what was before packing is ``unpacked``. ``left_out`` names twins that had something
    dead in them or diverged, with the reason.

    Args:
        asked: what to compare.
        out: a new directory, or that of the same comparison.
        processes: cells that run at the same time.
        tell: receives a line for each cell, and for what is not as equal as it should be.

    Raises:
        Stopped: a signal asked to stop; what was done is kept.
        OuroborosError: no twin, a text that cannot be used, other results in ``out``.
    """
    with study_directory(out):
        data = prepared_text(out, asked.recipe.data)[1]
        recipe = _with_steps(resolve(asked.recipe, data), data, out, processes)
        arms = {
            match: _arms(match, dataclasses.replace(asked, recipe=recipe), data, out, processes)
            for match in asked.matches
        }
    found: dict[str, Arm] = {}
    for each in (each for twins in arms.values() for each in twins):
        found.setdefault(fingerprint(each.recipe), each)  # several matches may share a twin
    study = Study(
        name="compare",
        question=f"Is {recipe.name} better than a plain model?",
        control=Arm(name=recipe.name, recipe=recipe),
        arms=tuple(found.values()),
        seeds=tuple(range(recipe.train.seed, recipe.train.seed + asked.seeds)),
        stages=(Stage(name="runs", split=SPLIT),),
        packing=_packing(asked, recipe),
    )
    left_out: dict[str, str] = {}
    results = run_study(study, out, workers=processes, tell=tell, dead=left_out)
    if study.packing is not None and "bytes" in asked.matches:
        with study_directory(out):
            results = _equally_large(results, study.packing, out, tell)
    runs = {each.name: [r for r in results if r.arm == each.name] for each in study.every_arm}
    for each in study.arms:
        lost = sorted({r.seed for r in runs[recipe.name]} - {r.seed for r in runs[each.name]})
        if lost and each.name not in left_out:
            left_out[each.name] = f"it diverged with seed {', '.join(map(str, lost))}"
    answers = []
    for match, twins in arms.items():
        names = [found[fingerprint(twin.recipe)].name for twin in twins]
        rivals = {name: runs[name] for name in names if name not in left_out}
        check(
            bool(rivals),
            f"no twin is left at equal {EQUAL[match]}: {reasons(left_out)}",
        )
        without = {name: left_out[name] for name in names if name in left_out}
        answers.append(_answer(match, runs[recipe.name], rivals) | {"left_out": without})
    return answers


def _packing(asked: Comparison, recipe: Recipe) -> Packing | None:
    """How models are packed: into equally many bytes, by default about those of six bits for each number."""
    if asked.budget is None and "bytes" not in asked.matches:
        return None
    return Packing(budget=asked.budget or cost(recipe.model).parameters * BITS // 8 + BESIDE)


def _equally_large(
    results: Sequence[Result], packing: Packing, out: Path, tell: Callable[[str], None]
) -> Sequence[Result]:
    """The results with files that are equally large within 1 %.

    A model whose file is smaller than the budget, because it fits with all its bits, cannot fill it; those with larger
    files are packed again, into as many bytes as the smallest one has.
    """
    sizes = [result.packed.bytes for result in results if result.packed is not None and result.packed.feasible]
    if len(sizes) < len(results):
        return results  # a budget that is too small, which the verdict names
    most, equal = int(min(sizes) / NEAR), []
    for result, size in zip(results, sizes, strict=True):
        if size > most:
            tell(f"{result.cell}: packed again, from {size:,} bytes into those of the smallest file, {min(sizes):,}")
            result = pack_again(out / result.run, result, dataclasses.replace(packing, budget=most), SPLIT)
        equal.append(result)
    return equal


def _with_steps(recipe: Recipe, data: PreparedData, out: Path, processes: int) -> Recipe:
    """The recipe with its budget in steps, so that every arm reads the same text in the same order."""
    train, tokens = recipe.train, recipe.train.batch_size * recipe.data.sequence_length
    if train.minutes is not None:
        wanted = 60 * train.minutes * _rates([recipe], data, out, processes)[0] / tokens
    else:
        wanted = train.steps or math.ceil((train.tokens or 0) / tokens)
    return _lasting(recipe, wanted)


def _lasting(recipe: Recipe, steps: float) -> Recipe:
    budget = {"minutes": None, "tokens": None, "steps": max(1, round(steps))}
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **budget))


def _rates(recipes: Sequence[Recipe], data: PreparedData, out: Path, processes: int) -> list[float]:
    """Training tokens per second with the threads that a cell will have."""
    threads, device = max(1, torch.get_num_threads() // processes), choose_device()
    same: dict[str, Any] = {"threads": threads, "compile": recipes[0].train.compile}
    if same["compile"] == "auto":  # as the study chooses for all, by its control
        dtype = choose_dtype(recipes[0].train, device)
        same["compile"] = "on" if compile_pays(expected_seconds(recipes[0], device, dtype), device, dtype) else "off"
    pinned = [dataclasses.replace(r, train=dataclasses.replace(r.train, **same)) for r in recipes]
    return training_rates(pinned, data, out / RATES)


def _arms(match: Match, asked: Comparison, data: PreparedData, out: Path, processes: int) -> list[Arm]:
    """The twins at one match."""
    recipe, size = asked.recipe, "flops" if match == "flops" else "parameters"
    twins = _sized(asked, size)
    if match != "time":
        return twins
    own, *others = _rates([recipe, *(twin.recipe for twin in twins)], data, out, processes)
    steps, timed = recipe.train.steps or 0, []
    for twin, rate in zip(twins, others, strict=True):
        # A smaller difference is within what the measurement varies by.
        longer = twin.recipe if abs(rate / own - 1) < 0.01 else _lasting(twin.recipe, steps * rate / own)
        timed.append(arm(f"{twin.name}-timed", recipe, longer))
    return timed


def _sized(asked: Comparison, size: Size) -> list[Arm]:
    if asked.against is None:
        return twins_of(asked.recipe, size)
    found = opponent(asked.recipe, asked.against, size)
    # Two arms are not called alike, also where one recipe is compared with itself, or meets the other in two sizes.
    taken = found.name == asked.recipe.name
    name = f"{found.name}-again" if taken else found.name
    return [dataclasses.replace(found, name=name if size == "parameters" else f"{name}-{size}")]


def _answer(match: Match, recipe: Sequence[Result], twins: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """What :func:`compare` returns of one match."""
    plain = judge(match, recipe, twins).to_dict()
    if recipe[0].packed is None:
        return plain
    packed = judge(match, recipe, twins, packed=True).to_dict()
    return {**packed, "packed": packed, "unpacked": plain} if match == "bytes" else {**plain, "packed": packed}


def judge(
    match: Match, recipe: Sequence[Result], twins: Mapping[str, Sequence[Result]], *, packed: bool = False
) -> Judged:
    """The verdict from the runs of a recipe and its twins.

    Args:
        match: what is equal.
        recipe: its runs, one of each seed.
        twins: theirs, by name.
        packed: compare the packed files.

    Raises:
        OuroborosError: a seed is missing on one side, or a run was not packed.
    """
    lines, own, reasons = [], _side(recipe[0].arm, recipe, packed), []
    for name, runs in twins.items():
        pair = paired_runs(recipe, runs, packed=packed)
        deviation = fmean(_quantity(match, r) for r in runs) / fmean(_quantity(match, r) for r in recipe) - 1
        side = dataclasses.asdict(_side(name, runs, packed))
        names = ("difference", "low", "high", "bootstrap_low", "bootstrap_high", "by_seed")
        reasons.append(_unequal(match, recipe, runs, deviation, packed))
        verdict: Outcome = "cannot tell" if reasons[-1] else pair.verdict
        facts = {n: getattr(pair, n) for n in names}
        lines.append(Twin(**side, **facts, verdict=verdict, deviation=deviation))
    best = min(lines, key=lambda line: line.bits_per_byte)
    said = sentence(own.name, best, f"equal {EQUAL[match]}{', packed' if packed else ''}", len(twins))
    unequal = next(filter(None, reasons), "")
    return Judged(
        match=match,
        verdict="cannot tell" if unequal else best.verdict,
        sentence=f"Cannot tell at equal {EQUAL[match]}: {unequal}." if unequal else said,
        difference=best.difference,
        low=best.low,
        high=best.high,
        better=best.name,
        recipe=own,
        twins=tuple(lines),
        seeds=tuple(sorted(result.seed for result in recipe)),
        scored_bytes=recipe[0].score.bytes,
        scored_sha256=recipe[0].score.data_sha256,
    )


def _unequal(match: Match, recipe: Sequence[Result], twin: Sequence[Result], deviation: float, packed: bool) -> str:
    """Why what should be equal is not, or nothing: no verdict may rest on that."""
    name, rival = recipe[0].arm, twin[0].arm
    files = [(r, r.packed) for r in (*recipe, *twin) if packed and r.packed is not None]
    if large := [(result, file) for result, file in files if not file.feasible]:
        result, file = large[0]
        return (
            f"with seed {result.seed} the smallest packed file of {result.arm} has {file.bytes:,} bytes, which is above"
            " the budget; give a larger --budget, in another --out"
        )
    if match == "time" and abs(deviation) > UNEQUAL:
        return (
            f"{rival} turned out to train {100 * deviation:+.0f} % longer than {name}, because the machine changed its"
            " speed; repeat this on an idle one, in another --out"
        )
    if match == "bytes" and packed:
        own = {result.seed: _quantity(match, result) for result in recipe}
        shares = [(_quantity(match, result) / own[result.seed] - 1, result.seed) for result in twin]
        share, seed = max(shares, key=lambda one: abs(one[0]))
        if abs(share) > SAME_BYTES:
            return (
                f"with seed {seed} the packed file of {rival} is {100 * abs(share):.1f} %"
                f" {'larger' if share > 0 else 'smaller'} than that of {name}, and no choice of bits brought them"
                " within 1 %; give another --budget, in another --out"
            )
    return ""


def _side(name: str, runs: Sequence[Result], packed: bool) -> Side:
    bits = [r.packed.score.bits_per_byte if packed and r.packed else r.bits_per_byte for r in runs]
    size = [r.packed.bytes if packed and r.packed else r.weights_bytes for r in runs]
    return Side(
        name=name,
        layout=runs[0].layout,
        parameters=runs[0].parameters,
        bytes=round(fmean(size)),
        bits_per_byte=fmean(bits),
        steps=runs[0].steps,
        seconds=fmean(r.seconds for r in runs),
    )


def _quantity(match: Match, result: Result) -> float:
    """What should be equal, as it turned out."""
    if match == "parameters":
        return result.parameters
    if match == "bytes":
        return result.packed.bytes if result.packed is not None else result.weights_bytes
    return result.flops_per_token * result.tokens if match == "flops" else result.seconds


def sentence(name: str, twin: Twin, equal: str, twins: int) -> str:
    """The verdict in one sentence."""
    rival = twin.name + (", the better twin" if twins > 1 else "")
    if twin.low is None or twin.high is None:
        apart = f"the scores differ by {twin.difference:+.4f}"
        return f"Cannot tell at {equal}: one seed has no interval. Between {name} and {twin.name} {apart}."
    if twin.low == twin.high == 0:
        return f"Cannot tell at {equal}: {name} and {rival} score exactly the same."
    interval = f"{twin.low:+.4f} to {twin.high:+.4f} over {len(twin.by_seed)} seeds"
    more = f"{abs(twin.difference):.4f} bits per byte {'less' if twin.difference < 0 else 'more'} than {rival}"
    if twin.verdict == "cannot tell":
        return f"Cannot tell at {equal}: {name} needs {more}, but the 95 % interval, {interval}, contains zero."
    return f"{name} {'wins' if twin.verdict == 'win' else 'loses'} at {equal}: it needs {more} (95 % {interval})."
