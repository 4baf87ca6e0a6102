"""Study: do the published findings about the Controller hold? Eleven hypotheses on a tiny donor, with paired seeds.

A donor is trained once on two texts: code (the source of Python's standard library without docstrings) and English
prose (those docstrings), or `--data FILE` and `--other FILE`. It is then made recursive as published, or in our form,
and healed on the first text. Every form is a cell: it is trained with two learning rates for every seed, with the same
windows in the same order as all cells of that seed, and the better rate by a validation slice is taken. Losses are nats
per token of held-out text, of the kind that is healed on ("in") and of the other ("out"); intervals are 95 % Student
intervals over seeds. `docs/studies/controller.md` tells what came out.

    python runs/controller_hypotheses.py --seeds 3 --out work

Finished cells are kept in the directory, so the same command goes on where it stopped. Prints one line of JSON and
writes it to `hypotheses.json` in the directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RATES = (3e-3, 1e-2)
"""Every form is trained with both."""
PUBLISHED_RATE = 3e-4
"""For the test of bfloat16, whose point is how small an update is."""
PUBLISHED_DEPTH = 2
GRID_DEPTHS, GRID_RANKS = (1, 2, 4), (4, 8, 16)
METRICS = ("next", "two")
TEXTS = ("in", "out")
MOVED = ("gain moved", "gain spread", "gate moved", "heads moved", "in next")
PUBLISHED = f"controller, depth {PUBLISHED_DEPTH}"
"""The arm that others are compared with."""
HEALED = (
    *(PUBLISHED, f"static, depth {PUBLISHED_DEPTH}", "two ahead", "static, two ahead", "no norm", "neither"),
    *("coda trained", "coda trained, two ahead", "bridge, not trained", "ours, bridge", "ours, static"),
    "ours, controller",
)
"""Arms that are compared with the cut donor."""


def main() -> None:
    """Train what is not trained yet, then compare."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--out", type=Path, required=True, help="working directory; finished cells in it are kept")
    options.add_argument("--data", type=Path, help="text to heal on, instead of the bundled code")
    options.add_argument("--other", type=Path, help="text of another kind, instead of the bundled docstrings")
    options.add_argument("--donor-steps", type=int, default=1000, help="of 1,024 tokens")
    options.add_argument("--updates", type=int, default=60, help="of 512 tokens, for every cell")
    options.add_argument("--windows", type=int, default=16, help="windows of each held-out text that are scored")
    options.add_argument("--max-bytes", type=int, default=1_000_000, help="of each text that are read")
    options.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many minutes")
    chosen = options.parse_args()
    if (chosen.data is None) != (chosen.other is None):
        options.error("--data and --other belong together: give both or neither")
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    from controller_cells import Bench, Sizes, write_texts

    from ouroboros.data.bundled import bundled_files

    sizes = Sizes(
        donor_steps=chosen.donor_steps, updates=chosen.updates, windows=chosen.windows, max_bytes=chosen.max_bytes
    )
    adopt(chosen.out, {**vars(sizes), "data": str(chosen.data), "other": str(chosen.other)})
    files = (path for _, path in bundled_files())
    texts = [chosen.data, chosen.other] if chosen.data else write_texts(chosen.out / "texts", files)
    bench = Bench(chosen.out, texts, sizes)
    table = Table(range(chosen.seeds))
    left = train(bench, table, chosen.out, 60 * chosen.minutes)
    found = kept(chosen.out / "baselines.json", lambda: baselines(bench))
    sums = {"study": "controller_hypotheses", "seeds": chosen.seeds, **vars(sizes), "baselines": found}
    sums |= {"not_reached": left, **findings(table, found)}
    (chosen.out / "hypotheses.json").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(sums))


def train(bench: Any, table: Table, out: Path, seconds: float) -> list[str]:
    """Train and measure every cell, the most telling ones first; returns the arms for which the time was too short."""
    end, left = time.monotonic() + seconds, []
    for name, cell in plan():
        for seed in table.seeds:
            one = dataclasses.replace(cell, seed=seed)
            path = out / "cells" / f"{one.name}.json"
            if not path.is_file() and time.monotonic() > end:
                left += [] if name in left else [name]
                continue
            table.results[one] = kept(path, lambda one=one: bench.run(one))
            print(name, seed, f"{table.results[one]['in next']:.4f}", file=sys.stderr, flush=True)
    return left


def adopt(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings into the directory, or refuse one that has others."""
    path = out / "settings.json"
    if path.is_file():
        before = json.loads(path.read_bytes())
        other = [name for name in settings if before.get(name) != settings[name]]
        if other:
            sys.exit(f"{out} holds a study with other settings ({', '.join(other)}): choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings), encoding="utf-8")


def kept(path: Path, make: Any) -> Any:
    """What a file holds; if it is not there, what ``make`` returns, which is written to it whole."""
    if not path.is_file():
        from ouroboros.files import write_whole

        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(make()).encode())
    return json.loads(path.read_bytes())


def tuned() -> dict[str, Any]:
    """Cells by name that are trained with both rates; rate and seed are left open."""
    from controller_cells import DEPTHS, Cell

    found = {}
    for depth in (PUBLISHED_DEPTH, *DEPTHS):
        found[f"controller, depth {depth}"] = Cell(depth=depth)
        found[f"static, depth {depth}"] = Cell(depth=depth, steering="static")
    return found


def others() -> dict[str, Any]:
    """Cells that are trained once, with the first of the rates unless the rate is what is asked."""
    from controller_cells import Cell

    found: dict[str, Any] = {
        "two ahead": Cell(ahead=2),
        "no controller": Cell(steering="none"),
        "no gate": Cell(gate="none"),
        "fixed gate": Cell(gate="fixed"),
        "no norm": Cell(norm=False),
        "neither": Cell(gate="none", norm=False),
        "bases of the looped layer": Cell(bases="own"),
        "random bases": Cell(bases="random"),
        "depth drawn": Cell(drawn=True),
        "coda trained": Cell(coda=True),
        "coda trained, two ahead": Cell(coda=True, ahead=2),
        "static, two ahead": Cell(ahead=2, steering="static"),
        "bridge, not trained": Cell(form="ours", steering="none", rate=0.0),
        "ours, bridge": Cell(form="ours", steering="none"),
        "ours, static": Cell(form="ours", steering="static"),
        "ours, controller": Cell(form="ours"),
        "float32, published rate": Cell(rate=PUBLISHED_RATE),
        "bfloat16, published rate": Cell(rate=PUBLISHED_RATE, precision="bfloat16"),
    }
    for gate in ("none", "trained"):
        for start in ("saddle", "b_zero"):
            name = f"refiner, {'no gate' if gate == 'none' else 'gate'}, {start}"
            found[name] = Cell(form="refiner", gate=gate, start=start, ahead=2, rate=1e-3)
    for rank in GRID_RANKS:
        found[f"controller, rank {rank}"] = Cell(rank=rank)
        for depth in GRID_DEPTHS:
            found[f"static, depth {depth}, rank {rank}"] = Cell(depth=depth, rank=rank, steering="static")
    return found


def plan() -> list[tuple[str, Any]]:
    """Every cell of seed 0 with its name, once, the most telling ones first."""
    first, second = ({name: dataclasses.replace(cell, rate=rate) for name, cell in tuned().items()} for rate in RATES)
    cells = [*first.items(), *others().items(), *((f"{name}, rate {RATES[1]}", cell) for name, cell in second.items())]
    found: dict[Any, str] = {}
    for name, cell in cells:
        found.setdefault(cell, name)
    return [(name, cell) for cell, name in found.items()]


def baselines(bench: Any) -> dict[str, Any]:
    """What needs no training: donor, cut donor, forms at their start, cosines of the bases."""
    from controller_cells import DEPTHS, Cell

    found: dict[str, Any] = {"donor": bench.losses(bench.donor), "cut": bench.losses(bench.cut())}
    for depth in DEPTHS:
        found[f"plain loop, depth {depth}"] = bench.losses(bench.cut(depth))
        found[f"start, depth {depth}"] = bench.losses(bench.model(Cell(depth=depth)))
        modulated = Cell(depth=depth, gate="none", norm=False)
        found[f"start without norm and gate, depth {depth}"] = bench.losses(bench.model(modulated))
    return found | {"cosines": bench.cosines()}


class Table:
    """Measurements of the cells that are there, and means of them over seeds."""

    def __init__(self, seeds: Iterable[int]) -> None:
        self.results: dict[Any, dict[str, float]] = {}
        self.seeds = tuple(seeds)

    def cells(self) -> dict[str, Any]:
        """The cell of every arm, with its rate."""
        return {name: self._better(cell) for name, cell in tuned().items()} | others()

    def _better(self, cell: Any) -> Any:
        """The cell with the rate whose validation loss is lower on average."""
        rates = [dataclasses.replace(cell, rate=rate) for rate in RATES]
        there = [each for each in rates if self.of(each, "valid next")] or rates[:1]
        return min(there, key=lambda each: sum(self.of(each, "valid next")))

    def of(self, cell: Any, key: str) -> list[float]:
        """One number for each seed; none where a seed is missing."""
        cells = [dataclasses.replace(cell, seed=seed) for seed in self.seeds]
        return [self.results[each][key] for each in cells] if all(each in self.results for each in cells) else []

    def values(self, arm: str, key: str = "in next") -> list[float]:
        """One measurement of an arm, for each seed."""
        return self.of(self.cells()[arm], key)

    def mean(self, arm: str, key: str = "in next") -> dict[str, Any]:
        """Its mean with an interval."""
        return interval(self.values(arm, key))

    def minus(self, arm: str, other: str, key: str = "in next", other_key: str | None = None) -> dict[str, Any]:
        """The difference of two arms, paired by seed; negative where the first is better."""
        left, right = self.values(arm, key), self.values(other, other_key or key)
        return interval([a - b for a, b in zip(left, right, strict=bool(left and right))])

    def both(self, arm: str, other: str) -> dict[str, Any]:
        """That difference on both texts."""
        return {text: self.minus(arm, other, f"{text} next") for text in ("in", "out")}


def interval(values: list[float]) -> dict[str, Any]:
    """Mean and 95 % Student interval over seeds; empty where an arm was not reached."""
    if not values:
        return {}
    from ouroboros.eval.stats import mean_interval

    found = mean_interval(values)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def findings(table: Table, base: dict[str, Any]) -> dict[str, Any]:
    """What is asked of every hypothesis."""
    return {
        "arms": {name: shown(table, name) for name in table.cells()},
        "H1 and H2": {arm: one_metric(table, base, arm) for arm in (PUBLISHED, "two ahead")},
        "H3": controller_or_static(table),
        "H4": robustness(table),
        "H5": depths(table),
        "H6": {
            **{arm: table.both(arm, PUBLISHED) for arm in ("no gate", "fixed gate", "no norm", "neither")},
            "refiners": refiners(table, base),
        },
        "H7": {arm: {text: against(table, base, arm, f"{text} next") for text in TEXTS} for arm in HEALED},
        "H8": {
            "cosines": base["cosines"],
            **{arm: table.both(arm, PUBLISHED) for arm in ("bases of the looped layer", "random bases")},
        },
        "H9": {
            arm: {key: table.mean(arm, key) for key in MOVED}
            for arm in ("float32, published rate", "bfloat16, published rate", PUBLISHED)
        },
        "H10": {
            name: {text: losses[f"{text} next"] - base["cut"][f"{text} next"] for text in TEXTS}
            for name, losses in base.items()
            if name.startswith(("start", "plain"))
        },
        "H11": misleading(table),
        "grid": {
            f"depth {depth}, rank {rank}": {
                "loss": table.mean(f"static, depth {depth}, rank {rank}"),
                "controller minus static": table.both(
                    f"controller, depth {depth}", f"static, depth {depth}, rank {rank}"
                ),
            }
            for depth in GRID_DEPTHS
            for rank in GRID_RANKS
        },
    }


def shown(table: Table, name: str) -> dict[str, Any]:
    """An arm by itself."""
    rate = table.cells()[name].rate
    losses = {f"{text} {metric}": table.mean(name, f"{text} {metric}") for text in TEXTS for metric in METRICS}
    trained = table.values(name, "trained")[:1] if rate else [0]
    return {"rate": rate, "trained": trained[0] if trained else None, **losses}


def controller_or_static(table: Table) -> dict[str, Any]:
    """The Controller minus static diagonals, also when it sees another text; and what either adds."""
    from controller_cells import DEPTHS

    found: dict[str, Any] = {}
    for depth in DEPTHS:
        pair = f"controller, depth {depth}", f"static, depth {depth}"
        found[f"depth {depth}"] = table.both(*pair) | {
            "another text seen": table.minus(*pair, "other in next", "in next"),
        }
    return found | {
        "drawn depth, used at depth 1, against static": table.minus(
            "depth drawn", "static, depth 1", "depth 1 in next", "in next"
        ),
        "controller against none": table.both(PUBLISHED, "no controller"),
        "static against none": table.both(f"static, depth {PUBLISHED_DEPTH}", "no controller"),
        "ours, controller against static": table.both("ours, controller", "ours, static"),
        "ours, static against bridge": table.both("ours, static", "ours, bridge"),
        "ours, controller against bridge": table.both("ours, controller", "ours, bridge"),
    }


def depths(table: Table) -> dict[str, Any]:
    """Differences between depths: each trained for itself, and one model whose depth was drawn."""
    from controller_cells import DEPTHS

    drawn = "depth drawn"
    return {
        "trained for its depth": {
            f"{depth} - 1": table.both(f"controller, depth {depth}", "controller, depth 1") for depth in DEPTHS[1:]
        },
        "depth drawn, used at": {
            f"{depth} - 2": table.minus(drawn, drawn, f"depth {depth} in next", "depth 2 in next")
            for depth in (1, 4, 8)
        },
    }


def misleading(table: Table) -> dict[str, Any]:
    """What a wrong input of the Controller costs, in nats."""
    from controller_cells import CONTROLS, DEPTHS

    return {
        arm: {how: table.minus(arm, arm, f"{how} in next", "in next") for how in CONTROLS}
        for arm in (*(f"controller, depth {depth}" for depth in DEPTHS), "two ahead", "ours, controller")
    }


def against(table: Table, base: dict[str, Any], arm: str, key: str) -> dict[str, Any]:
    """An arm minus the cut donor, and the share of the gap to the donor that it closes."""
    cut, donor = base["cut"][key], base["donor"][key]
    values = table.values(arm, key)
    return {
        "minus cut": interval([value - cut for value in values]),
        "closed": interval([(cut - value) / (cut - donor) for value in values]),
    }


def one_metric(table: Table, base: dict[str, Any], arm: str) -> dict[str, Any]:
    """Share by which the cut donor's loss falls, and share of the gap that is closed, for each metric; and the
    published mixture: cut and system by the one, the donor by the other."""
    found = {}
    for metric in METRICS:
        key = f"in {metric}"
        cut = base["cut"][key]
        falls = interval([(cut - value) / cut for value in table.values(arm, key)])
        found[metric] = {"falls by": falls, **against(table, base, arm, key)}
    cut, donor = base["cut"]["in two"], base["donor"]["in next"]
    found["mixed"] = interval([(cut - value) / (cut - donor) for value in table.values(arm, "in two")])
    return found


def robustness(table: Table) -> dict[str, Any]:
    """Differences between ranks and rates, and the deviation between seeds, which both are compared with."""
    from statistics import stdev

    cell, values = table.cells()[PUBLISHED], table.values(PUBLISHED)
    low, high = (table.of(dataclasses.replace(cell, rate=rate), "in next") for rate in RATES)
    return {
        **{f"rank {rank} - 8": table.both(f"controller, rank {rank}", PUBLISHED) for rank in GRID_RANKS if rank != 8},
        f"rate {RATES[1]} - {RATES[0]}": interval([b - a for a, b in zip(low, high, strict=bool(low and high))]),
        "deviation between seeds": stdev(values) if len(values) > 1 else None,
    }


def refiners(table: Table, base: dict[str, Any]) -> dict[str, Any]:
    """Every refiner minus the donor, both two ahead as trained, and how far its Controller's maps moved."""
    found = {}
    for name in table.cells():
        if name.startswith("refiner"):
            found[name] = {
                "minus donor": interval([value - base["donor"]["in two"] for value in table.values(name, "in two")]),
                "heads moved": table.mean(name, "heads moved"),
            }
    return found


if __name__ == "__main__":
    main()
