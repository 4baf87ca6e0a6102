"""OSAM's published sampler: against a slow reference written from the published rules, and as ``generate`` gets it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import TemperatureLogitsWarper

from ouroboros.api import build
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.recipes import RECIPES, recipe
from ouroboros.serve.stream import Continuation
from ouroboros.systems.osam.sampling import STYLE, NucleusWithin, ProgramSampling, repeat_last

SIZE = 6
scores = st.lists(st.sampled_from([-3.0, -1.5, -0.0, 0.0, 0.25, 2.0, 7.0]), min_size=SIZE, max_size=SIZE)


def apply(processor, values: list[float]) -> torch.Tensor:
    given = torch.tensor([values])
    kept = given.clone()
    out = processor(torch.tensor([[0]]), given)
    assert torch.equal(given, kept)  # nothing is changed in place
    return out[0]


@given(scores, st.integers(0, SIZE + 2), st.sampled_from([0.0, 0.113, 0.347, 0.613, 0.907, 0.9989]))
def test_the_token_that_crosses_is_left_out_and_k_are_k(values, top_k, top_p):
    found = apply(NucleusWithin(top_k, top_p), values)
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
    assert apply(NucleusWithin(0, 0.0), even).isfinite().sum() == 10
    sums = torch.full((10,), 0.1).cumsum(0)
    assert apply(NucleusWithin(0, 1.0), even).isfinite().sum() == (sums <= 1).sum()


def test_sequences_are_cut_each_for_itself_and_what_is_removed_stays_removed():
    scores = torch.tensor([[3.0, 1.0, -torch.inf, 0.0], [0.0, 0.0, 4.0, 3.5]])
    found = NucleusWithin(2, 0.7)(torch.zeros(2, 1, dtype=torch.long), scores)
    assert found.tolist() == [[3.0, -torch.inf, -torch.inf, -torch.inf], [-torch.inf, -torch.inf, 4.0, -torch.inf]]
    found = NucleusWithin(0, 0.999)(torch.zeros(1, 1, dtype=torch.long), scores[:1])
    assert found[0, 2] == -torch.inf


def kinds(sampling: ProgramSampling) -> list[type]:
    return [type(processor) for processor in sampling.options().get("logits_processor", [])]


def test_the_published_program_cuts_by_one_processor_when_asked_to():
    published = ProgramSampling()
    assert kinds(published) == [] and published.repeat_last and published.options()["do_sample"] is True
    assert (published.temperature, published.top_k, published.max_new_tokens) == (1.0, 0, 64)
    cut = dataclasses.replace(published, temperature=0.7, top_k=8, top_p=0.8)
    assert kinds(cut) == [TemperatureLogitsWarper, NucleusWithin]
    options = cut.options()
    assert (options["temperature"], options["top_k"], options["top_p"]) == (1.0, None, 1.0)  # nothing is left to it
    assert options["logits_processor"][1] == NucleusWithin(8, 0.8)
    assert dataclasses.replace(published, top_k=8).options()["logits_processor"] == [NucleusWithin(8, 0.0)]
    assert kinds(dataclasses.replace(cut, temperature=0.0)) == []
    usual = dataclasses.replace(cut, nucleus="reach").options()
    assert (usual["temperature"], usual["top_k"], usual["top_p"]) == (0.7, 8, 0.8) and "logits_processor" not in usual


def test_the_last_token_is_fed_twice_and_nothing_before_the_text():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokenizer = build(recipe("osam", "tiny")).eval(), byte_tokenizer()
    greedy = ProgramSampling(temperature=0.0, max_new_tokens=20)
    continuation = Continuation(model, tokenizer, b"abc", greedy)
    assert continuation.input_ids[0].tolist() == repeat_last([97, 98, 99]) == [97, 98, 99, 99]
    list(continuation)
    expected = model.generate(torch.tensor([[*b"abcc"]]), max_new_tokens=20, do_sample=False, eos_token_id=256)
    assert continuation.text == tokenizer.decode(expected[0, 4:].numpy())
    plain = Continuation(model, tokenizer, b"abc", dataclasses.replace(greedy, repeat_last=False))
    assert plain.input_ids[0].tolist() == [256, 97, 98, 99]


@pytest.mark.parametrize(
    ("ids", "window", "expected"),
    [
        ([256], None, [256]),
        ([256, 97, 256, 98], None, [97, 256, 98, 98]),
        ([256, 97, 98], 8, [97, 98, 98]),
        ([256], 8, [256]),
    ],
)
def test_an_empty_prompt_has_no_token_to_repeat(ids, window, expected):
    assert ProgramSampling(window=window).read(ids) == expected


def test_the_style_is_that_of_the_systems_models():
    assert STYLE.sampling == ProgramSampling()
    assert [name for name, value in RECIPES.items() if STYLE.recognises(value.model)] == ["osam", "osam-published"]
