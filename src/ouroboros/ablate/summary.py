"""What a study found: for each stage its arms with paired differences and intervals, and the answer in a sentence."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

from ouroboros.ablate.record import Result
from ouroboros.ablate.runner import pairs, promoted
from ouroboros.ablate.statistics import Paired, holm, kendall_tau, noise_floor
from ouroboros.ablate.study import Stage, Study

LEVEL = 0.05
"""The chance of any false win or loss among all arms of a stage."""


def summary(study: Study, results: Sequence[Result], dead: Mapping[str, str]) -> dict[str, Any]:
    """What ``ouroboros ablate --json`` prints."""
    stages: list[dict[str, Any]] = []
    for stage in study.stages:
        if stages:
            names = [study.control.name, *stages[-1]["promoted"]]
        else:
            names = [arm.name for arm in study.every_arm if arm.name not in dead]
        runs = [r for r in results if r.stage == stage.name and r.arm in names]
        stages.append(_stage(study, stage, names, runs))
    taus = []
    for before, after in itertools.pairwise(stages):
        differences = [
            {line["name"]: line["difference"] for line in stage["arms"] if line["difference"] is not None}
            for stage in (before, after)
        ]
        common = [name for name in differences[0] if name in differences[1]]
        taus.append(kendall_tau(*([found[name] for name in common] for found in differences)))
    return {
        "study": study.name,
        "question": study.question,
        "answer": _answer(study, stages[-1]),
        "stages": stages,
        "rank_stability": taus,
        "dead": dict(dead),
    }


def _stage(study: Study, stage: Stage, names: Sequence[str], results: Sequence[Result]) -> dict[str, Any]:
    """One stage: its rule, its noise, and the arms that came so far, from the best to the worst, the control among
    them. Arms that lack seeds come last, because the mean over those that are left says something else."""
    compared = pairs(study, stage, results)
    packed = pairs(study, stage, results, packed=True) if study.packing is not None else {}
    again = _repeats(study)
    corrected, corrected_packed = _corrected(compared, again), _corrected(packed, again)
    seeds = study.seeds_of(stage)
    lines, missing = [], {}
    for name in names:
        runs = [result for result in results if result.arm == name]
        if lacking := [seed for seed in seeds if seed not in {result.seed for result in runs}]:
            missing[name] = lacking
        if not runs:
            continue
        line = _line(runs) | _difference(compared.get(name), corrected.get(name))
        if study.packing is not None:
            scores = [r.packed.score.bits_per_byte for r in runs if r.packed is not None]
            sizes = [r.packed.bytes for r in runs if r.packed is not None]
            line["packed"] = {"bytes": round(fmean(sizes)), "bits_per_byte": fmean(scores)}
            line["packed"] |= _difference(packed.get(name), corrected_packed.get(name))
        lines.append(line)
    control = [r.bits_per_byte for r in results if r.arm == study.control.name]
    return {
        "name": stage.name,
        "budget": stage.budget,
        "seeds": list(seeds),
        "split": stage.split,
        "gate": None if stage.gate is None else stage.gate.describe(),
        "promoted": promoted(study, stage, results),
        "noise_floor": noise_floor(control, len(seeds)).to_dict() if len(seeds) > 1 else None,
        "missing": missing,
        "arms": sorted(lines, key=lambda line: (line["name"] in missing, line["bits_per_byte"])),
    }


def _repeats(study: Study) -> set[str]:
    """The arms that are the control once more, and ask nothing."""
    return {arm.name for arm in study.every_arm if arm.repeat}


def _corrected(compared: Mapping[str, Paired], again: Collection[str]) -> dict[str, float]:
    """P-values, corrected for the number of arms; repeats of the control keep theirs."""
    known = {name: pair.p_value for name, pair in compared.items() if pair.p_value is not None}
    asked = {name: value for name, value in known.items() if name not in again}
    return known | dict(zip(asked, holm(list(asked.values())), strict=True))


def _line(runs: Sequence[Result]) -> dict[str, Any]:
    """An arm: what is equal in all of its runs, and means of the rest."""
    first = runs[0]
    return {
        "name": first.arm,
        "layout": first.layout,
        "parameters": first.parameters,
        "weights_bytes": first.weights_bytes,
        "flops_per_token": first.flops_per_token,
        "steps": round(fmean(run.steps for run in runs)),
        "seconds": fmean(run.seconds for run in runs),
        "tokens_per_second": fmean(run.tokens_per_second for run in runs),
        "bits_per_byte": fmean(run.bits_per_byte for run in runs),
        "runs": [run.run for run in runs],
    }


def _difference(pair: Paired | None, p_value: float | None) -> dict[str, Any]:
    """An arm minus the control; it wins or loses only if it still does among so many arms."""
    if pair is None:
        return dict.fromkeys(("difference", "low", "high", "p_value", "verdict"))
    sure = p_value is not None and p_value < LEVEL
    return {
        "difference": pair.difference,
        "low": pair.low,
        "high": pair.high,
        "p_value": p_value,
        "verdict": pair.verdict if sure else "cannot tell",
    }


def _answer(study: Study, last: Mapping[str, Any]) -> str:
    """The answer in a sentence."""
    by: dict[str, list[str]] = {}
    again = _repeats(study)
    for line in last["arms"]:
        if line["verdict"] is not None and line["name"] not in again:
            by.setdefault(line["verdict"], []).append(f"{line['name']} ({line['difference']:+.4f})")
    words = {"win": "better", "loss": "worse", "cannot tell": "not told apart from it"}
    parts = [f"{words[verdict]}: {', '.join(by[verdict])}" for verdict in words if verdict in by]
    parts += [f"without a result of every seed: {', '.join(last['missing'])}"] if last["missing"] else []
    return f"Against {study.control.name}, in bits per byte: {'; '.join(parts) or 'no arm came so far'}."


def table(found: Mapping[str, Any]) -> list[str]:
    """The summary as lines of text."""
    lines = [found["question"]]
    for stage in found["stages"]:
        budget = ", ".join(f"{value:,} {name}" for name, value in stage["budget"].items()) or "own budgets"
        lines += ["", f"stage {stage['name']}: {budget}, seeds {', '.join(map(str, stage['seeds']))}"]
        width = max(len(line["name"]) for line in stage["arms"])
        lines.append(f"{'':<{width}}  parameters  bits/byte  difference  95 % interval       verdict")
        for line in stage["arms"]:
            lines.append(_row(line, line["name"], line["parameters"], width))
            if "packed" in line:
                lines.append(_row(line["packed"], "  packed", line["packed"]["bytes"], width))
        for name, seeds in stage["missing"].items():
            lines.append(f"{name}: no result with seed {', '.join(map(str, seeds))}, so it is not compared")
        if stage["gate"] is not None:
            lines.append(f"{stage['gate']}: {', '.join(stage['promoted']) or 'none'}")
    lines += ["", *(f"left out: {name}: {why}" for name, why in found["dead"].items()), found["answer"]]
    return lines


def _row(line: Mapping[str, Any], name: str, size: int, width: int) -> str:
    text = f"{name:<{width}}  {size:>10,}  {line['bits_per_byte']:>9.4f}"
    if line["difference"] is None:
        return text
    interval = "" if line["low"] is None else f"{line['low']:+.4f} .. {line['high']:+.4f}"
    return f"{text}  {line['difference']:>+10.4f}  {interval:<18}  {line['verdict']}"
