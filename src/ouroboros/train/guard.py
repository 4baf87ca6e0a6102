"""The stability guard: it notices within a few steps that training diverges, and says in which loop.

At every step it measures each loop, and each visit outside the loops: the norm of the state behind it as a root mean
square, its update as a share of the state before it, and the norm of the loss gradient at the state before it. With
the loss and the gradient norm of the step these are compared with what they were in the last :data:`WINDOW` steps. A
state that grows shows first in the loop that made it grow, and a gradient, which comes from behind, first in the last
one; so the earliest unusual state is named, and of unusual gradients the latest.

What it does then is ``train.guard.action``; :mod:`ouroboros.train.session` carries it out. A run goes back to the
*good* checkpoint: the last regular one that :data:`PROOF` usual steps have followed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ouroboros.config import GuardedTraining
from ouroboros.model.executor import observe
from ouroboros.nn.block import Block
from ouroboros.nn.visit import VisitContext
from ouroboros.schedule import Schedule
from ouroboros.train.distributed import Workers

Key = tuple[str, str]
"""A quantity, and the place in words; the place of the whole step is empty."""

WINDOW = 10
"""Usual steps that a step is compared with, at most."""
PERSISTS = 3
"""Unusual steps in a row after which the guard stops the run or rolls it back; a single one may be a bad batch."""
PROOF = 10
"""Usual steps after a checkpoint that show it to be good."""
QUIET = 20
"""Steps between messages about single unusual steps; so many of them in a row become the new usual."""
LOSS, GRADIENT = "loss", "gradient norm"
STATE, UPDATE, BACKWARD = "state norm", "update ratio", "gradient norm of the state"
BEFORE = "norm before"
GROWS = "growth of the state norm by loop"
NOWHERE = {LOSS: "the head", GRADIENT: "the gradient of a parameter"}
"""What is broken where loss or gradient norm is no number and every place is in order."""
FACTORS = {GRADIENT: 10.0, STATE: 5.0, UPDATE: 5.0, BACKWARD: 30.0}
"""How many times the largest of the last steps is unusual. Where these were spread wider than that, it is their spread
above the largest. Twice the state norm is usual from one step to the next in the first steps of small models."""
SETTLED = {GRADIENT: 5, BACKWARD: 5}
"""Steps before a quantity is judged, where it is not one: parts that start at zero pass no gradient at first."""
LEAST_UPDATE = 2.0
"""An update below so many times the state is usual, however small it was before."""
LEAST_RISE = 1.0
"""Nats per token by which the loss has to rise."""
GROWTH = 2.0
"""Where the third loop or a later one multiplies the state by more, it grows with a power of the loops."""


@dataclass(frozen=True)
class Alarm:
    """An unusual step."""

    step: int
    place: str
    """The loop or visit, in words."""
    quantity: str
    value: float
    usual: float | None
    """The largest of the last usual steps; None where the value is no finite number, and for growth by loop."""
    in_a_row: int
    """Unusual steps so far without a usual one between them."""
    new: bool
    """Whether it is to be reported: it is the first for some time, or by now one of several in a row."""

    @property
    def message(self) -> str:
        """The same for people, with what to do."""
        usual = "" if self.usual is None else f", usually {self.usual:.3g}"
        if self.quantity in (BACKWARD, GRADIENT):
            fix = "lower --optim.lr or --optim.clip-norm"
        elif self.place.startswith("loop"):
            fix = "lower --optim.lr, or give the loop a part that bounds its state, such as --model.loop.norm"
        else:
            fix = "lower --optim.lr, or raise --optim.warmup-fraction"
        return f"training becomes unstable in {self.place}: {self.quantity} {self.value:.3g}{usual}; {fix}"

    def record(self) -> dict[str, Any]:
        """The metrics."""
        return {"kind": "guard", **asdict(self), "message": self.message}


@dataclass
class GuardState:
    """What the guard remembers; a part of every checkpoint."""

    recent: dict[str, list[float]] = field(default_factory=dict)
    """Values of the last usual steps, by quantity and place; logarithms but for the loss."""
    lowest: float | None = None
    """Of all usual losses, the lowest that a whole window stayed below."""
    in_a_row: int = 0
    reported: int | None = None
    """Step of the last message."""
    grew: bool = False
    """Whether growth by loop was reported, which is done once."""
    good: int | None = None
    """Step of the checkpoint that the run goes back to."""
    candidate: int | None = None
    """Step of a checkpoint that may become it."""
    rollbacks: int = 0
    lr_factor: float = 1.0
    """By which rollbacks have multiplied the learning rate."""


class Guard:
    """Watches the steps of one run.

    Args:
        spec: what to do; the guard measures nothing if that is nothing.
        schedule: the model's.
    """

    def __init__(self, spec: GuardedTraining, schedule: Schedule) -> None:
        self.spec, self.schedule, self.state = spec, schedule, GuardState()
        self._probe: StateProbe | None = None
        self.first: Alarm | None = None
        """The first unusual step of those in a row, which tells best where it began."""

    @property
    def goes_back(self) -> bool:
        """Whether a good checkpoint is needed."""
        return self.spec.action in ("stop", "rollback")

    @contextlib.contextmanager
    def watching(self, model: nn.Module, loops: int | None) -> Iterator[None]:
        """Measure the passes within the context, of so many loops (None: the layout's own); of several micro-batches
        the largest values count."""
        if self.spec.action == "off":
            yield
            return
        self._probe = StateProbe(self.schedule if loops is None else self.schedule.with_loops(loops))
        with observe(model, on_visit=self._probe.on_visit, on_loop=self._probe.on_loop, registers=True):
            yield
        self._probe.forget()

    def measured(self, workers: Workers) -> dict[Key, float]:
        """What was measured within the last :meth:`watching`, see :meth:`StateProbe.collect`."""
        return {} if self._probe is None else self._probe.collect(workers)

    def judge(self, step: int, loss: float, gradient: float, measured: Mapping[Key, float]) -> Alarm | None:
        """Whether a step was unusual; every process has to be given the same numbers.

        Args:
            step: its number, counted from 1.
            loss: in nats per token.
            gradient: the global norm before clipping.
            measured: by quantity and place, in the order of computation.
        """
        if self.spec.action == "off":
            return None
        values = {**measured, (LOSS, ""): loss, (GRADIENT, ""): gradient}
        found, state = self._unusual(values), self.state
        if found is None:
            self._remember(step, values)
            grows = self._growth(measured)
            if grows is None:
                return None
            state.grew = True
            return Alarm(step, *grows, in_a_row=0, new=True)
        state.in_a_row += 1
        since = math.inf if state.reported is None else step - state.reported
        # A spike some steps before must not hide that training now diverges.
        new = since >= QUIET or (state.in_a_row == PERSISTS and since >= PERSISTS)
        state.reported = step if new else state.reported
        alarm = Alarm(step, *found, in_a_row=state.in_a_row, new=new)
        if state.in_a_row == 1 or self.first is None:
            self.first = alarm
        if state.in_a_row >= QUIET:  # what lasts so long is no failure, or nobody minds
            state.recent, state.lowest, state.in_a_row = {}, None, 0
        return alarm

    def saved(self, step: int) -> None:
        """A regular checkpoint of ``step`` is about to be written."""
        if self.goes_back and self.state.candidate is None and not self.state.in_a_row:
            self.state.candidate = step

    def went_back(self, then: Mapping[str, Any]) -> None:
        """The weights are those of the good checkpoint again, whose guard had the state ``then``."""
        self.state.recent, self.state.lowest = then["recent"], then["lowest"]
        self.state.in_a_row, self.state.candidate = 0, None

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON."""
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore :meth:`state_dict`; None, of a run of before there was a guard, begins anew."""
        self.state = GuardState() if state is None else GuardState(**state)

    def _unusual(self, values: Mapping[Key, float]) -> tuple[str, str, float, float | None] | None:
        """The place, the quantity, its value and its usual one; None for a usual step."""
        broken = [key for key, value in values.items() if not math.isfinite(value)]
        odd = broken or [key for key, value in values.items() if self._odd(key, value)]
        if not odd:
            return None
        states = [key for key in odd if key[0] in (STATE, UPDATE)]
        quantity, place = (*states, *(key for key in odd if key[0] == BACKWARD), *odd)[0]
        usual = None if broken else self._usual(quantity, place)
        where = place or (NOWHERE[quantity] if broken else "the model as a whole")
        return where, quantity, values[quantity, place], usual

    def _odd(self, key: Key, value: float) -> bool:
        """Whether a value is far above the last ones."""
        quantity, recent = key[0], self.state.recent.get(_name(key), [])
        if len(recent) < SETTLED.get(quantity, 1) or (quantity == UPDATE and value < LEAST_UPDATE):
            return False
        high, spread = max(recent), max(recent) - min(recent)
        if quantity != LOSS:
            return _log(value) > high + max(math.log(FACTORS[quantity]), spread)
        lowest = high if self.state.lowest is None else self.state.lowest
        drifted = min(*recent, value) > lowest + max(LEAST_RISE, 0.25 * lowest)
        return drifted or value > high + max(LEAST_RISE, 0.25 * high, spread)

    def _usual(self, quantity: str, place: str) -> float:
        high = max(self.state.recent[_name((quantity, place))])
        return high if quantity == LOSS else math.exp(high)

    def _remember(self, step: int, values: Mapping[Key, float]) -> None:
        """Take a usual step among the last ones."""
        state = self.state
        for key, value in values.items():
            recent = state.recent.setdefault(_name(key), [])
            recent.append(value if key[0] == LOSS else _log(value))
            del recent[:-WINDOW]
        losses = state.recent[_name((LOSS, ""))]
        if len(losses) == WINDOW:
            state.lowest = max(losses) if state.lowest is None else min(max(losses), state.lowest)
        state.in_a_row = 0
        if state.candidate is not None and step >= state.candidate + PROOF:
            state.good, state.candidate = state.candidate, None

    def _growth(self, measured: Mapping[Key, float]) -> tuple[str, str, float, float | None] | None:
        """The loop in which the state still grows by a factor, if that was not reported before."""
        if self.state.grew:
            return None
        for number, segment in enumerate(self.schedule.segments):
            for loop in range(2, segment.loops if segment.looped else 0):
                before, here = (measured.get((STATE, _loop(number, at)), 0.0) for at in (loop - 1, loop))
                if here > GROWTH * before > 0:
                    return _loop(number, loop), GROWS, here / before, None
        return None


class StateProbe:
    """Measures the loops of a pass, and its visits outside of loops, as norms that stay on the device until
    :meth:`collect`; of several passes the largest count."""

    def __init__(self, schedule: Schedule) -> None:
        self._looped: set[int] = set()
        slot = 0
        for segment in schedule.segments:
            count = segment.num_blocks * segment.loops
            self._looped.update(range(slot, slot + count) if segment.looped else ())
            slot += count
        self._norms: dict[Key, Tensor] = {}
        self._roots: dict[str, float] = {}
        """Of the number of elements, by place."""
        self._last: tuple[Tensor, Tensor] | None = None
        """The state behind the last place, which usually is the state before the next, and its norm."""

    def on_visit(self, block: Block, visit: VisitContext, before: Tensor, after: Tensor) -> None:
        """Measure a visit."""
        at = visit.visit
        if at is not None and at.slot not in self._looped:
            self._measure(f"block {at.block}" + (f" after {at.loop} visits" if at.loop else ""), before, after)

    def on_loop(self, segment: int, loop: int, before: Tensor, after: Tensor) -> None:
        """Measure a loop."""
        self._measure(_loop(segment, loop), before, after)

    def forget(self) -> None:
        """Let go of the last state, which would keep the pass in memory."""
        self._last = None

    def collect(self, workers: Workers) -> dict[Key, float]:
        """Means over processes by quantity and place, in the order of computation; a place that no gradient reaches has
        none."""
        if not self._norms:
            return {}
        norms = dict(zip(self._norms, torch.stack([*self._norms.values()]).tolist(), strict=True))
        summed = workers.sum(*(norms[key] for key in sorted(norms)))  # hooks may run in another order elsewhere
        norms |= zip(sorted(norms), (value / workers.world_size for value in summed), strict=True)
        found = {}
        for (quantity, place), norm in norms.items():
            if quantity == UPDATE:
                norm /= max(norms[BEFORE, place], 1e-12)
            if quantity == STATE:
                norm /= self._roots[place]
            if quantity != BEFORE:
                found[quantity, place] = norm
        return found

    @torch.no_grad()
    def _measure(self, place: str, before: Tensor, after: Tensor) -> None:
        known = self._last is not None and self._last[0] is before
        self._take(BEFORE, place, self._last[1] if self._last is not None and known else _norm(before))
        self._last = after, _norm(after)
        self._take(STATE, place, self._last[1])
        self._roots[place] = math.sqrt(after.numel())
        if before.shape == after.shape:
            self._take(UPDATE, place, _norm(after - before))
        if before.requires_grad:
            before.register_hook(lambda gradient: self._take(BACKWARD, place, _norm(gradient)))

    def _take(self, quantity: str, place: str, norm: Tensor) -> None:
        known = self._norms.get((quantity, place))
        self._norms[quantity, place] = norm if known is None else torch.maximum(known, norm)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach(), dtype=torch.float32)


def _log(value: float) -> float:
    """A logarithm that zero has too."""
    return math.log(max(value, 1e-12))


def _loop(segment: int, loop: int) -> str:
    return f"loop {loop} of segment {segment}"


def _name(key: Key) -> str:
    return " ".join(key).strip()
