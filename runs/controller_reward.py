"""Study: does training by the reward of answers (GRPO) gain anything over the supervised model that it starts from?

    python runs/controller_reward.py MODEL --train 'gsm8k_train.jsonl@Question: {question}\\nAnswer: {answer}' \\
        --test 'gsm8k_test.jsonl@Question: {question}\\nAnswer: {answer}' --seeds 3 --steps 200 --out work

Every seed trains a copy of MODEL. Before and after, each of the first ``--problems`` problems of ``--test`` that are
not in ``--train`` gets one completion, of the most probable tokens, and its reward: 1 if the answer is right, else 0.
The verdict is of the paired differences, after minus before: their interval over problems (the mean of all seeds for
each), and with several seeds also the interval of the seeds' gains; where these disagree, it cannot tell.

All is kept in ``--out``: settings, completions and rewards as JSON lines, and for each seed its metrics and newest
checkpoint, which every command opens as a model. The same command goes on where it was stopped. It prints one line of
JSON; `docs/systems/controller.md` tells what came out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ouroboros.errors import OuroborosError, check

CHANGEABLE = ("out", "seeds", "batch", "every")
"""Options that may change when a study goes on."""


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the supervised start: a run or a directory with its tokenizer")
    parser.add_argument("--train", required=True, metavar="FILE@FORMAT", help="problems to train on")
    parser.add_argument("--test", required=True, metavar="FILE@FORMAT", help="problems to score on")
    parser.add_argument("--out", type=Path, required=True, help="working directory; what is finished in it is kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--problems", type=int, default=500, help="unseen problems that are scored")
    parser.add_argument(
        "--answers",
        choices=("marked", "last"),
        default="marked",
        help="what counts as a completion's answer: what stands behind #### or in a box, as published; or, where"
        " neither is, the last number",
    )
    parser.add_argument("--prompts", type=int, default=4, help="problems of a step")
    parser.add_argument("--group", type=int, default=4, help="completions of each")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling in training")
    parser.add_argument("--updates", type=int, default=1, help="optimiser steps on the completions of a step")
    parser.add_argument("--kl", type=float, default=0.04, help="weight of the divergence from the start; 0 is off")
    parser.add_argument("--lr", type=float, default=1e-5, help="rate of AdamW, constant after a twentieth of the steps")
    parser.add_argument("--left-out", nargs="*", default=[], help="patterns of names of parameters that stay")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=16, help="problems that are scored side by side")
    parser.add_argument("--every", type=int, default=25, help="steps between checkpoints")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the start, then train and score every seed, and compare."""
    options = options_of(arguments)
    try:
        print(json.dumps(study(options)))
    except OuroborosError as error:
        raise SystemExit(f"error: {error}") from None


def study(options: argparse.Namespace) -> dict[str, Any]:
    """What the command prints."""
    from transformers.utils import logging

    from ouroboros.systems.controller.completions import read_problems

    logging.set_verbosity_error()
    check(options.seeds >= 1, f"--seeds must be >= 1, got {options.seeds}")
    check(options.problems >= 2, f"--problems must be >= 2, got {options.problems}")
    train, test = read_problems(options.train), read_problems(options.test)
    known = {problem.prompt for problem in train.items}
    unseen = [problem for problem in test.items if problem.prompt not in known][: options.problems]
    check(
        len(unseen) == options.problems,
        f"--problems {options.problems}: --test has {len(unseen)} that are not in --train",
    )
    keep_settings(options)
    stop = tuple(dict.fromkeys((*train.stop, *test.stop)))
    before = scored(options, None, train.items, unseen, stop)
    after = {seed: scored(options, seed, train.items, unseen, stop) for seed in range(options.seeds)}
    facts = {"study": "controller reward", "model": options.model, "answers": options.answers, "steps": options.steps}
    return facts | summary(before, after)


def keep_settings(options: argparse.Namespace) -> None:
    """Write down the settings of a new study, or see that those of the one in the directory are the same."""
    from ouroboros.files import read_text, write_whole

    now = {name: value for name, value in vars(options).items() if name not in CHANGEABLE}
    path = options.out / "settings.json"
    if path.is_file():
        kept = json.loads(read_text(path))
        changed = [f"--{n.replace('_', '-')} is {v!r}, was {kept.get(n)!r}" for n, v in now.items() if kept.get(n) != v]
        check(not changed, f"{path}: of another study: {'; '.join(changed)}; choose another --out")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(now, indent=1) + "\n").encode())


def scored(
    options: argparse.Namespace, seed: int | None, problems: Sequence[Any], unseen: Sequence[Any], stop: tuple[str, ...]
) -> list[dict[str, Any]]:
    """A record for each unseen problem, by the start or by what the seed trains; those in the directory are kept."""
    from ouroboros.systems.controller.pipeline import answer, reward
    from ouroboros.train.log import MetricsLog, read_metrics

    path = options.out / ("start" if seed is None else f"seed-{seed}")
    path.mkdir(exist_ok=True)
    log = MetricsLog(path / "scores.jsonl")
    found = read_metrics(path / "scores.jsonl")
    if len(found) < len(unseen):
        writer = writer_of(options, stop)
        if seed is not None:
            trained(options, writer, problems, path, seed)
        began, plain = time.perf_counter(), options.answers == "last"
        for problem, completion in writer.greedy(unseen[len(found) :], options.batch):
            facts = {"reward": reward(completion.text, problem.reference, plain=plain)}
            facts["answered"] = answer(completion.text, plain=plain) is not None
            found.append(facts | {"completion": completion.text})
            log.write(found[-1])
            if len(found) % 50 == 0 or len(found) == len(unseen):
                spent = f"{time.perf_counter() - began:.0f} s"
                say(f"{path.name}: {len(found)} problems, reward {mean(found, 'reward'):.4f}, {spent}")
    return found


def writer_of(options: argparse.Namespace, stop: tuple[str, ...]) -> Any:
    """The start, as one that writes completions."""
    from ouroboros.api import open_model
    from ouroboros.config import TrainSpec
    from ouroboros.systems.controller.completions import Writer
    from ouroboros.train.precision import choose_device, choose_dtype

    opened, device = open_model(options.model), choose_device()
    dtype = choose_dtype(TrainSpec(precision=options.precision), device)
    model: Any = opened.model.to(device)  # pyrefly: ignore
    return Writer(model, opened.tokenizer, stop=stop, max_new_tokens=options.max_new_tokens, dtype=dtype)


def trained(options: argparse.Namespace, writer: Any, problems: Sequence[Any], path: Path, seed: int) -> None:
    """Train the writer's model, or read what was trained before."""
    from ouroboros.config import OptimSpec
    from ouroboros.systems.controller.grpo import RewardSpec, RewardTrainer, train

    names = ("steps", "prompts", "group", "temperature", "updates", "kl")
    spec = RewardSpec(**{n: getattr(options, n) for n in names}, plain=options.answers == "last", seed=seed)
    optim = OptimSpec(
        matrix_optimizer="adamw",
        lr=options.lr,
        schedule="constant",
        warmup_fraction=0.05,
        weight_decay=0.0,
        left_out=tuple(options.left_out),
    )
    train(RewardTrainer(writer, problems, spec, optim), path, every=options.every, told=lambda r: told(path.name, r))


def told(name: str, record: Mapping[str, Any]) -> None:
    """Show a step."""
    shown = f"reward {record['reward']:.3f}, {record['tokens']:.0f} tokens, {record['seconds']:.1f} s"
    say(f"{name}: step {record['step']}, {shown}")


def say(text: str) -> None:
    """Show a line of progress."""
    print(text, file=sys.stderr, flush=True)


def summary(before: Sequence[Mapping[str, Any]], after: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Rewards, gains with their intervals, and verdicts."""
    from ouroboros.eval.stats import mean_interval

    gains = {
        seed: [b["reward"] - a["reward"] for a, b in zip(before, records, strict=True)]
        for seed, records in after.items()
    }
    of_problems = gain([statistics.fmean(values) for values in zip(*gains.values(), strict=True)])
    of_seeds = gain([statistics.fmean(values) for values in gains.values()])
    agree = len(after) < 2 or of_problems["verdict"] == of_seeds["verdict"]
    return {
        "problems": len(before),
        "start": mean_interval([r["reward"] for r in before]).to_dict() | {"answered": mean(before, "answered")},
        "seeds": [
            {"seed": seed, "reward": mean(records, "reward"), "answered": mean(records, "answered")} | gain(gains[seed])
            for seed, records in after.items()
        ],
        "over_problems": of_problems,
        "over_seeds": of_seeds,
        "verdict": of_problems["verdict"] if agree else "cannot tell",
    }


def gain(values: Sequence[float]) -> dict[str, Any]:
    """The mean of differences of rewards with its interval, and what it says of the trained model."""
    from ouroboros.eval.stats import mean_interval, verdict_of

    found = mean_interval(values)
    # Verdicts are of losses, which are better when they are lower.
    low, high = (None, None) if found.bounds is None else (-found.bounds[1], -found.bounds[0])
    return {"gain": found.mean, "low": found.low, "high": found.high, "verdict": verdict_of(low, high)}


def mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
    """The mean of one value of all records."""
    return statistics.fmean(record[name] for record in records)


if __name__ == "__main__":
    main()
