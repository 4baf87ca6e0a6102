"""Logits processors that transformers lacks: the variants of R-HRM and OSAM as published, and a window for penalties.

Each is called as transformers calls its own, with the tokens so far (B, T) and scores (B, V), and returns new scores.
Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation import LogitsProcessor, RepetitionPenaltyLogitsProcessor


class RecentPenalty(LogitsProcessor):
    """The standard repetition penalty (Keskar et al. 2019), for tokens among the last ``window`` only.

    A token is penalised once, however often it occurs: positive scores are divided by ``penalty``, others multiplied.
    """

    def __init__(self, penalty: float, window: int) -> None:
        self.standard = RepetitionPenaltyLogitsProcessor(penalty)
        self.window = window

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        """Scores (B, V) after the penalty."""
        return self.standard(input_ids[:, -self.window :], scores)  # pyrefly: ignore[bad-argument-type]


class OccurrencePenalty(LogitsProcessor):
    """A repetition penalty for every occurrence: a token seen n times is scaled by ``penalty ** n``.

    Positive scores are divided, others multiplied, so nothing changes sign. Over long contexts this crushes frequent
    tokens such as spaces and line breaks.

    Args:
        penalty: the factor of one occurrence.
        window: count among the last this many tokens; 0 counts all.
    """

    def __init__(self, penalty: float, window: int = 0) -> None:
        self.penalty, self.window = penalty, window

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        """Scores (B, V) after the penalty."""
        seen = input_ids[:, -self.window :]
        counts = torch.zeros(scores.shape, dtype=torch.float64, device=scores.device)
        counts.scatter_add_(1, seen, torch.ones(seen.shape, dtype=torch.float64, device=scores.device))
        factor = self.penalty**counts
        exact = scores.double()
        # Zero is left alone: an overflowed factor would make it NaN.
        scaled = torch.where(exact > 0, exact / factor, torch.where(exact < 0, exact * factor, exact))
        return torch.where(counts > 0, scaled.to(scores.dtype), scores)


class TripleBan(LogitsProcessor):
    """No fourth equal token: where the last three of more than three tokens are equal, that token cannot follow."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        """Scores (B, V) with the banned token of each sequence at minus infinity."""
        if input_ids.shape[1] <= 3:
            return scores
        last = input_ids[:, -1:]
        banned = (input_ids[:, -3:] == last).all(dim=1, keepdim=True)
        is_last = torch.arange(scores.shape[1], device=scores.device) == last
        return scores.masked_fill(banned & is_last, -torch.inf)


class NucleusPast(LogitsProcessor):
    """Top-p that goes on until the cumulative probability is past ``top_p``: the token that crosses is kept.

    transformers' own keeps the smallest set that reaches ``top_p``. The two differ where a sum equals ``top_p`` exactly
    (two tokens of probability 0.5 at ``top_p`` 0.5: here both, there one), and in which of equal tokens is kept: here
    the ones of smallest index.
    """

    def __init__(self, top_p: float) -> None:
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        """Scores (B, V) with what is left out at minus infinity."""
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = -1.0  # the most probable token is always kept
        out = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, before > self.top_p)
        return scores.masked_fill(out, -torch.inf)


class NucleusWithin(LogitsProcessor):
    """Top-k, and a top-p that stops before the probability is passed: the token that crosses is left out.

    Exactly ``top_k`` tokens are kept, also where others equal the last of them. Of these, renormalised, those are kept
    whose cumulative probability, their own included, is at most ``top_p``, and in any case the most probable one. The
    operations and their order are the published ones, as sums in float32 decide what is kept: rounding can leave out
    the last tokens even at a ``top_p`` of 1.

    Args:
        top_k: 0 keeps all.
        top_p: 0 keeps all.
    """

    def __init__(self, top_k: int, top_p: float) -> None:
        self.top_k, self.top_p = top_k, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        """Scores (B, V) with what is left out at minus infinity."""
        probabilities, nothing = scores.softmax(dim=-1), torch.zeros_like(scores, dtype=torch.bool)
        kept = ~nothing
        if self.top_k:
            kept = nothing.scatter(1, probabilities.topk(min(self.top_k, scores.shape[1])).indices, True)
            probabilities = probabilities * kept
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        if self.top_p:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            within = ordered.cumsum(dim=-1) <= self.top_p
            within[:, 0] = True
            kept = kept & nothing.scatter(1, order, within)
        return scores.masked_fill(~kept, -torch.inf)
