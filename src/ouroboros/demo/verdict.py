"""What the demo's single runs allow to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ouroboros.eval.baselines import Baseline
from ouroboros.eval.stats import Difference
from ouroboros.report.content import verdict_sentence

SEED_NOISE = 0.03
"""Bits per byte below which a difference of two small models is nothing that another seed could not undo. From seed to
seed it varied by 0.009 to 0.023 (standard deviation) in docs/studies/loop-recipe.md, and by 0.012 in
ablations/2026-11-30-four-budgets."""
STEEP = 0.5
"""Bits per byte that the second half of training takes off the training loss, from which models are still falling."""


class Judgement(NamedTuple):
    """The verdict, of the looped model against its better twin, as one word and as a sentence."""

    verdict: Literal["win", "loss", "cannot tell", "too little training"]
    sentence: str


def judge(
    names: tuple[str, str],
    scores: tuple[float, float],
    difference: Difference,
    baselines: Sequence[Baseline],
    metrics: Sequence[Sequence[Mapping[str, Any]]],
) -> Judgement:
    """Who won, said with the care that single runs allow.

    Args:
        names: of the looped model and its better twin.
        scores: theirs, in bits per byte.
        difference: of the two on the same text.
        baselines: on the same text.
        metrics: records of all trainings.
    """
    gram = min((b.bits_per_byte for b in baselines if "n-gram" in b.name), default=float("inf"))
    fall, why = max(map(late_fall, metrics)), ""
    if min(scores) >= gram:
        why = f"no model is better than an n-gram ({gram:.3f} bits per byte)"
    elif fall > STEEP:
        why = f"the second half of training still took {fall:.2f} bits per byte off the loss"
    if why:
        sentence = f"Too little training to tell: {why}; give it more time with --minutes."
        return Judgement("too little training", sentence)
    if difference.verdict == "cannot tell" or abs(difference.delta) >= SEED_NOISE:
        words: dict[str, Literal["win", "loss"]] = {"better": "win", "worse": "loss"}
        return Judgement(words.get(difference.verdict, "cannot tell"), verdict_sentence(*names, difference))
    sentence = (
        f"Cannot tell: {names[0]} and {names[1]} differ by {abs(difference.delta):.3f} bits per byte on the same"
        f" held-out text, and with another seed that may be {SEED_NOISE} more or less."
    )
    return Judgement("cannot tell", sentence)


def late_fall(metrics: Sequence[Mapping[str, Any]]) -> float:
    """By how many bits per byte the training loss falls from the middle of training to its end, both smoothed.

    Infinite where there are too few records to say.
    """
    losses = [float(record["bits_per_byte"]) for record in metrics if record.get("kind") == "train"]
    width = len(losses) // 10
    if width < 1:
        return float("inf")
    middle = losses[len(losses) // 2 - width : len(losses) // 2 + width]
    return sum(middle) / len(middle) - sum(losses[-width:]) / width
