"""The page about a healing: what it cost, what was kept, what was won on held-out text, and what the models write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ouroboros.convert.heal import DONOR
from ouroboros.convert.judge import Judge
from ouroboros.convert.verdict import ArmResult
from ouroboros.report.content import Arm, Report, Sample, Section, Table
from ouroboros.report.loops import section_of
from ouroboros.report.text import bits, quantity

MAX_SAMPLES = 2
"""Documents of each held-out text that models go on with."""


def page_of(judge: Judge, plan: Any, results: Sequence[ArmResult], facts: dict[str, Any]) -> Report:
    """The report of a healing that has ended."""
    first = next(iter(results[0].scores))
    arms = [
        Arm(
            name=result.name,
            description=result.description,
            parameters=result.parameters,
            minutes=result.minutes or None,
            tokens_per_second=result.tokens_per_second,
            bits_per_byte=result.scores[first].bits_per_byte,
            interval=result.scores[first].interval,
        )
        for result in results
    ]
    kept, loops = plan.to_dict()["kept"], loops_of_arms(judge, results, facts["best"])
    return Report(
        title=f"{plan.source}, made recursive",
        subtitle=f"layout {plan.layout}, of the donor's layers {kept}; bits per byte on {first}",
        headline=facts["verdict"],
        arms=arms,
        samples=_samples(judge, results, facts["best"]),
        sections=[_scores(results, facts), _costs(facts), *loops, _elsewhere(facts)],
        notes=[
            "Intervals are over pieces of the held-out texts. They say nothing of training seeds: repeat with --seed.",
            f"Scores are computed in {str(judge.healing.dtype).removeprefix('torch.')}.",
        ],
    )


def _scores(results: Sequence[ArmResult], facts: dict[str, Any]) -> Section:
    tables = []
    for text in results[0].scores:
        rows = []
        for arm in facts["arms"]:
            one = arm["texts"][text]
            gap, apart = one["closed"], one["against_cut"]
            share = "" if gap["share"] is None else f"{100 * gap['share']:.1f} %"
            span = "" if gap["low"] is None else f"{100 * gap['low']:.1f} to {100 * gap['high']:.1f} %"
            against = "" if apart["low"] is None else f"{apart['low']:+.3f} to {apart['high']:+.3f}"
            rows.append((arm["name"], bits(one["bits_per_byte"]), share, span, bits(apart["delta"], "+"), against))
        score = results[0].scores[text]
        head = (text, "bits per byte", "gap closed", "95 % interval", "against the cut donor", "95 % interval")
        note = f"{score.bytes:,} bytes in {score.units} units ({score.unit}), windows of {score.window} tokens."
        tables.append(Table(head, rows, note))
    lead = "The gap is that between the cut donor and the whole one: 100 % is as good as the donor."
    return Section(ident="held-out", title="Held-out text", lead=lead, tables=tables)


def _costs(facts: dict[str, Any]) -> Section:
    rows = []
    for arm in facts["arms"]:
        what = ", ".join(f"{owner} {number:,}" for owner, number in arm["trained"].items())
        speed = "" if arm["tokens_per_second"] is None else f"{arm['tokens_per_second']:.1f}"
        minutes = f"{arm['minutes']:.1f}" if arm["minutes"] else ""
        size = quantity(arm["bytes"], "B")
        rows.append((arm["name"], f"{arm['trained_parameters']:,}", what, size, minutes, speed))
    head = ("", "trained numbers", "of these", "in float32", "minutes of training", "tokens/s of generation")
    return Section(ident="cost", title="What it cost", tables=[Table(head, rows)])


def loops_of_arms(judge: Judge, results: Sequence[ArmResult], best: str) -> list[Section]:
    """What the loops of the best arm do, and those of the one with a Controller."""
    texts = [document for documents in judge.texts.values() for document in documents[:MAX_SAMPLES]]
    arms = dict.fromkeys((best, *(arm.name for arm in results if arm.name == "controller")))
    found = [section_of(judge.model_of(arm), judge.tokenizer, texts, f"the arm {arm}", arm) for arm in arms]
    return [section for section in found if section is not None]


def _elsewhere(facts: dict[str, Any]) -> Section:
    lead = (
        f"The model in this directory is the arm {facts['best']}, which the held-out part of the training text likes"
        f" best; the whole donor is in {DONOR}/. With transformers: import ouroboros, then"
        " AutoModelForCausalLM.from_pretrained(this directory). `ouroboros chat`, `generate` and `eval` take the"
        " directory too. Its own class has no place for what an arm adds to a donor, so `ouroboros export --to donor`"
        f" writes {DONOR}/ alone."
    )
    return Section(ident="elsewhere", title="How to load it", lead=lead)


def _samples(judge: Judge, results: Sequence[ArmResult], best: str) -> list[Sample]:
    shown = []
    models = {name: judge.model_of(name) for name in ("donor", "cut", best)}
    for documents in judge.texts.values():
        for document in documents[:MAX_SAMPLES]:
            for name, model in models.items():
                prompt, text = judge.continued(model, document)
                shown.append(Sample(prompt=prompt, text=text, arm=name, settings="the likeliest token each time"))
    return shown
