"""Study: how far a cut donor comes back, and whether a Controller has a part in it. Paired seeds.

Each seed is one ``ouroboros convert --heal``, so the study goes on where it was interrupted. For every arm and text the
share of the gap between cut donor and donor that is closed, as a mean over seeds with a 95 % Student interval, and
differences of arms in bits per byte, paired by seed. `docs/studies/healing.md` tells what came out.

    python runs/heal_study.py DONOR --seeds 3 --out work -- --data TEXT OTHER --held-out TEXT OTHER --steps 150

What stands behind ``--`` is handed on to the command. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAIRS = (
    ("low-rank", "healed"),
    ("static", "healed"),
    ("controller", "healed"),
    ("controller", "static"),
    ("controller", "low-rank"),
    ("controller, shuffled", "controller"),
    ("controller, constant", "controller"),
)


def main() -> None:
    """Heal with every seed, then compare."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("donor")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--out", type=Path, required=True, help="working directory; what is done in it is kept")
    arguments = sys.argv[1:]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    chosen, more = options.parse_args(arguments[:at]), arguments[at + 1 :]
    verdicts = [_verdict(chosen.donor, chosen.out / f"seed-{seed}", seed, more) for seed in range(chosen.seeds)]
    print(json.dumps({"study": "heal_study", "seeds": len(verdicts), **summary(verdicts)}))


def _verdict(donor: str, out: Path, seed: int, more: Sequence[str]) -> dict[str, Any]:
    """The verdict of one seed, made if it is not there."""
    path = out / "verdict.json"
    if not path.is_file():
        command = ["ouroboros", "convert", donor, "--heal", "--out", str(out), "--seed", str(seed), *more]
        subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], check=True, stdout=sys.stderr)
    return json.loads(path.read_bytes())


def summary(verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds with their intervals: the closed share of every arm, and the pairs of arms."""
    from ouroboros.eval.stats import mean_interval

    scores = [{arm["name"]: arm["texts"] for arm in verdict["arms"]} for verdict in verdicts]
    texts, names = list(scores[0]["donor"]), list(scores[0])

    def interval(values: Sequence[float]) -> dict[str, Any]:
        found = mean_interval(list(values))
        return {"mean": found.mean, "low": found.low, "high": found.high}

    def bits(arm: str, text: str) -> list[float]:
        return [seed[arm][text]["bits_per_byte"] for seed in scores]

    arms = {
        name: {
            text: {
                "bits_per_byte": interval(bits(name, text)),
                "closed": interval([seed[name][text]["closed"]["share"] for seed in scores]),
            }
            for text in texts
        }
        for name in names
    }
    pairs = {
        f"{left} - {right}": {
            text: interval([a - b for a, b in zip(bits(left, text), bits(right, text), strict=True)]) for text in texts
        }
        for left, right in PAIRS
        if left in names and right in names
    }
    trained = {arm["name"]: arm["trained_parameters"] for arm in verdicts[0]["arms"]}
    minutes = {
        arm: sorted(found["minutes"] for verdict in verdicts for found in verdict["arms"] if found["name"] == arm)
        for arm in names
    }
    best = [verdict["best"] for verdict in verdicts]
    return {"arms": arms, "pairs": pairs, "trained": trained, "minutes": minutes, "best": best}


if __name__ == "__main__":
    main()
