"""What the delta residuals of a running model do: gates, directions and amounts.

A residual use is one visit's mixer or feed-forward network; a looped block has one per loop. Everything is recorded by
hooks that are gone afterwards: the model is left as it was.

Shapes: B batch, T positions, D model width, V value channels (1 for a vector state).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.errors import check
from ouroboros.eval.windows import evaluating
from ouroboros.schedule import Visit

Sublayer = Literal["mixer", "mlp"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ResidualRecord:
    """One residual use on a batch of tokens; tensors are float32 on the CPU."""

    visit: Visit
    sublayer: Sublayer
    spec: DeltaSpec
    beta: Tensor
    """Gate ``b`` in (0, 2), (B, T)."""
    direction: Tensor
    """``k``, the guarded direction of the sublayer's output, (B, T, D)."""
    projection: Tensor
    """``k.X`` before the update, (B, T, V)."""
    value: Tensor
    """Target ``v``, (B, T, V)."""

    @property
    def eigenvalue(self) -> Tensor:
        """Factor ``1 - b |k|^2`` of the shortcut along ``k``, (B, T); 1 without erasing."""
        if not self.spec.erase:
            return torch.ones_like(self.beta)
        return (1 - self.beta.double() * self.direction.double().square().sum(-1)).float()

    @property
    def erased(self) -> Tensor:
        """``b |k.X|``, the amount taken away along ``k``, (B, T); 0 without erasing."""
        return self.beta * self.projection.norm(dim=-1) * float(self.spec.erase)

    @property
    def written(self) -> Tensor:
        """``b |v|``, the amount put in its place, (B, T)."""
        return self.beta * self.value.norm(dim=-1)


@contextmanager
def watching(model: Any, hook: Callable[..., None]) -> Iterator[None]:
    """Call ``hook(visit, sublayer, module, arguments, output)`` after every residual use, until the context ends.

    One call of a model with registers may hold two passes through the blocks: the registers' own, then the text's.
    """
    inner, now = model.model, dict[str, Visit]()

    def begin(block: nn.Module, args: Any) -> None:
        now["visit"] = args[1].visit

    def after(sublayer: Sublayer, *call: Any) -> None:
        hook(now["visit"], sublayer, *call)

    with ExitStack() as stack:
        for block in inner.decoder.layers:
            stack.callback(block.register_forward_pre_hook(begin).remove)
            for sublayer in get_args(Sublayer):
                module = getattr(block, f"{sublayer}_residual")
                stack.callback(module.register_forward_hook(partial(after, sublayer)).remove)
        yield


def record(model: Any, input_ids: Tensor) -> list[ResidualRecord]:
    """What every residual use does on ``input_ids`` (B, T), in execution order: mixer and mlp of each visit.

    Raises:
        OuroborosError: the model has another residual.
    """
    check(
        model.model.spec.block.residual.kind == "delta",
        "this model has no delta residual, so there are no gates to record; use one with model.residual = delta",
    )
    records: dict[tuple[int, Sublayer], ResidualRecord] = {}

    def keep(visit: Visit, sublayer: Sublayer, residual: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        spec, (x, *given) = residual.spec, args
        k_D, beta, value = residual.terms(*given)
        state = x.float() if spec.expanded else x.float()[..., None, :]
        # The text's own pass comes last, after that of the registers.
        records[visit.slot, sublayer] = ResidualRecord(
            visit=visit,
            sublayer=sublayer,
            spec=spec,
            beta=beta[..., 0].cpu(),
            direction=k_D.cpu(),
            projection=(state @ k_D[..., None])[..., 0].cpu(),
            value=value.cpu(),
        )

    with evaluating(model), watching(model, keep):
        model.model(input_ids, use_cache=False)
    return list(records.values())
