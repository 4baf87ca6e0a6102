"""How R-HRM's published chat chooses tokens.

Its steps, in order: temperature, ban of a fourth equal token, penalty for every occurrence, top-k, top-p. The last 128
tokens are shown to the model at every step, without a cache. Each processor is called as ``generate`` calls its own,
with the tokens so far (B, T) and scores (B, V), and returns new scores.
Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper

from ouroboros.serve.sampling import Sampling, Style


@dataclass(frozen=True)
class OccurrencePenalty:
    """A repetition penalty for every occurrence: a token seen n times is scaled by ``penalty ** n``.

    Positive scores are divided and others multiplied, so that nothing changes its sign. In a long text this crushes
    frequent tokens such as spaces and line breaks.

    Args:
        penalty: the factor of one occurrence.
        window: count among the last this many tokens; 0 counts all.
    """

    penalty: float
    window: int = 0

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        """Scores (B, V) after the penalty."""
        seen = ids_BT[:, -self.window :]
        counts = torch.zeros(scores_BV.shape, dtype=torch.float64, device=scores_BV.device)
        counts.scatter_add_(1, seen, torch.ones(seen.shape, dtype=torch.float64, device=scores_BV.device))
        factor = self.penalty**counts
        exact = scores_BV.double()
        # Zero is left alone: an overflowed factor would make it NaN.
        scaled = torch.where(exact > 0, exact / factor, torch.where(exact < 0, exact * factor, exact))
        return torch.where(counts > 0, scaled.to(scores_BV.dtype), scores_BV)


@dataclass(frozen=True)
class TripleBan:
    """No fourth equal token: where the last three of more than three tokens are equal, that token cannot follow."""

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        """Scores (B, V) with the banned token of each sequence at minus infinity."""
        if ids_BT.shape[1] <= 3:
            return scores_BV
        last = ids_BT[:, -1:]
        banned = (ids_BT[:, -3:] == last).all(dim=1, keepdim=True)
        is_last = torch.arange(scores_BV.shape[1], device=scores_BV.device) == last
        return scores_BV.masked_fill(banned & is_last, -torch.inf)


@dataclass(frozen=True)
class NucleusPast:
    """Top-p that goes on until the cumulative probability is past ``top_p``: the token that crosses is kept.

    transformers' own keeps the smallest set that reaches ``top_p``. The two differ where a sum equals ``top_p`` exactly
    (two tokens of probability 0.5 at ``top_p`` 0.5: here both are kept, there one), and in which of equal tokens are
    kept: here those of the smallest index.
    """

    top_p: float

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        """Scores (B, V) with what is left out at minus infinity."""
        ordered, order = scores_BV.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = -1.0  # the most probable token is always kept
        out = torch.zeros_like(scores_BV, dtype=torch.bool).scatter(1, order, before > self.top_p)
        return scores_BV.masked_fill(out, -torch.inf)


@dataclass(frozen=True, kw_only=True)
class ChatSampling(Sampling):
    """The controls of R-HRM's published chat."""

    max_new_tokens: int = 200
    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 0.9
    repetition_penalty: float = 1.2
    window: int | None = 128
    penalty: Literal["distinct", "occurrences"] = "occurrences"
    """Penalise each token of the text once, or once for every time it occurs, as published."""
    ban_triples: bool = True
    """Never write a fourth equal token in a row."""
    nucleus: Literal["reach", "pass"] = "pass"
    """Whether top-p stops where the probability is reached, or where it is passed, as published."""

    def options(self) -> dict[str, Any]:
        """The published chain as logits processors."""
        values = super().options()
        chain: list[Any] = values.pop("logits_processor", [])
        if self.penalty == "occurrences" and self.repetition_penalty != 1.0:
            values.pop("repetition_penalty", None)
            chain = [OccurrencePenalty(self.repetition_penalty, self.repetition_window)]
        if self.ban_triples:
            chain.insert(0, TripleBan())
        if self.temperature > 0 and self.nucleus == "pass":
            # generate() applies its own temperature, top-k and top-p last; the published order needs ours.
            values |= {"temperature": 1.0, "top_k": None, "top_p": 1.0}
            if self.temperature != 1.0:
                chain.insert(0, TemperatureLogitsWarper(self.temperature))
            chain += [TopKLogitsWarper(self.top_k)] if self.top_k else []
            chain += [NucleusPast(self.top_p)] if self.top_p < 1.0 else []
        return values | ({"logits_processor": chain} if chain else {})


STYLE = Style(
    recognises=lambda model: model.block.mixer.kind in ("latent_attention", "bottleneck_attention"),
    sampling=ChatSampling(),
)
"""Models with latent attention, as it should be or as published."""
