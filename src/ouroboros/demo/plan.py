"""What fits in the demo's time on this machine: a model, its steps, and how much text is scored."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ouroboros.ablate.twins import deep_twin
from ouroboros.accounting import cost
from ouroboros.config import Recipe
from ouroboros.eval.score import first_bytes
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.recipes import recipe as make_recipe
from ouroboros.recipes.twin import twin
from ouroboros.train.precision import choose_device, choose_dtype, compile_pays

COMPILING = 35.0
"""Seconds that compiling one of the models takes on two cores."""
COMPILED = {torch.float32: 1.1, torch.bfloat16: 2.2}
"""How many times as fast a compiled step is as the measured one, which is float32 and not compiled."""
SCORING = 0.12
"""Share of the time for scoring, at most; the rest is for training."""
CURVE = 0.2
"""Share of the scored text that is scored at every loop count."""
AFTERWARDS = 9.0
"""Seconds for writing samples and the page on a machine that trains ``SPEED`` operations a second; slower ones take
longer, for the baselines too."""
SPEED = 2e10
BOTH = 5.0
"""Minutes from which on there is time for the deeper and narrower twin too; a shorter demo asks the other one alone."""
MEASURING = 0.02
"""Share of the time, at most, for measuring how fast the models train."""
BASELINES = 2e-6
"""Seconds that the n-gram, bz2 and xz take for a byte of training text."""
LEAST = 0.3
"""Share of the time that training gets, whatever the rest takes."""
PRESETS = (
    (800_000, "small", "bpe:2048", 8),
    (450_000, "small", "bpe:2048", 4),
    (0, "tiny", "bpe:2048", 8),
)
"""Training tokens, in which size, tokenizer and batch are the best of the table: the largest first, in tokens that
``small`` is trained on in the time; measured, see docs/studies/loop-recipe.md."""


@dataclass(frozen=True)
class Plan:
    """What the demo does with its time."""

    size: str
    tokenizer: str
    batch: int
    rate: float
    """Measured training tokens per second of the chosen size, without compiling."""

    def describe(self) -> str:
        """One line for people."""
        return (
            f"this machine trains {self.rate:,.0f} tokens/s at size {self.size}: {self.size}, {self.tokenizer} and"
            f" {self.batch} windows a step fit the time"
        )


def make_plan(minutes: float, size: str | None, tokenizer: str | None) -> Plan:
    """Measure this machine and choose what fits in ``minutes``; a given size or tokenizer is kept."""
    small = make_recipe("loop", "small")
    rate, seconds = training_rate(small), 60 * minutes
    share = 1 / sum(relative_costs(small, minutes))
    tokens = rate * speed_up(small, 0.7 * share * seconds) * share * max(0.75 * seconds - 10, LEAST * seconds)
    _, best_size, best_tokenizer, batch = next(preset for preset in PRESETS if tokens >= preset[0])
    chosen = size or best_size
    rate = rate if chosen == "small" else training_rate(make_recipe("loop", chosen))
    return Plan(chosen, tokenizer or best_tokenizer, batch, rate)


def arms_of(looped: Recipe, minutes: float) -> list[Recipe]:
    """The looped recipe, its twin with as many blocks as are stored, and the deeper and narrower one if there is time
    for it in ``minutes``."""
    return [looped, twin(looped), *([deep_twin(looped)] if minutes >= BOTH else [])]


def relative_costs(looped: Recipe, minutes: float) -> list[float]:
    """Training operations per token of each of them, by count, relative to the looped one."""
    arms = arms_of(looped, minutes)
    flops = [cost(arm.model, context=looped.data.sequence_length // 2).training_flops_per_token for arm in arms]
    return [each / flops[0] for each in flops]


def training_rate(recipe: Recipe) -> float:
    """Training tokens per second of ``recipe``: the best of a few float32 steps of four windows, without optimiser."""
    best = float("inf")
    with torch.random.fork_rng(devices=[]):
        spec = dataclasses.replace(recipe.model, vocab_size=2048)
        model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).train()
        torch.nn.Module.to(model, choose_device())
        ids = torch.zeros(4, recipe.data.sequence_length, dtype=torch.long, device=choose_device())
        for _ in range(3):
            begun = time.perf_counter()
            loss = model(input_ids=ids, use_cache=False, targets=ids).loss
            loss.backward()
            loss.item()
            best = min(best, time.perf_counter() - begun)
    return ids.numel() / best


def speed_up(recipe: Recipe, seconds: float) -> float:
    """How many times as fast as measured the training of ``seconds`` will be: what the compiler brings, if any."""
    dtype = choose_dtype(recipe.train, choose_device())
    return COMPILED[dtype] if compile_pays(seconds, choose_device(), dtype) else 1.0


def looped_minutes(recipe: Recipe, seconds: float, rates: Sequence[float], train_bytes: int) -> float:
    """Minutes of training for the looped model of ``recipe``, when ``seconds`` are left for everything.

    Its twins are trained for as many steps; scoring, samples, the page and the baselines, which read ``train_bytes``,
    come after. ``rates`` are measured training tokens per second of the looped model and of each twin.
    """
    flops = cost(recipe.model, context=recipe.data.sequence_length // 2).training_flops_per_token
    slow = max(1.0, SPEED / (rates[0] * flops))
    after = (AFTERWARDS + BASELINES * train_bytes) * slow + SCORING * seconds
    left = max(seconds - after, LEAST * seconds)
    everything = sum(rates[0] / rate for rate in rates)  # seconds of all for a second of the looped model
    if speed_up(recipe, left / everything) > 1:
        left = max(left - len(rates) * COMPILING, LEAST * seconds)
    return left / everything / 60


def scored_part(test: Sequence[bytes], seconds: float, rate: float) -> list[bytes]:
    """The held-out documents, or as long a beginning of each as is scored in the time for that out of ``seconds``.

    At most three models score it, and one of them a part of it at four loop counts. A forward pass takes a third of a
    training step; windows overlap by half; a token stands for about 3 bytes.
    """
    per_byte = (3 + 4 * CURVE) * 2 / 3 / (3 * rate)
    return beginnings(test, SCORING * seconds / per_byte)


def beginnings(documents: Sequence[bytes], size: float) -> list[bytes]:
    """The first bytes of each document, equally many, cut before a character; about ``size`` in all, or everything."""
    left, cap = size, 64.0
    for index, length in enumerate(sorted(map(len, documents))):
        cap = max(left / (len(documents) - index), 64)
        left -= min(length, cap)
    return [first_bytes(document, int(cap)) for document in documents]
