"""``ouroboros convert DONOR --heal``: a cut donor is trained back, and the verdict on held-out text is written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ouroboros.config import DataSpec, OptimSpec, Recipe, TaughtTraining, TrainSpec
from ouroboros.convert.arms import TRAINED, Name, Steering
from ouroboros.errors import OuroborosError, check
from ouroboros.verbs.options import Quiet, emit_json, say, signal_status

if TYPE_CHECKING:
    from ouroboros.convert.heal import Plan
    from ouroboros.convert.layers import Layers
    from ouroboros.convert.verdict import ArmResult

VERDICT, REPORT = "verdict.json", "report.html"
BUNDLED = "python:"
TRAIN = TrainSpec(
    steps=150,
    batch_size=8,
    eval_every=50,
    eval_bytes=32_768,
    checkpoint_every=25,
    keep_last=1,
    teach=TaughtTraining(model=".", weight=0.5, states=1.0, blocks=(0, 0), share=0.25),
)
OPTIM = OptimSpec(matrix_optimizer="adamw", lr=1e-3, weight_decay=0.0, schedule="cosine", warmup_fraction=0.1)
TEXT = DataSpec(sequence_length=256, valid_fraction=0.02, test_fraction=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealOptions:
    """Options of a conversion that heals."""

    heal: tyro.conf.FlagCreatePairsOff[bool] = False
    """Pretrained models: train what is left of the donor back towards it on the text of --data, and say on --held-out
    text what that was worth. The same command goes on where it was interrupted."""
    sources: Annotated[list[str], tyro.conf.arg(name="data")] = dataclasses.field(default_factory=list)
    """With --heal: the text to train on, sources as of `ouroboros train`, each with an optional =WEIGHT."""
    held_out: list[str] = dataclasses.field(default_factory=list)
    """Pretrained models: text that nothing is trained on. --heal scores every arm on each of these sources (by default
    on the bundled text), and --init selected without --heal chooses layers by the first."""
    held_out_bytes: int = 60_000
    """With --heal: bytes of each held-out text that are scored."""
    arms: tuple[Name, ...] = TRAINED
    """With --heal: what is trained and compared. healed: the bridge; low-rank: additions to all kept layers too; norms:
    their norms and biases too; static: a diagonal for each loop too; controller: a Controller of the state too."""
    seed: int | None = None
    """With --heal: seed of what starts at random and of the order of the text."""
    steps: int | None = None
    """With --heal: optimiser steps of each arm, 150 by default."""
    minutes: float | None = None
    """With --heal: minutes of each arm, in place of steps."""
    steering: Steering = dataclasses.field(default_factory=Steering)
    quiet: Quiet = False
    optim: OptimSpec = OPTIM
    train: TrainSpec = TRAIN
    text: Annotated[DataSpec, tyro.conf.arg(name="data")] = TEXT


OWN = ("sources", "held_out_bytes", "arms", "seed", "steps", "minutes", "steering", "quiet", "optim", "train", "text")
"""Options that mean nothing without ``--heal``."""


def refuse_without_heal(options: Any) -> None:
    """Refuse options that only a healing reads.

    Raises:
        OuroborosError: names the option.
    """
    defaults = HealOptions()
    for name in OWN:
        option = {"sources": "data", "text": "data.*"}.get(name, name).replace("_", "-")
        same = getattr(options, name) == getattr(defaults, name)
        check(same, f"--{option} changes nothing without --heal: add that, or leave the option out")


def heal(options: Any) -> int:
    """Convert, heal, judge and report.

    Raises:
        OuroborosError: options that do not fit, or one of the steps failed.
    """
    check(bool(options.sources), "convert --heal: name the text to train on with --data")
    check(not options.no_tokenizer, "convert --heal reads text: leave --no-tokenizer out")
    from ouroboros.convert.heal import DONOR, Healing, Interrupted
    from ouroboros.convert.judge import Judge
    from ouroboros.convert.verdict import as_json, best_of
    from ouroboros.train.log import Progress

    progress = Progress(quiet=options.quiet)
    texts = _texts(options)
    source, out = str(options.source), Path(options.out)
    _convert_donor(options, out / DONOR)
    plan = _plan(options, out)
    healing = Healing(plan, out, (lambda line: None) if options.quiet else progress.message)
    judge = Judge(healing, texts, options.held_out_bytes)
    try:
        results = judge.run(progress)
    except Interrupted as error:
        if error.reason is None:
            raise
        say(f"{out}: {error}")
        return signal_status(error.reason)
    best = best_of(results)
    healing.adopt_best(best.name)
    facts = as_json(results, best.name)
    whole = {"source": source, "out": str(out), "layout": plan.layout, "layers": plan.to_dict()["kept"], **facts}
    (out / VERDICT).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    written = _report(judge, plan, results, facts, out)
    if options.json:
        emit_json({**whole, "report": written})
        return 0
    for line in table(results, facts):
        say(line)
    say(facts["verdict"])
    say(f"{out}: {best.name} is the model; the verdict is in {out / VERDICT}" + (f" and {written}" if written else ""))
    return 0


def _texts(options: Any) -> dict[str, list[bytes]]:
    """The held-out documents by the name of their text."""
    from ouroboros.data.documents import name_formats, read_documents
    from ouroboros.data.sources import parse_sources
    from ouroboros.data.splits import split_documents

    sources = tuple(options.held_out) or (BUNDLED,)
    spec = name_formats(dataclasses.replace(options.text, sources=sources, max_bytes=None))
    training = {ref.text for ref in parse_sources(tuple(options.sources))}
    found: dict[str, list[bytes]] = {}
    for ref in parse_sources(spec.sources):
        # A built-in text has a part of its own that training never sees.
        same = ref.text in training and not ref.is_built_in
        check(not same, f"--held-out {ref.text} is trained on by --data: hold another text out")
        documents = list(read_documents(ref, spec))
        if ref.is_built_in:
            documents = split_documents(documents, 0.05, 0.05).documents("test")
        name = ref.text if ref.is_built_in else Path(ref.text).name.split(".")[0]
        found[name if name not in found else ref.text] = [document.data for document in documents]
    return found


def _convert_donor(options: Any, place: Path) -> None:
    """The whole donor in our form, with the proof that it is the same."""
    from ouroboros.convert import readers
    from ouroboros.convert.heal import PLAN
    from ouroboros.train.rundir import WEIGHTS

    out = place.parent
    known = {PLAN, place.name, "data"}
    strange = sorted(entry.name for entry in out.iterdir() if entry.name not in known) if out.is_dir() else []
    check(
        not strange or (out / PLAN).is_file(),
        f"{out} exists and holds no healing ({', '.join(strange[:3])}): choose another --out",
    )
    if (place / WEIGHTS).is_file():
        return
    made = readers.convert(options.source, place, tokenizer=options.tokenizer)
    check("identity" in made.sizes, f"{options.source} is no pretrained model of another library: leave --heal out")
    if not options.quiet and not options.json:
        say(f"{place}: {made.system}, {made.summary}")


def _plan(options: Any, out: Path) -> Plan:
    """What is asked for, with the layers chosen."""
    from ouroboros.convert.heal import DONOR, Plan
    from ouroboros.data.documents import name_formats

    given = {name: getattr(options, name) for name in ("steps", "minutes") if getattr(options, name) is not None}
    check(len(given) < 2, "convert --heal: give one of --steps and --minutes")
    budget = {"steps": None, "minutes": None, **given} if given else {}
    train = dataclasses.replace(options.train, **budget)
    if options.seed is not None:
        train = dataclasses.replace(train, seed=options.seed)
    data = dataclasses.replace(options.text, sources=tuple(options.sources), tokenizer=str(out / DONOR))
    recipe = Recipe(name="heal", data=name_formats(data, quiet=True), optim=options.optim, train=train)
    layout, kept = _layers(options, out, recipe)
    return Plan(
        source=str(options.source),
        layout=layout,
        kept=kept,
        recipe=recipe,
        arms=tuple(options.arms),
        steering=options.steering,
    )


def _layers(options: Any, out: Path, recipe: Recipe) -> tuple[str, Layers]:
    """The layout, and the donor's layers for it: named, chosen by their place, or by measurement."""
    import torch

    from ouroboros.convert.choose import choose
    from ouroboros.convert.heal import DONOR, PLAN
    from ouroboros.convert.layers import initial, named, split
    from ouroboros.data.shards import prepare
    from ouroboros.data.stream import open_loader
    from ouroboros.model.reading import load_model
    from ouroboros.schedule import parse

    model = load_model(out / DONOR)
    layers = model.schedule.num_blocks
    ends = max(1, round(layers * 8 / 30))
    layout = options.layout or f"{ends} loop:(1)x2 {ends}"
    schedule = parse(layout)
    check(
        schedule.num_blocks < layers,
        f"layout {layout!r} keeps all {layers} layers, so there is nothing to heal: leave --heal out, or keep fewer",
    )
    if options.keep is not None:
        return layout, named(options.keep, layers, schedule.num_blocks)
    how: Literal["selected", "stepwise", "averaged"] = options.init or "selected"
    if how != "selected":
        return layout, initial(how, schedule, layers)
    if (out / PLAN).is_file():  # chosen before
        present = json.loads((out / PLAN).read_bytes())
        if present.get("layout") == layout:
            return layout, named(present["kept"], layers, schedule.num_blocks)
    length = recipe.data.sequence_length
    loader = open_loader(
        prepare(recipe.data, out / "data"), batch_size=8, sequence_length=length, seed=1, rank=0, world_size=1
    )
    found = choose(model, torch.from_numpy(loader.next_batch()).long(), schedule)
    if not options.quiet and not options.json:
        say(found.table())
    start, ends = found.best.start, split(schedule, layers)
    return layout, ends.kept([(layer,) for layer in range(start, start + ends.looped)])


def table(results: Sequence[ArmResult], facts: dict[str, Any]) -> list[str]:
    """The arms as lines of text."""
    texts = list(results[0].scores)
    head = f"{'':22}{'trained':>10}{'tokens/s':>10}"
    head += "".join(f"{text[:14]:>16}{'gap closed':>20}" for text in texts)
    lines = [head]
    for arm in facts["arms"]:
        speed = arm["tokens_per_second"]
        line = f"{arm['name']:22}{arm['trained_parameters'] or '':>10}{'' if speed is None else f'{speed:.1f}':>10}"
        for text in texts:
            one = arm["texts"][text]
            line += f"{one['bits_per_byte']:>16.4f}{_closed(one['closed']):>20}"
        lines.append(line)
    return lines


def _closed(gap: dict[str, Any]) -> str:
    if gap["share"] is None:
        return ""
    if gap["low"] is None:
        return f"{100 * gap['share']:.0f} %"
    return f"{100 * gap['share']:.0f} % ({100 * gap['low']:.0f} to {100 * gap['high']:.0f})"


def _report(judge: Any, plan: Plan, results: Sequence[ArmResult], facts: dict[str, Any], out: Path) -> str | None:
    """Write the page, if what draws it is installed; its path."""
    from ouroboros.report.healing import page_of
    from ouroboros.report.page import render

    try:
        render(page_of(judge, plan, results, facts), out / REPORT)
    except OuroborosError as error:
        if "pip install" not in str(error):
            raise
        return None
    return str(out / REPORT)
