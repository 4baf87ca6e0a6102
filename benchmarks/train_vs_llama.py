"""Training: tokens per second of ``gpt`` against transformers' Llama of the same shape, and where the time goes.

Every arm runs the same loop on the same batches: forward, mean cross-entropy, backward, AdamW's fused step. ``llama``
and ``gpt`` are float32 and eager; ``default`` is what ``ouroboros train`` does in a long run on this machine (precision
by measurement, compiled blocks and loss); ``default_muon`` has its optimisers too (Muon for matrices, AdamW for the
rest), and so has ``short_muon``, which is what a run does that is too short for compiling to pay: float32, eager, the
model's own loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from common import (
    alternate,
    autocast,
    build,
    cross_entropy,
    llama_of,
    load,
    parser,
    progress,
    ratio,
    report,
    set_threads,
    spread,
    timed,
)


def main() -> None:
    """Run the comparison."""
    options = parser(__doc__)
    options.add_argument("--size", default="small", choices=("tiny", "small", "base"))
    options.add_argument("--batch", type=int, help="sequences of a step; by default the recipe's")
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads)
    import torch

    from ouroboros.recipes import recipe

    made = recipe("gpt", "tiny" if chosen.quick else chosen.size)
    length, batch = made.data.sequence_length, 2 if chosen.quick else chosen.batch or made.train.batch_size
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 256, (batch, length + 1), generator=generator) for _ in range(4)]
    steps: dict[str, Callable[[], None]] = {
        "llama": _step(llama_of(made.model), batches, _adamw),
        "gpt": _step(build(made.model), batches, _adamw),
    }
    dtype, compiled = torch.float32, "quick: not compiled"
    if not chosen.quick:
        dtype, compiled, more = _default_arms(made, batches)
        steps |= more
    for name, step in steps.items():
        progress(f"first step of {name}: {timed(step):.1f} s")
        step()
    speed = alternate(
        {name: (lambda step=step: batch * length / timed(step)) for name, step in steps.items()},
        chosen.rounds or (2 if chosen.quick else 9),
    )
    report(
        "train_vs_llama",
        started,
        batch=[batch, length],
        default=f"{str(dtype).removeprefix('torch.')}, {compiled}",
        tokens_per_second={name: spread(values) for name, values in speed.items()},
        ratio_to_llama={name: ratio(values, speed["llama"]) for name, values in speed.items() if name != "llama"},
        percent_of_matmul_peak=_percent_of_peak(made, speed, dtype),
        share_of_time={name: shares(step) for name, step in steps.items()},
    )


def _adamw(model: Any) -> list[Any]:
    import torch

    return [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)]


def _step(
    model: Any,
    batches: Sequence[Any],
    optimizers_of: Callable[[Any], Iterable[Any]],
    *,
    dtype: Any = None,
    loss_of: Callable[[Any, Any], Any] | None = None,
    own_loss: bool = False,
) -> Callable[[], None]:
    """One training step on the next batch, as a function without arguments."""
    import itertools

    import torch

    model.train()
    optimizers = list(optimizers_of(model))
    turns = itertools.cycle(batches)
    loss_of = loss_of or cross_entropy

    def step() -> None:
        windows = next(turns)
        if own_loss:
            model(input_ids=windows[:, :-1], use_cache=False, targets=windows[:, 1:]).loss.backward()
        else:
            with autocast(torch.device("cpu"), dtype or torch.float32):
                logits = model(input_ids=windows[:, :-1], use_cache=False).logits
            loss_of(logits, windows[:, 1:]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def _default_arms(made: Any, batches: Sequence[Any]) -> tuple[Any, str, dict[str, Callable[[], None]]]:
    """The arms with the precision, compilation and optimisers of ``ouroboros train``."""
    import torch

    from ouroboros.optim import build_optimizers
    from ouroboros.train.precision import choose_dtype, compile_blocks

    device = torch.device("cpu")
    dtype = choose_dtype(made.train, device)
    loss_of = torch.compile(cross_entropy, dynamic=False)
    optim = dataclasses.replace(made.optim, lr=1e-4)
    steps, compiled = {}, ""
    optimizers: dict[str, Callable[[Any], Any]] = {
        "default": _adamw,
        "default_muon": lambda model: build_optimizers(model, optim),
    }
    for name, optimizers_of in optimizers.items():
        model = build(made.model)
        compiled = compile_blocks(model.model.decoder.layers, made.train, device, float("inf"))
        steps[name] = _step(model, batches, optimizers_of, dtype=dtype, loss_of=loss_of)
    steps["short_muon"] = _step(build(made.model), batches, lambda model: build_optimizers(model, optim), own_loss=True)
    return dtype, compiled, steps


def _percent_of_peak(made: Any, speed: dict[str, list[float]], default_dtype: Any) -> dict[str, float]:
    """Operations per second of the median step as a share of a large matrix product's, in the arm's precision."""
    import torch

    from ouroboros.accounting import cost
    from ouroboros.train.precision import matmul_peak

    flops = cost(made.model, context=(made.data.sequence_length + 1) // 2).training_flops_per_token
    peaks = {dtype: matmul_peak("cpu", dtype) for dtype in {torch.float32, default_dtype}}
    shares = {}
    for name, values in speed.items():
        peak = peaks[default_dtype if name.startswith("default") else torch.float32]
        shares[name] = round(100 * spread(values)["median"] * flops / peak, 1)
    shares |= {f"peak {str(dtype).removeprefix('torch.')}, GFLOP/s": round(peak / 1e9) for dtype, peak in peaks.items()}
    return shares


CATEGORIES = {
    "optimiser": ("Optimizer", "aten::_fused_adamw", "aten::lerp"),
    "attention": ("attention", "CausalAttention", "KeptAttention", "softmax_backward", "aten::_softmax"),
    "products of stacks (attention and Muon)": ("aten::bmm", "aten::baddbmm"),
    "matmul": ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul", "mkldnn"),
    "compiled elementwise and norms": ("CompiledFxGraph", "CompiledFunction", "Torch-Compiled", "cpp_fused"),
}
"""Profiler events by a part of their name; first match wins, the rest are elementwise operations and norms."""


def shares(step: Callable[[], None]) -> dict[str, float]:
    """Percent of one step's processor time by category of operation."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    totals: dict[str, float] = {}
    for event in profile.key_averages():
        category = next(
            (name for name, parts in CATEGORIES.items() if any(part in event.key for part in parts)),
            "elementwise, norms, copies",
        )
        totals[category] = totals.get(category, 0.0) + event.self_cpu_time_total
    whole = sum(totals.values())
    return {name: round(100 * value / whole, 1) for name, value in sorted(totals.items(), key=lambda item: -item[1])}


if __name__ == "__main__":
    main()
