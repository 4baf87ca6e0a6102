"""What the benchmarks share: alternating measurements, medians with quartiles, one line of JSON.

A shared machine's absolute figures move by a factor of two within minutes. So the arms of a comparison take turns
(A B A B ..) within one process, and a ratio is the median over rounds of the ratio of neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ouroboros.cli import let_waiting_threads_sleep

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from ouroboros.config import ModelSpec
    from ouroboros.model.modeling import OuroborosForCausalLM


def cross_entropy(logits: Any, targets: Any) -> Any:
    """The loss that training computes from logits, without label smoothing."""
    from ouroboros.model.loss import logits_loss

    return logits_loss(logits, targets, 0.0)[0]


def autocast(device: Any, dtype: Any) -> Any:
    """Training's mixed precision: none for float32."""
    import torch

    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options every benchmark has. Threads wait as they do under the command."""
    let_waiting_threads_sleep(os.environ)
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="smallest sizes, two rounds: a smoke test, not a measure")
    options.add_argument("--threads", type=int, help="threads of torch; by default all cores")
    options.add_argument("--rounds", type=int, help="turns of every arm")
    return options


def set_threads(threads: int | None) -> None:
    """Pin torch's threads, if asked, and silence advice from transformers."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)


def progress(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def alternate(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What every arm returned, in ``rounds`` turns; the order is reversed every other round."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        names = list(arms) if turn % 2 == 0 else list(arms)[::-1]
        for name in names:
            found[name].append(arms[name]())
        progress(f"round {turn + 1}/{rounds}: " + ", ".join(f"{name} {found[name][-1]:.4g}" for name in arms))
    return found


def timed(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of wall clock, or of another one."""
    start = clock()
    call()
    return clock() - start


def computed(call: Callable[[], Any]) -> float:
    """Seconds of processor time of this process, of all its threads: what else the machine does counts for little."""
    return timed(call, time.process_time)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    lower, median, upper = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0], values[0], values[0])
    )
    return {"median": _round(median), "q1": _round(lower), "q3": _round(upper)}


def ratio(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """``first / second`` round by round: median and quartiles."""
    return spread([a / b for a, b in zip(first, second, strict=True)])


def report(name: str, started_load: float, **results: Any) -> None:
    """Print the one line of JSON."""
    torch = sys.modules.get("torch")
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "torch": torch.__version__ if torch else None,
        "python": platform.python_version(),
        "load_before": _round(started_load),
        "load_after": _round(load()),
    }
    command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    print(json.dumps({"benchmark": name, "command": command, **results, "machine": machine}))


def load() -> float:
    """The system's load average of the last minute: above the benchmark's own threads, others disturb it."""
    return os.getloadavg()[0]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def build(spec: ModelSpec) -> OuroborosForCausalLM:
    """A model of ``spec`` with seeded weights, without an end-of-text token."""
    import torch

    from ouroboros.model.configuration import OuroborosConfig
    from ouroboros.model.modeling import OuroborosForCausalLM

    torch.manual_seed(0)
    return OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()


def llama_of(spec: ModelSpec) -> LlamaForCausalLM:
    """transformers' Llama of the shape and size of a plain ``spec``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.block.ffn.intermediate_size,
        num_hidden_layers=int(spec.layout),
        num_attention_heads=spec.block.mixer.num_heads,
        num_key_value_heads=spec.block.mixer.kv_heads,
        max_position_embeddings=spec.max_position_embeddings,
        rms_norm_eps=spec.block.norm.eps,
        tie_word_embeddings=spec.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    ours = build(spec)
    assert model.num_parameters() == ours.num_parameters(), "the two models differ in size"
    return model
