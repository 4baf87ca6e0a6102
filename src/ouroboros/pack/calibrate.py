"""A whole model as codes, in an order in which later codes know what earlier ones changed.

Weights that are read once are coded first. What loops read is then gathered with those codes in place and the loops are
coded, and once more with the codes of the loops themselves in place, so that every visit is seen with the activations
that the packed model makes; the final codes of the loops, and those of a head of its own, come from there. Other tools
look once, at the unchanged model (``per-call``).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ouroboros.errors import OuroborosError, check
from ouroboros.pack.coded import Coded
from ouroboros.pack.gptq import objective, solve
from ouroboros.pack.plan import Entry, Plan, Rule
from ouroboros.pack.quantize import checked, choose_steps, entropy, matrix_of, quantize, rounded
from ouroboros.pack.statistics import Statistics, Weighting, gather, maps_of

Mode = Literal["loop-aware", "per-call", "rounding"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """What became of one tensor."""

    name: str
    method: str
    """``gptq``, ``rounding``, ``float16`` or ``float32``; ``as it is`` for whole numbers."""
    bits: int = 0
    """Of a code; 0 where the numbers are kept."""
    entropy: float = 0.0
    """Of the codes, order 0, in bits."""
    objective: float | None = None
    """The mean squared error of what the map computes, with the moments that it was coded by; None without moments."""
    rounding: float | None = None
    """The same, had the codes been those of rounding."""
    notes: tuple[str, ...] = ()
    """What had to be tried again, or why rounding took the place of GPTQ."""
    fallback: bool = False
    """Whether rounding took that place against the plan."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A model's tensors, and what became of each."""

    tensors: dict[str, Coded | Tensor]
    """By the names of the model; a tied one once."""
    report: dict[str, Line] = field(default_factory=dict)

    @property
    def exceptions(self) -> list[str]:
        """What did not go as planned, one line each."""
        return [f"{line.name}: {'; '.join(line.notes)}" for line in self.report.values() if line.notes]


def quantize_model(
    model: Any,
    plan: Plan,
    ids: Sequence[Tensor],
    *,
    mode: Mode = "loop-aware",
    weighting: Weighting = "mean",
    allow_fallbacks: bool = False,
) -> Quantized:
    """The tensors of a model as ``plan`` says; the model itself is left as it is.

    It computes with one thread, so that the codes do not depend on how many there are.

    Args:
        model: ours, on the CPU.
        plan: what becomes of which tensor.
        ids: texts that the model reads, rows of ids (T,) each; see :mod:`ouroboros.pack.ids`. Not read for rounding.
        mode: ``loop-aware`` as above; ``per-call``, all from one reading of the unchanged model, visits put together;
            ``rounding`` to the nearest code.
        weighting: how visits of a looped map count, see :data:`~ouroboros.pack.statistics.Weighting`.
        allow_fallbacks: go on where GPTQ needed more damping or had to be replaced by rounding, and say so in the
            report.

    Raises:
        OuroborosError: a tensor that no rule fits or that cannot be coded, or an exception that is not allowed.
    """
    check(mode in ("loop-aware", "per-call", "rounding"), f"mode is loop-aware, per-call or rounding, not {mode!r}")
    check(mode == "loop-aware" or weighting == "mean", f"mode {mode} puts visits together: leave weighting out")
    chosen = {name: (_copied(entry), rule) for name, (entry, rule) in plan.choose(model).items()}
    with one_thread(), torch.no_grad():
        made = _plain(chosen)
        solved = [entry.name for entry, rule in chosen.values() if mode != "rounding" and _calibrates(entry, rule)]
        waiting = set(solved)
        with _restored(model, {name: entry.tensor for name, (entry, _) in chosen.items()}):
            for names in _stages(chosen, solved, mode):
                found = gather(model, ids, names)
                for name in names:
                    entry, rule = chosen[name]
                    made.tensors[name], made.report[name] = _solved(entry, rule, found, weighting)
                # Only now, as all of a stage see the same activations; what is not coded yet stays as it is.
                waiting -= {*names}
                apply(model, made.tensors | {name: chosen[name][0].tensor for name in waiting})
    exceptions = made.exceptions
    if exceptions and not allow_fallbacks:
        raise OuroborosError(
            f"{'; '.join(exceptions)}: give these a rule with method rounding, give more text, or allow fallbacks"
        )
    return made


@torch.no_grad()
def apply(model: Any, tensors: Mapping[str, Coded | Tensor]) -> None:
    """Put tensors into a model, codes as the numbers that they stand for.

    Raises:
        OuroborosError: names or shapes that are not the model's.
    """
    own = dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    for name in sorted(own.keys() ^ tensors.keys()):
        raise OuroborosError(f"tensor {name!r} is {'missing' if name in own else 'not one of the model'}")
    for name, tensor in tensors.items():
        fits = tuple(tensor.shape) == tuple(own[name].shape)
        check(fits, f"tensor {name!r} has shape {tuple(tensor.shape)}, the model wants {tuple(own[name].shape)}")
        own[name].copy_(tensor.dense() if isinstance(tensor, Coded) else tensor)


def _copied(entry: Entry) -> Entry:
    """The same with a tensor of its own, because the model's changes meanwhile."""
    tensor = checked(entry.tensor, entry.name) if entry.tensor.is_floating_point() else entry.tensor
    return dataclasses.replace(entry, tensor=tensor.clone())


def _calibrates(entry: Entry, rule: Rule) -> bool:
    return rule.keep is None and rule.method == "gptq" and entry.tensor.ndim >= 2


def _plain(chosen: Mapping[str, tuple[Entry, Rule]]) -> Quantized:
    """Every tensor without a look at what it does: kept, or rounded."""
    made = Quantized(tensors={})
    for name, (entry, rule) in chosen.items():
        tensor = entry.tensor
        if not tensor.is_floating_point():
            made.tensors[name], made.report[name] = tensor.clone(), Line(name=name, method="as it is")
        elif rule.keep is not None:
            kept = tensor.to(getattr(torch, rule.keep), copy=True)
            fits = bool(kept.isfinite().all())
            check(fits, f"tensor {name!r} has numbers beyond the range of float16: keep it as float32")
            made.tensors[name], made.report[name] = kept, Line(name=name, method=rule.keep)
        else:
            coded = quantize(tensor, rule.bits, group=rule.group, clip=rule.clip, name=name)
            made.tensors[name] = coded
            made.report[name] = Line(name=name, method="rounding", bits=rule.bits, entropy=entropy(coded.codes))
    return made


def _stages(chosen: Mapping[str, tuple[Entry, Rule]], names: list[str], mode: Mode) -> list[list[str]]:
    """Which weights are coded after which reading."""
    if mode != "loop-aware":
        return [names] if names else []
    looped = [name for name in names if chosen[name][0].place == "looped"]
    # A tied head is a table too, which every visit reads the results of; a head of its own can wait for the end.
    heads = [name for name in names if name == "lm_head.weight"]
    once = [name for name in names if name not in {*looped, *heads}]
    stages = [once, looped, [*looped, *heads]]
    return [stage for stage in stages if stage]


def _solved(entry: Entry, rule: Rule, found: Statistics, weighting: Weighting) -> tuple[Coded, Line]:
    """A matrix, or several in one tensor, coded by GPTQ, or rounded where that cannot be."""
    name, bits, shape = entry.name, rule.bits, tuple(entry.tensor.shape)
    maps = maps_of(name, entry.tensor)
    moments = [found.moment(label, weighting if entry.place == "looped" else "mean") for label in maps]
    if any(h_CC is None for h_CC in moments):
        nearest = quantize(entry.tensor, bits, group=rule.group, clip=rule.clip, name=name)
        readers = sorted(found.read_by.get(name, ()))
        # Looking up a row of a table moves no error to another, and what nothing reads does no harm.
        fallback = entry.role == "matrix" and bool(readers)
        notes = (f"rounded, as it is read by {', '.join(readers)} and not as a map",) if fallback else ()
        spent = entropy(nearest.codes)
        return nearest, Line(name=name, method="rounding", bits=bits, entropy=spent, notes=notes, fallback=fallback)
    made, steps, errors, results = [], [], [], []
    for w_RC, h_CC in zip(map(matrix_of, maps.values()), moments):
        assert h_CC is not None
        steps_RG = choose_steps(w_RC, bits, group=rule.group, clip=rule.clip, name=name)
        result = solve(w_RC, h_CC, steps_RG, bits)
        of_each = (result.codes_RC, rounded(w_RC, steps_RG, bits))
        coded = [Coded(codes=codes, scales=steps_RG, bits=bits, shape=tuple(w_RC.shape)) for codes in of_each]
        errors.append([objective(w_RC, c.dense(), h_CC) for c in coded])
        made.append(result.codes_RC)
        steps.append(steps_RG)
        results.append(result)
    # A step belongs to each row of each matrix: in a row of the tensor, that is a group of columns.
    codes, scales = (torch.cat(parts).reshape(shape[0], -1) for parts in (made, steps))
    notes = [note for result in results for note in result.escalations]
    notes += [f"rounded, as {result.fallback}" for result in results if result.fallback]
    ours, nearest = (sum(column) for column in zip(*errors))
    return Coded(codes=codes, scales=scales, bits=bits, shape=shape), Line(
        name=name,
        method="rounding" if all(result.fallback for result in results) else "gptq",
        bits=bits,
        entropy=entropy(codes),
        objective=ours,
        rounding=nearest,
        notes=tuple(dict.fromkeys(notes)),
        fallback=any(result.fallback for result in results),
    )


@contextlib.contextmanager
def _restored(model: Any, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Afterwards the model holds these tensors."""
    try:
        yield
    finally:
        apply(model, tensors)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: sums over positions then have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
