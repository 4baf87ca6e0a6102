"""Hidden states as transformers hands them out: one before the first visit, then one for each.

Shapes: B batch, T positions, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class HiddenStates:
    """Collects a state (B, T, D) for every visit while a model runs; :attr:`call` is how the model calls its blocks.

    The first is what enters the first visit: embeddings with whatever is added to them. One follows for each visit:
    what its block returns, before the loop parts at the boundary. The last is replaced by what the head reads, behind
    the final norm. An expanded delta state counts as the mean of its value channels: what its readers start as.

    Args:
        embeddings_BTD: the first.
        call: how a block is called otherwise; None: plainly.
        expanded: whether blocks return (B, T, V, D).
    """

    def __init__(self, embeddings_BTD: Tensor, call: Callable[..., Tensor] | None, *, expanded: bool) -> None:
        self.states = [embeddings_BTD]
        self.inner, self.expanded = call, expanded

    def call(self, block: nn.Module, *arguments: Any) -> Tensor:
        """Run a block and keep its state."""
        state = block(*arguments) if self.inner is None else self.inner(block, *arguments)
        # Registers that run in front of the text are left out.
        kept = state[:, -self.states[0].shape[1] :]
        self.states.append(kept.mean(dim=2) if self.expanded else kept)
        return state

    def ending_with(self, last_BTD: Tensor) -> tuple[Tensor, ...]:
        """All of them, with the model's output in the place of the last."""
        return (*self.states[:-1], last_BTD)
