"""What a healing was worth on text that nothing was trained on: shares of the gap between cut donor and donor."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ouroboros.eval.score import Score
from ouroboros.eval.stats import Difference, Record, paired_difference
from ouroboros.model.modeling import OuroborosForCausalLM

RESAMPLES = 2000
CONTROLS = ("shuffled", "constant")
"""What the Controller sees instead of the state: that of another token, or the mean of all."""


@dataclass(frozen=True, kw_only=True)
class Closed(Record):
    """The share of the gap between the cut donor and the donor that an arm closes, with a 95 % bootstrap interval over
    units of text; None where the donor is not better than what is cut out of it."""

    share: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """An arm and its scores."""

    name: str
    description: str
    trained: Mapping[str, int] = field(default_factory=dict)
    """Numbers that were trained or fitted, by what they belong to."""
    parameters: int = 0
    minutes: float = 0.0
    """Of training."""
    valid_bits_per_byte: float | None = None
    """Of the held-out part of the training text, which chooses the best arm."""
    scores: Mapping[str, Score] = field(default_factory=dict)
    """By text."""
    tokens_per_second: float | None = None
    """Of greedy generation, one text at a time."""
    against_donor: float | None = None
    """How many times as fast as the donor that is, measured in turns."""


def closed(donor: Score, cut: Score, arm: Score) -> Closed:
    """The share of the gap that ``arm`` closes: ``(cut - arm) / (cut - donor)`` of the nats of the same text.

    The interval is of bootstrap samples of the units (Efron 1979, percentiles), the same ones for all three models.
    """
    nats = [np.asarray(score.unit_nats, np.float64) for score in (donor, cut, arm)]
    whole = [values.sum() for values in nats]
    if whole[1] <= whole[0]:
        return Closed(share=None, low=None, high=None)
    share = float((whole[1] - whole[2]) / (whole[1] - whole[0]))
    if len(nats[0]) < 2:
        return Closed(share=share, low=None, high=None)
    draw = np.random.default_rng(0).integers(len(nats[0]), size=(RESAMPLES, len(nats[0])))
    sums = [values[draw].sum(1) for values in nats]
    gaps = sums[1] - sums[0]
    shares = np.where(gaps > 0, (sums[1] - sums[2]) / np.where(gaps > 0, gaps, 1), -math.inf)
    low, high = np.quantile(shares, (0.025, 0.975), method="inverted_cdf")
    return Closed(share=share, low=float(low) if math.isfinite(low) else None, high=float(high))


def best_of(arms: Sequence[ArmResult]) -> ArmResult:
    """The trained arm that validation likes best; without validation the last one."""
    scored = [arm for arm in arms if arm.valid_bits_per_byte is not None]
    if scored:
        return min(scored, key=lambda arm: arm.valid_bits_per_byte or math.inf)
    return [arm for arm in arms if arm.trained][-1]


def compare(arms: Mapping[str, ArmResult], name: str, other: str) -> dict[str, Difference]:
    """Of every text the difference of two arms in bits per byte, negative where the first is better."""
    left, right = arms[name].scores, arms[other].scores
    return {text: paired_difference(left[text], right[text]) for text in left}


def sentence(arms: Mapping[str, ArmResult], best: str) -> str:
    """The verdict in words: whether there is a gain on held-out text, and whether the Controller has a part in it."""
    found = compare(arms, best, "cut")
    texts = [text for text, difference in found.items() if difference.verdict == "better"]
    if not texts:
        return f"No held-out gain: {best} is not better than the cut donor on any held-out text."
    shares = []
    for text in found:
        gap = closed(arms["donor"].scores[text], arms["cut"].scores[text], arms[best].scores[text])
        if gap.share is not None:
            shares.append(f"{100 * gap.share:.0f} % of the gap on {text}" + _range(gap))
    said = f"{best} closes {', '.join(shares)}" if shares else f"{best} is better than the cut donor"
    worse = [text for text in found if text not in texts]
    said += f", and no gain is shown on {', '.join(worse)}." if worse else "."
    return f"{said} {steering_sentence(arms)}".strip()


def steering_sentence(arms: Mapping[str, ArmResult]) -> str:
    """Whether a Controller that sees the state adds anything to the same without; empty where that was not tried."""
    controls = [name for name in ("healed", "static") if name in arms]
    if "controller" not in arms or not controls:
        return ""
    gains = {name: compare(arms, "controller", name) for name in controls}
    better = [all(d.verdict == "better" for d in gains[name].values()) for name in controls]
    names = " and ".join(controls)
    if all(better):
        return f"The Controller is better than {names} on every held-out text, {_needs_state(arms)}."
    if any(better):
        return f"The Controller is better than {' and '.join(n for n, b in zip(controls, better) if b)} alone."
    return f"The Controller adds nothing that these texts show to {names}."


def _needs_state(arms: Mapping[str, ArmResult]) -> str:
    """On which texts the Controller is worse when it sees any other state than its own."""
    wrong = [compare(arms, name, "controller") for name in arms if name.startswith("controller, ")]
    texts = list(arms["controller"].scores)
    needs = [text for text in texts if wrong and all(found[text].verdict == "worse" for found in wrong)]
    if len(needs) == len(texts):
        return "and needs the state that it sees"
    return (
        f"and needs the state that it sees on {', '.join(needs)}" if needs else "though not for the state that it sees"
    )


def _range(gap: Closed) -> str:
    if gap.low is None or gap.high is None:
        return ""
    return f" ({100 * gap.low:.0f} to {100 * gap.high:.0f})"


@contextlib.contextmanager
def misled(model: OuroborosForCausalLM, how: str) -> Iterator[None]:
    """Within the context, what loop parts hand to visits is made of another state than the one that they belong to.

    Args:
        model: with loop parts that hand something.
        how: ``shuffled``, the state of another token of the batch, or ``constant``, the mean of all of them.
    """
    changed: list[Any] = []
    for parts, modules in zip(model.model.spec.loop_parts, model.model.decoder.loops, strict=True):
        for part in parts:
            if part.hands:
                changed.append(modules[part.kind])  # pyrefly: ignore
    for module in changed:
        module.hand = _wrong(module.hand, how)
    try:
        yield
    finally:
        for module in changed:
            del module.hand


def _wrong(hand: Any, how: str) -> Any:
    def wrong(x: Tensor, visit: Any, loop: int) -> Any:
        flat = x.flatten(0, -2)
        if how == "constant":
            return hand(flat.mean(0).expand_as(x), visit, loop)
        order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(len(flat))).to(x.device)
        return hand(flat[order].view_as(x), visit, loop)

    return wrong


def as_json(arms: Sequence[ArmResult], best: str) -> dict[str, Any]:
    """The verdict for files and ``--json``."""
    known = {arm.name: arm for arm in arms}
    rows = []
    for arm in arms:
        texts = {}
        for text, score in arm.scores.items():
            low, high = score.interval or (None, None)
            facts: dict[str, Any] = {"bits_per_byte": score.bits_per_byte, "low": low, "high": high}
            facts["nats_per_token"] = score.nats_per_token
            if {"donor", "cut"} <= known.keys():
                gap = closed(known["donor"].scores[text], known["cut"].scores[text], score)
                facts["closed"] = gap.to_dict()
                facts["against_cut"] = paired_difference(score, known["cut"].scores[text]).to_dict()
            texts[text] = facts
        rows.append(
            {
                "name": arm.name,
                "description": arm.description,
                "trained": dict(arm.trained),
                "trained_parameters": sum(arm.trained.values()),
                "parameters": arm.parameters,
                "bytes": 4 * arm.parameters,
                "minutes": arm.minutes,
                "tokens_per_second": arm.tokens_per_second,
                "speed_against_donor": arm.against_donor,
                "valid_bits_per_byte": arm.valid_bits_per_byte,
                "texts": texts,
            }
        )
    return {"verdict": sentence(known, best), "best": best, "arms": rows}
