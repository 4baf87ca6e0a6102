"""What a step of sharded training sends, keeps and waits for on many GPUs: by calculation, with its checks.

Nothing here runs on a GPU. Three things are compared, and the script fails where they differ:

- the collectives that the calculation expects, with those that FSDP issues for a small model of the same layout in a
  group of as many processes, of which one alone is real and sends nothing;
- the idle time by formula, with a simulation of the schedule on one compute queue and one network link;
- the tensors kept for the backward pass with and without activation checkpointing, counted at several loop counts.

The defaults stand for GPUs that compute 400 TFLOP/s in bfloat16, each with 50 GB/s to the others.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from common import load, parser, report, set_threads
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from ouroboros.accounting import cost
from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.schedule import parse
from ouroboros.train.sharding import Shards, reused_blocks

ROOT = -1
"""The number that stands for all parameters outside of blocks."""


class Op(NamedTuple):
    """One thing that a process does in a step: gather or reduce parameters, or compute."""

    kind: str
    block: int


def operations(layout: str, micro_batches: int, *, keeps: bool) -> Iterator[Op]:
    """A step in order. With ``keeps`` as :mod:`ouroboros.train.sharding` does it, without as FSDP does by itself."""
    schedule = parse(layout)
    kept = reused_blocks(schedule) if keeps else set()
    blocks = [visit.block for visit in schedule.visits]
    held: set[int] = set()
    for micro in range(micro_batches):
        reduces = micro == micro_batches - 1
        yield Op("gather", ROOT)
        yield Op("forward", ROOT)
        for block in blocks:
            if block not in held:
                yield Op("gather", block)
            yield Op("forward", block)
            held |= kept & {block}
        yield Op("backward", ROOT)
        for place in reversed(range(len(blocks))):
            block, first = blocks[place], blocks[place] not in blocks[:place]
            if block not in held:
                yield Op("gather", block)
            yield Op("backward", block)
            # Autograd has the gradient of a block when the contributions of all visits are there. What earlier
            # micro-batches have left is sent behind the visit that the backward pass comes to first.
            left = micro and block in kept and block not in blocks[place + 1 :]
            if reduces and (first or left):
                yield Op("reduce", block)
        if reduces:
            yield Op("reduce", ROOT)


class Issued(TorchDispatchMode):
    """Counts the collectives of a context by kind and by the numbers of their larger side."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).startswith("c10d."):
            leaves = torch.utils._pytree.tree_leaves(args)
            numbers = max(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor))
            self.found["gather" if "gather" in str(function) else "reduce", numbers] += 1
        return function(*args, **(kwargs or {}))


def small(layout: str) -> OuroborosForCausalLM:
    """A model whose parameters divide evenly among 64 processes, so that nothing is padded."""
    spec = ModelSpec(layout=layout, vocab_size=128, hidden_size=64, max_position_embeddings=32)
    spec = spec.replace(mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=128))
    return OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).train()


def issued(layout: str, processes: int, micro_batches: int, *, keeps: bool) -> tuple[dict[Any, int], dict[Any, int]]:
    """The collectives of one step, as FSDP issues them and as :func:`operations` has them."""
    model = small(layout)
    sizes = {n: sum(p.numel() for p in block.parameters()) for n, block in enumerate(model.model.decoder.layers)}
    sizes[ROOT] = sum(p.numel() for p in model.parameters()) - sum(sizes.values())
    expected = Counter(
        (op.kind, sizes[op.block])
        for op in operations(layout, micro_batches, keeps=keeps)
        if op.kind in ("gather", "reduce")
    )
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    if keeps:
        shards = Shards(model, [], main=False, processes=processes)
    else:
        for module in (*model.model.decoder.layers, model):
            fully_shard(module, mesh=init_device_mesh("cpu", (processes,)))
    ids = torch.zeros(1, 8, dtype=torch.long)
    with Issued() as counted:
        for micro in range(micro_batches):
            last = micro == micro_batches - 1
            with contextlib.nullcontext() if last or not keeps else shards.apart():
                model(input_ids=ids, targets=ids, use_cache=False).loss.backward()
        if keeps:
            shards.settle()
    own = sum(p.to_local().numel() for p in model.parameters())  # pyrefly: ignore
    assert own * processes == sum(sizes.values()), "a process holds another share of the parameters"
    torch.distributed.destroy_process_group()
    return dict(counted.found), dict(expected)


class Seconds(NamedTuple):
    """How long things take: a visit's forward pass, the head's, and a collective of a block and of all the rest."""

    forward: float
    head: float
    block: float
    root: float

    def of(self, op: Op) -> float:
        if op.kind in ("gather", "reduce"):
            return self.root if op.block == ROOT else self.block
        if op.block == ROOT:  # the head computes in both directions when the blocks are done; tables cost nothing
            return 3 * self.head if op.kind == "backward" else 0.0
        return self.forward * (2 if op.kind == "backward" else 1)


class Work(NamedTuple):
    """A computation, the collectives it waits for, and those it makes possible, in seconds."""

    computes: float
    gathers: float
    reduces: float


def works(ops: list[Op], seconds: Seconds) -> list[Work]:
    """The computations of a step in order, with what is sent before and behind each."""
    found: list[Work] = []
    gathers = 0.0
    for op in ops:
        if op.kind == "gather":
            gathers += seconds.of(op)
        elif op.kind == "reduce":
            found[-1] = found[-1]._replace(reduces=found[-1].reduces + seconds.of(op))
        else:
            found.append(Work(seconds.of(op), gathers, 0.0))
            gathers = 0.0
    return found


def simulated_idle(step: list[Work]) -> float:
    """Seconds of a step in which nothing is computed, on one compute queue and one link that serves in order.

    What a computation needs is gathered while the one before it computes, as FSDP prefetches; what it reduces is sent
    when it has ended; the optimiser waits for everything.
    """
    compute = 0.0
    link = arrives = step[0].gathers
    for work, following in zip(step, [*step[1:], Work(0.0, 0.0, 0.0)], strict=True):
        begins = max(compute, arrives)
        if following.gathers:
            link = arrives = max(link, begins) + following.gathers
        compute = begins + work.computes
        if work.reduces:
            link = max(link, compute) + work.reduces
    return max(compute, link) - sum(work.computes for work in step)


def idle_by_formula(step: list[Work]) -> float:
    """``g_1 + sum over i of max(0, r_(i-1) + g_(i+1) - c_i) + r_n``.

    The first gathering; what the link should take and bring while computation i of n lasts, and cannot; and the last
    reduction. The sum is over those computations whose successor waits for a gathering.
    """
    before, after = [0.0, *(work.reduces for work in step)], [*(work.gathers for work in step[1:]), 0.0]
    behind = sum(max(0.0, r + g - work.computes) for r, g, work in zip(before, after, step, strict=False) if g)
    return step[0].gathers + behind + step[-1].reduces


def activations(layout: str, loops: int, *, recomputed: bool) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights left out, for 64 positions of width 64."""
    model = small(layout)
    if recomputed:
        model.activation_checkpointing_enable()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # which keeps the address from being used again
        return tensor

    ids = torch.zeros(2, 32, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, targets=ids, use_cache=False, loops=loops).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def sizes_of(spec: ModelSpec) -> dict[str, int]:
    """Parameters: of one block, outside of blocks, and of all matrices that Muon trains."""
    with torch.device("meta"):
        model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec))
    blocks = list(model.model.decoder.layers)
    block, total = (sum(p.numel() for p in module.parameters()) for module in (blocks[0], model))
    matrices = sum(p.numel() for p in model.model.decoder.parameters() if p.ndim == 2)
    return {"total": total, "block": block, "root": total - block * len(blocks), "matrices": matrices}


def memory(spec: ModelSpec, sizes: dict[str, int], processes: int) -> dict[str, dict[str, float]]:
    """GB of a GPU without activations, in three ways of training."""
    P, block, root = sizes["total"], sizes["block"], sizes["root"]
    state = 4 * sizes["matrices"] + 8 * (P - sizes["matrices"])
    copies = 2 * P  # bfloat16, which autocast makes and the backward pass needs
    reused = len(reused_blocks(parse(spec.layout))) * block
    own = {"weights": 4 * P, "gradients": 4 * P, "optimiser": state}
    part = {name: size / processes for name, size in own.items()}
    working = 4 * 4 * block  # weights and gradients of the present block and of the neighbour that is sent meanwhile
    forms = {
        "ddp": {**own, "buckets": 4 * P, "copies": copies},
        # Autograd adds up the gradient of looped weights over all visits before FSDP can reduce it.
        "fsdp": {**part, "whole": 8 * root + 4 * reused + working, "copies": copies},
        "ours": {**part, "whole": 8 * (root + reused) + working, "copies": copies},
    }
    return {
        form: {name: size / 1e9 for name, size in {**sizes, "sum": sum(sizes.values())}.items()}
        for form, sizes in forms.items()
    }


def muon(spec: ModelSpec, processes: int, flops: float, steps: int = 5) -> dict[str, float]:
    """Seconds in which one process orthogonalises its share of the matrices, and all of them; and the GB it sends.

    A matrix of R x C, R <= C, takes ``steps (4 R^2 C + 2 R^3)`` operations. Matrices of one shape are dealt out, so
    that the process with most has ``ceil(n / processes)``; their rows go to it and come back in bfloat16.
    """
    with torch.device("meta"):
        model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec))
    shapes = Counter(tuple(sorted(p.shape)) for p in model.model.decoder.parameters() if p.ndim == 2)
    exact = Counter(tuple(p.shape) for p in model.model.decoder.parameters() if p.ndim == 2)
    work = {shape: steps * (4 * shape[0] ** 2 * shape[1] + 2 * shape[0] ** 3) / flops for shape in shapes}
    share = sum(math.ceil(n / processes) * work[min(shape), max(shape)] for shape, n in exact.items())
    numbers = sum(n * math.prod(shape) for shape, n in exact.items())
    gigabytes = 2 * 2 * numbers / processes * (processes - 1) / processes / 1e9
    return {"share_seconds": share, "all_seconds": sum(n * work[shape] for shape, n in shapes.items()), "GB": gigabytes}


def waiting(args: Any, spec: ModelSpec, sizes: dict[str, int], computing: float) -> dict[str, Any]:
    """What a step sends and waits for, by form and bandwidth; the formula has to agree with the simulation."""
    W, visits = args.processes, parse(args.layout).num_visits
    per_token = cost(spec, context=args.context // 2).flops_per_token
    head = 2 * args.vocabulary * args.width
    steps = {}
    for bandwidth in args.bandwidth:

        def collective(parameters: int, bandwidth: float = bandwidth) -> float:
            return args.latency + 4 * parameters * (W - 1) / W / bandwidth

        seconds = Seconds(
            forward=(per_token - head) / visits * args.tokens / args.flops,
            head=head * args.tokens / args.flops,
            block=collective(sizes["block"]),
            root=collective(sizes["root"]),
        )
        for form, keeps in (("fsdp", False), ("ours", True)):
            ops = list(operations(args.layout, args.accumulation, keeps=keeps))
            sent = [op for op in ops if op.kind in ("gather", "reduce")]
            step = works(ops, seconds)
            idle, formula = simulated_idle(step), idle_by_formula(step)
            assert math.isclose(idle, formula, rel_tol=0.1), (form, bandwidth, idle, formula)
            steps[f"{form}, {bandwidth / 1e9:g} GB/s"] = {
                "collectives": len(sent),
                "GB": sum(4 * sizes["root" if op.block == ROOT else "block"] for op in sent) * (W - 1) / W / 1e9,
                "sending_seconds": sum(seconds.of(op) for op in sent),
                "idle_seconds": idle,
                "idle_by_formula": formula,
                "idle_share": idle / (idle + computing),
            }
        steps[f"ddp, {bandwidth / 1e9:g} GB/s"] = {
            "GB": 2 * 4 * sizes["total"] * (W - 1) / W / 1e9,
            "sending_seconds": 2 * collective(sizes["total"]),
        }
    return steps


def main() -> None:
    """Check, calculate, print."""
    options = parser(__doc__)
    options.add_argument("--layout", default="4 (8)x4 4")
    options.add_argument("--width", type=int, default=2048)
    options.add_argument("--vocabulary", type=int, default=65_536)
    options.add_argument("--processes", type=int, default=64)
    options.add_argument("--tokens", type=int, default=16_384, help="tokens of a micro-batch on each GPU")
    options.add_argument("--context", type=int, default=4096)
    options.add_argument("--accumulation", type=int, default=1)
    options.add_argument("--flops", type=float, default=4e14, help="operations that a GPU does in a second")
    options.add_argument("--bandwidth", type=float, nargs="+", default=[5e10, 2.5e10, 1.25e10], help="bytes a second")
    options.add_argument("--latency", type=float, default=1e-4, help="seconds that a collective takes at least")
    args = options.parse_args()
    set_threads(args.threads)
    started = load()
    cases = [("1 (2)x3 1", 1, True), ("1 (2)x3 1", 2, True), ("(1)x4 2", 1, True), ("3", 1, True)]
    for layout, micro_batches, keeps in [*cases, ("1 (2)x3 1", 1, False)]:
        found, expected = issued(layout, args.processes, micro_batches, keeps=keeps)
        assert found == expected, f"{layout}: FSDP issues {found}, the calculation has {expected}"
    counted = {
        name: {loops: activations("1 (2)x4 1", loops, recomputed=on) for loops in (1, 2, 4, 8)}
        for name, on in (("kept", False), ("recomputed", True))
    }

    W, width = args.processes, args.width
    spec = ModelSpec(
        layout=args.layout, vocab_size=args.vocabulary, hidden_size=width, max_position_embeddings=args.context
    ).replace(mixer=AttentionSpec(num_heads=width // 128), ffn=FeedForwardSpec(intermediate_size=width * 8 // 3))
    sizes, per_token = sizes_of(spec), cost(spec, context=args.context // 2).flops_per_token
    computing = 3 * per_token * args.tokens * args.accumulation / args.flops
    report(
        "sharding",
        started,
        parameters=sizes,
        computing_seconds=computing,
        memory_GB=memory(spec, sizes, W),
        steps=waiting(args, spec, sizes, computing),
        muon=muon(spec, W, args.flops),
        activation_bytes=counted,
    )


if __name__ == "__main__":
    main()
