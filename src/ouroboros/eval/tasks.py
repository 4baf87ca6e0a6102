"""Multiple choice and cloze tasks through lm-eval (the extra ``eval``), with data from a local directory.

lm-eval has the model (``HFLM``), the requests, the metrics and the standard errors; this module has the records, so
that nothing is fetched. Names and prompts are those of lm-eval, without examples in the prompt. The figures of a model
directory are those of lm-eval's own model ``hf`` on the same records, with ``max_length`` the window.

Records are JSON lines, in the form that common evaluation suites use:

* ``query``, ``choices``, ``gold``: which continuation of the query is the most probable one? (``acc``; ``acc_norm``
  divides the log-probability by the length of the choice in characters);
* ``context_options``, ``continuation``, ``gold``: after which context is the continuation the most probable?;
* ``sentence_good``, ``sentence_bad``, ``UID``: is the good sentence the more probable one?;
* ``context``, ``continuation``: is the continuation what greedy decoding writes (``acc``), and what is its
  ``perplexity``?
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ouroboros.data.records import read_rows
from ouroboros.errors import OuroborosError, check, nearest
from ouroboros.eval.score import at_loops
from ouroboros.eval.stats import Record, ratio_interval
from ouroboros.eval.windows import check_windows, evaluating, rows
from ouroboros.files import sha256_of

REQUEST_TOKENS = 256
"""Tokens that most requests stay below: the size of a batch is chosen for it."""
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True, kw_only=True)
class TaskScore(Record):
    """One metric of a model on one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    """Standard error of ``value`` over documents; None for fewer than two."""
    chance: float | None
    """What guessing would reach on average; None where nothing is chosen from."""
    documents: int
    loops: int | None
    """Loop count; None when the model does not tell."""
    window: int
    """Tokens that the model reads at most; of a longer request the beginning is cut off."""
    cut: int
    """Requests that were longer than that: choices, each with what stands before it."""
    data_sha256: str
    """Of the file with the records."""


Fields = dict[str, Any]
"""A record, or a row of what lm-eval is given."""


@dataclass(frozen=True)
class _Form:
    """How lm-eval reads rows: its options of a task by the names of columns."""

    output_type: str
    doc_to_text: str
    doc_to_target: str
    metrics: tuple[str, ...]
    doc_to_choice: str | None = None


CHOICES = _Form("multiple_choice", "context", "gold", ("acc", "acc_norm"), "choices")
PAIRS = replace(CHOICES, metrics=("acc",))
# lm-eval's form for contexts to choose from: the "text" is the number of the right one, the "choices" are contexts.
CONTEXTS = _Form("multiple_choice", "gold", "target", ("acc",), "choices")
CLOZE = _Form("loglikelihood", "context", "target", ("acc", "perplexity"))


class _Reader:
    """The fields of one record; whatever is wrong with one is an error that names file and line."""

    def __init__(self, values: Any, where: str) -> None:
        check(isinstance(values, dict), f"{where}: not a JSON object, but every record of a task is one")
        self.values, self.where = values, where

    def text(self, name: str) -> str:
        """The field ``name``, a text that is not blank."""
        return self._text(self.values.get(name), f"field {name!r}")

    def texts(self, name: str) -> list[str]:
        """The field ``name``, a list of at least two texts."""
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) < 2:
            raise OuroborosError(f"{self.where}: field {name!r} must be a list of at least two texts")
        return [self._text(item, f"entry {index} of field {name!r}") for index, item in enumerate(value)]

    def gold(self, choices: Sequence[str]) -> int:
        """The field ``gold``: the position of the right choice, from 0."""
        gold, count = self.values.get("gold"), len(choices)
        if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < count:
            raise OuroborosError(
                f"{self.where}: field 'gold' must be the position of the right one of {count}, from 0 to {count - 1};"
                f" got {gold!r}"
            )
        return gold

    def _text(self, value: Any, what: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise OuroborosError(f"{self.where}: {what} must be a text that is not blank, got {value!r}")
        return value


def _ending(record: _Reader) -> Fields:
    choices = record.texts("choices")
    return {"context": record.text("query").strip(), "choices": choices, "gold": record.gold(choices)}


def _question(record: _Reader) -> Fields:
    row = _ending(record)
    return row | {"context": f"{row['context']}\nAnswer:"}


def _contexts(record: _Reader) -> Fields:
    choices = record.texts("context_options")
    return {"choices": choices, "target": record.text("continuation").strip(), "gold": record.gold(choices)}


def _pair(record: _Reader) -> Fields:
    pair = [record.text("sentence_good"), record.text("sentence_bad")]
    return {"context": "", "choices": pair, "gold": 0, "group": record.text("UID")}


def _cloze(record: _Reader) -> Fields:
    return {"context": record.text("context"), "target": f" {record.text('continuation').strip()}"}


@dataclass(frozen=True)
class _Task:
    """A task: the names that its file may have, what a record becomes, and how lm-eval reads that."""

    files: tuple[str, ...]
    row: Callable[[_Reader], Fields]
    form: _Form


TASKS = {
    "arc_challenge": _Task(("arc_challenge",), _question, CHOICES),
    "arc_easy": _Task(("arc_easy",), _question, CHOICES),
    "blimp": _Task(("blimp",), _pair, PAIRS),
    "hellaswag": _Task(("hellaswag", "hellaswag_val"), _ending, CHOICES),
    "lambada_openai": _Task(("lambada_openai",), _cloze, CLOZE),
    "piqa": _Task(("piqa",), _question, CHOICES),
    "winogrande": _Task(("winogrande",), _contexts, CONTEXTS),
}


@dataclass(frozen=True)
class TaskData:
    """The records of a task, ready for lm-eval."""

    name: str
    rows: list[Fields]
    data_sha256: str

    @property
    def chance(self) -> float | None:
        """The mean of one over the number of choices; None where nothing is chosen from."""
        if "choices" not in self.rows[0]:
            return None
        return sum(1 / len(row["choices"]) for row in self.rows) / len(self.rows)


def find_task(name: str, directory: Path) -> Path:
    """The file of the task ``name`` in ``directory``.

    Raises:
        OuroborosError: there is no such task, or no such file; says which file is needed.
    """
    check(name in TASKS, f"unknown task {name!r}{nearest(name, TASKS)}")
    check(directory.is_dir(), f"{directory}: no such directory; give the one that holds {name}.jsonl")
    files = [directory / f"{stem}{ending}" for stem in TASKS[name].files for ending in ENDINGS]
    found = next((path for path in files if path.is_file()), None)
    if found is None:
        needed = " or ".join(f"{stem}.jsonl" for stem in TASKS[name].files)
        raise OuroborosError(
            f"task {name!r}: {directory} holds no {needed} (.gz and .zst are read too); put it there, for nothing is"
            " fetched"
        )
    return found


def read_task(name: str, directory: Path, limit: int | None = None) -> TaskData:
    """The first ``limit`` records of the task ``name``, by default all of them; of records in groups (``UID``) as many
    of each group.

    Raises:
        OuroborosError: as of :func:`find_task`; a record that lacks a field or has a wrong one, by file and line; a
            file without records.
    """
    check(limit is None or limit >= 1, f"the limit of documents must be >= 1, got {limit}")
    path, task = find_task(name, directory), TASKS[name]
    found: list[Fields] = []
    for _, where, load in read_rows(path):
        found.append(task.row(_Reader(load(), where)))
        if limit is not None and len(found) == limit and "group" not in found[0]:
            break
    check(bool(found), f"{path}: holds no record")
    if "group" in found[0]:
        seen: Counter[str] = Counter()
        for row in found:
            row["turn"] = seen[row["group"]] = seen[row["group"]] + 1
        found.sort(key=lambda row: row["turn"])
    return TaskData(name, found[:limit], sha256_of(path))


def score_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[TaskData],
    loops: Sequence[int | None],
    *,
    window: int,
    amp: torch.dtype | None = None,
) -> list[TaskScore]:
    """Score ``model`` on every task at each loop count; with less than two documents there is no standard error.

    Args:
        model: a causal model of transformers, ours or another.
        tokenizer: its tokenizer, as one of transformers.
        tasks: what :func:`read_task` read.
        loops: loop counts, by ``model.with_loops``; None is the model as it is.
        window: tokens that the model reads at a time, at most ``model.config.max_position_embeddings``.
        amp: autocast type, for example ``torch.bfloat16``.

    Raises:
        OuroborosError: lm-eval is not installed, the window is out of range, or a loop count was given for a model
            without loops.
    """
    check_installed()
    check_windows(model, window, window)
    # `simple_evaluate` is this with what a library must not do to its caller: it seeds all generators of the process,
    # and lists packages and hardware by starting other programs, which takes seconds for every loop count.
    from lm_eval.evaluator import evaluate

    ready = {task.name: _configurable(task) for task in tasks}
    found = []
    for count in loops:
        view = at_loops(model, count)
        used = count if count is not None else getattr(getattr(view, "schedule", None), "loops", None)
        for task in tasks:
            with evaluating(view):
                lm = harness_model(view, tokenizer, window=window, amp=amp)
                chosen = {"tasks": {task.name: ready[task.name]}}
                # Any number of draws: no metric here has a standard error that is drawn.
                results: Any = evaluate(lm, chosen, bootstrap_iters=1, log_samples=True)
            found += _scores(task, results, loops=used, window=window, cut=lm.cut)
    return found


def _scores(task: TaskData, results: Any, **facts: Any) -> Iterator[TaskScore]:
    """What lm-eval found on ``task``, metric by metric."""
    values, samples = results["results"][task.name], results["samples"][task.name]
    for metric in TASKS[task.name].form.metrics:
        error = values[f"{metric}_stderr,none"]
        yield TaskScore(
            task=task.name,
            metric=metric,
            value=float(values[f"{metric},none"]),
            stderr=_perplexity_stderr(samples) if metric == "perplexity" else _number(error),
            chance=None if metric == "perplexity" else task.chance,
            documents=len(task.rows),
            data_sha256=task.data_sha256,
            **facts,
        )


def check_installed() -> None:
    """Refuse to go on without lm-eval."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise OuroborosError("tasks need lm-eval: pip install 'ouroboros-lm[eval]'") from None


def harness_model(model: Any, tokenizer: Any, *, window: int, amp: torch.dtype | None = None) -> Any:
    """``model`` in the form that lm-eval gives a model directory by the name ``hf``.

    A request without a context is read behind the tokenizer's token of the beginning, or else of the end of a text; it
    stands before nothing else unless the tokenizer itself puts it there.

    Returns:
        The model for lm-eval; ``cut`` counts the requests that did not fit in ``window`` tokens.
    """
    from lm_eval.models.huggingface import HFLM

    class Harnessed(HFLM):
        cut = 0

        def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **options: Any) -> Any:
            """lm-eval cuts the beginning of what does not fit, and refuses a continuation that does not fit alone;
            such a one is read here in windows, each behind the end of the one before."""
            pieces, owners = [], []
            for index, (texts, context, ids) in enumerate(requests):
                self.cut += len(context) + len(ids) > window + 1
                for start in range(0, len(ids), window):
                    pieces.append((texts, context + ids[:start], ids[start : start + window]))
                    owners.append(index)
            found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
            scored = super()._loglikelihood_tokens(pieces, *arguments, **options)
            for index, (nats, greedy) in zip(owners, scored, strict=True):
                found[index] = found[index][0] + nats, found[index][1] and greedy
            return found

    return Harnessed(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        max_length=window,
        batch_size=rows(model, min(window, REQUEST_TOKENS)),
        mixed_precision_dtype=amp,
        softmax_dtype=torch.float32,
    )


def _configurable(task: TaskData) -> Any:
    """``task`` as one of lm-eval's."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    form = TASKS[task.name].form
    table = datasets.Dataset.from_list(task.rows)
    # lm-eval would resample its own aggregation of perplexities, in a pool of processes that prints to standard output.
    aggregations = {"perplexity": _perplexity}
    config = {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": table},
        "test_split": "test",
        "output_type": form.output_type,
        "doc_to_text": form.doc_to_text,
        "doc_to_target": form.doc_to_target,
        "doc_to_choice": form.doc_to_choice,
        "num_fewshot": 0,
        "metric_list": [
            {
                "metric": name,
                "aggregation": aggregations.get(name, "mean"),
                "higher_is_better": name not in aggregations,
            }
            for name in form.metrics
        ],
    }
    return ConfigurableTask(config=config)


def _perplexity(items: Sequence[float]) -> float:
    """``exp(-mean)`` of log-probabilities, as lm-eval defines it."""
    return math.exp(-sum(items) / len(items))


def _perplexity_stderr(samples: Sequence[Fields]) -> float | None:
    """By the delta method: the perplexity times the standard error of the mean log-probability."""
    items = [sample["perplexity"] for sample in samples]
    error = ratio_interval(items, [1] * len(items)).stderr
    return None if error is None else _perplexity(items) * error


def _number(value: Any) -> float | None:
    """lm-eval writes N/A for an error that it does not know."""
    return None if isinstance(value, str) else float(value)
