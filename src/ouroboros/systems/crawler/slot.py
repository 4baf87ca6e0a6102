"""SLOT: a vector added to the last states, fitted to a window's context before its targets are scored.

The model runs once on a window and stays as it is. A vector ``delta`` that starts at zero is fitted by a few steps of
AdamW so that ``head(h + delta)`` predicts the window's *context*, the tokens that earlier windows have scored; then the
window's own targets are scored with it, and it is thrown away (Hu et al. 2025, "SLOT: sample-specific language model
optimization at test-time"). Only the head runs in each step.

With a vector for every window no target is used before it is scored. The published form has one vector for a batch of
consecutive windows. There the context of a window holds what the windows before it in the batch are about to score, so
:mod:`ouroboros.eval.legality` rejects it: on ids drawn at random it scores below their entropy.

Shapes: B windows, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ouroboros.errors import check
from ouroboros.eval.adapt import check_adaptation
from ouroboros.eval.windows import Scored, Span, device_of, spans
from ouroboros.systems.crawler.score import published_spans


@dataclass(frozen=True)
class Slot:
    """A procedure (:data:`ouroboros.eval.windows.Procedure`) for models of this library."""

    window: int
    stride: int
    steps: int = 8
    """Steps of AdamW (weight decay 1e-8, epsilon 1e-5) for each window."""
    lr: float = 0.005
    batch_size: int = 32
    """Windows that are read together."""
    shared: bool = False
    """One vector for all windows of a batch, which is not legal."""
    published: bool = False
    """As in the published program: the loss is the mean over all context of a batch instead of one for each window, the
    batch with the first window has no vector, and the end of the text is scored several times."""

    def __post_init__(self) -> None:
        check_adaptation(self.steps, self.lr)
        check(
            self.stride < self.window,
            f"slot fits a vector to what a window holds before its {self.stride} targets, but windows have"
            f" {self.window} tokens: give a stride below that",
        )

    def __call__(self, model: Any, sequences: Sequence[Tensor]) -> Iterator[Scored]:
        """Score ``sequences`` in their order.

        Raises:
            OuroborosError: the model is none of this library, so its last states and its head are not known.
        """
        check(hasattr(model, "logits"), f"slot: {type(model).__name__} is no model of this library; adapt it by 'ttt'")
        plan = published_spans if self.published else spans
        for index, sequence in enumerate(sequences):
            todo = list(plan(len(sequence) - 1, self.window, self.stride, index))
            for at in range(0, len(todo), self.batch_size):
                yield from self._score(model, sequence, todo[at : at + self.batch_size])

    def _score(self, model: Any, sequence: Tensor, batch: Sequence[Span]) -> Iterator[Scored]:
        device = device_of(model)
        inputs_BT = pad_sequence([sequence[start:end] for _, start, end, _ in batch], batch_first=True).to(device)
        targets_BT = pad_sequence([sequence[start + 1 : end + 1] for _, start, end, _ in batch], batch_first=True)
        h_BTD = model.model(input_ids=inputs_BT, use_cache=False).last_hidden_state
        if not (self.published and batch[0].start == 0):
            context = torch.tensor([first - start for _, start, _, first in batch], device=device)
            h_BTD = h_BTD + self._delta(model, h_BTD, targets_BT.to(device), context)
        for row, (index, start, end, first) in enumerate(batch):
            logits = model.logits(h_BTD[row, first - start : end - start]).float()
            yield Scored(index, first, torch.log_softmax(logits, dim=-1))

    def _delta(self, model: Any, h_BTD: Tensor, targets_BT: Tensor, context_B: Tensor) -> Tensor:
        """The fitted vector of each window, (B, 1, D), or (1, 1, D) of all; ``context_B``: positions to fit it on."""
        is_context = torch.arange(h_BTD.shape[1], device=h_BTD.device) < context_B[:, None]
        weight_BT = is_context / (context_B.sum() if self.published else context_B[:, None]).clamp(min=1)
        delta = h_BTD.new_zeros(1 if self.shared else len(h_BTD), 1, h_BTD.shape[-1]).requires_grad_()
        optimizer = torch.optim.AdamW([delta], lr=self.lr, weight_decay=1e-8, eps=1e-5)
        length = int(context_B.max())
        for _ in range(self.steps):
            with torch.enable_grad():
                logits = model.logits(h_BTD[:, :length] + delta).float()
                nats_BT = F.cross_entropy(logits.transpose(1, 2), targets_BT[:, :length], reduction="none")
                (delta.grad,) = torch.autograd.grad((nats_BT * weight_BT[:, :length]).sum(), [delta])
            optimizer.step()
        return delta.detach()


PUBLISHED = functools.partial(Slot, shared=True, published=True)
"""The published form, one vector for a batch of windows."""
