"""``ouroboros eval MODEL --tasks NAME,...``: multiple choice and cloze tasks, for one or several loop counts."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ouroboros.errors import OuroborosError, check
from ouroboros.verbs.options import emit_json, log_to_stderr, quiet_transformers, say

if TYPE_CHECKING:
    from ouroboros.eval.tasks import TaskScore
    from ouroboros.verbs.evaluate import EvalOptions

logger = logging.getLogger(__name__)

TOGETHER = {"model", "tasks", "task_data", "limit", "window", "loops", "precision", "json"}
"""Options of ``eval`` that mean something with ``--tasks``; the others are about a text."""


def eval_tasks(options: EvalOptions, loops: Sequence[int | None]) -> int:
    """Read the records, score the model, show what was found."""
    names = _names(options)
    log_to_stderr()
    quiet_transformers()
    # It says of every long request that it was cut, and of every model that it was not given as a name.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import torch

    from ouroboros.api import open_model
    from ouroboros.eval.tasks import check_installed, find_task, read_task, score_tasks
    from ouroboros.verbs.evaluate import trained_length

    directory = options.task_data
    if directory is None:
        raise OuroborosError(
            f"eval: --tasks {options.tasks}: name the directory that holds {names[0]}.jsonl with --task-data DIR,"
            " because nothing is fetched"
        )
    for name in names:
        find_task(name, directory)
    check_installed()
    tasks = [read_task(name, directory, options.limit) for name in names]
    opened = open_model(options.model)
    limit = opened.model.config.max_position_embeddings
    window = options.window or min(trained_length(options.model) or limit, limit)
    amp = torch.bfloat16 if options.precision == "bf16" else None
    scores = score_tasks(opened.model, opened.transformers_tokenizer, tasks, loops, window=window, amp=amp)
    for name, cut in {score.task: score.cut for score in scores if score.cut}.items():
        logger.warning(
            "%s: %d requests were longer than the window of %d tokens and lost their beginning", name, cut, window
        )
    if options.json:
        facts = {"model": str(options.model), "lm_eval": importlib.metadata.version("lm-eval"), "limit": options.limit}
        emit_json(facts | {"tasks": [score.to_dict() for score in scores]})
    else:
        show_tasks(scores)
    return 0


def _names(options: EvalOptions) -> list[str]:
    """The names behind ``--tasks``, after refusing what means nothing beside them."""
    for field in dataclasses.fields(options):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        option = f"--{field.name.replace('_', '-')}"
        check(
            field.name in TOGETHER or getattr(options, field.name) == default,
            f"eval: {option} is about a text and has no meaning with --tasks; leave one of them out",
        )
    check(options.limit is None or options.limit >= 1, f"eval: --limit must be >= 1, got {options.limit}")
    names = [name.strip() for name in str(options.tasks).split(",")]
    given = f"eval: --tasks {options.tasks!r}"
    check(all(names), f"{given}: give names separated by commas, for example arc_easy,hellaswag")
    check(len(set(names)) == len(names), f"{given}: a task is named twice")
    return names


def show_tasks(scores: Sequence[TaskScore]) -> None:
    """A table: what was measured, its standard error, and what guessing would reach."""
    say(f"window {scores[0].window}")
    say(f"{'task':<16}{'loops':>5}{'documents':>11}  {'metric':<12}{'value':>9}{'stderr':>9}{'chance':>9}")
    for score in scores:
        loops = "" if score.loops is None else score.loops
        numbers = "".join(f"{_short(value):>9}" for value in (score.value, score.stderr, score.chance))
        say(f"{score.task:<16}{loops:>5}{score.documents:>11,}  {score.metric:<12}{numbers}")


def _short(value: float | None) -> str:
    """Four decimals where they say something."""
    return "" if value is None else f"{value:.4f}" if value < 100 else f"{value:.3g}"
