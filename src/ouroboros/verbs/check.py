"""``ouroboros check MODEL_OR_RECIPE``: the harness on a model or recipe, and the audit of a trained model's score; or
the proof that every parameter and every switch is alive."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from ouroboros.config import Recipe
from ouroboros.errors import OuroborosError, nearest
from ouroboros.recipes import RECIPES, recipe
from ouroboros.verbs.options import Json, emit_json, log_to_stderr, parse, quiet_transformers, say

if TYPE_CHECKING:
    from ouroboros.eval.finding import Finding
    from ouroboros.eval.liveness import ParameterLife, Report
    from ouroboros.model.modeling import OuroborosForCausalLM


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Prove a model right: causality, caches, padding, reload, gradients, counts; and audit a trained model's score."""

    subject: tyro.conf.Positional[str]
    """What to check: a run directory, a transformers directory, a packed file or the name of a recipe."""
    size: str | None = None
    """The size to check a recipe at, see `ouroboros recipes`; by default tiny, and with --liveness the one that `train`
    and `show` take."""
    liveness: bool = False
    """Prove instead that every parameter changes the function, gets a gradient, is in an optimiser group and moves
    within ten steps of training, and that every option changes something; what does not is named."""
    quick: bool = False
    """Leave out what takes longest: the check of torch.compile, or with --liveness the options of optimiser and
    training."""
    json: Json = False


def check(arguments: Sequence[str]) -> int:
    """The verb ``check``; status 1 if anything failed."""
    options = parse(CheckOptions, "check", arguments)
    log_to_stderr()
    quiet_transformers()
    path = Path(options.subject)
    if options.liveness:
        return _liveness(options, path)
    if path.exists():
        findings = _check_model(path, options.quick)
    else:
        findings = _check_recipe(options)
    failed = [finding for finding in findings if not finding.ok]
    if options.json:
        emit_json({"subject": options.subject, "ok": not failed, "findings": [f.to_dict() for f in findings]})
    else:
        _table(findings)
        say(f"{len(findings) - len(failed)} of {len(findings)} checks passed")
    return 1 if failed else 0


def _recipe(options: CheckOptions) -> Recipe:
    if options.subject not in RECIPES:
        hint = nearest(options.subject, RECIPES)
        raise OuroborosError(f"{options.subject!r} is neither a model directory nor a recipe{hint}")
    return recipe(options.subject, options.size or ("small" if options.liveness else "tiny"))


def _check_recipe(options: CheckOptions) -> list[Finding]:
    from ouroboros.eval.harness import run_harness

    return run_harness(_recipe(options), quick=options.quick)


def _check_model(path: Path, quick: bool) -> list[Finding]:
    """The harness on the trained weights, then the audit on the run's held-out text if it has any."""
    from ouroboros.api import open_model
    from ouroboros.eval.audit import audit
    from ouroboros.eval.harness import run_harness
    from ouroboros.train.rundir import RunDirectory
    from ouroboros.verbs.evaluate import default_window

    opened, run = open_model(path), RunDirectory(path)
    model, tokenizer = opened.own_model, opened.tokenizer if run.has_data else None
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


def _liveness(options: CheckOptions, path: Path) -> int:
    """Print the proof; status 1 if anything is dead."""
    from ouroboros.eval.liveness import liveness
    from ouroboros.train.switches import training_switches

    checked, model = _trained(path) if path.exists() else (_recipe(options), None)
    report = liveness(checked, model)
    if not options.quick:
        report = dataclasses.replace(report, switches=report.switches + training_switches(checked))
    if options.json:
        emit_json(
            {
                "subject": options.subject,
                "ok": report.ok,
                "dead_parameters": _numbers(report.dead_parameters),
                "parameters": [life.to_dict() for life in report.parameters],
                "switches": [switch.to_dict() for switch in report.switches],
            }
        )
    else:
        _tell(report)
    return 0 if report.ok else 1


def _trained(path: Path) -> tuple[Recipe, OuroborosForCausalLM]:
    """A model, and how it was trained; by the usual optimiser, if that is not known."""
    from ouroboros.api import open_model
    from ouroboros.train.rundir import RunDirectory

    model, run = open_model(path).own_model, RunDirectory(path)
    return run.read_recipe() if run.is_run else Recipe(name=path.name, model=model.model.spec), model


def _tell(report: Report) -> None:
    """A line for each kind of parameter and for each switch, and the sums."""
    kinds: dict[tuple[str, str], list[ParameterLife]] = {}
    for life in report.parameters:
        kinds.setdefault((life.pattern, _described(life)), []).append(life)
    rows = [
        ("DEAD" if lives[0].dead else "--" if lives[0].why else "ok", pattern, f"{_numbers(lives):,} numbers: {told}")
        for (pattern, told), lives in kinds.items()
    ]
    for switch in report.switches:
        mark = "DEAD" if switch.dead else "ok" if switch.acts else "--"
        rows.append((mark, switch.name, f"changes {switch.acts}" if switch.acts else switch.why))
    width = max(len(name) for _, name, _ in rows)
    for mark, name, told in rows:
        say(f"{mark:<4}  {name:<{width}}  {told}")
    declared = [life for life in report.parameters if life.why and life.declared]
    acting, dead = sum(bool(switch.acts) for switch in report.switches), len(report.dead_switches)
    say(
        f"{_numbers(report.dead_parameters):,} of {_numbers(report.parameters):,} parameters are dead"
        + (f", and {_numbers(declared):,} are declared so" if declared else "")
        + f"; {acting} switches act, {len(report.switches) - acting - dead} say why not, and {dead} are dead"
    )


def _numbers(lives: Iterable[ParameterLife]) -> int:
    return sum(life.numbers for life in lives)


def _described(life: ParameterLife) -> str:
    if life.why:
        return life.why + " (declared)" * life.declared
    return f"changes logits, has a gradient, is in group {life.group}, moves"
