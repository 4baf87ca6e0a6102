"""Sampling controls: their ranges, and what transformers makes of them."""

import dataclasses

import pytest
from transformers.generation import logits_process as lp

from ouroboros.errors import OuroborosError
from ouroboros.serve import processors as ours
from ouroboros.serve.sampling import PUBLISHED, Sampling, controls

PROCESSORS = {
    "temperature": (lp.TemperatureLogitsWarper, "temperature"),
    "top_k": (lp.TopKLogitsWarper, "top_k"),
    "top_p": (lp.TopPLogitsWarper, "top_p"),
    "repetition_penalty": (lp.RepetitionPenaltyLogitsProcessor, "penalty"),
    "no_repeat_ngram": (lp.NoRepeatNGramLogitsProcessor, "ngram_size"),
}


def processors(model, sampling: Sampling) -> dict[str, float]:
    """What ``generate`` would apply, by our names: asked of transformers itself, defaults and all."""
    config, rest = model._prepare_generation_config(None, **sampling.options())
    assert not rest
    assert config.do_sample == (sampling.temperature > 0) and config.max_new_tokens == sampling.max_new_tokens
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


def kinds(sampling: Sampling) -> list[type]:
    return [type(processor) for processor in sampling.options().get("logits_processor", [])]


def test_what_transformers_lacks_comes_as_processors_and_only_when_asked():
    assert "logits_processor" not in Sampling().options()
    assert "logits_processor" not in Sampling(repetition_penalty=1.2, no_repeat_ngram=3, top_k=5).options()
    assert kinds(Sampling(penalty="occurrences", repetition_window=4)) == []  # a penalty of 1 is off
    assert kinds(Sampling(repetition_penalty=1.2, penalty="occurrences")) == [ours.OccurrencePenalty]
    recent = Sampling(repetition_penalty=1.2, repetition_window=4)
    assert kinds(recent) == [ours.RecentPenalty] and "repetition_penalty" not in recent.options()
    assert kinds(Sampling(ban_triples=True)) == [ours.TripleBan]


def test_the_published_style_is_the_published_chain():
    published = PUBLISHED["rhrm"]
    chain = [lp.TemperatureLogitsWarper, ours.TripleBan, ours.OccurrencePenalty, lp.TopKLogitsWarper, ours.NucleusPast]
    assert kinds(published) == chain and published.window == 128
    temperature, _, penalty, top_k, top_p = published.options()["logits_processor"]
    assert (temperature.temperature, penalty.penalty, top_k.top_k, top_p.top_p) == (0.6, 1.2, 50, 0.9)
    assert published.max_new_tokens == 200 and penalty.window == 0


def test_osam_as_published_cuts_by_one_processor_when_asked_to():
    published = PUBLISHED["osam"]
    assert kinds(published) == [] and published.repeat_last and published.options()["do_sample"] is True
    assert (published.temperature, published.top_k, published.max_new_tokens) == (1.0, 0, 64)
    cut = dataclasses.replace(published, temperature=0.7, top_k=8, top_p=0.8)
    assert kinds(cut) == [lp.TemperatureLogitsWarper, ours.NucleusWithin]
    options = cut.options()
    assert (options["temperature"], options["top_k"], options["top_p"]) == (1.0, None, 1.0)  # nothing is left to it
    within = options["logits_processor"][1]
    assert (within.top_k, within.top_p) == (8, 0.8)
    (only_k,) = dataclasses.replace(published, top_k=8).options()["logits_processor"]
    assert (only_k.top_k, only_k.top_p) == (8, 0.0)
    assert kinds(dataclasses.replace(cut, temperature=0.0)) == []


def test_the_published_style_depends_on_the_mixer():
    assert controls("published", "osam") == PUBLISHED["osam"]
    assert controls("published", "latent_attention") == controls("published", "") == PUBLISHED["rhrm"]
    assert controls("standard", "osam") == controls("standard", "attention") == Sampling()


def test_temperature_0_is_greedy_and_divides_by_nothing():
    greedy = dataclasses.replace(PUBLISHED["rhrm"], temperature=0.0)
    assert kinds(greedy) == [ours.TripleBan, ours.OccurrencePenalty]
    assert greedy.options()["do_sample"] is False and "temperature" not in greedy.options()


def test_generate_applies_the_published_chain_and_nothing_else(model):
    options = PUBLISHED["rhrm"].options()
    chain = options.pop("logits_processor")
    config, _ = model._prepare_generation_config(None, **options)
    assert list(model._get_logits_processor(config, 3, device="cpu", logits_processor=chain)) == list(chain)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("top_k", "7", 7),
        ("window", "12", 12),
        ("window", "none", None),
        ("ban_triples", "on", True),
        ("ban_triples", "off", False),
        ("penalty", "occurrences", "occurrences"),
        ("nucleus", "pass", "pass"),
        ("nucleus", "within", "within"),
        ("repeat_last", "on", True),
    ],
)
def test_values_as_text(name, text, value):
    assert getattr(Sampling(window=5, ban_triples=value is False).with_value(name, text), name) == value


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tempratur", "1", "unknown control 'tempratur'; did you mean 'temperature'"),
        ("stop", "x", "unknown control 'stop'"),
        ("top_k", "1.5", "top_k: '1.5' is not a number of the right kind"),
        ("window", "all", "window: 'all' is not a number"),
        ("window", "0", "window must be >= 1 or none, got 0"),
        ("ban_triples", "true", "ban_triples: 'true' is neither on nor off"),
        ("penalty", "twice", "penalty: 'twice' is none of distinct, occurrences"),
    ],
)
def test_text_that_is_no_value_is_named(name, text, words):
    with pytest.raises(OuroborosError, match=words):
        Sampling().with_value(name, text)
