"""R-HRM training at Lite's shape: tokens per second and losses of ``rhrm-published`` on the published model's batches.

Every arm starts from the same weights and takes the published step: 4 sequences, 4 micro-batches, AdamW on everything
at the peak rate. ``ours`` runs as ``ouroboros train`` does on this machine (precision by measurement, compiled blocks
and loss, fused AdamW). ``--peer DIR`` (a checkout of Ouroboros-Recursive-LM) is what it is compared with; without it
the float32 eager form of our own stands in. The losses are compared with the spread of the peer's own runs, whose
dropout differs by seed. ``ours_without_dropout`` is the same model as ``rhrm`` is trained.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable
from typing import Any

from common import alternate, autocast, cross_entropy, load, parser, progress, ratio, report, set_threads, spread, timed

VOCABULARY = 50_257
"""Of the published model; a quick run has fewer."""


def main() -> None:
    """Run the comparison."""
    options = parser(__doc__)
    options.add_argument("--peer", help="directory of the published model.py")
    options.add_argument("--steps", type=int, default=24, help="optimiser steps of the loss curves")
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads)
    import torch

    from ouroboros.recipes import recipe

    made = recipe("rhrm-published", "tiny" if chosen.quick else "lite")
    made = dataclasses.replace(made, model=made.model.replace(vocab_size=512 if chosen.quick else VOCABULARY))
    rows = made.train.batch_size // made.train.accumulation
    steps = 2 if chosen.quick else chosen.steps
    batches = text_batches(made, rows, made.train.accumulation * (steps + 2))
    torch.manual_seed(0)
    start = ours_of(made).state_dict()
    makers: dict[str, Callable[[int], Arm]] = {
        "ours": lambda seed: ours_arm(made, start, batches, seed, compiled=not chosen.quick),
        "baseline": (
            (lambda seed: peer_arm(chosen.peer, made, start, batches, seed))
            if chosen.peer
            else (lambda seed: ours_arm(made, start, batches, seed, compiled=False, plain=True))
        ),
    }
    still = dataclasses.replace(made, model=without_dropout(made.model))
    makers["ours_without_dropout"] = lambda seed: ours_arm(still, start, batches, seed, compiled=not chosen.quick)
    curves = {}
    for name, seed in (("baseline", 0), ("baseline", 1), ("ours", 0), ("ours", 1)):
        arm = makers[name](seed)
        curves[f"{name} {seed}"] = [arm() for _ in range(steps)]
        progress(f"{name}, seed {seed}: loss {curves[f'{name} {seed}'][0]:.4f} to {curves[f'{name} {seed}'][-1]:.4f}")
    arms = {name: maker(0) for name, maker in makers.items()}
    tokens = made.train.batch_size * made.data.sequence_length
    for arm in arms.values():
        arm()
    speed = alternate(
        {name: (lambda arm=arm: tokens / timed(arm)) for name, arm in arms.items()},
        chosen.rounds or (2 if chosen.quick else 7),
    )
    report(
        "rhrm_train",
        started,
        baseline="published model" if chosen.peer else "ours, float32 eager",
        tokens_per_second={name: spread(values) for name, values in speed.items()},
        ratio_to_baseline={n: ratio(values, speed["baseline"]) for n, values in speed.items() if n != "baseline"},
        losses={name: [round(value, 4) for value in values] for name, values in curves.items()},
        mean_difference_of_losses={
            "ours - baseline": difference(curves["ours 0"], curves["baseline 0"]),
            "baseline, two dropout seeds": difference(curves["baseline 1"], curves["baseline 0"]),
            "ours, two dropout seeds": difference(curves["ours 1"], curves["ours 0"]),
        },
    )


def without_dropout(spec: Any) -> Any:
    """The model as ``rhrm`` trains: no dropout, so attention runs in its fused kernels."""
    mixer, ffn = (dataclasses.replace(part, dropout=0.0) for part in (spec.block.mixer, spec.block.ffn))
    return spec.replace(mixer=mixer, ffn=ffn, dropout=0.0)


Arm = Callable[[], float]
"""One optimiser step on the next batches; returns its mean loss."""


def difference(one: list[float], other: list[float]) -> dict[str, float]:
    """Mean and largest size of the step by step difference."""
    gaps = [a - b for a, b in zip(one, other, strict=True)]
    return {"mean": round(statistics.fmean(gaps), 5), "largest": round(max(map(abs, gaps)), 5)}


def text_batches(made: Any, rows: int, count: int) -> list[Any]:
    """Bytes of the bundled text, spread over the vocabulary so that the table is used as widely as with words."""
    import torch

    from ouroboros.data.bundled import bundled_files

    length = made.data.sequence_length
    data = b"".join(path.read_bytes() for _, path in list(bundled_files())[:60])
    pairs = torch.frombuffer(bytearray(data[: 2 * rows * length * count]), dtype=torch.uint8).long().view(-1, 2)
    ids = (pairs[:, 0] * 196 + pairs[:, 1] % 196) % made.model.vocab_size
    return list(ids.view(count, rows, length))


def ours_of(made: Any) -> Any:
    """Our model."""
    from ouroboros.model.configuration import OuroborosConfig
    from ouroboros.model.modeling import OuroborosForCausalLM

    return OuroborosForCausalLM(OuroborosConfig.from_spec(made.model))


def ours_arm(made: Any, start: Any, batches: list[Any], seed: int, *, compiled: bool, plain: bool = False) -> Arm:
    """Our model, optimisers, precision and compilation."""
    import torch

    from ouroboros.optim import build_optimizers
    from ouroboros.train.precision import choose_dtype, compile_blocks

    model, device = ours_of(made), torch.device("cpu")
    model.load_state_dict(start)
    model.train()
    dtype = torch.float32 if plain else choose_dtype(made.train, device)
    loss_of = cross_entropy
    if compiled:
        compile_blocks(model.model.decoder.layers, made.train, device, float("inf"))
        loss_of = torch.compile(cross_entropy, dynamic=False)
    optimizers = build_optimizers(model, made.optim)

    def loss(windows: Any) -> Any:
        with autocast(device, dtype):
            logits = model(windows[:, :-1], use_cache=False).logits
        return loss_of(logits, windows[:, 1:])

    return step_of(model, optimizers, loss, batches, made, seed)


def peer_arm(directory: str, made: Any, start: Any, batches: list[Any], seed: int) -> Arm:
    """The published model and its optimiser, from our starting weights."""
    sys.path.insert(0, directory)
    import model as published
    import torch

    from ouroboros.systems.rhrm.checkpoint import NAMES

    spec = made.model
    loops = int(spec.layout.removeprefix("(1)x"))
    peer = published.HierarchicalReasoningModel(
        spec.vocab_size,
        spec.hidden_size,
        spec.block.mixer.num_heads,
        spec.block.ffn.intermediate_size,
        loops,
        spec.registers,
    )
    state = peer.state_dict()
    state |= {name: start[ours].view_as(state[name]) for name, ours in NAMES.items() if name in state}
    peer.load_state_dict(state | {"lm_head.weight": state["token_embedding.weight"]})
    peer.train()
    optim = made.optim
    optimizers = [torch.optim.AdamW(peer.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)]
    return step_of(peer, optimizers, lambda windows: peer(windows, targets=windows)[1], batches, made, seed)


def step_of(model: Any, optimizers: Any, loss_of: Any, batches: list[Any], made: Any, seed: int) -> Arm:
    """The published step: accumulate, clip, step at the peak rate, clear."""
    import torch

    turns, count = itertools.cycle(batches), made.train.accumulation
    torch.manual_seed(seed)

    def step() -> float:
        total = 0.0
        for _ in range(count):
            loss = loss_of(next(turns)) / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), made.optim.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total

    return step


if __name__ == "__main__":
    main()
