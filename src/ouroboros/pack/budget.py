"""The best model in so many bytes: how finely each tensor is coded.

An entropy coder follows, so what a tensor costs is the entropy of its codes and not their width. Each tensor therefore
gets a step, a multiple of the root mean square of a row, and as many bits as the largest code needs; the finest setting
is eight bits with the clip of least squared error, as :data:`~ouroboros.pack.plan.DEFAULT` has it.

What a setting costs in quality is measured: the loss on calibration text rises when a block is coded coarsely, and the
rise is shared out to the block's tensors by their squared errors, weighted by how large the inputs are that the columns
are multiplied by. From the coarsest settings on, the finer step that saves most loss per byte is taken again and again,
the last one as far as bytes are left. Sizes are planned by entropies; the written file decides, and planning is
repeated until it fits.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ouroboros.errors import check
from ouroboros.eval.windows import BATCH_LOGITS, evaluating, log_probs
from ouroboros.pack.calibrate import Mode, Quantized, one_thread, quantize_model
from ouroboros.pack.plan import DEFAULT, Entry, Plan, Rule
from ouroboros.pack.quantize import Clip, checked, entropy, matrix_of, quantize
from ouroboros.pack.statistics import gather, maps_of

STEPS = [2.0 ** (1 - number / 2) for number in range(14)]
"""In multiples of a row's root mean square, coarsest first: from about one bit per weight to about seven."""
PROBE = 0.5
"""The step with which losses are measured, of about three bits: the rise is well above what rounding alone varies."""
PROBE_TOKENS = 2048
"""Tokens of which losses are measured, at most."""
AIM, ENOUGH, TRIES = 0.994, 0.98, 8
"""The share of the budget that is planned for, the share with which the search ends, and how often it plans."""
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_size(text: str) -> int:
    """``300000``, ``256kB`` or ``1.5MB`` in bytes; 1 kB is 1,000 bytes.

    Raises:
        OuroborosError: it is no size.
    """
    found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    size = float(re.sub("[_,]", "", found[1])) * UNITS.get(found[2], 0) if found else 0
    check(size >= 1, f"budget {text!r} is no size: give bytes, such as 300000, 256kB or 1MB (1 kB is 1,000 bytes)")
    return int(size)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to code a tensor."""

    bits: int
    clip: Clip
    step: float
    """In multiples of a row's root mean square; 0 where each row has a clip of its own."""
    size: float
    """Bytes of the codes by their entropy."""
    error: float
    """Squared error, weighted by the inputs."""


@dataclass(kw_only=True, eq=False)
class Item:
    """A tensor that is coded, (R, C), and what can be chosen for it."""

    entry: Entry
    rule: Rule
    w_RC: Tensor
    weight_C: Tensor
    """The mean square of the input of each column; ones where nothing was seen."""
    settings: list[Setting] = field(default_factory=list)
    """Smallest first, each step to the next one worth less for its bytes than the step before."""
    loss_per_error: float = 0.0

    def dense(self, step: float) -> Tensor:
        """The tensor as codes with this step stand for."""
        bits, clip = self._width(step)
        return quantize(self.w_RC, bits, clip=clip, name=self.entry.name).dense()

    def setting(self, step: float) -> Setting:
        """With this step."""
        return self._measured(*self._width(step), step)

    def finest(self) -> Setting:
        """As the rule says, which has eight bits where it does not fix others."""
        return self._measured(self.rule.bits, self.rule.clip, 0.0)

    def error(self, dense_RC: Tensor) -> float:
        """Weighted squared error."""
        return float(((dense_RC - self.w_RC).square().sum(dim=0).double() * self.weight_C).sum())

    def _width(self, step: float) -> tuple[int, Clip]:
        """The fewest bits that hold the largest weight, and the clip that makes this step."""
        size_R = self.w_RC.double().square().mean(dim=1).sqrt()
        peak = float((self.w_RC.abs().amax(dim=1) / size_R.clamp(min=1e-30)).max())
        bits = next((bits for bits in range(2, 8) if 2 ** (bits - 1) - 0.5 >= peak / step), 8)
        return bits, Clip(by="sigma", value=step * (2 ** (bits - 1) - 1))

    def _measured(self, bits: int, clip: Clip, step: float) -> Setting:
        coded = quantize(self.w_RC, bits, clip=clip, name=self.entry.name)
        size = entropy(coded.codes) * coded.codes.numel() / 8
        return Setting(bits=bits, clip=clip, step=step, size=size, error=self.error(coded.dense()))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A model within a budget."""

    made: Quantized
    size: int
    """Bytes of the file."""
    feasible: bool
    """Whether it is within the budget; if not, it is the smallest file that there is."""
    tries: int
    """How many files were made to find it."""


def fit(
    model: Any,
    ids: Sequence[Tensor],
    budget: int,
    size_of: Callable[[Quantized], int],
    *,
    plan: Plan = DEFAULT,
    mode: Mode = "loop-aware",
    allow_fallbacks: bool = False,
    enough: float = ENOUGH,
) -> Fit:
    """The tensors of a model for a file of at most ``budget`` bytes; as ``plan`` has them if that fits.

    Args:
        model: ours, on the CPU.
        ids: calibration text, rows of ids (T,).
        budget: bytes.
        size_of: of the file that holds these tensors, everything else in it included.
        plan: eight bits for all that gets codes, but for tensors with other rules than those of ``DEFAULT``
            (:meth:`~ouroboros.pack.plan.Plan.mixed`), which are coded by these whatever the budget.
        mode: as of :func:`~ouroboros.pack.calibrate.quantize_model`.
        allow_fallbacks: as there.
        enough: the share of the budget with which the search ends.

    Raises:
        OuroborosError: as there.
    """

    def made_by(chosen: Plan, how: Mode = mode) -> Quantized:
        return quantize_model(model, chosen, ids, mode=how, allow_fallbacks=allow_fallbacks)

    rounded = size_of(made_by(plan, "rounding"))
    if rounded <= 1.01 * budget:  # codes that make up for errors have about the same size
        whole = made_by(plan)
        if (size := size_of(whole)) <= budget:
            return Fit(made=whole, size=size, feasible=True, tries=1)
    items = measure(model, ids, plan)
    target = AIM * budget - (rounded - sum(item.settings[-1].size for item in items))
    best: Fit | None = None
    smallest = {item.entry.name: item.settings[0] for item in items}
    for number in range(1, TRIES + 1):
        settings = choose(items, target)
        made = made_by(plan_of(items, settings))
        size = size_of(made)
        if size <= budget and (best is None or size > best.size):
            best = Fit(made=made, size=size, feasible=True, tries=number)
        if enough * budget <= size <= budget:
            break
        if settings == smallest and size > budget:
            return best or Fit(made=made, size=size, feasible=False, tries=number)
        target += AIM * budget - size
    if best is None:
        made = made_by(plan_of(items, smallest))
        size = size_of(made)
        best = Fit(made=made, size=size, feasible=size <= budget, tries=TRIES + 1)
    return dataclasses.replace(best, tries=number)


def plan_of(items: Sequence[Item], settings: Mapping[str, Setting]) -> Plan:
    """The plan that codes each tensor so, and treats the others as :data:`~ouroboros.pack.plan.DEFAULT` does."""
    rules = []
    for item in items:
        chosen = settings[item.entry.name]
        rules.append(Rule(where=item.entry.name, bits=chosen.bits, clip=chosen.clip, method=item.rule.method))
    return DEFAULT.first(*rules)


def choose(items: Sequence[Item], target: float) -> dict[str, Setting]:
    """The settings with the least loss whose codes have ``target`` bytes, or the smallest ones."""
    chosen = {item.entry.name: item.settings[0] for item in items}
    left = target - sum(setting.size for setting in chosen.values())
    steps = []
    for number, item in enumerate(items):
        for before, after in zip(item.settings, item.settings[1:]):
            gain = item.loss_per_error * (before.error - after.error) / (after.size - before.size)
            steps.append((-gain, number, after.size, before, after))
    for _, number, _, before, after in sorted(steps, key=lambda step: step[:3]):
        item = items[number]
        if after.size - before.size <= left:
            chosen[item.entry.name] = after
            left -= after.size - before.size
        else:
            if left > 0:
                chosen[item.entry.name] = _between(item, before, before.size + left)
            break
    return chosen


def _between(item: Item, before: Setting, most: float) -> Setting:
    """A setting finer than ``before``, as large as ``most`` bytes allow."""
    if not before.step:
        return before
    coarse, fine, found = before.step, before.step / 4, before
    for _ in range(7):
        middle = math.sqrt(coarse * fine)
        tried = item.setting(middle)
        if tried.size <= most:
            coarse, found = middle, tried if tried.error < found.error else found
        else:
            fine = middle
    return found


@torch.no_grad()
def measure(model: Any, ids: Sequence[Tensor], plan: Plan = DEFAULT) -> list[Item]:
    """Every tensor that is coded, with its settings and how much its errors harm; ``plan`` as of :func:`fit`.

    Computed with one thread, so that the choice does not depend on how many there are.
    """
    with one_thread():
        found = gather(model, ids)
        items = []
        for entry, rule in plan.choose(model).values():
            if rule.keep is not None or not entry.tensor.is_floating_point():
                continue
            w_RC = matrix_of(checked(entry.tensor, entry.name)).clone()
            moments = [found.moment(name) for name in maps_of(entry.name, entry.tensor)]
            weight_C = torch.ones(w_RC.shape[1]).double()
            if all(moment is not None for moment in moments):
                w_RC = w_RC.reshape(-1, entry.tensor.shape[-1])  # rows of matrices, of several below one another
                weight_C = torch.stack([moment.diagonal() for moment in moments if moment is not None]).mean(dim=0)
            items.append(Item(entry=entry, rule=rule, w_RC=w_RC, weight_C=weight_C))
        for item in items:
            steps = STEPS if item.rule in DEFAULT.rules else ()
            item.settings = _worthwhile([*map(item.setting, steps), item.finest()])
        _measure_losses(model, ids, items)
    return items


def _worthwhile(settings: list[Setting]) -> list[Setting]:
    """The lower convex hull of error over size: what a mixture of others beats is never chosen."""
    hull: list[Setting] = []
    for point in sorted(settings, key=lambda setting: (setting.size, setting.error)):
        if hull and (point.error >= hull[-1].error or point.size <= hull[-1].size):
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(before: Setting, after: Setting) -> float:
    return (before.error - after.error) / (after.size - before.size)


def _measure_losses(model: Any, ids: Sequence[Tensor], items: Sequence[Item]) -> None:
    """Set what an error of each tensor costs, from the loss with its block coded coarsely.

    By chance the loss may hardly rise, or even fall, which is no reason for errors: a block costs at least what the
    predictions diverge by, which is how the loss would rise on text that the model itself has written.
    """
    weights = dict(model.named_parameters())
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        block = re.match(r".*?\.\d+\.", item.entry.name)
        groups[block[0] if block else item.entry.name].append(item)
    with evaluating(model):
        rows = _probe_rows(model, ids)
        plain = [log_probs(model, row[None])[0] for row in rows]
        for group in groups.values():
            total = 0.0
            try:
                for item in group:
                    dense_RC = item.dense(PROBE)
                    total += item.error(dense_RC)
                    weights[item.entry.name].copy_(dense_RC.reshape(item.entry.tensor.shape))
                rise = _rise(model, rows, plain)
            finally:
                for item in group:
                    weights[item.entry.name].copy_(item.w_RC.reshape(item.entry.tensor.shape))
            for item in group:
                item.loss_per_error = rise / total if total else 0.0


def _probe_rows(model: Any, ids: Sequence[Tensor]) -> list[Tensor]:
    """Text of which losses are measured: rows from all of it, no more than memory has room for the predictions of."""
    most = min(PROBE_TOKENS, max(2, BATCH_LOGITS // model.config.vocab_size))
    rows = [row.long()[:most] for row in ids if len(row) > 1]
    wanted = max(1, most // max(map(len, rows), default=1))
    return rows[:: max(1, len(rows) // wanted)][:wanted]


def _rise(model: Any, rows: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
    """Nats per token by which the loss is above that of the predictions ``plain``, or by which these diverge."""
    loss = divergence = count = 0.0
    for row, before_TV in zip(rows, plain, strict=True):
        after_TV = log_probs(model, row[None])[0]
        lost_TV = (before_TV - after_TV).double()
        loss += float(lost_TV[:-1].gather(-1, row[1:, None]).sum())
        divergence += float((before_TV.double().exp() * lost_TV)[:-1].sum())
        count += len(row) - 1
    return max(loss, divergence, 0.0) / max(count, 1)
