"""The demo: does looping pay at equal stored parameters? A looped model and its twins, one text, one page.

Trains the looped recipe and its plain twins (a short demo: one of them) on the same windows in the same order, scores
them and cheap baselines on held-out files, lets the looped model write, and makes the report. The verdict is against
the better twin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ouroboros.ablate.rates import training_rates
from ouroboros.ablate.runner import RATES
from ouroboros.accounting import cost
from ouroboros.api import open_model
from ouroboros.config import Recipe
from ouroboros.config.demo import DemoOptions
from ouroboros.data.documents import name_formats
from ouroboros.data.loader import seen_text
from ouroboros.data.prepared import PreparedData
from ouroboros.data.shards import prepare
from ouroboros.demo.plan import CURVE, MEASURING, Plan, arms_of, beginnings, looped_minutes, make_plan, scored_part
from ouroboros.demo.verdict import SEED_NOISE, judge
from ouroboros.errors import OuroborosError, check
from ouroboros.eval.baselines import compare_baselines
from ouroboros.eval.score import Score, score
from ouroboros.eval.stats import paired_difference
from ouroboros.files import write_whole
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.recipes import recipe as make_recipe
from ouroboros.report.content import Arm, Report, Sample
from ouroboros.report.page import render
from ouroboros.report.run import arm_of, loop_points
from ouroboros.serve.sampling import Sampling
from ouroboros.serve.stream import Continuation
from ouroboros.train.log import Progress, read_metrics
from ouroboros.train.run import make_directory, remove_new, resolve, start
from ouroboros.train.rundir import RunDirectory
from ouroboros.train.session import RunResult

PROMPTS = {True: ("def read_", "class ", "import "), False: ("The ", "I ", "When ")}
"""Prompts for the bundled source code and for other text."""


class DemoStopped(OuroborosError):
    """Training was interrupted; ``reason`` is the signal."""

    def __init__(self, message: str, reason: str | None) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Trained:
    """One arm after training."""

    result: RunResult
    recipe: Recipe
    model: OuroborosForCausalLM
    score: Score
    metrics: list[dict[str, Any]]
    run: RunDirectory


def run_demo(options: DemoOptions, tell: Callable[[str], None], progress: Callable[[], Progress]) -> dict[str, Any]:
    """Run the demo; returns its numbers, which are also in ``OUT/demo.json``.

    Args:
        options: see :class:`~ouroboros.config.demo.DemoOptions`.
        tell: receives the lines of the result.
        progress: makes a progress line for each training run.

    Raises:
        OuroborosError: ``out`` is not empty, the data cannot be used.
        DemoStopped: training was interrupted.
    """
    check(options.minutes > 0, f"--minutes must be > 0, got {options.minutes}")
    begun = time.monotonic()
    options = dataclasses.replace(options, out=_free(options.out))
    plan = make_plan(options.minutes, options.size, options.tokenizer)
    recipe = demo_recipe(options, plan)
    run = options.out / "loop"
    with contextlib.ExitStack() as undo:
        undo.callback(remove_new, run, make_directory(run))  # nothing stays of a demo whose text cannot be used
        # Training names the formats of chats too, and takes the prepared text only if both say the same.
        recipe = dataclasses.replace(recipe, data=name_formats(recipe.data))
        data = prepare(recipe.data, run / "data")
        undo.pop_all()
    tell(plan.describe())
    seconds = 60 * options.minutes
    test = scored_part(data.documents("test"), seconds, plan.rate)
    rates = _paces(resolve(recipe, data), data, options)
    left = max(seconds - (time.monotonic() - begun), 0.1 * seconds)
    minutes = looped_minutes(recipe, left, rates, data.count("train", "bytes"))
    looped = _train(_with_training(recipe, minutes=minutes), run, progress, test)
    # The twins take as many steps, and are compiled if the looped model was: they differ in nothing but the loop.
    same = {"minutes": None, "steps": looped.result.counters.step, "compile": looped.run.state()["compile"]}
    twins = []
    for place, arm in zip(("twin", "deep"), arms_of(looped.recipe, options.minutes)[1:], strict=False):
        shutil.copytree(run / "data", options.out / place / "data")
        twins.append(_train(_with_training(arm, **same), options.out / place, progress, test))
    twins.sort(key=lambda twin: twin.score.bits_per_byte)
    page, numbers = _results(options, [looped, *twins], data, test)
    numbers["plan"] = dataclasses.asdict(plan)
    render(page, options.out / "report.html")
    write_whole(options.out / "demo.json", (json.dumps(numbers, indent=2) + "\n").encode())
    for line in table(page):
        tell(line)
    for sample in page.samples[:2]:
        tell(f"--- {looped.recipe.name} writes ---\n{sample.prompt}{sample.text}")
    tell(f"{options.out / 'report.html'}: the page")
    return numbers


def _free(out: Path) -> Path:
    """``out`` if it is new or empty; the default directory gets a number instead of a refusal."""
    candidates = [out]
    if out == DemoOptions().out:
        candidates += [out.with_name(f"{out.name}-{number}") for number in range(2, 1000)]
    for path in candidates:
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return path
    raise OuroborosError(f"{out} is not empty; choose another --out")


def _with_training(recipe: Recipe, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **changes))


def demo_recipe(options: DemoOptions, plan: Plan) -> Recipe:
    """The looped recipe with the demo's data; its time is still to be said."""
    base = make_recipe("loop", plan.size)
    data = dataclasses.replace(base.data, sources=(options.data,), tokenizer=plan.tokenizer)
    settings = {"eval_bytes": 32_768, "checkpoint_every": 0, "telemetry_every": 50}
    return _with_training(dataclasses.replace(base, data=data), batch_size=plan.batch, seed=options.seed, **settings)


def _paces(looped: Recipe, data: PreparedData, options: DemoOptions) -> list[float]:
    """Measured training tokens per second of the looped model and of its twins: what a step of a deep and narrow model
    costs is not told by its operations."""
    most = 60 * options.minutes
    same = {"minutes": options.minutes, "compile": "off", "threads": torch.get_num_threads()}
    arms = [_with_training(arm, **same) for arm in arms_of(looped, options.minutes)]
    return training_rates(arms, data, options.out / RATES, seconds=MEASURING * most)


def _train(recipe: Recipe, out: Path, progress: Callable[[], Progress], test: Sequence[bytes]) -> Trained:
    result = start(recipe, out, progress=progress())
    if not result.finished:
        raise DemoStopped(
            f"the demo was stopped by {result.reason}; `ouroboros resume {out}` finishes this model", result.reason
        )
    run, model = RunDirectory(out), open_model(out).model
    return Trained(result, run.read_recipe(), model, _score(model, run, test), read_metrics(run.metrics_file), run)


def _score(model: OuroborosForCausalLM, run: RunDirectory, test: Sequence[bytes], loops: int | None = None) -> Score:
    """Every byte with at least half a window of context, in the precision of training."""
    recipe, dtype = run.read_recipe(), run.state()["dtype"]
    window = recipe.data.sequence_length
    return score(
        model,
        run.open_data().tokenizer,
        test,
        window=window,
        stride=max(1, window // 2),
        loops=loops,
        model_name=recipe.name,
        amp=None if dtype == "float32" else getattr(torch, dtype),
    )


def _results(
    options: DemoOptions, arms: Sequence[Trained], data: PreparedData, test: Sequence[bytes]
) -> tuple[Report, dict[str, Any]]:
    """The page, and what ``demo.json`` holds, of the looped model, its better twin and the other one."""
    looped, better = arms[:2]
    state = looped.run.state()
    difference = paired_difference(looped.score, better.score)
    cheap = compare_baselines(data.documents("train"), seen_text(data, state["loader"]), test)
    several = len(arms) > 2
    against = "two plain twins" if several else "a plain twin"
    names = (looped.recipe.name, f"{better.recipe.name} (the better twin)" if several else better.recipe.name)
    bits = (looped.score.bits_per_byte, better.score.bits_per_byte)
    verdict = judge(names, bits, difference, cheap, [arm.metrics for arm in arms])
    trained = looped.model.schedule.loops
    part = beginnings(test, max(CURVE * sum(map(len, test)), 4096))
    curve = [_score(looped.model, looped.run, part, loops) for loops in sorted({1, trained, trained + 1, 2 * trained})]
    text = "the source of Python's standard library" if options.data == "python:" else options.data
    page = Report(
        title="Does looping pay?",
        headline=verdict.sentence,
        decided=verdict.verdict in ("win", "loss"),
        subtitle=f"A looped language model and {against} with equal stored parameters, trained on {text}",
        command=_command(options),
        environment={
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "precision": state["dtype"],
            "held-out text, sha256": looped.score.data_sha256,
            "training windows": f"{looped.score.window} tokens, {looped.recipe.train.batch_size} a step",
        },
        arms=[_arm(arm) for arm in arms],
        baselines=cheap,
        loop_curve={names[0]: loop_points([s.to_dict() for s in curve], trained)},
        samples=_samples(looped, data, options),
        notes=_notes(arms, curve[0].bytes),
        difference=difference,
    )
    numbers = {
        "command": page.command,
        "verdict": verdict.verdict,
        "verdict_sentence": verdict.sentence,
        "arms": {arm.recipe.name: _arm_numbers(arm) for arm in arms},
        "better_twin": better.recipe.name,
        "difference": difference.to_dict(),
        "baselines": [baseline.to_dict() for baseline in cheap],
        "loops": [s.to_dict() for s in curve],
        "report": str(options.out / "report.html"),
    }
    return page, numbers


def _arm(arm: Trained) -> Arm:
    c, shown = arm.result.counters, arm_of(arm.recipe, arm.metrics, arm.score.to_dict())
    return dataclasses.replace(shown, tokens=c.tokens, minutes=c.seconds / 60, tokens_per_second=c.tokens / c.seconds)


def _arm_numbers(arm: Trained) -> dict[str, Any]:
    c, model = arm.result.counters, arm.recipe.model
    trained = {"steps": c.step, "training_tokens": c.tokens, "seconds": c.seconds}
    return arm.score.to_dict() | {"parameters": cost(model).parameters, "layout": model.layout} | trained


def _samples(arm: Trained, data: PreparedData, options: DemoOptions) -> list[Sample]:
    sampling = Sampling(max_new_tokens=160, temperature=0.7, top_p=0.95)
    found = []
    for seed, prompt in enumerate(PROMPTS[options.data.startswith("python:")], options.seed):
        torch.manual_seed(seed)
        text = "".join(Continuation(arm.model, data.tokenizer, prompt.encode(), sampling))
        settings = f"temperature 0.7, top-p 0.95, seed {seed}, {arm.model.schedule.loops} loops"
        found.append(Sample(prompt=prompt, text=text, arm=arm.recipe.name, settings=settings))
    return found


def _notes(arms: Sequence[Trained], curve_bytes: int) -> list[str]:
    """What the numbers do not say."""
    looped, *twins = arms
    flops = [cost(arm.recipe.model).training_flops_per_token for arm in arms]
    more = " and ".join(
        f"{flops[0] / each:.2f} times as much per token as {twin.recipe.name} and trained"
        f" {looped.result.counters.seconds / twin.result.counters.seconds:.2f} times as long"
        for each, twin in zip(flops[1:], twins, strict=True)
    )
    return [
        "One seed: the interval covers other held-out text of this kind, not other seeds."
        f" Differences below {SEED_NOISE} bits per byte between two single runs are counted as noise.",
        "Equal stored parameters and equal training tokens in the same order, not equal work: the looped model"
        f" computes {more}.",
        f"Scored on {looped.score.bytes:,} held-out bytes in {looped.score.documents} files, every byte once,"
        f" window {looped.score.window}, stride {looped.score.stride}; loop counts on the first"
        f" {curve_bytes:,} bytes of them.",
    ]


def _command(options: DemoOptions) -> str:
    defaults = DemoOptions()
    words = ["ouroboros", "demo"]
    for field in ("minutes", "data", "size", "tokenizer", "seed"):
        if getattr(options, field) != getattr(defaults, field):
            words += [f"--{field}", str(getattr(options, field))]
    return shlex.join([*words, "--out", str(options.out)])


def table(page: Report) -> list[str]:
    """The result as lines of text."""
    width = max(len(row.name) for row in page.rows)
    lines = ["", f"{'':<{width}}  bits/byte  95 % interval"]
    for row in page.rows:
        interval = "" if row.low is None or row.high is None else f"{row.low:.4f} .. {row.high:.4f}"
        lines.append(f"{row.name:<{width}}  {row.bits_per_byte:>9.4f}  {interval}")
    return [*lines, "", page.headline, *page.notes, ""]
