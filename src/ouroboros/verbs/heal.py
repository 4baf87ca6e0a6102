"""``ouroboros convert DONOR --heal``: a cut donor is trained back, and the verdict on held-out text is written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ouroboros.config import DataSpec, OptimSpec, Recipe, TaughtTraining, TrainSpec, fields_by_path
from ouroboros.convert.arms import BRIDGE_TOKENS, TRAINED, Name, Steering
from ouroboros.errors import OuroborosError, check
from ouroboros.files import write_whole
from ouroboros.verbs.options import Quiet, emit_json, say, signal_status
from ouroboros.verbs.parts import refuse_idle

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
    """Pretrained models: text that nothing is trained on. --heal scores every candidate on each of these sources (by
    default on the bundled text), and --init selected without --heal chooses layers by the first."""
    held_out_bytes: int = 60_000
    """With --heal: how many bytes of each held-out text are scored."""
    bridge_tokens: int = BRIDGE_TOKENS
    """With --heal: how many tokens of the training text the bridge is fitted to before anything is trained."""
    arms: tuple[Name, ...] = TRAINED
    """With --heal: which candidates are made and compared. All have a bridge, an affine map that stands in for the
    removed layers. bridge only fits it, healed trains it. The others train more besides: low-rank trains low-rank
    additions to the kept layers, norms their norms and biases, static one diagonal for each loop, and controller a
    network that makes such diagonals of the state."""
    seed: int | None = None
    """With --heal: the seed of what starts at random and of the order of the text."""
    steps: int | None = None
    """With --heal: how many optimiser steps each candidate is trained for; 150 by default."""
    minutes: float | None = None
    """With --heal: how many minutes each candidate is trained for, in place of a number of steps."""
    steering: Steering = dataclasses.field(default_factory=Steering)
    quiet: Quiet = False


NESTED = {"optim": OPTIM, "train": TRAIN, "text": TEXT}
"""Specifications whose fields are options of a healing too, with what a healing takes for them."""


TAKEN = ("optim.left_out", "train.low_rank", "train.teach.model", "train.teach.blocks", "data.tokenizer")
"""Options of training that a healing sets by itself."""
STEERED = {
    **dict.fromkeys(("rank", "alpha", "bases"), frozenset(("static", "controller"))),
    **dict.fromkeys(("style", "pooling"), frozenset(("controller",))),
    "low_rank": frozenset(("low-rank",)),
}
"""The arms that each option of ``--steering`` is for."""


def refuse_without_heal(options: Any) -> None:
    """Refuse options that only a healing reads.

    Raises:
        OuroborosError: names the option.
    """
    usual = {field.name: getattr(HealOptions(), field.name) for field in dataclasses.fields(HealOptions)}
    for name in ("heal", "held_out"):
        del usual[name]
    for name, value in {**usual, **NESTED}.items():
        given, changed = getattr(options, name), name
        if given != value and dataclasses.is_dataclass(value):
            here, there = fields_by_path(given), fields_by_path(value)
            changed += "." + next(path for path in here if here[path] != there.get(path))
        option = changed.replace("text.", "data.").replace("sources", "data").replace("_", "-")
        check(given == value, f"--{option} changes nothing without --heal: add that, or leave the option out")


def _recipe(values: Mapping[str, Any]) -> Recipe:
    return Recipe(name="heal", data=values["text"], optim=values["optim"], train=values["train"])


def _check_options(options: Any) -> None:
    """Refuse options that do nothing here, or that the healing sets."""
    check(bool(options.sources), "convert --heal: name the text to train on with --data")
    check(not options.no_tokenizer, "convert --heal reads text: leave --no-tokenizer out")
    check(options.keep is None or options.init is None, "--keep and --init exclude each other: leave one of them out")
    check(bool(options.arms), "convert --heal: --arms names no arm: name at least one, such as healed")
    check(len({*options.arms}) == len(options.arms), "convert --heal: --arms names one arm twice")
    for name in ("held_out_bytes", "bridge_tokens"):
        check(getattr(options, name) >= 1, f"--{name.replace('_', '-')} must be >= 1, got {getattr(options, name)}")
    usual = NESTED
    if options.train.teach.blocks is None:  # where no state is compared, no blocks are either
        teach = dataclasses.replace(TRAIN.teach, states=0.0, blocks=None)
        usual = {**NESTED, "train": dataclasses.replace(TRAIN, teach=teach)}
    given, default = _recipe(vars(options)), _recipe(usual)
    here, there = fields_by_path(given), fields_by_path(default)
    for path, value in here.items():
        taken = any(path == name or path.startswith(f"{name}.") for name in TAKEN)
        option = path.replace("_", "-")
        fault = f"--{option} is set by --heal itself, for every arm as it needs it: leave it out"
        check(not taken or value == there.get(path), fault)
    refuse_idle(given, default, ())
    steering, usual_steering = vars(options.steering), vars(Steering())
    for name, arms in STEERED.items():
        check(
            steering[name] == usual_steering[name] or bool(arms.intersection(options.arms)),
            f"--steering.{name.replace('_', '-')} is for the arms {' and '.join(sorted(arms))}: name one with --arms",
        )


def heal(options: Any) -> int:
    """Convert, heal, judge and report.

    Raises:
        OuroborosError: options that do not fit, or one of the steps failed.
    """
    _check_options(options)
    from ouroboros.convert.heal import Interrupted

    try:
        return _heal(options)
    except (Interrupted, KeyboardInterrupt) as error:
        reason = error.reason if isinstance(error, Interrupted) else "SIGINT"
        if options.json:
            emit_json({"out": str(options.out), "finished": False, "stopped_by": reason})
        else:
            words = (
                error if isinstance(error, Interrupted) else "stopped by SIGINT; the same command goes on from there"
            )
            say(f"{options.out}: {words}")
        return signal_status(reason)


def _heal(options: Any) -> int:
    from ouroboros.convert.heal import DONOR, Healing
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
    results = judge.run(progress)
    best = best_of(results)
    healing.adopt_best(best.name)
    facts = as_json(results, best.name)
    whole = {"source": source, "out": str(out), "layout": plan.layout, "layers": plan.to_dict()["kept"], **facts}
    write_whole(out / VERDICT, (json.dumps(whole, indent=2) + "\n").encode())
    written = _report(judge, plan, results, facts, out)
    if options.json:
        emit_json({**whole, "finished": True, "report": written})
        return 0
    for line in table(results, facts):
        say(line)
    say(facts["verdict"])
    say(f"{out}: {best.name} is the model; the verdict is in {out / VERDICT}" + (f" and {written}" if written else ""))
    return 0


def _texts(options: Any) -> dict[str, list[bytes]]:
    """The held-out documents by the name of their text.

    Raises:
        OuroborosError: one is empty, or is trained on.
    """
    from ouroboros.data.documents import name_formats, read_documents
    from ouroboros.data.sources import parse_sources, source_files
    from ouroboros.data.splits import split_documents

    sources = tuple(options.held_out) or (BUNDLED,)
    spec = name_formats(dataclasses.replace(options.text, sources=sources, max_bytes=None), quiet=True)
    training = parse_sources(tuple(options.sources))
    files = {path.resolve() for ref in training if not ref.is_built_in for _, path in source_files(ref, quiet=True)}
    found: dict[str, list[bytes]] = {}
    for ref in parse_sources(spec.sources):
        documents = list(read_documents(ref, spec))
        if ref.is_built_in:
            # Its held-out part is that of no training, unless this one has none.
            trained = any(other.text == ref.text for other in training)
            check(
                not trained or spec.test_fraction > 0,
                f"{ref.text} is trained on as a whole: add --data.test-fraction 0.05, or hold another text out with"
                " --held-out",
            )
            fractions = (spec.valid_fraction, spec.test_fraction) if trained else (0.05, 0.05)
            documents = split_documents(documents, *fractions).documents("test")
        else:
            same = [path for _, path in source_files(ref, quiet=True) if path.resolve() in files]
            check(not same, f"--held-out {ref.text}: {same[0] if same else ''} is trained on: hold another text out")
        name = ref.text.removesuffix(":") if ref.is_built_in else Path(ref.text).name.split(".")[0]
        texts = [document.data for document in documents if document.data]
        check(bool(texts), f"--held-out {ref.text} holds no text")
        found[name if name not in found else ref.text] = texts
    return found


def _convert_donor(options: Any, place: Path) -> None:
    """The whole donor in our form, with the proof that it is the same."""
    from ouroboros.convert import donors, readers
    from ouroboros.convert.heal import PLAN, adopt

    out, source = place.parent, str(options.source)
    begun = (out / PLAN).is_file()
    check(
        begun or not out.exists() or (out.is_dir() and not any(entry.name[0] != "." for entry in out.iterdir())),
        f"{out} exists and holds no healing: choose another --out",
    )
    if not begun:
        donor = donors.find(options.source)
        check(donor is not None, f"{source} is no pretrained model of another library: leave --heal out")
        assert donor is not None
        check(donor.repeated is None, f"{source} runs its layers several times already: leave --heal out")
        made = readers.convert(options.source, place, tokenizer=options.tokenizer)
        if not options.quiet and not options.json:
            say(f"{place}: {made.system}, {made.summary}")
    adopt({"source": source}, out)


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
    recipe = _recipe({"text": name_formats(data, quiet=True), "optim": options.optim, "train": train})
    layout, kept = _layers(options, out, recipe)
    return Plan(
        source=str(options.source),
        layout=layout,
        kept=kept,
        recipe=recipe,
        arms=tuple(options.arms),
        bridge_tokens=options.bridge_tokens,
        steering=options.steering,
    )


def _layers(options: Any, out: Path, recipe: Recipe) -> tuple[str, Layers]:
    """The layout, and the donor's layers for it: named, chosen by their place, or by measurement."""
    from ouroboros.api import open_model
    from ouroboros.convert.choose import choose
    from ouroboros.convert.heal import DONOR, PLAN, training_windows
    from ouroboros.convert.layers import initial, named, split
    from ouroboros.schedule import parse

    donor = open_model(out / DONOR)
    layers = donor.spec.schedule.num_blocks
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
    found = choose(donor.model, next(training_windows(recipe, out, batch_size=8, seed=1)), schedule)
    if not options.quiet and not options.json:
        say(found.table())
    start, ends = found.best.start, split(schedule, layers)
    return layout, ends.kept([(layer,) for layer in range(start, start + ends.looped)])


def table(results: Sequence[ArmResult], facts: dict[str, Any]) -> list[str]:
    """The arms as lines of text."""
    texts = list(results[0].scores)
    head = f"{'':22}{'trained':>10}{'speed':>10}"
    head += "".join(f"{text[:14]:>16}{'gap closed':>22}" for text in texts)
    lines = [head]
    for arm in facts["arms"]:
        speed = arm["speed_against_donor"]
        line = f"{arm['name']:22}{arm['trained_parameters'] or '':>10}{'' if speed is None else f'{speed:.1f}x':>10}"
        for text in texts:
            one = arm["texts"][text]
            line += f"{one['bits_per_byte']:>16.4f}{_closed(one['closed']):>22}"
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
