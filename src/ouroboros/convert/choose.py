"""Which layers of a donor a loop takes, by what the rest of the donor loses without the others.

Shapes: B windows, T tokens, D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.convert.layers import Split, split
from ouroboros.errors import check
from ouroboros.files import read_text
from ouroboros.model.executor import observe
from ouroboros.model.loss import logits_loss
from ouroboros.nn.visit import VisitContext
from ouroboros.schedule import Schedule

if TYPE_CHECKING:
    from ouroboros.data.tokenize import TextTokenizer
    from ouroboros.model.modeling import OuroborosForCausalLM

WINDOWS, WINDOW = 8, 256
"""Windows of held-out text that candidates are compared on, and tokens of each."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is lost if the loop takes these layers, and neither prelude nor coda takes the others between them."""

    start: int
    """The first layer of the loop."""
    loss: float
    """Of prelude, one pass through the loop, and coda on the held-out windows, without training; nats per token."""
    angular_distance: float
    """By how much the removed layers turn the state: the angle between the states before and behind them, divided by
    pi, mean over tokens; summed over the layers before the loop and those behind it (arXiv 2403.17887)."""
    block_influence: float
    """One minus the mean cosine of the states before and behind a layer, summed over the removed layers (arXiv
    2403.03853)."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """All candidates, and which one is chosen."""

    candidates: tuple[Candidate, ...]
    donor_loss: float
    """Of the whole donor on the same windows, nats per token."""
    tokens: int
    """Tokens that were predicted."""

    @property
    def best(self) -> Candidate:
        """The candidate of the lowest loss."""
        return min(self.candidates, key=lambda candidate: candidate.loss)

    def table(self) -> str:
        """For people, the best candidate first marked."""
        lines = ["first layer of the loop    loss    angular distance    block influence"]
        lines += [
            f"{'*' if candidate is self.best else ' '} {candidate.start:21}  {candidate.loss:6.3f}"
            f"  {candidate.angular_distance:18.3f}  {candidate.block_influence:17.3f}"
            for candidate in self.candidates
        ]
        lines.append(f"  {'whole donor':>21}  {self.donor_loss:6.3f}")
        return "\n".join(lines)


def windows_of(path: Path, tokenizer: TextTokenizer, longest: int) -> Tensor:
    """Windows of a held-out text, evenly spaced, as ids (B, T).

    Args:
        path: a text file.
        tokenizer: of the donor.
        longest: tokens that the donor can read.

    Raises:
        OuroborosError: the file cannot be read, or is shorter than one window.
    """
    ids = tokenizer.encode(read_text(path).encode(), name=str(path))
    size = min(WINDOW, longest)
    check(len(ids) >= size, f"--held-out: {path} has {len(ids)} tokens, and one window has {size}: give more text")
    count = min(WINDOWS, len(ids) // size)
    starts = np.linspace(0, len(ids) - size, count).astype(int)
    return torch.from_numpy(np.stack([ids[start : start + size] for start in starts])).long()


@torch.no_grad()
def choose(donor: OuroborosForCausalLM, ids_BT: Tensor, schedule: Schedule) -> Choice:
    """Try every run of neighbouring layers between prelude and coda as the layers of the loop.

    The donor is run once. Its states before the layers between prelude and coda are kept, so that a candidate costs its
    looped layers and the coda alone.

    Args:
        donor: the whole donor, its layers in order.
        ids_BT: held-out text.
        schedule: of the layout; a prelude, a loop and a coda.

    Raises:
        OuroborosError: the layout does not fit, see :func:`~ouroboros.convert.layers.split`.
    """
    place = split(schedule, donor.schedule.num_blocks)
    runs = _Runs(donor, ids_BT, place)
    starts = range(place.middle.start, place.middle.stop - place.looped + 1)
    return Choice(
        candidates=tuple(runs.candidate(start) for start in starts),
        donor_loss=runs.donor_loss,
        tokens=ids_BT[:, 1:].numel(),
    )


class _Runs:
    """What one run of the donor tells, and what runs of a few of its layers tell besides."""

    def __init__(self, donor: OuroborosForCausalLM, ids_BT: Tensor, place: Split) -> None:
        self.donor, self.ids_BT, self.place = donor, ids_BT, place
        self.layers: list[tuple[nn.Module, VisitContext]] = []
        self.before: dict[int, Tensor] = {}
        """The state before each layer of the middle, and before the coda."""
        self.influence: list[float] = []

        def see(block: nn.Module, visit: VisitContext, before: Tensor, after: Tensor) -> None:
            number = len(self.layers)
            self.layers.append((block, visit))
            self.influence.append(1 - float(F.cosine_similarity(before.float(), after.float(), dim=-1).mean()))
            if number >= place.middle.start and number <= place.middle.stop:
                self.before[number] = before
            if number + 1 == place.middle.stop == place.layers:
                self.before[number + 1] = after

        with observe(donor, see):
            self.donor_loss = self._loss(donor.model(ids_BT, use_cache=False).last_hidden_state)

    def candidate(self, start: int) -> Candidate:
        """What remains with the layers from ``start`` on in the loop."""
        middle, end = self.place.middle, start + self.place.looped
        x = self.before[middle.start]
        for block, visit in (*self.layers[start:end], *self.layers[middle.stop :]):
            x = block(x, visit)
        gone = [layer for layer in middle if not start <= layer < end]
        return Candidate(
            start=start,
            loss=self._loss(self.donor.model.norm(x)),
            angular_distance=self._angle(middle.start, start) + self._angle(end, middle.stop),
            block_influence=sum(self.influence[layer] for layer in gone),
        )

    def _angle(self, first: int, last: int) -> float:
        """The angle between the states before two layers, in half turns, mean over tokens."""
        if first == last:
            return 0.0
        cosine = F.cosine_similarity(self.before[first].float(), self.before[last].float(), dim=-1)
        return float(cosine.clamp(-1, 1).arccos().mean()) / math.pi

    def _loss(self, x_BTD: Tensor) -> float:
        """The mean loss of the next token, of normalised last states; a window at a time, because logits are large."""
        losses = [
            logits_loss(self.donor.logits(x_TD[:-1]), ids_T[1:], 0.0)[0]
            for x_TD, ids_T in zip(x_BTD, self.ids_BT, strict=True)
        ]
        return float(torch.stack(losses).mean())
