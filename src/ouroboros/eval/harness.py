"""The harness: what every model of this library must do, checked on one model.

A new part is accepted when a recipe that uses it passes. The checks are in :mod:`ouroboros.eval.equivalence` (two ways
of computing the same thing agree) and :mod:`ouroboros.eval.counts` (what is counted is what is measured).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ouroboros.config import ModelSpec, Recipe
from ouroboros.eval import counts, equivalence
from ouroboros.eval.finding import Finding, find
from ouroboros.eval.subject import Subject, build_perturbed, prepare
from ouroboros.model.modeling import OuroborosForCausalLM

CHECKS: dict[str, Callable[[Subject], str]] = {
    "causal": equivalence.check_causal,
    "cached == uncached": equivalence.check_cached,
    "chunked prefill": equivalence.check_chunked,
    "static cache": equivalence.check_static_cache,
    "beam search": equivalence.check_beams,
    "left padding": equivalence.check_left_padding,
    "packed documents": equivalence.check_packed,
    "hidden states": equivalence.check_hidden_states,
    "save and reload": equivalence.check_reload,
    "loop counts": equivalence.check_loops,
    "neutral parts": equivalence.check_neutral,
    "dropout": equivalence.check_dropout,
    "torch.compile": equivalence.check_compile,
    "gradients": counts.check_gradients,
    "optimiser groups": counts.check_optimizer_groups,
    "parameter count": counts.check_parameters,
    "FLOPs": counts.check_flops,
    "cache bytes": counts.check_cache_bytes,
}
"""Every check by the name of its finding, in order."""
SLOW = ("torch.compile",)
"""Checks that a quick run leaves out, because they take longer than everything else together."""


def run_harness(
    subject: ModelSpec | Recipe | OuroborosForCausalLM, *, seed: int = 0, quick: bool = False
) -> list[Finding]:
    """Check one model: one finding per check, in the order of :data:`CHECKS`. A failing check does not raise.

    Args:
        subject: a specification or recipe, of which a model is built and perturbed by noise (so that parts that start
            neutral do something); or a model, which is checked with its own weights and left as it is.
        seed: of weights, noise and inputs. The global random state is restored.
        quick: leave out :data:`SLOW`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        given = subject.model if isinstance(subject, Recipe) else subject
        model = given if isinstance(given, OuroborosForCausalLM) else build_perturbed(given)
        training = model.training
        try:
            prepared, skipped = prepare(model, seed), SLOW if quick else ()
            return [
                find(name, (lambda _: "skipped: quick") if name in skipped else check, prepared)
                for name, check in CHECKS.items()
            ]
        finally:
            model.train(training)
