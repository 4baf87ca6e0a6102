"""A small comparison and a small run, as the report gets them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ouroboros.config import to_json
from ouroboros.eval.baselines import Baseline
from ouroboros.eval.stats import Difference
from ouroboros.recipes import recipe
from ouroboros.report.content import Arm, LoopPoint, Report, Sample

HOSTILE = "</pre><script>alert(1)</script>&amp; \x00\x1b[31m\udcff\u202e $x_1$ https://example.org/x.js\n"
CURVE = ((1, 2.2), (2, 1.5), (3, 1.411), (4, 1.42), (8, 1.66))


def make_metrics(final: float, loops: int = 0, steps: int = 200) -> list[dict[str, Any]]:
    """Records as the trainer writes them; ``loops`` > 0 adds telemetry."""
    records: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        bits = final + 4 * math.exp(-step / 40)
        records.append({"kind": "train", "step": step, "tokens": step * 100, "seconds": step / 2, "loss": bits * 0.69})
        records[-1] |= {"bits_per_byte": bits, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 200.0 + step % 20}
        if step % 50 == 0:
            records.append({"kind": "valid", "step": step, "bits_per_byte": bits + 0.02})
        if loops and step % 20 == 0:
            entries = [
                {"segment": 1, "loop": i, "state_norm": 1.0 + i, "update_ratio": 1 / (1 + i), "grad_norm": 0.1 * i}
                | {"cosine": None if i == 0 else 0.2 * i}
                for i in range(loops)
            ]
            records.append({"kind": "telemetry", "step": step, "loops": entries})
    return records


def make_difference(low: float, high: float) -> Difference:
    """A difference with the verdict that its interval gives."""
    verdict = "better" if high < 0 else "worse" if low > 0 else "cannot tell"
    return Difference(delta=(low + high) / 2, stderr=0.01, low=low, high=high, verdict=verdict, units=10)


@pytest.fixture(scope="session")
def comparison() -> Report:
    """A demo's report with something in every section."""
    looped = Arm(
        name="loop",
        description="prelude, loop, coda",
        layout="2 (2)x3 2",
        parameters=4_890_000,
        stored_bytes=3_667_500,
        training_flops_per_token=56_400_000,
        tokens=20_000,
        minutes=1.5,
        tokens_per_second=7801.0,
        bits_per_byte=1.411,
        interval=(1.39, 1.43),
        metrics=make_metrics(1.4, loops=3),
        recipe='{"name": "loop"}',
    )
    plain = Arm(name="gpt", layout="6", bits_per_byte=1.438, interval=(1.42, 1.46), metrics=make_metrics(1.43))
    curve = [LoopPoint(loops=n, bits_per_byte=b, low=b - 0.02, high=b + 0.02, trained=n == 3) for n, b in CURVE]
    return Report(
        title="Does looping pay?",
        subtitle="Both arms saw the same bytes.",
        command="ouroboros demo --minutes 1 --seed 0",
        environment={"torch": "2.13.0", "cores": 2},
        arms=[looped, plain],
        baselines=[
            Baseline(name="order-4 n-gram", bytes=1, train_bytes=1, bits_per_byte=2.163, interval=(2.124, 2.202)),
            Baseline(name="xz", bytes=1, train_bytes=1, bits_per_byte=1.652, detail="given 2.6 MB"),
        ],
        loop_curve={"loop": curve},
        samples=[Sample(prompt="def main(", text=HOSTILE, arm="loop", settings="temperature 0.8")],
        notes=["One seed each."],
        difference=make_difference(-0.033, -0.021),
        headline="loop wins.",
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run of the looped recipe, without ``eval.json``."""
    run = tmp_path / "my-run"
    run.mkdir()
    (run / "recipe.json").write_text(to_json(recipe("loop", "tiny")), encoding="utf-8")
    lines = [json.dumps(record) for record in make_metrics(1.5, loops=2)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return run


@pytest.fixture
def records_of() -> Any:
    """:func:`make_metrics`, for tests of other modules."""
    return make_metrics
