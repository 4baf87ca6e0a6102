"""Every benchmark runs, and prints one line of JSON whose claims that do not depend on speed hold."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("common"))


def run(name: str, python: str) -> dict[str, Any]:
    command = [python, f"benchmarks/{name}.py", "--quick", "--threads", "1"]
    result = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 1, lines
    return json.loads(lines[0])


def check_ablate_overhead(found: dict[str, Any]) -> None:
    assert found["cells"] == 2 and found["clock"] == "processor time"
    assert found["ratio"]["median"] > 0 and found["proof_of_life_seconds"]["median"] > 0


def check_study_survives(found: dict[str, Any]) -> None:
    assert found["same"] and found["cells"] == found["asked"] and found["steps"] == found["steps_asked"], found
    deaths = found["lives"]["killed"] + found["lives"]["disk full"]
    assert found["cells_again"] == 0 and found["steps_again"] <= deaths, found


def check_codecs(found: dict[str, Any]) -> None:
    for name, bits in found["bits_per_code"].items():
        assert bits["range"] < 1.01 * bits["entropy"], name
        assert bits["range"] < min(bits["brotli"], bits["xz"]), name


def check_fuzz_artifact(found: dict[str, Any]) -> None:
    assert found["files"] == 400 and found["faults"] == {}
    assert len(found["outcomes"]) == 8 and all(kind["refused"] > 10 for kind in found["outcomes"].values())
    assert sum(kind.get("read", 0) for kind in found["outcomes"].values()) > 0
    assert found["memory_growth_MB"] < 200 and found["slowest_seconds"] < 2


def check_sharding(found: dict[str, Any]) -> None:
    """The script itself compares its calculation with what FSDP sends and with a simulation."""
    steps, memory = found["steps"], found["memory_GB"]
    assert steps["ours, 25 GB/s"]["idle_seconds"] < 0.6 * steps["fsdp, 25 GB/s"]["idle_seconds"]
    assert memory["fsdp"]["sum"] < memory["ours"]["sum"] < memory["ddp"]["sum"]
    kept, recomputed = (found["activation_bytes"][name] for name in ("kept", "recomputed"))
    assert all(recomputed[loops] < 0.15 * kept[loops] for loops in kept)
    assert found["muon"]["share_seconds"] < 0.1 * found["muon"]["all_seconds"]


def check_startup(found: dict[str, Any]) -> None:
    assert not any(found["imported"].values()), found["imported"]
    assert found["seconds"]["ouroboros --help"]["median"] > 0


def check_decode(found: dict[str, Any]) -> None:
    assert found["same_tokens_as_generate"] == {"fast_uncompiled": True}
    sizes = found["cache_bytes_per_token"]
    assert all(size["measured"] == size["predicted"] for size in sizes.values())
    assert sizes["loop, share_last_kv"]["measured"] < sizes["loop"]["measured"]


def check_optim_muon(found: dict[str, Any]) -> None:
    assert found["largest_difference_of_weights"] < 1e-4


def check_shakespeare(found: dict[str, Any]) -> None:
    assert 0 < found["ouroboros"]["bits_per_byte"] < 9 and "nanogpt" not in found


def check_busy(found: dict[str, Any]) -> None:
    speeds = found["tokens_per_second"]
    assert set(speeds) == {"command", "2,000 turns", "runtime", "sleep at once", "one thread"}
    assert all(value["median"] > 0 for arm in speeds.values() for value in arm.values())


def check_loop_vs_gpt(found: dict[str, Any]) -> None:
    assert found["layouts"] == {"loop": "1 (1)x2 1", "gpt": "4"}


def check_share_last_kv(found: dict[str, Any]) -> None:
    (measured,) = found["layouts"].values()
    bits = measured["bits_per_byte"]
    assert bits["cache of every visit"] == pytest.approx(bits["uncached"], abs=2e-4)
    assert bits["share_last_kv"] != pytest.approx(bits["uncached"], abs=2e-4)


def check_train_vs_llama(found: dict[str, Any]) -> None:
    for shares in found["share_of_time"].values():
        assert sum(shares.values()) == pytest.approx(100, abs=0.5)
        assert {"matmul", "attention", "optimiser"} <= set(shares)


def check_rhrm_decode(found: dict[str, Any]) -> None:
    sizes = found["cache_bytes_per_token"]
    assert sizes["published, latents"] < sizes["rhrm"] < sizes["published, keys and values"]


def check_rhrm_train(found: dict[str, Any]) -> None:
    """Float32 or not, compiled or not: the losses are those of one model."""
    assert found["mean_difference_of_losses"]["ours - baseline"]["largest"] < 1e-3


def check_delta_step(found: dict[str, Any]) -> None:
    """Gate and value alone are what a vector state adds: (D + 1) (1 + V) at each of two residuals per block."""
    parameters, shape = found["parameters"], found["shape"]
    assert parameters["1 value"] - parameters["additive"] == shape["blocks"] * 2 * (shape["width"] + 1) * 2
    assert set(found["ratio_to_additive"]["eager"]) == set(parameters) - {"additive"}


def check_serve(found: dict[str, Any]) -> None:
    assert set(found["tokens_per_second"]) == {"in process", "endpoint", "endpoint, streamed", "eight clients"}
    first, last = found["megabytes"].values()
    assert last - first < 30  # a request that is kept would be less, so the long run decides; this finds large leaks
    assert found["seconds_to_first_token"]["median"] > 0


def check_osam_train(found: dict[str, Any]) -> None:
    """All positions at once, or one after another: the losses of three steps are those of one model."""
    assert set(found["largest_difference_of_losses"]) == {"step loop"}
    assert found["largest_difference_of_losses"]["step loop"] < 1e-5  # another formula: 1e-4
    assert set(found["ratio"]["ours"]) == set(found["ratio_by_processor_time"]["ours"]) == {"step loop"}
    floor = found["floor"]
    assert floor["percent_reached"]["ours"] < 100
    assert floor["tokens_per_second"]["float32"] * floor["operations_per_token"] > 1e9


def check_osam_decode(found: dict[str, Any]) -> None:
    assert found["same_tokens_as_generate"] == {"fast": True, "generate": True, "step loop": True}
    sizes, long = found["state_bytes"], found["long"]
    assert sizes["few tokens"] == sizes["more tokens"] == sizes["predicted"] < sizes["step loop"]
    assert set(long["state_bytes"].values()) == {sizes["predicted"]}
    assert long["state_is_finite"]
    assert set(long["late_to_early"]) == {"step of fast", "model with cache"}
    memory = list(long["resident_megabytes"].values())
    assert memory[1] - memory[0] < 8  # a text of 200 more tokens


def check_crawler_vs_published(found: dict[str, Any]) -> None:
    """Without the published program there is nothing to compare with: it says where that is."""
    assert "--published" in found["published"] and "pull request 1308" in found["published"]


def check_sliding(found: dict[str, Any]) -> None:
    nats = found["nats_per_token"]
    assert nats["windows"] == pytest.approx(nats["naive"], abs=1e-5)
    assert nats["rolling"] == pytest.approx(nats["naive"], abs=0.1)  # another function of the same text


def check_halting(found: dict[str, Any]) -> None:
    early, late = sorted(found["halting"].values(), key=lambda one: one["mean_steps"])
    assert early["operations_of_the_prompt"] < late["operations_of_the_prompt"] < 1


def check_healing(found: dict[str, Any]) -> None:
    assert set(found["ratio_to_plain"]) == {"first", "kept", "kept_all"}
    assert all(one["median"] > 0 for one in found["tokens_per_second"].values())


def check_guard(found: dict[str, Any]) -> None:
    assert found["alarms"] == {} and found["healthy_runs"] > 0
    for seen in found["seen"].values():
        assert seen["not_a_number"]["steps"] == 1 and "loop 0 of" in seen["not_a_number"]["place"]
        assert seen["rate_times_100"]["steps"] < 10


@pytest.mark.parametrize("name", SCRIPTS)
def test_benchmark(name: str, python: str) -> None:
    found = run(name, python)
    assert found["benchmark"] == name
    assert f"benchmarks/{name}.py --quick" in found["command"]
    assert set(found["machine"]) >= {"processor", "threads", "load_before"}
    globals()[f"check_{name}"](found)
