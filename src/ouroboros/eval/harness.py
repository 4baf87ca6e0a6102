"""The harness: what every model of this library must do, checked on one model.

Each check compares two ways of computing the same thing: cached with uncached, batched with single, saved with loaded, counted
with measured. A new part is accepted when a recipe that uses it passes. Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ouroboros.accounting import block_flops, cached_visits, cost, loop_flops
from ouroboros.config import LoopSpec, ModelSpec, OptimSpec, Recipe
from ouroboros.errors import OuroborosError
from ouroboros.eval.finding import Finding
from ouroboros.model.cache import cache_bytes
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.optim import build_optimizers, parameter_roles

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""Largest difference of float32 logits computed in two ways, times the largest logit where that exceeds 1."""
NOISE = 0.05
"""Standard deviation added to every parameter of a fresh model, so that parts that start neutral do something."""
TOKENS = 17
"""Prompt length, where the context allows it."""
NEW_TOKENS = 8


class _Mismatch(Exception):
    """A check's two sides differ."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model under check and the inputs of the checks."""

    model: OuroborosForCausalLM
    """In evaluation mode and float32; checks leave it as it is."""
    ids: Tensor
    """Random token ids, (3, T)."""
    new_tokens: int
    seed: int
    quick: bool

    @property
    def spec(self) -> ModelSpec:
        """The model's specification."""
        return self.model.model.spec

    @property
    def views(self) -> dict[int | None, OuroborosForCausalLM]:
        """The model at loop counts 1, as it is, and two more; by loop count, None for a layout without loops."""
        if not self.model.schedule.is_looped:
            return {None: self.model}
        loops = self.model.schedule.loops
        return {n: self.model if n == loops else self.model.with_loops(n) for n in (1, loops, loops + 2)}

    @functools.cached_property
    def logits(self) -> Tensor:
        """Logits of ``ids`` without a cache, (3, T, V)."""
        return logits_of(self.model, self.ids)

    def close(self, found: Tensor, expected: Tensor, what: str) -> str:
        """Compare two computations of the same logits; returns the largest difference as text."""
        if found.shape != expected.shape:
            raise _Mismatch(f"{what}: shapes {tuple(found.shape)} and {tuple(expected.shape)}")
        gap = float((found - expected).abs().max())
        if not gap <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise _Mismatch(f"{what}: logits differ by {gap:.2g}")
        return f"{gap:.1e}"

    def generate(self, ids: Tensor, **options: Any) -> Tensor:
        """Exactly ``new_tokens`` tokens after each row of ``ids``, greedy unless told otherwise, (B, new)."""
        given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0} | options
        lengths = {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens}
        with torch.no_grad():
            return self.model.generate(ids, **lengths, **given)[:, ids.shape[1] :]

    def same_choice(self, ids: Tensor, found: Tensor, expected: Tensor, what: str) -> None:
        """Two greedy continuations agree, or part at a tie that float32 cannot order."""
        for row in range(len(ids)):
            unequal = (found[row] != expected[row]).nonzero()
            if len(unequal) == 0:
                continue
            at = int(unequal[0])
            context = torch.cat((ids[row], expected[row, :at]))[None]
            last = logits_of(self.model, context)[0, -1]
            gap = float((last[found[row, at]] - last[expected[row, at]]).abs())
            if not gap <= TOLERANCE * max(1.0, float(last.abs().max())):
                raise _Mismatch(f"{what}: row {row} differs from new token {at} on")


def logits_of(model: OuroborosForCausalLM, ids: Tensor, **options: Any) -> Tensor:
    """Logits (B, T, V) without a cache and without a gradient."""
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


def run_harness(
    subject: ModelSpec | Recipe | OuroborosForCausalLM, *, seed: int = 0, quick: bool = False
) -> list[Finding]:
    """Check one model; one finding per check, in a fixed order, none of which raises.

    Args:
        subject: a specification (a small model is wise: it is built, perturbed by noise and trained for one backward pass) or a
            model, which is checked with its own weights and left as it is.
        seed: of weights, noise and inputs. The global random state is restored.
        quick: leave out ``torch.compile``.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(subject, (ModelSpec, Recipe)):
            model = build_perturbed(subject.model if isinstance(subject, Recipe) else subject)
        else:
            model = subject
        training = model.training
        try:
            checked = prepare(model, seed, quick)
            return [_run(name, check, checked) for name, check in CHECKS.items()]
        finally:
            model.train(training)


def build_perturbed(spec: ModelSpec) -> OuroborosForCausalLM:
    """A fresh model of ``spec`` with noise on every parameter, in evaluation mode."""
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec, eos_token_id=spec.vocab_size - 1)).eval()
    _perturb(model)
    return model


def prepare(model: OuroborosForCausalLM, seed: int = 0, quick: bool = False) -> Subject:
    """The subject of the checks for ``model``: in evaluation mode and float32 (a copy if it is not)."""
    model = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    spec = model.model.spec
    length = max(1, min(TOKENS, spec.max_position_embeddings - NEW_TOKENS))
    new_tokens = max(1, min(NEW_TOKENS, spec.max_position_embeddings - length))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, spec.vocab_size, (3, length), generator=generator).to(model.device)
    return Subject(model=model.eval(), ids=ids, new_tokens=new_tokens, seed=seed, quick=quick)


def _run(name: str, check: Callable[[Subject], str], subject: Subject) -> Finding:
    """One check as a finding. Whatever a faulty part raises is that part's failure, not the harness's."""
    start = time.perf_counter()
    try:
        ok, detail = True, check(subject)
    except _Mismatch as difference:
        ok, detail = False, str(difference)
    except Exception as error:
        logger.debug("check %s failed", name, exc_info=True)
        first_line = (str(error).strip() or "no message").splitlines()[0]
        ok, detail = False, f"{type(error).__name__}: {first_line}"
    return Finding(name=name, ok=ok, detail=detail, seconds=time.perf_counter() - start)


@torch.no_grad()
def _perturb(model: OuroborosForCausalLM) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * NOISE)


def check_causal(subject: Subject) -> str:
    """Changing later tokens leaves earlier logits as they were, at every loop count."""
    length = subject.ids.shape[1]
    cuts = sorted({1, length // 2, length - 1} - {0, length})
    for loops, view in subject.views.items():
        expected = logits_of(view, subject.ids)
        for cut in cuts:
            other = subject.ids.clone()
            other[:, cut:] = (other[:, cut:] + 1) % subject.spec.vocab_size
            where = f"tokens from position {cut} on changed" + ("" if loops is None else f", loops {loops}")
            subject.close(logits_of(view, other)[:, :cut], expected[:, :cut], where)
    counts = [n for n in subject.views if n is not None]
    return f"{len(cuts)} cuts" + (f" at loops {', '.join(map(str, counts))}" if counts else "")


def _fed(subject: Subject, sizes: list[int]) -> Tensor:
    """Logits of ``ids`` fed in chunks of ``sizes`` tokens (the last size repeats) through a growing cache."""
    parts, store, at = [], None, 0
    with torch.no_grad():
        while at < subject.ids.shape[1]:
            chunk = subject.ids[:, at : at + sizes[min(len(parts), len(sizes) - 1)]]
            output = subject.model(chunk, past_key_values=store, use_cache=True)
            store = output.past_key_values
            parts.append(output.logits)
            at += chunk.shape[1]
    return torch.cat(parts, dim=1)


def check_cached(subject: Subject) -> str:
    """Feeding tokens one by one through a cache gives the logits of one pass without it."""
    if subject.spec.loop.share_last_kv:
        with torch.no_grad():
            output = subject.model(subject.ids, use_cache=True)
        gap = subject.close(output.logits, subject.logits, "prefill and uncached")
        filled = sum(layer.get_seq_length() > 0 for layer in output.past_key_values.layers)
        _equal(filled, subject.model.schedule.num_blocks, "cache entries, one per block")
        return f"share_last_kv decodes approximately by design: prefill == uncached ({gap}), {filled} entries"
    return f"one token at a time, largest difference {subject.close(_fed(subject, [1]), subject.logits, 'cached')}"


def check_chunked(subject: Subject) -> str:
    """Chunks of odd sizes through a cache give the logits of one pass without it."""
    if subject.spec.loop.share_last_kv:
        return "skipped: share_last_kv decodes approximately by design"
    gaps = [subject.close(_fed(subject, sizes), subject.logits, f"chunks of {sizes}") for sizes in ([7, 1, 4, 5], [3])]
    return f"chunks 7, 1, 4, 5 and 3, 3, ..: largest difference {max(gaps, key=float)}"


def check_generate(subject: Subject) -> str:
    """Greedy generation is the same uncached, with a growing and with a preallocated cache."""
    ids = subject.ids
    dynamic = subject.generate(ids)
    static = subject.generate(ids, cache_implementation="static")
    if subject.spec.loop.share_last_kv:
        _equal(static.tolist(), dynamic.tolist(), "static and dynamic cache")
        return f"static == dynamic, {subject.new_tokens} tokens; uncached differs by design of share_last_kv"
    uncached = subject.generate(ids, use_cache=False)
    subject.same_choice(ids, dynamic, uncached, "dynamic cache and uncached")
    subject.same_choice(ids, static, uncached, "static cache and uncached")
    return f"static == dynamic == uncached, {subject.new_tokens} tokens"


def check_beams(subject: Subject) -> str:
    """Beam search finds what it finds without a cache."""
    options: dict[str, Any] = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    cached: Any = subject.generate_output(subject.ids, **options)
    if subject.spec.loop.share_last_kv:
        return "3 beams run; uncached differs by design of share_last_kv"
    uncached: Any = subject.generate_output(subject.ids, use_cache=False, **options)
    # Sequences may part at a tie; then their scores still agree.
    gap = float((cached.sequences_scores - uncached.sequences_scores).abs().max())
    if not (torch.equal(cached.sequences, uncached.sequences) or gap <= TOLERANCE):
        raise _Mismatch(f"3 beams with and without a cache differ; scores by {gap:.2g}")
    return f"3 beams == uncached beams, scores within {gap:.1e}"
