"""Study: what does a memory keep, and what does it cost? Attention, latent attention and OSAM at equal parameters.

Four tasks, each scored at three lengths. Multi-query associative recall, copy and a needle in noise are trained on all
three, so that what is scored is how much a memory holds and how far back; the bundled text, byte by byte, is trained on
the first alone, so that longer windows are new. Arms of a seed see the same sequences in the same order. Each arm's
rate is the better of two on a seed of its own. Finished trainings in the working directory are kept. Prints one line
of JSON and writes `table.md` and `picture.svg` there.

    python runs/memory_probes.py --out work
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import probes_picture
from probe_tasks import Batch, Copy, Needle, Probe, Recall

from ouroboros.accounting import cost
from ouroboros.config import (
    AttentionSpec,
    DataSpec,
    FeedForwardSpec,
    ModelSpec,
    OptimSpec,
    Recipe,
    TrainSpec,
)
from ouroboros.config.parts.latent import LatentAttentionSpec
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.data.masks import IGNORED, hide
from ouroboros.eval.stats import mean_interval

HIDDEN = 32
HEADS = 2
STARTS: dict[str, Any] = {"gate_start": OsamSpec().gate_start, "time_scales": OsamSpec().time_scales}
"""Gates of the better form start closed and its memory long: with the recipe's start, which is better for text, recall
was not learned in 1,500 steps (seed RATE_SEED)."""
ARMS = ("attention", "latent attention", "osam", "osam as published")
SCALAR_RATES = {"osam": 5, "osam as published": 10}
"""Of phases, gates, frequencies and decays, as multiples of the rest's: those of the two recipes."""
RATE_SEED = 100
"""Of the trainings that choose a rate; no other uses it."""
FACTORS = (1, 2, 4)
"""Scored sizes as multiples of the smallest."""
WINDOWS = 64
"""Held-out windows of text."""
ROWS = 32
"""Sequences that are scored at a time."""
PROMPT, NEW = 1024, 64
"""Tokens in front of, and in, a timed continuation."""


@dataclass(frozen=True)
class Study:
    """A probe: how its sequences are made, trained and scored."""

    size: int
    """The smallest, in the units of ``make``."""
    steps: int
    sequences: int
    """Scored, of each size."""
    make: Callable[[int], Probe]
    batch: int = 16
    """Sequences of the smallest size in a batch."""
    factors: tuple[int, int, int] = FACTORS
    rates: tuple[float, float] = (1e-3, 3e-3)
    better: Callable[..., Any] = max
    """Of two scores."""

    @property
    def probes(self) -> list[Probe]:
        """One of each size."""
        return [self.make(factor * self.size) for factor in self.factors]

    @property
    def vocab_size(self) -> int:
        """Number of ids, whatever the size."""
        return self.probes[0].vocab_size

    @property
    def lengths(self) -> list[int]:
        """Tokens of the sequences that are scored."""
        return [probe.length for probe in self.probes]

    @property
    def levels(self) -> list[dict[str, float]]:
        """What each scored probe gives away without a memory."""
        return [{"chance": probe.chance, "unbound": probe.unbound} for probe in self.probes]

    def sample(self, batch_size: int, seed: Any) -> Batch:
        """A batch of one of the sizes: ``batch_size`` sequences of the smallest, or fewer and about as many tokens."""
        factor = int(np.random.default_rng(seed).choice(self.factors))
        return self.make(factor * self.size).sample(batch_size // factor, (*seed, factor))

    def scores(self, model: Any, *, choosing: bool) -> list[float]:
        """Share of right answers at every length, on sequences no training sees; other ones to choose a rate by."""
        return [
            accuracy(model, probe.sample(self.sequences, (factor, int(choosing), 1)))
            for factor, probe in zip(self.factors, self.probes, strict=True)
        ]


STUDIES = {
    "recall": Study(4, 5000, 256, lambda n: Recall(pairs=n, queries=n, length=6 * n, keys=16, values=16)),
    "copy": Study(8, 2000, 128, lambda n: Copy(span=n, values=32)),
    "needle": Study(16, 1500, 512, lambda n: Needle(length=n, keys=4, values=16), batch=64, factors=(1, 4, 16)),
}


class Text:
    """The bundled text: windows of the first length anywhere in it, every token of which is to be predicted."""

    steps, batch, rates, better = 400, 8, (3e-3, 1e-2), min
    lengths = [256 * factor for factor in FACTORS]
    levels: tuple[dict[str, float], ...] = ()

    def __init__(self, directory: Path) -> None:
        from ouroboros.data.shards import prepare

        self.prepared = prepare(DataSpec(sequence_length=self.lengths[0]), directory)
        self.tokens, self.vocab_size = self.prepared.tokens("train", 0), self.prepared.tokenizer.vocab_size

    def sample(self, batch_size: int, seed: Any) -> Batch:
        """A batch of windows: inputs and the token behind them."""
        length = self.lengths[0]
        starts = np.random.default_rng(seed).integers(len(self.tokens) - length, size=batch_size)
        ids = self.tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)
        return Batch(ids, ids)

    def scores(self, model: Any, *, choosing: bool) -> list[float]:
        """Bits per byte over the second half of each length, in windows of the longest, of other files if choosing."""
        import torch

        from ouroboros.eval.score import next_token_nats

        tokens, longest = self.prepared.tokens("valid" if choosing else "test", 0), self.lengths[-1]
        starts = np.linspace(0, len(tokens) - longest - 1, WINDOWS).astype(int)
        windows = tokens[starts[:, None] + np.arange(longest + 1)].astype(np.int64)
        bits = next_token_nats(model, torch.from_numpy(windows)).mean(0) / np.log(2)
        return [float(bits[length // 2 : length].mean()) for length in self.lengths]


class Batches:
    """What the trainer reads: step s of a training sees the batch of ``(seed, s)``, and learns its answers alone.

    Models of one seed see the same sequences in the same order, whatever they are.
    """

    def __init__(self, task: Any, seed: int) -> None:
        self.task, self.seed, self.step = task, seed, 0

    def next_batch(self) -> np.ndarray:
        """The next batch as the trainer takes it: ids that are not learned are hidden."""
        inputs, labels = self.task.sample(self.task.batch, (self.seed, self.step))
        self.step += 1
        return hide(inputs, labels != IGNORED)


def main() -> None:
    """Choose rates, train every arm and seed, score, time decoding, and put it all together."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--tasks", nargs="+", default=[*STUDIES, "text"], help="some of them")
    options.add_argument("--share", type=float, default=1.0, help="of the steps of each task, for a try")
    options.add_argument("--rounds", type=int, default=7, help="turns of each arm when decoding is timed")
    options.add_argument("--out", type=Path, required=True, help="working directory; finished trainings are kept")
    chosen = options.parse_args()
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    chosen.out.mkdir(parents=True, exist_ok=True)
    log = Log(chosen.out / "trainings.jsonl")
    text = Text(chosen.out / "data")
    tasks = {**STUDIES, "text": text}
    found = {}
    for name in chosen.tasks:
        steps = max(1, round(tasks[name].steps * chosen.share))
        found[name] = study_task(name, tasks[name], steps, range(chosen.seeds), log, text.prepared)
    record = {
        "study": "memory probes",
        "seeds": chosen.seeds,
        "share": chosen.share,
        "tasks": found,
        "tokens_per_second": decoding(text.vocab_size, chosen.rounds),
    }
    (chosen.out / "table.md").write_text(table(record))
    (chosen.out / "picture.svg").write_text(probes_picture.draw(record))
    print(json.dumps(record))


class Log:
    """Finished trainings, one line of JSON each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.known = {self._key(entry): entry for entry in map(json.loads, lines)}

    def get(self, compute: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """The entry of ``key``, computed now unless it is there already."""
        known = self.known.get(self._key(key))
        if known is None:
            known = key | compute()
            self.known[self._key(key)] = known
            with self.path.open("a") as stream:
                stream.write(json.dumps(known) + "\n")
            print(json.dumps(known), file=sys.stderr, flush=True)
        return known

    @staticmethod
    def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry[name] for name in ("task", "arm", "steps", "rate", "seed"))


def arms(vocab_size: int) -> dict[str, ModelSpec]:
    """Two blocks of each mixer; the feed-forward width makes up for what a mixer needs more or less than OSAM's."""
    from ouroboros.recipes import recipe
    from ouroboros.recipes.twin import equal_size

    osam = recipe("osam", "tiny").model
    sizes = {"buckets": 4 * HIDDEN, "readout_hidden": HIDDEN}
    base = osam.replace(
        layout="2",
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        mixer=osam.block.mixer.replace(**sizes, **STARTS),
        ffn=FeedForwardSpec(intermediate_size=3 * HIDDEN),
    )
    mixers = (AttentionSpec(num_heads=HEADS), LatentAttentionSpec(num_heads=HEADS), base.block.mixer, OsamSpec(**sizes))
    return {name: equal_size(base.replace(mixer=mixer), base) for name, mixer in zip(ARMS, mixers, strict=True)}


def optimiser(arm: str, rate: float) -> OptimSpec:
    """AdamW for all."""
    return OptimSpec(
        matrix_optimizer="adamw",
        lr=rate,
        scalar_lr=SCALAR_RATES[arm] * rate if arm in SCALAR_RATES else None,
        weight_decay=0.0,
        warmup_fraction=0.1,
        decay_fraction=0.3,
    )


def trained(spec: ModelSpec, task: Any, optim: OptimSpec, steps: int, seed: int, prepared: Any) -> Any:
    """A new model trained on batches of ``task``; the trainer is told of ``prepared`` and reads nothing of it."""
    import torch

    from ouroboros.api import build
    from ouroboros.train.distributed import Workers
    from ouroboros.train.trainer import Trainer

    train = TrainSpec(steps=steps, batch_size=task.batch, seed=seed, precision="fp32", threads=1, compile="off")
    recipe = Recipe(name="memory probe", model=spec, data=prepared.spec, optim=optim, train=train)
    torch.manual_seed(seed)
    trainer = Trainer(recipe, build(recipe), prepared, Workers())
    trainer.loader = Batches(task, seed)
    while not trainer.done:
        trainer.step()
    return trainer.model.eval()


def accuracy(model: Any, batch: Batch) -> float:
    """Share of the answers that the model gives: the likeliest id at the position before each label."""
    import torch

    from ouroboros.eval.windows import evaluating, log_probs

    inputs, labels = (torch.from_numpy(array) for array in batch)
    with evaluating(model):
        found = torch.cat([log_probs(model, part[:, :-1]).argmax(-1) for part in inputs.split(ROWS)])
    asked = labels[:, 1:] != IGNORED
    return (found == labels[:, 1:])[asked].double().mean().item()


def study_task(name: str, task: Any, steps: int, seeds: Sequence[int], log: Log, prepared: Any) -> dict[str, Any]:
    """All trainings of a :class:`Study` or of :class:`Text`: rates, scores and intervals of every arm."""
    specs, found = arms(task.vocab_size), {}
    for arm, spec in specs.items():

        def train(rate: float, seed: int, arm: str = arm, spec: ModelSpec = spec) -> dict[str, Any]:
            start = time.process_time()
            model = trained(spec, task, optimiser(arm, rate), steps, seed, prepared)
            seconds = time.process_time() - start
            return {"scores": task.scores(model, choosing=seed == RATE_SEED), "cpu_seconds": round(seconds, 1)}

        def entry(rate: float, seed: int, arm: str = arm, train: Any = train) -> dict[str, Any]:
            return log.get(lambda: train(rate, seed), task=name, arm=arm, steps=steps, rate=rate, seed=seed)

        tried = {rate: entry(rate, RATE_SEED)["scores"][0] for rate in task.rates}
        rate = task.better(tried, key=lambda rate: tried[rate])
        runs = [entry(rate, seed) for seed in seeds]
        found[arm] = {
            "parameters": cost(spec).parameters,
            "rates": {str(one): value for one, value in tried.items()},
            "rate": rate,
            "scores": [run["scores"] for run in runs],
            "state_bytes": [state_bytes(spec, length) for length in task.lengths],
            "cpu_seconds": statistics.mean(run["cpu_seconds"] for run in runs),
        }
    base = found[ARMS[0]]["scores"]
    for result in found.values():
        pairs = list(zip(result["scores"], base, strict=True))
        result["intervals"] = [interval([s[at] for s, _ in pairs]) for at in range(len(FACTORS))]
        result["minus_attention"] = [interval([s[at] - b[at] for s, b in pairs]) for at in range(len(FACTORS))]
    return {"steps": steps, "lengths": task.lengths, "levels": list(task.levels), "arms": found}


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % Student interval over seeds."""
    return mean_interval(values).to_dict()


def state_bytes(spec: ModelSpec, length: int) -> int:
    """What a cache holds for one sequence behind ``length`` tokens, float32."""
    total = cost(spec)
    return total.cache_bytes_per_token() * length + total.state_bytes()


def decoding(vocab_size: int, rounds: int) -> dict[str, float]:
    """Tokens per second of one sequence at PROMPT tokens and more: medians of turns, prompt not counted.

    The bytes of every cache are held against what accounting says.
    """
    import torch
    from transformers.cache_utils import DynamicCache

    from ouroboros.model.cache import cache_bytes
    from ouroboros.model.configuration import OuroborosConfig
    from ouroboros.model.modeling import OuroborosForCausalLM
    from ouroboros.serve.fast import FastDecoder

    ids = torch.randint(0, 256, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    decoder, models = FastDecoder(), {}
    for arm, spec in arms(vocab_size).items():
        torch.manual_seed(0)
        models[arm] = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()
        store = DynamicCache(config=models[arm].config)
        with torch.no_grad():
            models[arm](ids, past_key_values=store)
        assert cache_bytes(store) == state_bytes(spec, PROMPT), arm

    greedy = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

    def seconds(arm: str, new: int) -> float:
        start = time.perf_counter()
        decoder.generate(models[arm], ids, max_new_tokens=new, min_new_tokens=new, **greedy)
        return time.perf_counter() - start

    rates: dict[str, list[float]] = {arm: [] for arm in models}
    for turn in range(-1, rounds):  # the first turn compiles
        for arm in models if turn % 2 else reversed(models):
            taken = seconds(arm, NEW + 1) - seconds(arm, 1)
            if turn >= 0:
                rates[arm].append(NEW / taken)
        print(f"decoding, turn {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return {arm: statistics.median(values) for arm, values in rates.items()}


def table(record: dict[str, Any]) -> str:
    """Every task and arm in a row: scores with half-widths of intervals, differences, state."""
    lines = []
    for name, task in record["tasks"].items():
        heads = " | ".join(f"T = {length}" for length in task["lengths"])
        head = f"| arm | rate | {heads} | first, by seed | state, kB | CPU s |"
        lines += [f"**{name}**, {task['steps']} steps", "", head, "|---" * (len(FACTORS) + 5) + "|"]
        for arm, found in task["arms"].items():
            scores = " | ".join(shown(one) for one in found["intervals"])
            state = ", ".join(f"{size / 1000:.1f}" for size in sorted(set(found["state_bytes"])))
            seeds = ", ".join(f"{run[0]:.2f}" for run in found["scores"])
            lines.append(f"| {arm} | {found['rate']:g} | {scores} | {seeds} | {state} | {found['cpu_seconds']:.0f} |")
        for level in ("chance", "unbound") if task["levels"] else ():
            lines.append(f"| *{level}* | | {' | '.join(f'{one[level]:.3f}' for one in task['levels'])} | | | |")
        for arm in ARMS[1:]:
            scores = " | ".join(shown(one, "+") for one in task["arms"][arm]["minus_attention"])
            lines.append(f"| {arm} minus attention | | {scores} | | | |")
        lines.append("")
    name, task = list(record["tasks"].items())[-1]
    lines += [f"| arm | parameters, {name} | tokens/s |", "|---|---|---|"]
    for arm, rate in record["tokens_per_second"].items():
        lines.append(f"| {arm} | {task['arms'][arm]['parameters']:,} | {rate:,.0f} |")
    return "\n".join(lines) + "\n"


def shown(one: dict[str, Any], sign: str = "") -> str:
    """Mean and half the width of the interval."""
    half = "" if one["low"] is None else f" +- {(one['high'] - one['low']) / 2:.3f}"
    return f"{one['mean']:{sign}.3f}{half}"


if __name__ == "__main__":
    main()
