"""The harness: what every model of this library must do, checked on one model.

A new part is accepted when a recipe that uses it passes. The checks are in :mod:`ouroboros.eval.equivalence` (two ways
of computing the same thing agree) and :mod:`ouroboros.eval.accounts` (what is counted is what is measured).
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable

import torch

from ouroboros.config import ModelSpec, Recipe
from ouroboros.eval import accounts, equivalence
from ouroboros.eval.equivalence import Mismatch, Subject
from ouroboros.eval.finding import Finding
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM

logger = logging.getLogger(__name__)

TOKENS = 17
"""Prompt length of the checks, where the context allows it."""
NEW_TOKENS = 8

CHECKS: dict[str, Callable[[Subject], str]] = {
    "causal": equivalence.check_causal,
    "cached == uncached": equivalence.check_cached,
    "chunked prefill": equivalence.check_chunked,
    "static cache": equivalence.check_static_cache,
    "beam search": equivalence.check_beams,
    "left padding": equivalence.check_left_padding,
    "batched == single": equivalence.check_batched,
    "packed documents": equivalence.check_packed,
    "hidden states": equivalence.check_hidden_states,
    "save and reload": equivalence.check_reload,
    "loop counts": equivalence.check_loops,
    "neutral parts": equivalence.check_neutral,
    "dropout": equivalence.check_dropout,
    "torch.compile": equivalence.check_compile,
    "gradients": accounts.check_gradients,
    "optimiser groups": accounts.check_optimizer_groups,
    "parameter count": accounts.check_parameters,
    "FLOPs": accounts.check_flops,
    "cache bytes": accounts.check_cache_bytes,
}
"""Every check by the name of its finding, in order."""


def run_harness(
    subject: ModelSpec | Recipe | OuroborosForCausalLM, *, seed: int = 0, quick: bool = False
) -> list[Finding]:
    """Check one model: one finding per check, in the order of :data:`CHECKS`. A failing check does not raise.

    Args:
        subject: a specification or recipe, of which a model is built and perturbed by noise (so that parts that start
            neutral do something); or a model, which is checked with its own weights and left as it is.
        seed: of weights, noise and inputs. The global random state is restored.
        quick: leave out ``torch.compile``, which takes longer than everything else together.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        spec = subject.model if isinstance(subject, Recipe) else subject
        model = build_perturbed(spec) if isinstance(spec, ModelSpec) else spec
        training = model.training
        try:
            prepared = prepare(model, seed)
            return [_run(name, check, prepared, quick) for name, check in CHECKS.items()]
        finally:
            model.train(training)


def build_perturbed(spec: ModelSpec) -> OuroborosForCausalLM:
    """A fresh model of ``spec`` with noise on every parameter, in evaluation mode."""
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec, eos_token_id=spec.vocab_size - 1)).eval()
    accounts.perturb(model)
    return model


def prepare(model: OuroborosForCausalLM, seed: int = 0) -> Subject:
    """The subject of the checks: the model in evaluation mode and float32 (a copy if it is not), and random tokens."""
    model = (model if model.dtype == torch.float32 else copy.deepcopy(model).float()).eval()
    spec = model.model.spec
    length = max(1, min(TOKENS, spec.max_position_embeddings - NEW_TOKENS))
    new_tokens = max(1, min(NEW_TOKENS, spec.max_position_embeddings - length))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, spec.vocab_size, (3, length), generator=generator)
    return Subject(model, ids.to(model.device), new_tokens)


def _run(name: str, check: Callable[[Subject], str], subject: Subject, quick: bool) -> Finding:
    """One check as a finding. Whatever a faulty part raises is that part's failure, not the harness's."""
    start = time.perf_counter()
    try:
        ok, detail = True, "skipped: quick" if quick and check is equivalence.check_compile else check(subject)
    except Mismatch as difference:
        ok, detail = False, str(difference)
    except Exception as error:
        logger.debug("check %s failed", name, exc_info=True)
        ok, detail = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Finding(name=name, ok=ok, detail=detail, seconds=time.perf_counter() - start)
