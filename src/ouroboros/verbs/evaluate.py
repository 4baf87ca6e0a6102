"""``ouroboros eval MODEL``: bits per byte, for one or several loop counts, beside cheap baselines. Tasks of lm-eval,
asked for with ``--tasks``, are in :mod:`ouroboros.verbs.tasks`.

Systems bring scores of streams of ids through the place ``scorings`` of the registry, offered as ``--scoring NAME``: a
function of model, tokenizer and ids, and of ``window``, ``stride``, ``procedure``, ``reading``, ``loops`` and
``model_name``. It returns a :class:`~ouroboros.eval.stats.Record` with ``bits_per_byte``, ``bytes``, ``tokens``,
``loops``, ``window``, ``stride`` and ``reading``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ouroboros.config import DataSpec
from ouroboros.errors import OuroborosError, check, nearest
from ouroboros.registry import found, load
from ouroboros.verbs.options import (
    Json,
    Model,
    SkipBadRecords,
    TextField,
    collect,
    emit_json,
    log_to_stderr,
    parse,
    quiet_transformers,
    say,
)

if TYPE_CHECKING:
    from ouroboros.api import OpenedModel
    from ouroboros.eval.baselines import Baseline
    from ouroboros.eval.finding import Finding
    from ouroboros.eval.score import Score
    from ouroboros.eval.windows import Procedure

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Score a model in bits per byte of the original text, every byte exactly once, with a 95 % interval; with --tasks
    by how often it is right."""

    model: Model
    data: list[str] = dataclasses.field(default_factory=list)
    """The sources to score; by default the run's own held-out text."""
    split: Literal["all", "train", "valid", "test"] | None = None
    """Which part of the data to score. The default is all of --data (of built-in texts the test split) or the run's
    test split."""
    window: int | None = None
    """How many tokens the model reads at a time; by default as many as in training."""
    stride: int | None = None
    """How many tokens one window begins behind the one before. The default is the window, so that windows do not
    overlap; a smaller stride scores every token with more context, and takes longer."""
    rolling: bool = False
    """With a smaller stride: keep what the model remembers of a window's earlier tokens in place of reading them again.
    Every token is read once, which is faster, and another way to read, with a score of its own."""
    adapt: str | None = None
    """Adapt the model to the text while it is scored: ttt trains on each window once it is scored, slot fits a vector
    to what stands before each window's targets. The result says so, and whether the score is a fair one."""
    adapt_steps: int | None = None
    """With --adapt: optimiser steps for each window."""
    adapt_lr: float | None = None
    """With --adapt: the learning rate."""
    scoring: str | None = None
    """Score token shards as one stream of ids, by the rules of a challenge: challenge counts the bytes by the table of
    the tokenizer and every token once, challenge-published repeats the published program."""
    loops: str | None = None
    """The loop counts to score, for example 1,2,4,8; by default the one that the model was trained with."""
    max_bytes: int | None = None
    """Score at most this many bytes."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """The number format of the arithmetic."""
    baselines: bool = False
    """Also score n-grams, bz2 and xz on the same bytes, which needs the run's training data."""
    text_field: TextField = "text"
    skip_bad_records: SkipBadRecords = False
    by_source: bool = False
    """Score the held-out part of each of the run's sources by itself; baselines get that source's training text."""
    tasks: str | None = None
    """Score these tasks of lm-eval in place of a text, for example arc_easy,hellaswag."""
    task_data: Path | None = None
    """With --tasks: the directory with the records, as arc_easy.jsonl and so on; nothing is fetched."""
    limit: int | None = None
    """With --tasks: score the first so many documents of each task."""
    json: Json = False


def eval(arguments: Sequence[str]) -> int:
    """The verb ``eval``."""
    options = parse(EvalOptions, "eval", collect(arguments, "--data"))
    loops: Any = parse_loops(options.loops)
    _check(options)
    if options.tasks is not None:
        from ouroboros.verbs.tasks import eval_tasks

        return eval_tasks(options, loops)
    log_to_stderr()
    quiet_transformers()
    import torch

    from ouroboros.api import open_model
    from ouroboros.eval.score import score_loops, with_text

    opened = open_model(options.model)
    model, tokenizer = opened.model, opened.tokenizer
    window = _window(options, model.config.max_position_embeddings)
    procedure, reading = _procedure(options, window, options.stride or window)
    criteria = _criteria(options, model)

    amp = torch.bfloat16 if options.precision == "bf16" else None
    if options.scoring is not None:
        given = {"window": window, "stride": options.stride or window, "procedure": procedure, "reading": reading}
        return _eval_stream(options, opened, loops, amp, _legality(criteria), given)

    def score_all(documents: list[bytes]) -> list[Score]:
        return score_loops(
            model,
            tokenizer,
            documents,
            loops,
            window=window,
            stride=options.stride,
            procedure=procedure,
            reading=reading,
            model_name=str(options.model),
            amp=amp,
        )

    if options.by_source:
        return _eval_sources(options, score_all)
    # Conversations are read in the form that the model was trained on, and token shards by its tokenizer.
    by_tokenizer = tokenizer.reads_specials or any(source.startswith("shards:") for source in options.data)
    documents = texts(options, str(opened.directory) if by_tokenizer else "bytes")
    if options.max_bytes is not None:  # cut here, so that baselines are given the same bytes
        documents = with_text(documents, options.max_bytes)
    scores = score_all(documents)
    if not options.data and options.split in (None, "test") and options.max_bytes is None and procedure is None:
        _keep(options.model, scores)
    cheap = _baselines(options.model, documents) if options.baselines else []
    if options.json:
        emit_json(as_json(scores, cheap) | _legality(criteria))
    else:
        show_scores(scores, cheap)
    return 0


def _check(options: EvalOptions) -> None:
    """Refuse options that change nothing together."""
    check(options.window is None or options.window >= 1, f"eval: --window must be >= 1, got {options.window}")
    check(
        not options.rolling or options.stride is not None,
        "eval: --rolling changes nothing without --stride, because windows do not overlap; give a stride",
    )
    check(not (options.rolling and options.adapt), "eval: --rolling and --adapt are two ways to read; leave one out")
    for name, value in (("task-data", options.task_data), ("limit", options.limit)):
        check(value is None or options.tasks is not None, f"eval: --{name} changes nothing without --tasks")
    for name, value in (("steps", options.adapt_steps), ("lr", options.adapt_lr)):
        check(value is None or options.adapt is not None, f"eval: --adapt-{name} changes nothing without --adapt")
    if options.scoring is not None:
        known = found("scorings")
        check(options.scoring in known, f"eval: unknown scoring {options.scoring!r}{nearest(options.scoring, known)}")
        check(
            bool(options.data) and all(source.startswith("shards:") for source in options.data),
            f"eval: --scoring {options.scoring} scores a stream of ids; give it as --data shards:PATH (`ouroboros"
            " tokenizer --shards` writes them)",
        )
        for name in ("split", "max_bytes", "baselines", "by_source"):
            option = f"--{name.replace('_', '-')}"
            check(not getattr(options, name), f"eval: {option} has no meaning with --scoring; leave it out")


def _window(options: EvalOptions, limit: int) -> int:
    """Tokens of a window; one that is longer than in training comes with a word."""
    trained, window = trained_length(options.model), options.window or default_window(options.model, limit)
    if trained is not None and window > trained:
        logger.warning(
            "windows of %d tokens are longer than the %d that the model was trained on: positions so far from the"
            " start are new to it, and the score may be worse for that; by default windows are as long as in training",
            *(window, trained),
        )
    return window


def _procedure(options: EvalOptions, window: int, stride: int) -> tuple[Procedure | None, str]:
    """How the text is read, and what results call it; None: in windows, each by itself."""
    from ouroboros.eval.adapt import adaptation
    from ouroboros.eval.windows import Rolling

    if options.rolling:
        return Rolling(window, stride), "rolling"
    if options.adapt is None:
        return None, "windows"
    procedure = adaptation(options.adapt, window, stride, steps=options.adapt_steps, lr=options.adapt_lr)
    steps, lr = (getattr(procedure, name) for name in ("steps", "lr"))
    return procedure, f"adapted by {options.adapt} ({steps} steps at {lr:g})"


def _criteria(options: EvalOptions, model: Any) -> list[Finding]:
    """Whether the chosen adaptation is a fair one, nothing without one."""
    if options.adapt is None:
        return []
    from ouroboros.eval.adapt import judge

    findings = judge(model, options.adapt, steps=options.adapt_steps, lr=options.adapt_lr)
    for finding in findings:
        if not finding.ok:
            logger.warning("--adapt %s is not fair by criterion %s: %s", options.adapt, finding.name, finding.detail)
    return findings


def _legality(criteria: Sequence[Finding]) -> dict[str, Any]:
    """What JSON says of an adaptation."""
    if not criteria:
        return {}
    found = [finding.to_dict() for finding in criteria]
    return {"legal": all(finding.ok for finding in criteria), "criteria": found}


def _eval_stream(
    options: EvalOptions,
    opened: OpenedModel,
    loops: list[int | None],
    amp: Any,
    legality: dict[str, Any],
    given: dict[str, Any],
) -> int:
    """The score of a stream of ids by the rules of ``--scoring``, at each loop count; ``given``: how it is read."""
    import numpy as np
    import torch

    from ouroboros.data.sources import parse_sources, source_files
    from ouroboros.data.token_shards import read_stream
    from ouroboros.eval.score import at_loops
    from ouroboros.eval.windows import device_of

    vocabulary = opened.tokenizer.vocab_size
    shards = [ids for ref in parse_sources(options.data) for _, ids in read_stream(source_files(ref), vocabulary)]
    ids, scoring = np.concatenate(shards), load(found("scorings")[str(options.scoring)])
    device = device_of(opened.model).type
    scores = []
    for count in loops:
        with contextlib.nullcontext() if amp is None else torch.autocast(device, dtype=amp):
            view = at_loops(opened.model, count)
            facts = {"loops": count or opened.model.schedule.loops, "model_name": str(options.model)}
            scores.append(scoring(view, opened.tokenizer, ids, **given, **facts))
    if options.json:
        emit_json(as_json(scores, []) | {"scoring": options.scoring} | legality)
        return 0
    first = scores[0]
    reading = "" if first.reading == "windows" else f", {first.reading}"
    say(f"{first.tokens:,} tokens, {first.bytes:,} bytes, window {first.window}, stride {first.stride}{reading}")
    for score in scores:
        say(f"loops {score.loops:<10}{score.bits_per_byte:>10.4f} bits/byte")
    return 0


def _eval_sources(options: EvalOptions, score_all: Callable[[list[bytes]], list[Score]]) -> int:
    """Scores, and baselines if asked for, of each source's own held-out part."""
    from ouroboros.data.prepared import open_prepared
    from ouroboros.eval.baselines import compare_baselines
    from ouroboros.eval.score import with_text

    check(not options.data, "--by-source scores the run's own sources: leave out --data")
    _check_has_data(options.model)
    data, split = open_prepared(options.model / "data"), options.split or "test"
    check(split != "all", "--by-source scores one part: give --split train, valid or test")
    found = {}
    for index, ref in enumerate(data.sources):
        documents = data.documents(split, index)
        check(bool(documents), f"source {ref.text!r} has no {split} part; choose another --split")
        if options.max_bytes is not None:
            documents = with_text(documents, options.max_bytes)
        train = data.documents("train", index)
        whole = "head" if data.spec.stream else "all"
        cheap = compare_baselines(train, None, documents, whole=whole) if options.baselines else []
        found[ref.text] = score_all(documents), cheap
    if options.json:
        emit_json({"sources": {name: as_json(*pair) for name, pair in found.items()}})
        return 0
    for name, pair in found.items():
        say(name)
        show_scores(*pair)
        say()
    return 0


def _check_has_data(run: Path) -> None:
    from ouroboros.train.rundir import RunDirectory

    check(RunDirectory(run).has_data, f"{run} has no held-out data of its own; name the text with --data FILE")


def parse_loops(text: str | None) -> list[int | None]:
    """``"1,2,4"`` as numbers; None as the model's own count."""
    if text is None:
        return [None]
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise OuroborosError(f"--loops {text!r}: give loop counts separated by commas, for example 1,2,4,8") from None
    check(all(count >= 1 for count in counts), f"--loops {text!r}: loop counts must be >= 1")
    return list(counts)


def default_window(run: Path, limit: int) -> int:
    """The training length of a run; 512 or the model's limit for other models."""
    return min(trained_length(run) or 512, limit)


def trained_length(run: Path) -> int | None:
    """Tokens of a window that a model was trained on; None where it does not tell."""
    from ouroboros.api import open_model

    recipe = open_model(run).recipe
    return None if recipe is None else recipe.data.sequence_length


def _keep(run: Path, scores: Sequence[Score]) -> None:
    """Save a run's scores on its own held-out text as ``RUN/eval.json``, for `ouroboros report`."""
    from ouroboros.files import write_whole
    from ouroboros.train.rundir import RunDirectory

    text = json.dumps([score.to_dict() for score in scores], indent=2) + "\n"
    write_whole(RunDirectory(run).scores_file, text.encode())


def texts(options: EvalOptions, tokenizer: str) -> list[bytes]:
    """The texts to score, ``tokenizer`` a value of ``data.tokenizer``."""
    from ouroboros.data.documents import name_formats, read_documents
    from ouroboros.data.prepared import open_prepared
    from ouroboros.data.sources import parse_sources
    from ouroboros.data.splits import split_documents

    if not options.data:
        _check_has_data(options.model)
        data = open_prepared(options.model / "data")
        split = options.split or "test"
        parts = ("train", "valid", "test") if split == "all" else (split,)
        return [document for part in parts for document in data.documents(part)]
    given = DataSpec(
        sources=tuple(options.data),
        text_field=options.text_field,
        tokenizer=tokenizer,
        max_bytes=options.max_bytes,
        skip_bad_records=options.skip_bad_records,
    )
    spec = name_formats(given)
    found: list[bytes] = []
    for ref in parse_sources(spec.sources):
        split = options.split or ("test" if ref.is_built_in else "all")
        documents = list(read_documents(ref, spec))
        if split == "all":
            found += [document.data for document in documents]
            continue
        splits = split_documents(documents, spec.valid_fraction, spec.test_fraction)
        found += [document.data for document in splits.documents(split)]
    return found


def _baselines(run: Path, documents: list[bytes]) -> list[Baseline]:
    """The cheap baselines, given the training text the run has seen and, where that is less, given all of it.

    Of a streamed run the head of each source was kept, and nothing is streamed again to score it: what the run read
    beyond the head is not given to them, and they are marked ``(head)``.
    """
    from ouroboros.data.loader import seen_text
    from ouroboros.eval.baselines import compare_baselines
    from ouroboros.train.rundir import RunDirectory

    directory = RunDirectory(run)
    directory.read_recipe()
    data = directory.open_data()
    whole = "head" if data.spec.stream else "all"
    seen = seen_text(data, directory.state()["loader"])
    return compare_baselines(data.documents("train"), seen, documents, whole=whole)


def as_json(scores: Sequence[Score], cheap: Sequence[Baseline]) -> dict:
    """The first score's fields at the top; all scores under ``scores`` when there are several."""
    value = scores[0].to_dict()
    if len(scores) > 1:
        value["scores"] = [score.to_dict() for score in scores]
    if cheap:
        value["baselines"] = [baseline.to_dict() for baseline in cheap]
    return value


def show_scores(scores: Sequence[Score], cheap: Sequence[Baseline]) -> None:
    """A table, best understood beside the baselines."""
    first = scores[0]
    reading = "" if first.reading == "windows" else f", {first.reading}"
    say(f"{first.bytes:,} bytes in {first.documents} documents, window {first.window}, stride {first.stride}{reading}")
    say(f"{'':<16}{'bits/byte':>10}  {'95 % interval':<18}")
    for score in scores:
        name = "model" if score.loops is None or len(scores) == 1 else f"loops {score.loops}"
        low_high = "" if score.interval is None else f"{score.interval[0]:.4f} .. {score.interval[1]:.4f}"
        say(f"{name:<16}{score.bits_per_byte:>10.4f}  {low_high:<18}")
    for baseline in cheap:
        say(f"{baseline.name:<16}{baseline.bits_per_byte:>10.4f}")
