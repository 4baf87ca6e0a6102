"""What the delta residuals of a running model do: gates, directions and amounts, and what forcing a gate costs.

A residual use is one visit's mixer or feed-forward network; a looped block has one per loop. Everything is recorded by
hooks that are gone afterwards: the model is left as it was.

Shapes: B batch, T positions, D model width, V value channels (1 for a vector state), N residual uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ouroboros.errors import check
from ouroboros.eval.score import evaluating, next_token_nats
from ouroboros.eval.stats import ratio_interval
from ouroboros.nn.delta import DeltaResidual
from ouroboros.schedule import Visit

Sublayer = Literal["mixer", "mlp"]
SUBLAYERS: tuple[Sublayer, ...] = get_args(Sublayer)
CUTS = (0.5, 1.5)
"""Gates that bound the regimes keep, erase and reflect."""
FINE_CUTS = (0.3, 0.7, 1.3, 1.7)
"""The finer cut into five regimes."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
GATE_EDGE = 1e-3
"""A gate this close to 0 or 2 has stopped learning."""
VALUE_EDGE = 0.025
"""A sigmoid target in this share of its range at either end is saturated: outside (0.1, 3.9) at scale 4."""
SMALL = 100.0
"""A sublayer's output shorter than this many ``eps`` has a direction that the guard shortens or noise decides."""

ResidualHook = Callable[[Visit, Sublayer, nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]
"""``hook(visit, sublayer, residual, (x, update, context, read), output)``; a tensor it returns replaces the output."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ResidualRecord:
    """One residual use on a batch of tokens; tensors are float32 on the CPU."""

    slot: int
    """The visit's position in the schedule."""
    block: int
    loop: int
    sublayer: Sublayer
    eps: float
    """The guard of the direction."""
    value_scale: float | None
    """Upper end of a sigmoid target; None for the other kinds."""
    erase: bool
    """False for the control that writes without erasing."""
    beta: Tensor
    """Gate ``b`` in (0, 2), (B, T)."""
    h_norm: Tensor
    """Length of the sublayer's output, (B, T)."""
    direction: Tensor
    """``k``, the guarded direction of that output, (B, T, D)."""
    projection: Tensor
    """``k.X`` before the update, (B, T, V)."""
    projection_after: Tensor
    """``k.X'``, of the state as the model stores it, (B, T, V)."""
    value: Tensor
    """Target ``v``, (B, T, V)."""
    state_norm_after: Tensor
    """``|X'|``, (B, T), the length of the whole state after the update."""
    gram: Tensor
    """Inner products of the value channels of ``X'``, (B, T, V, V): their lengths and cosines."""

    @property
    def eigenvalue(self) -> Tensor:
        """Factor ``1 - b |k|^2`` of the shortcut along ``k``, (B, T); 1 without erasing."""
        if not self.erase:
            return torch.ones_like(self.beta)
        return (1 - self.beta.double() * self.direction.double().square().sum(-1)).float()

    @property
    def discrepancy(self) -> Tensor:
        """``|v - k.X|`` before the update, (B, T)."""
        return (self.value - self.projection).norm(dim=-1)

    @property
    def discrepancy_after(self) -> Tensor:
        """``|v - k.X'|``, (B, T): ``|1 - b |k|^2|`` times the one before, where the residual erases."""
        return (self.value - self.projection_after).norm(dim=-1)

    @property
    def erased(self) -> Tensor:
        """``b |k.X|``, the amount taken away along ``k``, (B, T); 0 without erasing."""
        return self.beta * self.projection.norm(dim=-1) * float(self.erase)

    @property
    def written(self) -> Tensor:
        """``b |v|``, the amount put in its place, (B, T)."""
        return self.beta * self.value.norm(dim=-1)


def _inner(model: Any) -> Any:
    """The model without its head."""
    return getattr(model, "model", model)


@contextmanager
def watching(model: Any, hook: ResidualHook, restart: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Call ``hook`` at every residual use, of any kind of residual, until the context ends. (core: ``observe``)

    Args:
        model: an Ouroboros model, with or without its head.
        hook: called in execution order after each residual.
        restart: called when a pass through the blocks begins. One call of a model with registers may hold two: the
            registers' own, then the text's.
    """
    inner = _inner(model)
    visits = inner.schedule.visits
    uses = [(visit, sublayer) for visit in visits for sublayer in SUBLAYERS]
    count = 0

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal count
        count = 0
        restart()

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        nonlocal count
        visit, sublayer = uses[min(count, len(uses) - 1)]
        check(
            count < len(uses) and module is getattr(inner.decoder.layers[visit.block], f"{sublayer}_residual"),
            "residuals are followed through the model's own schedule: instead of a call with loops=n, watch and call"
            " model.with_loops(n)",
        )
        count += 1
        return hook(visit, sublayer, module, args, output)

    with ExitStack() as stack:
        # The registers' keys and values are kept between calls: neither may a kept set hide their pass from the hook,
        # nor one made under the hook outlive it.
        inner.__dict__.pop("_prefix_memo", None)
        stack.callback(inner.__dict__.pop, "_prefix_memo", None)
        stack.callback(inner.decoder.register_forward_pre_hook(begin).remove)
        for block in inner.decoder.layers:
            for sublayer in SUBLAYERS:
                residual = getattr(block, f"{sublayer}_residual")
                stack.callback(residual.register_forward_hook(after).remove)
        yield


def _delta_only(model: Any) -> None:
    check(
        _inner(model).spec.block.residual.kind == "delta",
        "this model has no delta residual (its residual is 'additive'), so there are no gates to record; use a model"
        " whose recipe has model.residual = delta",
    )


def record(model: Any, input_ids: Tensor) -> list[ResidualRecord]:
    """What every residual use does on ``input_ids`` (B, T), in execution order: mixer and mlp of each visit.

    Runs one forward pass in evaluation mode without a cache or gradients.

    Raises:
        OuroborosError: the model's residual is not the delta residual.
    """
    _delta_only(model)
    records: list[ResidualRecord] = []

    def keep(visit: Visit, sublayer: Sublayer, residual: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        records.append(_record(visit, sublayer, residual, args, output))

    with evaluating(model), watching(model, keep, records.clear):
        _inner(model)(input_ids, use_cache=False)
    return records


def _record(
    visit: Visit, sublayer: Sublayer, residual: nn.Module, args: tuple[Tensor, ...], output: Tensor
) -> ResidualRecord:
    assert isinstance(residual, DeltaResidual)
    spec, (x, update, context, read) = residual.spec, args
    k_D, beta, value = residual.terms(update, context, read)
    before, after = (t.float() if spec.expanded else t.float()[..., None, :] for t in (x, output))
    return ResidualRecord(
        slot=visit.slot,
        block=visit.block,
        loop=visit.loop,
        sublayer=sublayer,
        eps=spec.eps,
        value_scale=spec.value_scale if spec.value == "sigmoid" else None,
        erase=spec.erase,
        beta=beta[..., 0].cpu(),
        h_norm=update.float().norm(dim=-1).cpu(),
        direction=k_D.cpu(),
        projection=(before @ k_D[..., None])[..., 0].cpu(),
        projection_after=(after @ k_D[..., None])[..., 0].cpu(),
        value=value.cpu(),
        state_norm_after=after.flatten(-2).norm(dim=-1).cpu(),
        gram=(after @ after.mT).cpu(),
    )


@dataclass(frozen=True, kw_only=True)
class ResidualSummary:
    """One residual use over all its tokens. Shares are of tokens (of token and channel for the target)."""

    regimes: tuple[float, ...]
    """Shares that keep (b < 0.5), erase and reflect (b >= 1.5)."""
    fine_regimes: tuple[float, ...]
    """Shares between the finer cuts."""
    beta: tuple[float, ...]
    """Quantiles (:data:`QUANTILES`) of the gate."""
    eigenvalue: tuple[float, ...]
    """Quantiles of ``1 - b |k|^2``."""
    gate_closed: float
    """Share with ``b < 0.001``."""
    gate_open: float
    """Share with ``b > 1.999``."""
    value_low: float | None
    """Share of targets in the lowest 2.5 % of the sigmoid's range; None without a sigmoid."""
    value_high: float | None
    """Share in the highest 2.5 %."""
    h_norm: tuple[float, ...]
    """Quantiles of the sublayer output's length."""
    h_small: float
    """Share with a length below 100 eps."""
    discrepancy: float
    """Mean ``|v - k.X|``."""
    discrepancy_after: float
    erased: float
    """Mean ``b |k.X|``."""
    written: float
    """Mean ``b |v|``."""
    state_norm_after: float
    """Mean ``|X|`` after the update."""

    @property
    def median_beta(self) -> float:
        """The middle quantile of the gate."""
        return self.beta[QUANTILES.index(0.5)]


def shares(values: Tensor, cuts: Sequence[float]) -> tuple[float, ...]:
    """Shares of ``values`` below the first cut, from one to the next, and from the last on; they sum to 1."""
    bins = torch.bucketize(values.flatten(), torch.tensor(cuts, dtype=values.dtype), right=True)
    counts = torch.bincount(bins, minlength=len(cuts) + 1)
    return tuple((counts.double() / bins.numel()).tolist())


def quantiles(values: Tensor) -> tuple[float, ...]:
    """:data:`QUANTILES` of all entries, interpolated."""
    # torch.quantile refuses more than 2^24 entries.
    ordered = values.flatten().double().sort().values
    place = torch.tensor(QUANTILES, dtype=torch.float64) * (len(ordered) - 1)
    return tuple(torch.lerp(ordered[place.floor().long()], ordered[place.ceil().long()], place.frac()).tolist())


def summarise(record: ResidualRecord) -> ResidualSummary:
    """The numbers behind the pictures of one residual use."""

    def share(where: Tensor) -> float:
        return where.double().mean().item()

    low = high = None
    if record.value_scale is not None:
        edge = VALUE_EDGE * record.value_scale
        low, high = share(record.value < edge), share(record.value > record.value_scale - edge)
    return ResidualSummary(
        regimes=shares(record.beta, CUTS),
        fine_regimes=shares(record.beta, FINE_CUTS),
        beta=quantiles(record.beta),
        eigenvalue=quantiles(record.eigenvalue),
        gate_closed=share(record.beta < GATE_EDGE),
        gate_open=share(record.beta > 2 - GATE_EDGE),
        value_low=low,
        value_high=high,
        h_norm=quantiles(record.h_norm),
        h_small=share(record.h_norm < SMALL * record.eps),
        discrepancy=record.discrepancy.mean().item(),
        discrepancy_after=record.discrepancy_after.mean().item(),
        erased=record.erased.mean().item(),
        written=record.written.mean().item(),
        state_norm_after=record.state_norm_after.mean().item(),
    )


class Headline(NamedTuple):
    """How many residual uses do what, by their median gate."""

    residuals: int
    keep: int
    """Median gate below 0.5."""
    erase: int
    reflect: int
    """1.5 or more."""


def headline(summaries: Sequence[ResidualSummary]) -> Headline:
    """Counts over all residual uses."""
    medians = [summary.median_beta for summary in summaries]
    keep, reflect = sum(b < CUTS[0] for b in medians), sum(b >= CUTS[1] for b in medians)
    return Headline(len(medians), keep, len(medians) - keep - reflect, reflect)


@contextmanager
def forced(model: Any, slot: int, sublayer: Sublayer, beta: float) -> Iterator[None]:
    """One residual use with its gate at ``beta`` in [0, 2] for every token, until the context ends.

    Raises:
        OuroborosError: no delta residual, no such slot, or ``beta`` outside [0, 2].
    """
    _delta_only(model)
    slots = len(_inner(model).schedule.visits)
    check(0 <= slot < slots, f"slot must be in 0..{slots - 1} (the visits of this model), got {slot}")
    check(sublayer in SUBLAYERS, f"sublayer must be mixer or mlp, got {sublayer!r}")
    check(0 <= beta <= 2, f"beta must be in [0, 2], got {beta}")

    def replace(
        visit: Visit, at: Sublayer, residual: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        if (visit.slot, at) != (slot, sublayer):
            return None
        assert isinstance(residual, DeltaResidual)
        x, update, context, read = args
        k, _, value = residual.terms(update, context, read)
        if residual.spec.expanded:
            k, value = k[..., None, :], value[..., None]
        state = x.float()
        error = value - (k * state).sum(-1, keepdim=True) if residual.spec.erase else value
        return (state + beta * error * k).to(output.dtype)

    with watching(model, replace):
        yield


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What forcing one residual use's gate does to the loss."""

    slot: int
    sublayer: Sublayer
    beta: float
    loss: float
    """Mean loss with the gate forced, nats per token."""
    change: float
    """That minus the loss of the model as it is."""
    stderr: float | None
    """Standard error of the change over sequences; None with fewer than two."""


def ablate(model: Any, input_ids: Tensor, betas: Sequence[float] = (0.0, 1.0, 2.0)) -> list[Ablation]:
    """Force the gate of every residual use in turn, and measure the next-token loss on ``input_ids`` (B, T).

    One forward pass for each use and gate, and one of the model as it is. Order: uses as in :func:`record`, then
    ``betas``.

    Raises:
        OuroborosError: no delta residual, fewer than two tokens, or a gate outside [0, 2].
    """
    _delta_only(model)
    check(input_ids.shape[-1] >= 2, "the loss needs sequences of at least two tokens")

    def loss_of_each() -> Tensor:
        return next_token_nats(model, input_ids).mean(-1)

    found, plain = [], loss_of_each()
    for visit in _inner(model).schedule.visits:
        for sublayer in SUBLAYERS:
            for beta in betas:
                with forced(model, visit.slot, sublayer, beta):
                    nats = loss_of_each()
                change = ratio_interval((nats - plain).numpy(), np.ones(len(nats)))
                found.append(
                    Ablation(
                        slot=visit.slot,
                        sublayer=sublayer,
                        beta=beta,
                        loss=nats.mean().item(),
                        change=change.mean,
                        stderr=change.stderr,
                    )
                )
    return found
