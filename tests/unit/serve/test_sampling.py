"""Sampling controls: their ranges, what transformers makes of them, and those of published styles."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as lp

from ouroboros.config import ModelSpec
from ouroboros.errors import OuroborosError
from ouroboros.recipes import RECIPES
from ouroboros.registry import found, load
from ouroboros.serve import sampling
from ouroboros.serve.sampling import Sampling, Style, published_sampling

PROCESSORS = {
    "temperature": (lp.TemperatureLogitsWarper, "temperature"),
    "top_k": (lp.TopKLogitsWarper, "top_k"),
    "top_p": (lp.TopPLogitsWarper, "top_p"),
    "repetition_penalty": (lp.RepetitionPenaltyLogitsProcessor, "penalty"),
    "no_repeat_ngram": (lp.NoRepeatNGramLogitsProcessor, "ngram_size"),
}


def processors(model, controls: Sampling) -> dict[str, float]:
    """What ``generate`` would apply, by our names: asked of transformers itself, defaults and all."""
    config, rest = model._prepare_generation_config(None, **controls.options())
    assert not rest
    assert config.do_sample == (controls.temperature > 0) and config.max_new_tokens == controls.max_new_tokens
    assert config.num_beams == 1
    found = model._get_logits_processor(config, input_ids_seq_length=3, device="cpu")
    names = {kind: (name, attribute) for name, (kind, attribute) in PROCESSORS.items()}
    return {names[type(p)][0]: getattr(p, names[type(p)][1]) for p in found}


@pytest.mark.parametrize(
    ("controls", "applied"),
    [
        ({"top_p": 1.0, "temperature": 1.0}, {}),  # and no top-k of 50, which transformers would add
        ({}, {"temperature": 0.8, "top_p": 0.95}),
        ({"top_k": 7, "top_p": 1.0}, {"temperature": 0.8, "top_k": 7}),
        ({"temperature": 0.0, "top_k": 7, "top_p": 0.5}, {}),
        ({"temperature": 0.0, "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        (
            {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.1, "no_repeat_ngram": 4},
            {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.1, "no_repeat_ngram": 4},
        ),
    ],
)
def test_controls_arrive_and_nothing_else_does(controls, applied, model):
    assert processors(model, Sampling(**controls)) == applied


@pytest.mark.parametrize(
    ("control", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("no_repeat_ngram", -1),
        ("repetition_window", -1),
        ("window", 0),
    ],
)
def test_values_out_of_range_are_named(control, value):
    with pytest.raises(OuroborosError, match=f"^{control} must be .*, got {value}"):
        Sampling(**{control: value})


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.lists(st.sampled_from([-3.0, -1.5, -0.0, 0.0, 0.25, 2.0, 7.0]), min_size=6, max_size=6),
    st.integers(1, 14),
)
def test_within_a_window_the_penalty_is_the_standard_one_on_the_last_tokens(context, values, window):
    options = Sampling(repetition_penalty=1.3, repetition_window=window).options()
    assert "repetition_penalty" not in options
    (penalise,) = options["logits_processor"]
    scores = torch.tensor([values])
    standard = lp.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([context[-window:]]), scores.clone())
    assert torch.equal(penalise(torch.tensor([context]), scores), standard) and scores[0].tolist() == values


def test_what_transformers_has_is_left_to_it():
    assert "logits_processor" not in Sampling(repetition_penalty=1.2, no_repeat_ngram=3, top_k=5).options()
    assert "logits_processor" not in Sampling(repetition_window=4).options()  # a penalty of 1 is off


def test_a_window_begins_anywhere():
    assert Sampling().read([256, 97]) == [256, 97]
    assert Sampling(window=8).read([256, 97]) == [97] and Sampling(window=8).read([256]) == [256]


def test_a_style_is_that_of_the_system_which_recognises_the_model(monkeypatch):
    entries = {
        "wide": Style(recognises=lambda model: model.hidden_size > 100, sampling=Sampling(top_k=1)),
        "narrow": Style(recognises=lambda model: model.hidden_size == 16, sampling=Sampling(top_k=2)),
    }
    monkeypatch.setattr(sampling, "found", lambda place: {name: name for name in entries if place == "styles"})
    monkeypatch.setattr(sampling, "load", entries.__getitem__)
    assert published_sampling(ModelSpec(hidden_size=16)) == Sampling(top_k=2)
    with pytest.raises(OuroborosError, match=r"of no system that has a published style \(wide, narrow\); leave it out"):
        published_sampling(ModelSpec(hidden_size=32))


def test_every_entry_is_a_style_and_no_model_has_two():
    entries = [load(target) for target in found("styles").values()]
    assert entries and all(isinstance(entry, Style) for entry in entries)
    for value in RECIPES.values():
        assert sum(entry.recognises(value.model) for entry in entries) <= 1, value.name
