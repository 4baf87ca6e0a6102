"""R-HRM's published chat: against slow references written from the published rules, and as ``generate`` gets it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ouroboros.api import build
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.recipes import RECIPES, recipe
from ouroboros.serve.fast import FastDecoder
from ouroboros.serve.stream import Continuation
from ouroboros.systems.rhrm.sampling import STYLE, ChatSampling, NucleusPast, OccurrencePenalty, TripleBan

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


def kinds(sampling: ChatSampling) -> list[type]:
    return [type(processor) for processor in sampling.options().get("logits_processor", [])]


def test_the_chain_is_the_published_one():
    published = ChatSampling()
    chain = [TemperatureLogitsWarper, TripleBan, OccurrencePenalty, TopKLogitsWarper, NucleusPast]
    assert kinds(published) == chain and published.window == 128 and published.max_new_tokens == 200
    temperature, _, penalty, top_k, top_p = published.options()["logits_processor"]
    assert (temperature.temperature, top_k.top_k) == (0.6, 50)
    assert (penalty, top_p) == (OccurrencePenalty(1.2), NucleusPast(0.9))


def test_temperature_0_is_greedy_and_divides_by_nothing():
    greedy = ChatSampling(temperature=0.0)
    assert kinds(greedy) == [TripleBan, OccurrencePenalty]
    assert greedy.options()["do_sample"] is False and "temperature" not in greedy.options()


def test_each_rule_can_be_the_usual_one():
    options = ChatSampling(penalty="distinct", ban_triples=False, nucleus="reach").options()
    assert "logits_processor" not in options
    assert (options["temperature"], options["top_k"], options["top_p"]) == (0.6, 50, 0.9)
    assert options["repetition_penalty"] == 1.2
    off = ChatSampling(repetition_penalty=1.0, temperature=1.0, top_k=0, top_p=1.0)
    assert kinds(off) == [TripleBan]


@pytest.fixture
def model():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = recipe("rhrm", "tiny")
    return build(dataclasses.replace(small, model=dataclasses.replace(small.model, vocab_size=257))).eval()


def test_generate_applies_the_chain_and_nothing_else(model):
    options = ChatSampling().options()
    chain = options.pop("logits_processor")
    config, _ = model._prepare_generation_config(None, **options)
    assert list(model._get_logits_processor(config, 3, device="cpu", logits_processor=chain)) == chain


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"penalty": "distinct", "repetition_window": 5}])
def test_fast_decoding_applies_it_too(changes, model):
    sampling = ChatSampling(window=None, max_new_tokens=30, **changes)
    written = []
    for decoder in (None, FastDecoder(compile=False)):
        torch.manual_seed(5)
        continuation = Continuation(model, byte_tokenizer(), b"abab", sampling, decoder)
        list(continuation)
        written.append(continuation.text)
    assert written[0] == written[1] != b""


def test_the_style_is_that_of_the_systems_models():
    assert STYLE.sampling == ChatSampling()
    assert [name for name, value in RECIPES.items() if STYLE.recognises(value.model)] == ["rhrm", "rhrm-published"]
