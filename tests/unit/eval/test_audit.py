"""The audit catches planted defects and raises no false alarm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ouroboros.data.tokenize import character_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.eval.audit import CHECKS, CHECKS_PER_LOOP_COUNT, audit, check_overlap
from ouroboros.eval.finding import Finding, Mismatch
from ouroboros.eval.score import Score, score
from ouroboros.eval.windows import log_probs

NAMES = [*CHECKS, *CHECKS_PER_LOOP_COUNT]


def failed(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings if not finding.ok]


@pytest.fixture
def run(fakes: SimpleNamespace, texts: list[bytes]) -> Callable[..., list[Finding]]:
    """The audit of an honest set-up, with what a test plants."""

    def call(model: Any = None, tokenizer: Any = None, **options: Any) -> list[Finding]:
        given = {"window": 24} | options
        return audit(model or fakes.Bigram(), tokenizer or fakes.ByteTokenizer(), texts, **given)

    return call


def restated(found: Score, **changes: Any) -> Score:
    """A score with other numbers and the bits per byte that follow from them."""
    new = dataclasses.replace(found, **changes)
    return dataclasses.replace(new, bits_per_byte=new.nats / math.log(2) / new.bytes)


@pytest.mark.parametrize("window", [1, 2, 24, 500])
def test_an_honest_model_passes(run: Any, fakes: SimpleNamespace, window: int) -> None:
    for tokenizer in (fakes.ByteTokenizer(), fakes.PairTokenizer()):
        findings = run(tokenizer=tokenizer, window=window, train_documents=[b"another text" * 100])
        assert failed(findings) == [], findings
        assert [finding.name for finding in findings] == [*NAMES, "overlap"]
        assert all(finding.detail and finding.seconds >= 0 for finding in findings)


def test_characters_are_scored_honestly_unknown_ones_too(fakes: SimpleNamespace, texts: list[bytes]) -> None:
    for training in (texts, [b"aeiou "]):
        tokenizer = character_tokenizer(training)
        findings = audit(fakes.Bigram(vocabulary=tokenizer.vocab_size), tokenizer, texts, window=24)
        assert failed(findings) == [], findings


def test_unknown_characters_for_nothing_are_caught(fakes: SimpleNamespace, texts: list[bytes]) -> None:
    tokenizer = character_tokenizer([b"aeiou "])

    def cheap(model: Any, tokenizer: Any, documents: Any, **options: Any) -> Score:
        found = score(model, tokenizer, documents, **options)
        return restated(found, nats=found.nats - found.unknown_tokens * tokenizer.unknown_nats)

    model = fakes.Bigram(vocabulary=tokenizer.vocab_size)
    assert "coverage" in failed(audit(model, tokenizer, texts, window=24, scorer=cheap))


def test_the_details_say_what_was_checked(run: Any) -> None:
    by_name = {finding.name: finding.detail for finding in run()}
    assert "bit-identical" in by_name["causality"]
    assert "10 lengths x 3 strides" in by_name["coverage"]


def test_double_counted_bytes_are_caught(run: Any) -> None:
    def twice(model: Any, tokenizer: Any, documents: Any, **options: Any) -> Score:
        found = score(model, tokenizer, documents, **options)
        spaces = sum(document.count(b" ") for document in documents)
        return restated(found, bytes=found.bytes + spaces)

    def quietly(*arguments: Any, **options: Any) -> Score:
        found = score(*arguments, **options)
        return dataclasses.replace(found, bits_per_byte=found.bits_per_byte / 2)

    assert failed(run(scorer=twice)) == ["bytes"]
    assert "bytes" in failed(run(scorer=quietly))


def test_a_wrong_byte_table_is_caught(run: Any, fakes: SimpleNamespace) -> None:
    tokenizer = fakes.ByteTokenizer()
    tokenizer.token_bytes = lambda: np.array([1 + (i == 32) for i in range(256)] + [0])
    assert failed(run(tokenizer=tokenizer)) == ["bytes"]


@pytest.mark.parametrize("gain", [3.0, 0.01])
def test_look_ahead_by_one_is_caught(run: Any, fakes: SimpleNamespace, gain: float) -> None:
    model = fakes.LookAhead()
    model.gain = gain
    findings = run(model)
    assert "causality" in failed(findings)
    assert "tokens after position 0 change" in findings[4].detail


def test_a_statistic_of_the_whole_window_is_caught_at_its_loop_count(run: Any, fakes: SimpleNamespace) -> None:
    findings = run(fakes.Looped(bad_loops=4), loops=(1, 2, 4))
    assert "causality (loops 4)" in failed(findings)
    assert not {"causality (loops 1)", "causality (loops 2)"} & set(failed(findings))
    assert failed(run(fakes.Looped(), loops=(1, 2, 4))) == []


def mixed(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """A mixture with a uniform distribution whose weights sum to 1.1."""
    return torch.log(0.9 * log_probs(model, ids).exp() + 0.2 / 257)


def test_an_unnormalised_mixture_is_caught(run: Any) -> None:
    assert failed(run(predict=mixed)) == ["normalisation"]


def test_an_unnormalised_mixture_inside_the_scorer_is_caught(run: Any) -> None:
    def cheat(*arguments: Any, **options: Any) -> Score:
        return score(*arguments, **options | {"predict": mixed})

    findings = run(scorer=cheat)
    assert "normalisation" in failed(findings)
    assert "above 1" in findings[3].detail


def test_a_distribution_that_wastes_mass_is_caught(run: Any) -> None:
    assert "normalisation" in failed(run(predict=lambda model, ids: log_probs(model, ids) - 0.001))


def test_a_dropped_tail_is_caught(run: Any) -> None:
    def whole_windows(model: Any, tokenizer: Any, documents: Any, *, window: int, **options: Any) -> Score:
        kept = [text[: max(1, len(text) // window) * window] for text in documents]
        return score(model, tokenizer, kept, window=window, **options)

    def silently(model: Any, tokenizer: Any, documents: Any, **options: Any) -> Score:
        found = whole_windows(model, tokenizer, documents, **options)
        size = sum(map(len, documents))
        return restated(found, bytes=size, tokens=size)

    findings = run(scorer=whole_windows)
    assert {"bytes", "coverage"} <= set(failed(findings))
    assert "the scorer counts" in findings[1].detail
    assert "coverage" in failed(run(scorer=silently))


def test_a_target_scored_twice_is_caught(run: Any) -> None:
    def overlapping(*arguments: Any, **options: Any) -> Score:
        found = score(*arguments, **options)
        extra = found.nats_per_token if found.tokens > found.window else 0.0
        return restated(found, nats=found.nats + extra)

    assert "coverage" in failed(run(scorer=overlapping))


def test_a_score_that_depends_on_batching_or_neighbours_is_caught(run: Any) -> None:
    def batched(*arguments: Any, **options: Any) -> Score:
        found = score(*arguments, **options)
        return restated(found, nats=found.nats * (1.001 if options.get("batch_size") == 3 else 1))

    def carried(*arguments: Any, **options: Any) -> Score:
        found = score(*arguments, **options)
        return restated(found, nats=found.nats * 0.999 ** (found.documents - 1))

    for scorer in (batched, carried):
        assert "independence" in failed(run(scorer=scorer))


def test_overlap_with_training_is_caught(run: Any, texts: list[bytes]) -> None:
    copied, other = texts[0], b"0123456789abcdef" * 400
    assert failed(run(train_documents=[other, copied])) == ["overlap"]
    shifted = other[:37] + texts[6][100:8000] + other
    findings = run(train_documents=[shifted])
    assert failed(findings) == ["overlap"] and "1 documents by half or more (documents 6)" in findings[-1].detail
    assert failed(run(train_documents=[other])) == []


def test_overlap_share_is_exact_for_aligned_passages_and_boilerplate_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    held, passage = rng.bytes(100_000), rng.bytes(512)
    text = held[:777] + passage + held[777:]
    share = f"{100 * 512 / len(text):.2f} %"
    assert share in check_overlap([text], [passage])
    monkeypatch.setattr("ouroboros.eval.audit.MAX_OVERLAP", 0.001)
    with pytest.raises(Mismatch, match=share):
        check_overlap([text], [passage])
    ruler = b"-" * 5000
    assert "0.00 %" in check_overlap([ruler], [b"-" * 9000])


def test_a_lossy_tokenizer_fails_without_ending_the_audit(run: Any, fakes: SimpleNamespace) -> None:
    tokenizer = fakes.ByteTokenizer()
    tokenizer.decode = lambda ids: fakes.ByteTokenizer().decode(ids).upper()
    findings = run(tokenizer=tokenizer)
    assert failed(findings)[:2] == ["bytes", "coverage"] and "lossless" in findings[1].detail


def test_modes_are_restored(run: Any, fakes: SimpleNamespace) -> None:
    model = fakes.Bigram()
    model.train()
    model.inner.eval()
    run(model)
    assert model.training and not model.inner.training and torch.is_grad_enabled()


def test_refusals(fakes: SimpleNamespace) -> None:
    with pytest.raises(OuroborosError, match="no data"):
        audit(fakes.Bigram(), fakes.ByteTokenizer(), [b""], window=8)
    with pytest.raises(OuroborosError, match="has no loops"):
        audit(fakes.Bigram(), fakes.ByteTokenizer(), [b"abc"], window=8, loops=(2,))


def test_findings_are_the_same_each_time(run: Any) -> None:
    first, second = run(), run()
    assert [(f.name, f.ok, f.detail) for f in first] == [(f.name, f.ok, f.detail) for f in second]
