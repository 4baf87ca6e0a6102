"""Windows: what each scores, that batches and the cache change nothing they should not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.config.parts.stem import LearnedPositionsSpec
from ouroboros.errors import OuroborosError
from ouroboros.eval.subject import build_perturbed
from ouroboros.eval.windows import ROLLING_WINDOWS, Procedure, Rolling, Windows, evaluating, spans, target_nats
from ouroboros.model.modeling import OuroborosForCausalLM


@given(st.integers(0, 400), st.integers(1, 70), st.data())
def test_windows_score_every_target_once_with_the_context_promised(tokens: int, window: int, data: Any) -> None:
    stride = data.draw(st.integers(1, window))
    times = np.zeros(tokens, dtype=int)
    for index, span in enumerate(spans(tokens, window, stride)):
        assert 0 < span.end - span.start <= window and span.start <= span.first < span.end <= tokens
        times[span.first : span.end] += 1
        if index:
            assert span.first - span.start + 1 >= window - stride + 1
    assert (times == 1).all()


def read(model: Any, sequences: list[Tensor], procedure: Procedure) -> list[np.ndarray]:
    """Nats of every target; NaN where none was scored, and no target is scored twice."""
    nats = [np.full(len(sequence) - 1, np.nan) for sequence in sequences]
    with evaluating(model):
        for found in procedure(model, sequences):
            here = nats[found.sequence][found.first : found.first + len(found.log_probs)]
            assert np.isnan(here).all() and len(here) == len(found.log_probs)
            here[:] = target_nats(found, sequences)
    return nats


def one_at_a_time(model: Any, sequence: Tensor, window: int, stride: int) -> list[float]:
    """One window after another, all positions of each."""
    found: list[float] = []
    with evaluating(model):
        for start in range(0, len(sequence), stride):
            ids = sequence[start : start + window + 1]
            if start + len(ids) - 1 > len(found):
                nats = torch.nn.functional.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none")
                found += nats.tolist()[len(found) - start :]
    return found


@pytest.fixture(scope="module")
def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 50, (size,), generator=generator) for size in (2, 9, 8 * ROLLING_WINDOWS + 30, 40, 17)]


def model_of(**changes: Any) -> OuroborosForCausalLM:
    spec = ModelSpec(layout="1 (1)x2 1", vocab_size=50, hidden_size=16)
    spec = spec.replace(mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=24))
    torch.manual_seed(0)
    return build_perturbed(spec.replace(**changes))


@pytest.fixture(scope="module")
def small() -> OuroborosForCausalLM:
    return model_of()


@pytest.mark.parametrize("stride", [8, 3, 1])
@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_many_windows_at_a_time_give_what_one_at_a_time_gives(
    small: OuroborosForCausalLM, texts: list[Tensor], stride: int, batch_size: int | None
) -> None:
    found = read(small, texts, Windows(8, stride, batch_size))
    for nats, sequence in zip(found, texts, strict=True):
        assert nats == pytest.approx(one_at_a_time(small, sequence, 8, stride), abs=1e-5)


def test_only_scored_positions_reach_the_head(small: OuroborosForCausalLM, texts: list[Tensor]) -> None:
    seen = []
    hook = small.lm_head.register_forward_hook(lambda module, given, out: seen.append(tuple(out.shape[:2])))
    read(small, texts[2:3], Windows(8, 2, 4))
    hook.remove()
    targets = len(texts[2]) - 1
    assert sum(rows * kept for rows, kept in seen) <= targets + 4 * 8


@pytest.mark.parametrize("stride", [8, 3, 1])
def test_a_single_attention_layer_rolls_exactly(texts: list[Tensor], stride: int) -> None:
    """Its keys depend on their own tokens alone, so it does not matter when they were computed."""
    model = model_of(layout="1")
    for batch_size in (None, 2):
        found = read(model, texts, Rolling(8, stride, batch_size))
        expected = read(model, texts, Windows(8, stride))
        part = 8 * ROLLING_WINDOWS  # where a part begins, its first window has as much context as any other
        for nats, others, sequence in zip(found, expected, texts, strict=True):
            if stride == 8 or part >= len(sequence):
                assert nats == pytest.approx(others, abs=1e-5)
            else:
                assert nats[:part] == pytest.approx(others[:part], abs=1e-5)


def test_what_fits_into_a_window_is_read_as_without_a_cache(small: OuroborosForCausalLM, texts: list[Tensor]) -> None:
    short = [texts[0], texts[1], texts[4]]
    for nats, others in zip(read(small, short, Rolling(16, 4)), read(small, short, Windows(16, 4)), strict=True):
        assert nats == pytest.approx(others, abs=1e-5)


def test_a_memory_of_constant_size_forgets_nothing_within_a_part(texts: list[Tensor]) -> None:
    model = model_of(mixer=OsamSpec())
    found = read(model, texts, Rolling(8, 2))
    part = 8 * ROLLING_WINDOWS
    for nats, sequence in zip(found, texts, strict=True):
        whole = one_at_a_time(model, sequence, len(sequence), len(sequence))
        assert nats[:part] == pytest.approx(whole[:part], abs=1e-4)


def test_rolling_sees_nothing_ahead_whatever_the_parts(small: OuroborosForCausalLM, texts: list[Tensor]) -> None:
    sequence = texts[2]
    for at in (0, 7, 8, 60, 8 * ROLLING_WINDOWS, len(sequence) - 2):
        other = sequence.clone()
        other[at + 1 :] = (other[at + 1 :] + 1) % 50
        before, after = (read(small, [ids], Rolling(8, 3))[0][:at] for ids in (sequence, other))
        assert (before == after).all()


def test_what_cannot_roll_is_refused(texts: list[Tensor], fakes: SimpleNamespace) -> None:
    learned = model_of(stem=(LearnedPositionsSpec(),))
    with pytest.raises(OuroborosError, match="table of positions ends at"):
        read(learned, texts, Rolling(8, 2))
    with pytest.raises(OuroborosError, match="Bigram: its cache is not one of this library"):
        read(fakes.Bigram(), texts, Rolling(8, 2))
