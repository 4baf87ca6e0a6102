"""A report about a study's directory or a comparison's: who won, by how much, at what cost, and who was left out.

Differences are those of an arm minus the control, which in a comparison is the recipe, so above zero means that the
recipe is better than a twin.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ouroboros.ablate.alive import found_dead
from ouroboros.ablate.cells import DIVERGED, has_diverged
from ouroboros.ablate.changes import differences
from ouroboros.ablate.compare import ANSWER, EQUAL, Judged
from ouroboros.ablate.record import Result, check_comparable, read_result
from ouroboros.ablate.runner import ALIVE, MANIFEST
from ouroboros.ablate.study import Arm as StudyArm
from ouroboros.ablate.study import Stage, Study
from ouroboros.ablate.summary import summary
from ouroboros.config import from_dict, to_json
from ouroboros.errors import check
from ouroboros.files import read_object, read_text
from ouroboros.report.content import Absent, Arm, Ranking, Report, Row, Section, Table
from ouroboros.report.curves import TELEMETRY, loop_series, points, smoothed
from ouroboros.report.drawing import NUM_ARMS
from ouroboros.report.text import MISSING, bits, finite, percent, plural, quantity
from ouroboros.train.log import read_metrics
from ouroboros.train.rundir import RunDirectory

_WORDS = {"win": "better", "loss": "worse", "cannot tell": "cannot tell"}
_OF_TWIN = {"win": "loss", "loss": "win", "cannot tell": "cannot tell"}
MAX_CHANGES = 6
"""Of an arm that are named."""
PARTS = 4
"""Into which a run is divided to say in numbers how its training went."""


@dataclass(frozen=True)
class _Kept:
    """What a directory holds."""

    path: Path
    asked: Study
    study: Study
    """The same without what is under way: see :func:`_seeds`."""
    facts: Mapping[str, str]
    """About the code and the machine."""
    results: Sequence[Result]
    dead: Mapping[str, str]
    """Arms that were not run, and why."""

    def of(self, stage: str, arm: str) -> list[Result]:
        return [result for result in self.results if (result.stage, result.arm) == (stage, arm)]

    def absent(self, stage: str) -> list[Absent]:
        """The arms of a stage that lack runs."""
        first = stage == self.asked.stages[0].name
        names = [arm.name for arm in self.asked.every_arm if first or (self.path / stage / arm.name).is_dir()]
        found = [self._absent(stage, name) for name in names if name != self.asked.control.name]
        return [one for one in found if one is not None]

    def _absent(self, stage: str, arm: str) -> Absent | None:
        if arm in self.dead:
            return Absent(arm, "dead", self.dead[arm])
        (asked,) = (each for each in self.study.stages if each.name == stage)
        seeds = sorted(set(self.study.seeds_of(asked)) - {result.seed for result in self.of(stage, arm)})
        places = {seed: self.path / stage / arm / f"seed-{seed}" for seed in seeds}
        if ends := [seed for seed, place in places.items() if has_diverged(place)]:
            why = read_text(places[ends[0]] / DIVERGED).strip()
            return Absent(arm, "diverged", f"With {_named(ends)}: {why}.")
        return Absent(arm, "unfinished", f"There is no result of {_named(seeds)} yet.") if seeds else None

    def metrics(self, stage: str, arm: str) -> list[dict[str, Any]]:
        """The records of training, averaged over the seeds where each has one of the same step."""
        runs: list[dict[Any, Any]] = []
        for result in self.of(stage, arm):
            with suppress(OSError):  # without its files a run still has its result
                records = read_metrics(RunDirectory(self.path / result.run).metrics_file)
                kinds = ("train", "valid", "telemetry")
                runs.append({(r["kind"], r.get("step")): r for r in records if r.get("kind") in kinds})
        return [_mean([run[key] for run in runs]) for key in (runs or [{}])[0] if all(key in run for run in runs)]


def report_from_study(directory: Path | str) -> Report:
    """What the directory of ``ouroboros ablate`` or ``ouroboros compare`` tells, also while it is not complete.

    Raises:
        OuroborosError: a file is missing, damaged or of another release; there is nothing to compare yet.
    """
    kept = _read(Path(directory))
    control, stages = kept.study.control, kept.study.stages
    found = summary(kept.study, kept.results, kept.dead)
    last, ranked = stages[-1].name, [line["name"] for line in found["stages"][-1]["arms"]]
    metrics = {name: kept.metrics(last, name) for name in ranked}
    shown = [control.name, *(name for name in ranked if name != control.name)][:NUM_ARMS]
    every = sorted((arm for arm in kept.study.every_arm if not arm.repeat), key=lambda arm: _place(shown, arm.name))
    judged = _judged(kept.path / ANSWER)
    notes, complete = _notes(kept, found, len(every) > len(shown))
    headline = found["answer"] if complete else f"So far, with runs missing: {found['answer']}"
    if judged:
        findings = [_match(kept, *each, shown, number, len(judged) > 1) for number, each in enumerate(judged)]
        said = [f"{one.verdict} at equal {EQUAL[one.match]}" for one, *_ in judged]
        headline = judged[0][0].sentence if len(judged) == 1 else f"{control.name} against its twins: {_list(said)}."
    else:
        findings = [_stage(kept, line, shown, len(kept.asked.stages) > 1) for line in reversed(found["stages"])]
    return Report(
        title=kept.study.question,
        subtitle=f"{plural(len(kept.asked.arms), 'arm')} against {control.name}.",
        headline=headline,
        environment={"study": kept.study.name, "data": _list(control.recipe.data.sources), **kept.facts},
        arms=[_card(kept.study, arm, metrics.get(arm.name, ()) if arm.name in shown else ()) for arm in every],
        findings=findings,
        sections=_numbers(metrics),
        notes=notes,
    )


def _read(path: Path) -> _Kept:
    values = read_object(path / MANIFEST)
    good = {"study", "code", "environment"} <= values.keys() and isinstance(values["environment"], dict)
    check(good, f"{path / MANIFEST}: not a study's; the file is damaged")
    asked = from_dict(Study, values["study"], where=str(path / MANIFEST))
    results = []
    for stage in asked.stages:
        for arm in asked.every_arm:
            runs = [read_result(path / stage.name / arm.name / f"seed-{seed}") for seed in asked.seeds_of(stage)]
            results += [result for result in runs if result is not None]
    seeds = {stage.name: _seeds(asked, stage, results) for stage in asked.stages}
    stages = [dataclasses.replace(stage, seeds=seeds[stage.name]) for stage in asked.stages if seeds[stage.name]]
    check(bool(stages), f"{path}: too few runs are done to compare any arm with {asked.control.name!r}; let it go on")
    results = [result for result in results if result.seed in seeds[result.stage]]
    check_comparable(results)
    return _Kept(
        path=path,
        asked=asked,
        study=dataclasses.replace(asked, stages=tuple(stages)),
        facts={"code": values["code"], **values["environment"]},
        results=results,
        dead=found_dead(values["study"], read_object(path / ALIVE) if (path / ALIVE).is_file() else {}, values["code"]),
    )


def _seeds(asked: Study, stage: Stage, results: Sequence[Result]) -> tuple[int, ...]:
    """The seeds of which the control, and half of the arms that have any result, have one: a study may be under way."""
    done = {(result.seed, result.arm) for result in results if result.stage == stage.name}
    control, arms = asked.control.name, {arm for _, arm in done} - {asked.control.name}
    if not arms and stage != asked.stages[0]:
        return ()
    seeds = [seed for seed in asked.seeds_of(stage) if (seed, control) in done]
    return tuple(seed for seed in seeds if 2 * sum((seed, arm) in done for arm in arms) >= len(arms))


def _judged(path: Path) -> list[tuple[Judged, Judged, Judged | None, Mapping[str, str]]]:
    """Of each match the answer, what is before and after packing, and the twins left out; empty for other studies."""
    found: list[Any] = []
    values = read_object(path) if path.is_file() else {"matches": []}
    matches = values.get("matches", [values])
    good = isinstance(matches, list) and all(isinstance(each, dict) for each in matches)
    check(good, f"{path}: expected the answer of each match; the file is damaged")
    for each in matches:
        rest = dict(each)
        parts = [rest.pop(name, None) for name in ("unpacked", "packed")]
        left_out = rest.pop("left_out", {})
        answer = from_dict(Judged, rest, where=str(path))
        plain, packed = (None if part is None else from_dict(Judged, part, where=str(path)) for part in parts)
        found.append((answer, plain or answer, packed, left_out))
    return found


def _stage(kept: _Kept, found: Mapping[str, Any], shown: Sequence[str], many: bool) -> Section:
    """One stage of a study, of which ``found`` is the summary."""
    stage, control = found["name"], kept.study.control.name
    lines, absent = found["arms"], kept.absent(stage)
    budget = _list([f"{value:,} {name}" for name, value in found["budget"].items()]) or "Each its own budget"
    lead = f"{budget} for each run, {_named(found['seeds'])}, scored on the {found['split']} part of the text."
    if found["gate"] is not None and all(one.mark != "unfinished" for one in absent):
        lead += f" By the rule stated before, {found['gate']}: {_list(found['promoted']) or 'none'}."
    if (floor := found["noise_floor"]) is not None:
        lead += (
            f" Runs of the control vary by {floor['deviation']:.4f} bits per byte (standard deviation); without pairs a"
            f" difference below {floor['difference']:.4f} would not be seen."
        )
    note = (
        f"The dot is the mean difference to {control}, the bar its 95 % interval over seeds and text; left of zero is"
        " better. Better or worse is what still is so after Holm's correction for the number of arms."
    )
    rankings = [_ranking(lines, control, shown, "Before packing" if "packed" in lines[0] else "", note, absent)]
    tables = [_cost(kept, stage, [line["name"] for line in lines])]
    if "packed" in lines[0]:
        packed = [{"name": line["name"], **line["packed"]} for line in lines]
        rankings.append(_ranking(packed, control, shown, "After packing"))
        tables.append(_gaps(kept, stage, lines, packed))
    title = f"Stage {stage}" if many else "What came out"
    return Section(ident=f"stage-{stage}", title=title, lead=lead, rankings=rankings, tables=tables)


def _match(
    kept: _Kept,
    answer: Judged,
    plain: Judged,
    packed: Judged | None,
    left_out: Mapping[str, str],
    shown: Sequence[str],
    number: int,
    many: bool,
) -> Section:
    """A comparison at one match."""
    name = plain.recipe.name
    marks = {one.name: one for one in kept.absent(kept.study.stages[-1].name)}
    absent = [marks.get(twin, Absent(twin, "dead", why)) for twin, why in left_out.items()]
    lines, note = _lines(plain), f"Above zero {name} is better than the twin. The bar is a 95 % interval."
    rankings = [_ranking(lines, name, shown, "" if packed is None else "Before packing", note, absent)]
    stage = kept.study.stages[-1].name
    tables = [_cost(kept, stage, [line["name"] for line in lines])]
    if packed is not None:
        rankings.append(_ranking(_lines(packed), name, shown, "After packing"))
        tables.append(_gaps(kept, stage, lines, _lines(packed)))
    return Section(
        ident=f"match-{number}",
        title=f"At equal {EQUAL[plain.match]}",
        headline=answer.sentence if many else "",
        lead=f"Trained with {_named(plain.seeds)}, scored on {plain.scored_bytes:,} held-out bytes.",
        rankings=rankings,
        tables=tables,
    )


def _lines(judged: Judged) -> list[dict[str, Any]]:
    """The arms of a comparison as the summary of a study has them: minus the recipe, and from the best to the worst."""
    twins: list[dict[str, Any]] = [
        dataclasses.asdict(twin)
        | {"difference": -twin.difference, "verdict": _OF_TWIN[twin.verdict]}
        | {"low": None if twin.high is None else -twin.high, "high": None if twin.low is None else -twin.low}
        | {"more": f"{percent(twin.deviation)} more {EQUAL[judged.match]}"}
        for twin in judged.twins
    ]
    own: dict[str, Any] = dataclasses.asdict(judged.recipe) | {"difference": None}
    return sorted([own, *twins], key=lambda line: float(line["bits_per_byte"]))


def _ranking(
    lines: Sequence[Mapping[str, Any]],
    control: str,
    shown: Sequence[str],
    title: str,
    note: str = "",
    absent: Sequence[Absent] = (),
) -> Ranking:
    rows = []
    for line in lines:
        name, detail = line["name"], f"{bits(line['bits_per_byte'], digits=4)} bits per byte"
        place = shown.index(name) if name in shown else None
        if name == control:
            rows.append(Row(name, detail, 0.0, None, None, place, "control"))
        elif line["difference"] is not None:
            detail += f", {line['more']}" if "more" in line else ""
            row = Row(name, detail, line["difference"], line["low"], line["high"], place, _WORDS[line["verdict"]])
            rows.append(row)
    rows.sort(key=lambda row: row.bits_per_byte)
    return Ranking(rows, absent, differences=True, title=title, note=note)


def _cost(kept: _Kept, stage: str, names: Sequence[str]) -> Table:
    rows = []
    for name in names:
        runs = kept.of(stage, name)
        if not runs:
            continue
        first, scores = runs[0], [run.bits_per_byte for run in runs]
        deviation = f"{stdev(scores):.4f}" if len(scores) > 1 else MISSING
        work = first.flops_per_token * fmean(run.tokens for run in runs)
        sizes = quantity(first.parameters), quantity(first.weights_bytes, "B"), quantity(work)
        times = f"{fmean(run.seconds for run in runs):,.1f}", quantity(fmean(run.tokens_per_second for run in runs))
        steps = f"{fmean(run.steps for run in runs):,.0f}", f"{sum(run.skipped for run in runs):,}"
        rows.append([name, bits(fmean(scores), digits=4), deviation, str(len(runs)), *sizes, *steps, *times])
    head = ("Arm", "bits per byte", "deviation", "runs", "parameters", "weights", "training FLOPs", "steps", "skipped")
    note = "Means over the runs of an arm; the deviation is that of single runs, steps were skipped in all together."
    return Table(head=(*head, "seconds", "tokens per second"), rows=rows, note=note)


def _gaps(kept: _Kept, stage: str, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Table:
    """Scores before and after packing, and what packing costs each arm."""
    files = {line["name"]: line for line in after}
    gaps = {line["name"]: files[line["name"]]["bits_per_byte"] - line["bits_per_byte"] for line in before}
    own, rows, large = gaps.get(kept.study.control.name, math.nan), [], []
    for line in before:
        name, file = line["name"], files[line["name"]]
        if any(run.packed is not None and not run.packed.feasible for run in kept.of(stage, name)):
            large.append(name)
        scores = bits(line["bits_per_byte"], digits=4), bits(file["bits_per_byte"], digits=4)
        rows.append(
            [name, *scores, *(bits(gap, "+", 4) for gap in (gaps[name], gaps[name] - own)), f"{file['bytes']:,}"]
        )
    head = ("Arm", "before packing", "after packing", "gap", "gap minus the control's", "bytes of the file")
    note = "The gap is what packing costs, in bits per byte."
    return Table(head=head, rows=rows, note=note + (f" Above the budget: {_list(large)}." if large else ""))


def _card(study: Study, arm: StudyArm, metrics: Sequence[Mapping[str, Any]]) -> Arm:
    """An arm by what it changes."""
    changes = differences(study.control.recipe, arm.recipe)
    inner = (one for path, values in changes.items() if path != "train.seed" for one in _inner(path, *values))
    words = [f"{path}: {old} \u2192 {new}" for path, old, new in inner]
    more = [f"{len(words) - MAX_CHANGES} more"] if len(words) > MAX_CHANGES else []
    control = arm.name == study.control.name
    return Arm(
        name=arm.name,
        description="the control" if control else _list([*words[:MAX_CHANGES], *more], "; "),
        layout=arm.recipe.model.layout,
        metrics=metrics,
        recipe=to_json(arm.recipe) if control else "",
    )


def _inner(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """What differs within lists of mappings, such as the overrides of single blocks; another part says its kind."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if old.get("kind") != new.get("kind"):
            yield path, old.get("kind"), new.get("kind")
            return
        for name in {**old, **new}:
            yield from _inner(f"{path}.{name}", old.get(name), new.get(name))
    elif _are_mappings(old) and _are_mappings(new) and len(old) == len(new):
        for number, pair in enumerate(zip(old, new, strict=True)):
            yield from _inner(f"{path}.{number}", *pair)
    elif old != new:
        yield path, old, new


def _are_mappings(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, Mapping) for one in value)


def _numbers(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Section]:
    """Curves and telemetry of all arms as numbers, also for those that are not drawn."""
    training, loops = [], []
    for name, records in metrics.items():
        curve = points(records, "train", "step", "bits_per_byte")[1]
        if mean := smoothed(curve, len(curve) / 50):
            places = (math.ceil(len(mean) * part / PARTS) - 1 for part in range(1, PARTS + 1))
            training.append([name, *(bits(mean[max(0, place)], digits=4) for place in places)])
        series = [loop_series(records, key) for key in TELEMETRY]
        if every := sorted({loop for one in series for loop in one}):
            last = [[f"{one[loop][1][-1]:.3g}" if loop in one else MISSING for loop in every] for one in series]
            loops.append([name, *map(", ".join, last)])
    tables = []
    if training:
        head = ("Arm", *(f"{part} of {PARTS} parts" for part in range(1, PARTS + 1)))
        tables.append(
            Table(head=head, rows=training, note="Bits per byte in training, smoothed, by the share of the run.")
        )
    if loops:
        head = ("Arm", *(key.replace("_", " ") for key in TELEMETRY))
        tables.append(Table(head=head, rows=loops, note="At the end of training: a number for each loop, in order."))
    return [Section(ident="numbers", title="Training in numbers", tables=tables)] if tables else []


def _notes(kept: _Kept, found: Mapping[str, Any], cut: bool) -> tuple[list[str], bool]:
    """Caveats, and whether all runs are there."""
    notes, kept_seeds = [], {stage.name: kept.study.seeds_of(stage) for stage in kept.study.stages}
    for stage in kept.asked.stages:
        missing = [seed for seed in kept.asked.seeds_of(stage) if seed not in kept_seeds.get(stage.name, ())]
        if missing:
            notes.append(f"Not counted, because runs of it are missing: {_named(missing)} of stage {stage.name}.")
    lacking = (one.mark == "unfinished" for stage in kept_seeds for one in kept.absent(stage))
    complete = not notes and not any(lacking)
    for stage, seeds in kept_seeds.items():
        if len(seeds) == 1:
            notes.append(f"Stage {stage} has one seed, and so no interval: nothing can be told from it.")
    names = [stage.name for stage in kept.study.stages]
    for before, after, tau in zip(names, names[1:], found["rank_stability"], strict=False):
        if tau is not None:
            notes.append(f"Stages {before} and {after} rank their common arms alike with Kendall's tau of {tau:+.2f}.")
    notes.append("Curves and telemetry are means over the seeds.")
    if cut:
        notes.append(
            f"They are drawn of the control and at most {NUM_ARMS - 1} arms, the best; `ouroboros report` draws those"
            " of any single run."
        )
    return notes, complete


def _mean(values: Sequence[Any]) -> Any:
    """The mean of numbers, and of those within equal records and lists; None where one has none."""
    if all(isinstance(value, dict) for value in values):
        return {key: _mean([value.get(key) for value in values]) for key in values[0]}
    if all(isinstance(value, list) for value in values):
        return [_mean(one) for one in zip(*values, strict=False)]
    numbers = [number for value in values if (number := finite(value)) is not None]
    if len(numbers) == len(values):
        return fmean(numbers)
    return values[0] if all(value == values[0] for value in values) else None


def _place(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else len(names)


def _list(values: Sequence[Any], between: str = ", ") -> str:
    return between.join(map(str, values))


def _named(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {_list(seeds)}"
