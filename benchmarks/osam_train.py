"""OSAM training: tokens per second of the published model, of a plain step loop and of the published program.

Every arm takes the published step (AdamW, the scalars at ten times the rate, clipped at 1) on text of the published
pattern's length and characters. ``ours`` is float32 and eager; ``--all`` adds bfloat16 and compiled forms, which
``ouroboros train`` chooses by measurement for long runs. ``step loop`` computes position after position with the whole
state of 2 m + 2 d m numbers. ``--peer DIR`` (a checkout of osam) adds the published program with what it measures at
every step. The floor is the time the step's matrix products would take at the rate of a large one.

At size ``quick-start`` a step of the published batch, 64 sequences, takes the loops a minute and more: they get 16, and
so does a second arm of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from common import alternate, build, load, parser, progress, ratio, report, set_threads, spread, timed

PATTERN = (7, 3, 12, 16, 2, 0, 16, 10, 6, 5, 16, 10, 13, 9, 8, 7, 3, 6, 16, 11, 0, 10, 15, 5, 9, 2, 7, 8, 11, 14, 0)
LOOP_ROWS = {"default": 32, "quick-start": 16, "tiny": 8}
"""Sequences of a step of what computes position after position."""
CHECKED = 2, 3
"""Sequences and steps on which the arms' losses are compared, without dropout."""


class Arm(NamedTuple):
    """One way to train."""

    step: Callable[[Any], float]
    """One step on windows (B, T + 1); returns the loss."""
    rows: int
    """Sequences of a step."""
    precision: str | None = None
    """Of arms of ours."""


def main() -> None:
    """Run the comparison."""
    from common_osam import ratios

    options = parser(__doc__)
    options.add_argument("--size", default="default", choices=("default", "quick-start"))
    options.add_argument("--peer", help="directory of the published osam_minidemo.py")
    options.add_argument(
        "--all", action="store_true", help="bfloat16, compiled forms, and the program without telemetry"
    )
    options.add_argument("--turn", type=float, default=1.0, help="seconds of a turn of ours, about")
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads)

    size = "tiny" if chosen.quick else chosen.size
    differences = losses_differ(size, chosen.peer)
    progress(f"losses differ by {differences} at most")
    arms = arms_of(size, chosen.peer, more=chosen.all)
    processor: dict[str, list[float]] = {name: [] for name in arms}
    length = recipe_of(size).data.sequence_length
    turns = {
        name: turn_of(arm, length, 0.0 if chosen.quick else chosen.turn, processor[name]) for name, arm in arms.items()
    }
    speed = alternate(turns, chosen.rounds or (2 if chosen.quick else 4 if size == "quick-start" else 7))
    mine = [name for name, arm in arms.items() if arm.precision is not None]
    report(
        "osam_train",
        started,
        size=size,
        windows={name: [arm.rows, length] for name, arm in arms.items()},
        largest_difference_of_losses=differences,
        tokens_per_second={name: spread(values) for name, values in speed.items()},
        tokens_per_second_of_processor_time={name: spread(values) for name, values in processor.items()},
        ratio=ratios(mine, speed, with_range),
        ratio_by_processor_time=ratios(mine, processor, with_range),
        floor=floor_of(size, arms, speed),
    )


def recipe_of(size: str) -> Any:
    """The published recipe."""
    from ouroboros.recipes import recipe

    return recipe("osam-published", size)


def arms_of(size: str, peer: str | None, *, more: bool) -> dict[str, Arm]:
    """All arms, from the same weights."""
    from common_osam import spec_of

    made, model = recipe_of(size), build(spec_of(size))
    rows, few = made.train.batch_size, LOOP_ROWS[size]
    arms = {"ours": Arm(ours(made, model), rows, "float32")}
    if few != rows:
        arms[f"ours, {few} sequences"] = Arm(ours(made, model), few, "float32")
    if more:
        for name, dtype, compiled in (
            ("ours, bfloat16", "bfloat16", False),
            ("ours, compiled", "float32", True),
            ("ours, bfloat16, compiled", "bfloat16", True),
        ):
            arms[name] = Arm(ours(made, model, dtype, compiled=compiled), rows, dtype)
    arms["step loop"] = Arm(step_loop(made, model), few)
    if peer:
        arms["published"] = Arm(published(peer, made, model, size), few)
        if more:
            arms["published, no telemetry"] = Arm(published(peer, made, model, size, telemetry=False), few)
    return arms


def ours(made: Any, model: Any, dtype: str = "float32", *, compiled: bool = False) -> Callable[[Any], float]:
    """A step of a copy of ``model`` as ``ouroboros train`` takes it."""
    import torch

    from ouroboros.train.losses import criterion
    from ouroboros.train.precision import autocast, compile_blocks

    model, device, loss_of = copy.deepcopy(model), torch.device("cpu"), criterion(made.train.label_smoothing)
    if compiled:
        progress(compile_blocks(model.model.decoder.layers, made.train, device, None))
        loss_of = torch.compile(loss_of, dynamic=False)

    def loss(windows: Any) -> Any:
        with autocast(device, getattr(torch, dtype)):
            logits = model(windows[:, :-1], use_cache=False).logits
        return loss_of(logits, windows[:, 1:])[0]

    return step_of(made, model.train(), loss)


def step_loop(made: Any, model: Any) -> Callable[[Any], float]:
    """The same step of a copy of ``model`` that computes one position after another."""
    from common_osam import StepLoop

    from ouroboros.train.losses import criterion

    loop, loss_of = StepLoop(copy.deepcopy(model)).train(), criterion(made.train.label_smoothing)
    return step_of(made, loop.model, lambda windows: loss_of(loop(windows[:, :-1]), windows[:, 1:])[0])


def step_of(made: Any, model: Any, loss_of: Callable[[Any], Any]) -> Callable[[Any], float]:
    """Forward, backward, clip, optimiser."""
    from ouroboros.optim import build_optimizers, clip_and_norm

    optimizers = build_optimizers(model, made.optim)

    def step(windows: Any) -> float:
        loss = loss_of(windows)
        loss.backward()
        clip_and_norm(model.parameters(), made.optim.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return step


def published(directory: str, made: Any, model: Any, size: str, *, telemetry: bool = True) -> Callable[[Any], float]:
    """The published program's step, with its optimiser and what it measures."""
    import torch
    from common_osam import published_model, published_program

    program = published_program(directory)
    theirs, optim = published_model(program, model, size).train(), made.optim
    scalars = [parameter for parameter in theirs.parameters() if parameter.ndim == 0]
    others = [parameter for parameter in theirs.parameters() if parameter.ndim > 0]
    optimizer = torch.optim.AdamW(
        [{"params": others, "lr": optim.lr}, {"params": scalars, "lr": optim.scalar_lr}],
        betas=optim.betas,
        weight_decay=optim.weight_decay,
    )

    def step(windows: Any) -> float:
        logits, _ = theirs(windows[:, :-1].contiguous(), return_telemetry=telemetry)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), windows[:, 1:].flatten(), label_smoothing=made.train.label_smoothing
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), optim.clip_norm)
        optimizer.step()
        program.grad_global_norm(theirs)
        return loss.item()

    return step


def windows_of(rows: int, length: int) -> Callable[[], Any]:
    """Draws windows (rows, length + 1) of the repeated pattern; the same ones every time."""
    import torch

    text, generator = torch.tensor(PATTERN).repeat(length // len(PATTERN) + 3), torch.Generator().manual_seed(0)

    def draw() -> Any:
        starts = torch.randint(0, len(PATTERN), (rows, 1), generator=generator)
        return text[starts + torch.arange(length + 1)]

    return draw


def turn_of(arm: Arm, length: int, seconds: float, processor: list[float]) -> Callable[[], float]:
    """Some steps in a row, tokens per second; those per second of processor time are added to ``processor``.

    Steps of the loops are long and were warmed up by the comparison of losses: a turn is one step.
    """
    from common_osam import clocked

    draw, repeats = windows_of(arm.rows, length), 1
    if arm.precision is not None:
        progress(f"first step: {timed(lambda: arm.step(draw())):.2f} s")
        repeats = max(1, round(seconds / timed(lambda: arm.step(draw()))))
    tokens = repeats * arm.rows * length

    def turn() -> float:
        took, used = clocked(lambda: [arm.step(draw()) for _ in range(repeats)])
        processor.append(tokens / used)
        return tokens / took

    return turn


def losses_differ(size: str, peer: str | None) -> dict[str, float]:
    """How far the losses of a few steps are from ours at most, all from the same weights on the same windows."""
    from common_osam import open_gates, spec_of

    made, model = recipe_of(size), open_gates(build(spec_of(size, dropout=0.0)))
    rows, steps = CHECKED
    arms = {"ours": ours(made, model), "step loop": step_loop(made, model)}
    if peer:
        arms["published"] = published(peer, made, model, size)
    losses = {}
    for name, step in arms.items():
        draw = windows_of(rows, made.data.sequence_length)
        losses[name] = [step(draw()) for _ in range(steps)]
    return {
        name: float(f"{max(abs(a - b) for a, b in zip(values, losses['ours'])):.2g}")
        for name, values in losses.items()
        if name != "ours"
    }


def with_range(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the rounds' ratios, and their range."""
    found = [float(f"{a / b:.4g}") for a, b in zip(one, other)]
    return ratio(one, other) | {"least": min(found), "most": max(found)}


def floor_of(size: str, arms: dict[str, Arm], speed: dict[str, list[float]]) -> dict[str, Any]:
    """Tokens per second if matrix products took all the time and ran as fast as a large one, and our share of that."""
    import torch
    from common_osam import spec_of

    from ouroboros.accounting import cost
    from ouroboros.train.precision import matmul_peak

    flops = cost(spec_of(size), context=recipe_of(size).data.sequence_length).training_flops_per_token
    kinds = sorted({arm.precision for arm in arms.values() if arm.precision is not None})
    peaks = {kind: matmul_peak("cpu", getattr(torch, kind)) for kind in kinds}
    return {
        "operations_per_token": flops,
        "peak_gflops": {kind: round(peak / 1e9) for kind, peak in peaks.items()},
        "tokens_per_second": {kind: round(peak / flops) for kind, peak in peaks.items()},
        "percent_reached": {
            name: round(100 * spread(speed[name])["median"] * flops / peaks[arm.precision], 1)
            for name, arm in arms.items()
            if arm.precision is not None
        },
    }


if __name__ == "__main__":
    main()
