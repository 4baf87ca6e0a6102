"""Logits processors: against slow references written from the published rules, and against transformers' own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from ouroboros.serve.processors import NucleusPast, NucleusWithin, OccurrencePenalty, RecentPenalty, TripleBan

SIZE = 6
contexts = st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=12)
scores = st.lists(st.sampled_from([-3.0, -1.5, -0.0, 0.0, 0.25, 2.0, 7.0]), min_size=SIZE, max_size=SIZE)


def apply(processor, context: list[int], values: list[float]) -> torch.Tensor:
    given = torch.tensor([values])
    kept = given.clone()
    out = processor(torch.tensor([context]), given)
    assert torch.equal(given, kept)  # nothing is changed in place
    return out[0]


@given(contexts, scores, st.sampled_from([0, 1, 3, 20]))
def test_one_penalty_for_every_occurrence(context, values, window):
    expected = list(values)
    for token in context[-window:]:
        expected[token] = expected[token] / 1.2 if expected[token] > 0 else expected[token] * 1.2
    found = apply(OccurrencePenalty(1.2, window), context, values)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)


def test_thousands_of_occurrences_give_no_nan():
    found = apply(OccurrencePenalty(1.2), [0, 1, 2] * 5000, [1.0, -1.0, 0.0, 4.0])
    assert found.tolist() == [0.0, -torch.inf, 0.0, 4.0]


def test_what_is_removed_stays_removed():
    values = [-torch.inf, 1.0, 1.0, 1.0]
    assert apply(OccurrencePenalty(1.2), [0, 0, 1], values)[0] == -torch.inf
    assert apply(NucleusPast(0.99), [0], values)[0] == -torch.inf


@given(contexts, scores, st.integers(1, 14))
def test_recent_is_the_standard_penalty_on_the_last_tokens(context, values, window):
    found = apply(RecentPenalty(1.3, window), context, values)
    standard = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([context[-window:]]), torch.tensor([values]))
    assert torch.equal(found, standard[0])


@given(st.lists(st.integers(0, 1), min_size=1, max_size=8))
def test_no_fourth_equal_token(context):
    found = apply(TripleBan(), context, [1.0, 2.0])
    banned = len(context) > 3 and len(set(context[-3:])) == 1
    assert found.tolist() == [-torch.inf if banned and token == context[-1] else 1.0 + token for token in (0, 1)]


def test_every_sequence_of_a_batch_is_its_own():
    ids = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 1]])
    same = torch.ones(2, 2)
    assert TripleBan()(ids, same).tolist() == [[1.0, -torch.inf], [1.0, 1.0]]
    expected = torch.tensor([[1 / 1.2, 1.2**-3], [1.2**-2, 1.2**-2]])
    torch.testing.assert_close(OccurrencePenalty(1.2)(ids, same), expected)


@given(scores, st.sampled_from([0.1, 0.35, 0.6, 0.9, 0.999]))
def test_the_token_that_crosses_is_kept(values, top_p):
    order = sorted(range(SIZE), key=lambda index: -values[index])
    probabilities = torch.tensor(values, dtype=torch.float64).softmax(-1)
    kept, total = set(), 0.0
    for index in order:
        kept.add(index)
        total += float(probabilities[index])
        if total > top_p:
            break
    found = apply(NucleusPast(top_p), [0], values)
    assert {index for index in range(SIZE) if found[index] > -torch.inf} == kept


@given(scores, st.integers(0, SIZE + 2), st.sampled_from([0.0, 0.113, 0.347, 0.613, 0.907, 0.9989]))
def test_the_token_that_crosses_is_left_out_and_k_are_k(values, top_k, top_p):
    found = apply(NucleusWithin(top_k, top_p), [0], values)
    kept = [index for index in range(SIZE) if found[index] > -torch.inf]
    assert torch.equal(found[kept], torch.tensor(values)[kept])
    # Of equal tokens any may be kept, so what is kept is compared by its values.
    ordered = sorted(values, reverse=True)[: top_k or None]
    probabilities = torch.tensor(ordered, dtype=torch.float64).softmax(-1)
    most = [value for value, total in zip(ordered, probabilities.cumsum(-1), strict=True) if total <= top_p]
    expected = (most or ordered[:1]) if top_p else ordered
    assert sorted((values[index] for index in kept), reverse=True) == expected


def test_rounding_can_leave_out_the_last_token_at_a_nucleus_of_everything():
    """The published sums: 0.1 ten times is more than 1 in float32."""
    even = [0.0] * 10
    assert apply(NucleusWithin(0, 0.0), [0], even).isfinite().sum() == 10
    sums = torch.full((10,), 0.1).cumsum(0)
    assert apply(NucleusWithin(0, 1.0), [0], even).isfinite().sum() == (sums <= 1).sum()


def test_sequences_are_cut_each_for_itself_and_what_is_removed_stays_removed():
    scores = torch.tensor([[3.0, 1.0, -torch.inf, 0.0], [0.0, 0.0, 4.0, 3.5]])
    found = NucleusWithin(2, 0.7)(torch.zeros(2, 1, dtype=torch.long), scores)
    assert found.tolist() == [[3.0, -torch.inf, -torch.inf, -torch.inf], [-torch.inf, -torch.inf, 4.0, -torch.inf]]
    found = NucleusWithin(0, 0.999)(torch.zeros(1, 1, dtype=torch.long), scores[:1])
    assert found[0, 2] == -torch.inf


@pytest.mark.parametrize(
    ("values", "top_p", "past", "reached"),
    [
        ([0.0, 0.0], 0.5, [0, 1], [1]),  # a sum equal to top_p
        ([0.0, 0.0, 0.0], 0.5, [0, 1], [1, 2]),  # equal tokens
        ([2.0, 1.0, 0.0], 0.7, [0, 1], [0, 1]),
        ([2.0, 1.0, 0.0], 1e-9, [0], [0]),
    ],
)
def test_where_it_differs_from_transformers(values, top_p, past, reached):
    for processor, expected in ((NucleusPast(top_p), past), (TopPLogitsWarper(top_p), reached)):
        found = apply(processor, [0], values)
        assert [index for index in range(len(values)) if found[index] > -torch.inf] == expected
