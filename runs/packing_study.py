"""Study: what packing costs, by method, bits and number of loops. Paired seeds, resumable.

For every seed, models are trained that differ in nothing but how often their middle blocks are visited (``gpt`` stands
for a plain model of as many blocks, and ``crawler`` is the recipe of that name). Each is coded with every number of
bits by three methods: rounding to the nearest code, GPTQ that looks once at the unchanged model as other tools do, and
loop-aware GPTQ. What counts is the rise of the score on held-out text, in bits per byte. Further rows: the published
floor under the steps, calibration on other text than the training text, and models packed to a number of bytes.

    python runs/packing_study.py --out work --seeds 3 --data books_train.txt --held-out books_test.txt

Every row is kept in OUT/rows.jsonl, and a second call makes only those that are missing. Prints one line of JSON with
means over seeds and 95 % Student intervals. `docs/packing.md` tells what came out.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from loop_search import prepare, trained

LOOPS = {"gpt": 0, "loops 1": 1, "loops 2": 2, "loops 4": 4, "loops 8": 8, "crawler": 0}
METHODS = ("rounding", "per-call", "loop-aware")
BITS = (8, 6, 4, 3)
TOKENS, WINDOW = 16384, 256
"""Of calibration text, and tokens that are read at a time."""


def main() -> None:
    """Train what is missing, code it in every way, and compare."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="working directory; what is done in it is kept")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--data", default="python:", help="training text")
    options.add_argument("--held-out", type=Path, help="text to score; by default the test split of the training text")
    options.add_argument("--max-bytes", type=int, default=100_000, help="held-out bytes scored")
    options.add_argument("--tokens", type=int, default=1_500_000, help="training tokens of each model")
    options.add_argument("--models", default=",".join(LOOPS), help="which models, separated by commas")
    options.add_argument("--budgets", default="128kB,192kB,256kB", help="sizes of packed files, separated by commas")
    options.add_argument("--only", default="method,floor,calibration,budget", help="kinds of rows to make")
    chosen = options.parse_args()
    prepare(chosen.out)
    rows = _Rows(chosen.out / "rows.jsonl")
    for seed, name in itertools.product(range(chosen.seeds), chosen.models.split(",")):
        run = chosen.out / f"{name.replace(' ', '-')}-{seed}"
        opened = trained(recipe_of(name, chosen.data, chosen.tokens, seed), run)
        for row, measured in _measured(chosen, opened, name, seed):
            rows.make(row, measured)
    print(json.dumps({"study": "packing_study", "rows": len(rows.found), **summary(rows.found)}))


class _Rows:
    """Rows of a file, each a JSON object with what it is and what was measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[dict[str, Any]] = []
        if path.is_file():
            # A line that was cut off when the study was stopped is made again.
            lines = path.read_text().splitlines(keepends=True)
            self.found = [json.loads(line) for line in lines if line.endswith("\n")]
            path.write_text("".join(line for line in lines if line.endswith("\n")))

    def make(self, row: dict[str, Any], measured: Callable[[], dict[str, Any]]) -> None:
        """Measure this row if it is not there."""
        if any(all(one.get(key) == value for key, value in row.items()) for one in self.found):
            return
        self.found.append(row | measured())
        with self.path.open("a") as file:
            file.write(json.dumps(self.found[-1]) + "\n")
        print(json.dumps(self.found[-1]), file=sys.stderr, flush=True)


def recipe_of(name: str, data: str, tokens: int, seed: int) -> Any:
    """The recipe of one model: about 0.6 million parameters, of which the vocabulary has a sixth."""
    from ouroboros.recipes import recipe

    if name == "crawler":
        made = recipe("crawler", "tiny")
    else:
        made = recipe("gpt" if name == "gpt" else "loop", "tiny")
        block = made.model.block
        block = dataclasses.replace(block, ffn=block.ffn.replace(intermediate_size=288))
        layout = "4" if name == "gpt" else f"1 (2)x{LOOPS[name]} 1"
        made = dataclasses.replace(made, model=made.model.replace(layout=layout, hidden_size=96, block=block))
    train = dataclasses.replace(
        made.train, tokens=tokens, seed=seed, batch_size=8, eval_every=0, checkpoint_every=0, telemetry_every=0
    )
    data_spec = dataclasses.replace(made.data, sources=(data,), tokenizer="bpe:1024", sequence_length=WINDOW)
    return dataclasses.replace(made, data=data_spec, train=train)


def _measured(
    chosen: argparse.Namespace, opened: Any, name: str, seed: int
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Each row of one model, and how it is measured."""
    from ouroboros.pack.ids import generated_ids, random_ids
    from ouroboros.pack.plan import uniform

    bench, model = _Bench(chosen, opened), opened.model
    given = {"model": name, "seed": seed}
    number, first = TOKENS // WINDOW, opened.tokenizer.eos_id
    other = {
        "generated": functools.partial(generated_ids, model, rows=number, length=WINDOW, first=first),
        "random": functools.partial(random_ids, model.config.vocab_size, rows=number, length=WINDOW),
    }
    for kind in chosen.only.split(","):
        if kind == "method":
            yield given | {"kind": kind, "method": "none"}, bench.plain
            for bits, method in itertools.product(BITS, METHODS):
                measured = functools.partial(bench.coded, uniform(bits), method)
                yield given | {"kind": kind, "bits": bits, "method": method}, measured
        elif kind == "floor":
            for bits in BITS:
                yield given | {"kind": kind, "bits": bits}, functools.partial(bench.floored, bits)
        elif kind == "calibration":
            for text, ids in other.items():
                measured = functools.partial(bench.coded, uniform(4), "loop-aware", ids)
                yield given | {"kind": kind, "bits": 4, "method": "loop-aware", "text": text}, measured
        elif kind == "budget":
            for budget in chosen.budgets.split(","):
                yield given | {"kind": kind, "budget": budget}, functools.partial(bench.fitted, budget)


class _Bench:
    """A model, its calibration text and its held-out text."""

    def __init__(self, chosen: argparse.Namespace, opened: Any) -> None:
        import numpy as np
        import torch

        data = opened.run.open_data()
        tokens = data.tokens("train", 0)
        starts = np.linspace(0, len(tokens) - WINDOW, TOKENS // WINDOW).astype(int)
        self.ids = [torch.from_numpy(tokens[start : start + WINDOW].astype("int64")) for start in starts]
        self.test = [chosen.held_out.read_bytes()] if chosen.held_out else data.documents("test")
        self.opened, self.most = opened, chosen.max_bytes

    @functools.cached_property
    def before(self) -> float:
        """Bits per byte of the model as it is."""
        return self._score(self.opened.model)

    def _score(self, model: Any) -> float:
        from ouroboros.eval.score import score

        tokenizer = self.opened.tokenizer
        return score(model, tokenizer, self.test, window=WINDOW, max_bytes=self.most).bits_per_byte

    def plain(self) -> dict[str, Any]:
        """The model as it is."""
        return {"bits_per_byte": self.before, "parameters": sum(p.numel() for p in self.opened.model.parameters())}

    def coded(self, plan: Any, method: Any, ids: Callable[[], Any] | None = None) -> dict[str, Any]:
        """With codes by this plan."""
        from ouroboros.pack.calibrate import quantize_model

        text = self.ids if ids is None else ids()
        return self._of(quantize_model(self.opened.model, plan, text, mode=method, allow_fallbacks=True))

    def _of(self, made: Any) -> dict[str, Any]:
        coded = [(line.entropy, made.tensors[line.name].codes.numel()) for line in made.report.values() if line.bits]
        entropy = sum(bits * count for bits, count in coded) / sum(count for _, count in coded)
        return self._with(made.tensors) | {"entropy": entropy, "exceptions": made.exceptions}

    def _with(self, tensors: Any) -> dict[str, Any]:
        from ouroboros.pack.calibrate import apply

        model = copy.deepcopy(self.opened.model)
        apply(model, tensors)
        found = self._score(model)
        return {"bits_per_byte": found, "rise": found - self.before}

    def floored(self, bits: int) -> dict[str, Any]:
        """Rounded with the steps of the largest weights, none of them below that of a largest weight of one."""
        from ouroboros.nn.quantize import quantized
        from ouroboros.pack.calibrate import quantize_model
        from ouroboros.pack.plan import uniform
        from ouroboros.pack.quantize import Clip

        whole = Clip(by="quantile", value=1.0)
        made = quantize_model(self.opened.model, uniform(bits, clip=whole), [], mode="rounding")
        weights = dict(self.opened.model.named_parameters())
        least = 1 / (2 ** (bits - 1) - 1)
        floored = {
            line.name: quantized(weights[line.name].detach(), bits, smallest=least)
            for line in made.report.values()
            if line.bits and weights[line.name].ndim == 2
        }
        found = self._with(made.tensors | floored)
        return found | {"without": self._with(made.tensors)["rise"]}

    def fitted(self, budget: str) -> dict[str, Any]:
        """In a file of so many bytes, read again from it."""
        from ouroboros.api import open_model
        from ouroboros.pack.budget import fit, parse_size
        from ouroboros.pack.write import pack

        opened = self.opened

        def file(made: Any) -> bytes:
            return pack(opened.spec, made.tensors, opened.tokenizer)

        found = fit(opened.model, self.ids, parse_size(budget), lambda made: len(file(made)))
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.pack"
            path.write_bytes(file(found.made))
            score = self._score(open_model(path).model)
        return {"bits_per_byte": score, "rise": score - self.before, "bytes": found.size, "feasible": found.feasible}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds with their intervals: of each row, and of pairs of methods."""
    from ouroboros.eval.stats import mean_interval

    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    names = ("kind", "model", "bits", "method", "text", "budget")
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), {})[row["seed"]] = row

    def interval(values: Sequence[float]) -> dict[str, Any]:
        found = mean_interval(list(values))
        return {"mean": found.mean, "low": found.low, "high": found.high, "seeds": found.n}

    def paired(left: tuple[Any, ...], right: tuple[Any, ...]) -> dict[str, Any]:
        a, b = groups[left], groups[right]
        return interval([a[seed]["bits_per_byte"] - b[seed]["bits_per_byte"] for seed in sorted(a.keys() & b.keys())])

    means, pairs = [], []
    for key, found in groups.items():
        facts = {name: value for name, value in zip(names, key, strict=True) if value is not None}
        measured = [
            name for name in ("bits_per_byte", "rise", "without", "bytes", "entropy") if name in min(found.items())[1]
        ]
        means.append(facts | {name: interval([row[name] for row in found.values()]) for name in measured})
    for kind, model, bits, *_ in groups:
        for left, right in (("per-call", "rounding"), ("loop-aware", "per-call"), ("loop-aware", "rounding")):
            keys = tuple((kind, model, bits, method, None, None) for method in (left, right))
            row = {"model": model, "bits": bits, "pair": f"{left} - {right}"}
            if all(key in groups for key in keys) and not any(row.items() <= one.items() for one in pairs):
                pairs.append(row | paired(*keys))
    return {"means": means, "pairs": pairs}


if __name__ == "__main__":
    main()
