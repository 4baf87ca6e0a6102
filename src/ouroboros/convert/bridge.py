"""The bridge: an affine map that takes the place of removed layers, fitted in closed form to what they did.

Shapes: B sequences, T positions, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ouroboros.convert.ridge import Ridge
from ouroboros.errors import check
from ouroboros.model.executor import observe
from ouroboros.model.modeling import OuroborosForCausalLM

PENALTIES = (1e-3, 1e-2, 1e-1)
HELD_OUT_EVERY = 8
"""Of so many batches one chooses the penalty."""


@dataclass(frozen=True, kw_only=True)
class BridgeFit:
    """How well a bridge does what the removed layers did."""

    tokens: int
    penalty: float
    before: float
    """The error without it: the mean of ``|z - t|^2 / |t|^2`` over the batches that chose the penalty, where z is the
    state that leaves the loop and t that of the donor in the same place."""
    after: float
    """The error with it, of the same batches."""


@torch.no_grad()
def fit_bridge(
    model: OuroborosForCausalLM,
    donor: OuroborosForCausalLM,
    batches: Iterable[Tensor],
    layer: int,
    dtype: torch.dtype = torch.float32,
) -> BridgeFit:
    """Set the bridge behind the one loop of ``model`` to the ridge regression of the donor's state.

    Every token counts by the inverse square of the donor's state: what a state weighs for the blocks behind it depends
    on its direction, because they normalise it, and a few tokens have states a hundred times as long as all others.

    Args:
        model: with a loop part ``bridge`` that is neutral.
        donor: the whole pretrained model.
        batches: token ids (B, T), at least two of them.
        layer: the donor's layer before which the state is compared.
        dtype: of the products, by autocast.

    Raises:
        OuroborosError: too little text, or states that are not finite.
    """
    width = model.config.hidden_size
    fitting, choosing = Ridge(2 * width, width), Ridge(2 * width, width)
    tokens = 0
    for number, ids_BT in enumerate(batches):
        before, after, wanted = _states(model, donor, ids_BT, layer, dtype)
        x = torch.cat((after, before), dim=-1).flatten(0, -2)
        y, t = (wanted - after).flatten(0, -2), wanted.flatten(0, -2)
        sums = choosing if number % HELD_OUT_EVERY == 1 else fitting
        sums.add(x, y, 1 / t.square().sum(-1).clamp(min=1e-12))
        tokens += ids_BT.numel()
    check(choosing.count > 0, "the text has too few tokens to fit a bridge: give at least two batches")
    errors = {penalty: choosing.squares(fitting.solve(penalty)) for penalty in PENALTIES}
    penalty = min(errors, key=lambda each: errors[each])
    fitting.merge(choosing)
    found = fitting.solve(penalty)
    bridge: Any = model.model.decoder.loops[0]["bridge"]  # pyrefly: ignore
    bridge.proj.weight.copy_(found.weight)
    bridge.proj.bias.copy_(found.bias)
    errors_per_token = choosing.sum_yy / choosing.pairs, errors[penalty] / choosing.pairs
    return BridgeFit(tokens=tokens, penalty=penalty, before=errors_per_token[0], after=errors_per_token[1])


def _states(
    model: OuroborosForCausalLM, donor: OuroborosForCausalLM, ids_BT: Tensor, layer: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 the state before the loop, that behind it, and the donor's before ``layer``, (B, T, D) each."""
    loops: list[tuple[Tensor, Tensor]] = []
    theirs: list[Tensor] = []

    def on_loop(segment: int, loop: int, before: Tensor, after: Tensor) -> None:
        loops.append((before, after))

    def on_visit(_: Any, visit: Any, before: Tensor, after: Tensor) -> None:
        if visit.visit.block == layer - 1:
            theirs.append(after)

    amp = torch.autocast(ids_BT.device.type, dtype=dtype, enabled=dtype != torch.float32)
    with amp, observe(model, on_loop=on_loop), observe(donor, on_visit=on_visit):
        model.model(input_ids=ids_BT, use_cache=False)
        donor.model(input_ids=ids_BT, use_cache=False)
    return loops[0][0].float(), loops[-1][1].float(), theirs[0].float()
