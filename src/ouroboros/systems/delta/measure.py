"""What the delta residuals of a running model do: gates, directions and amounts, and what forcing a gate costs.

A residual use is one visit's mixer or feed-forward network; a looped block has one per loop. Everything is recorded by
hooks that are gone afterwards: the model is left as it was.

Shapes: B batch, T positions, D model width, V value channels (1 for a vector state), N residual uses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.errors import check
from ouroboros.eval.score import next_token_nats
from ouroboros.eval.stats import ratio_interval
from ouroboros.eval.windows import evaluating
from ouroboros.nn.delta import DeltaResidual
from ouroboros.schedule import Visit

Sublayer = Literal["mixer", "mlp"]
SUBLAYERS: tuple[Sublayer, ...] = get_args(Sublayer)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

ResidualHook = Callable[[Visit, Sublayer, nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]
"""``hook(visit, sublayer, module, arguments, output)``; a tensor it returns replaces the output."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ResidualRecord:
    """One residual use on a batch of tokens; tensors are float32 on the CPU."""

    visit: Visit
    sublayer: Sublayer
    spec: DeltaSpec
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
        if not self.spec.erase:
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
        return self.beta * self.projection.norm(dim=-1) * float(self.spec.erase)

    @property
    def written(self) -> Tensor:
        """``b |v|``, the amount put in its place, (B, T)."""
        return self.beta * self.value.norm(dim=-1)


def _inner(model: Any) -> Any:
    """The model without its head."""
    return getattr(model, "model", model)


@contextmanager
def watching(model: Any, hook: ResidualHook, part: str = "") -> Iterator[None]:
    """Call ``hook`` at every residual use, of any kind of residual, until the context ends.

    One call of a model with registers may hold two passes through the blocks: the registers' own, then the text's.

    Args:
        model: an Ouroboros model, with or without its head.
        hook: called in execution order after each residual.
        part: after this part of each residual instead.
    """
    inner, now = _inner(model), dict[str, Visit]()

    def begin(block: nn.Module, args: Any) -> None:
        now["visit"] = args[1].visit

    def after(sublayer: Sublayer, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return hook(now["visit"], sublayer, module, args, output)

    with ExitStack() as stack:
        # The registers' keys and values are kept between calls: neither may a kept set hide their pass from the hook,
        # nor one made under the hook outlive it.
        inner.__dict__.pop("_prefix_memo", None)
        stack.callback(inner.__dict__.pop, "_prefix_memo", None)
        for block in inner.decoder.layers:
            stack.callback(block.register_forward_pre_hook(begin).remove)
            for sublayer in SUBLAYERS:
                module = getattr(block, f"{sublayer}_residual").get_submodule(part)
                stack.callback(module.register_forward_hook(partial(after, sublayer)).remove)
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
    records: dict[tuple[int, Sublayer], ResidualRecord] = {}

    def keep(visit: Visit, sublayer: Sublayer, residual: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        # The text's own pass comes last, after that of the registers.
        records[visit.slot, sublayer] = _record(visit, sublayer, residual, args, output)

    with evaluating(model), watching(model, keep):
        _inner(model)(input_ids, use_cache=False)
    return list(records.values())


def _record(
    visit: Visit, sublayer: Sublayer, residual: nn.Module, args: tuple[Tensor, ...], output: Tensor
) -> ResidualRecord:
    assert isinstance(residual, DeltaResidual)
    spec, (x, update, context, read) = residual.spec, args
    k_D, beta, value = residual.terms(update, context, read)
    before, after = (t.float() if spec.expanded else t.float()[..., None, :] for t in (x, output))
    return ResidualRecord(
        visit=visit,
        sublayer=sublayer,
        spec=spec,
        beta=beta[..., 0].cpu(),
        h_norm=update.float().norm(dim=-1).cpu(),
        direction=k_D.cpu(),
        projection=(before @ k_D[..., None])[..., 0].cpu(),
        projection_after=(after @ k_D[..., None])[..., 0].cpu(),
        value=value.cpu(),
        state_norm_after=after.flatten(-2).norm(dim=-1).cpu(),
        gram=(after @ after.mT).cpu(),
    )


def shares(values: Tensor, cuts: Sequence[float]) -> list[float]:
    """Shares of ``values`` below the first cut, from one to the next, and from the last on; they sum to 1."""
    bins = torch.bucketize(values.flatten(), torch.tensor(cuts, dtype=values.dtype), right=True)
    return (torch.bincount(bins, minlength=len(cuts) + 1).double() / bins.numel()).tolist()


def quantiles(values: Tensor) -> list[float]:
    """:data:`QUANTILES` of all entries, interpolated."""
    return np.quantile(values.double().numpy(), QUANTILES).tolist()


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

    def replace(visit: Visit, at: Sublayer, gate: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return torch.full_like(output, beta) if (visit.slot, at) == (slot, sublayer) else None

    with watching(model, replace, part="gate"):
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
    plain = next_token_nats(model, input_ids).mean(-1)

    def forcing(slot: int, sublayer: Sublayer, beta: float) -> Ablation:
        with forced(model, slot, sublayer, beta):
            nats = next_token_nats(model, input_ids).mean(-1)
        change = ratio_interval((nats - plain).numpy(), np.ones(len(nats)))
        loss = nats.mean().item()
        return Ablation(slot=slot, sublayer=sublayer, beta=beta, loss=loss, change=change.mean, stderr=change.stderr)

    slots = range(len(_inner(model).schedule.visits))
    return [forcing(*use) for use in itertools.product(slots, SUBLAYERS, betas)]
