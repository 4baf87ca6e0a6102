"""``ouroboros check MODEL_OR_RECIPE``: the harness on a model or recipe, and the audit of a trained model's score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from ouroboros.errors import OuroborosError, nearest
from ouroboros.recipes import RECIPES, recipe
from ouroboros.verbs.options import Json, emit_json, log_to_stderr, parse, quiet_transformers, say

if TYPE_CHECKING:
    from ouroboros.eval.finding import Finding


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Prove a model right: causality, caches, padding, reload, gradients, counts; and audit a trained model's score."""

    subject: tyro.conf.Positional[str]
    """What to check: a run directory, a transformers directory or the name of a recipe."""
    size: str = "tiny"
    """The size to check a recipe at, see `ouroboros recipes`."""
    quick: bool = False
    """Leave out the check of torch.compile, which takes longest."""
    json: Json = False


def check(arguments: Sequence[str]) -> int:
    """The verb ``check``; status 1 if anything failed."""
    options = parse(CheckOptions, "check", arguments)
    log_to_stderr()
    quiet_transformers()
    path = Path(options.subject)
    if path.exists():
        findings = _check_model(path, options.quick)
    elif options.subject in RECIPES:
        findings = _check_recipe(options)
    else:
        hint = nearest(options.subject, RECIPES)
        raise OuroborosError(f"{options.subject!r} is neither a model directory nor a recipe{hint}")
    failed = [finding for finding in findings if not finding.ok]
    if options.json:
        emit_json({"subject": options.subject, "ok": not failed, "findings": [f.to_dict() for f in findings]})
    else:
        _table(findings)
        say(f"{len(findings) - len(failed)} of {len(findings)} checks passed")
    return 1 if failed else 0


def _check_recipe(options: CheckOptions) -> list[Finding]:
    from ouroboros.eval.harness import run_harness

    return run_harness(recipe(options.subject, options.size), quick=options.quick)


def _check_model(path: Path, quick: bool) -> list[Finding]:
    """The harness on the trained weights, then the audit on the run's held-out text if it has any."""
    from ouroboros.api import open_model
    from ouroboros.eval.audit import audit
    from ouroboros.eval.harness import run_harness
    from ouroboros.train.rundir import RunDirectory
    from ouroboros.verbs.evaluate import default_window

    opened, run = open_model(path), RunDirectory(path)
    model, tokenizer = opened.model, opened.tokenizer if run.has_data else None
    findings = run_harness(model, quick=quick)
    if tokenizer is not None:
        data = run.open_data()
        loops = [None, 1, model.schedule.loops + 1] if model.schedule.is_looped else [None]
        findings += audit(
            model,
            tokenizer,
            data.documents("test") or data.documents("valid"),
            window=default_window(path, model.config.max_position_embeddings),
            loops=loops,
            train_documents=data.documents("train"),
        )
    return findings


def _table(findings: Sequence[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        say(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name:<{width}}  {finding.detail}")
