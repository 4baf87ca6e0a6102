"""Sampling controls: their ranges, and what transformers makes of them."""

import pytest
from transformers.generation import logits_process as lp

from ouroboros.errors import OuroborosError
from ouroboros.serve.sampling import Sampling

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
    ],
)
def test_values_out_of_range_are_named(control, value):
    with pytest.raises(OuroborosError, match=f"^{control} must be .*, got {value}"):
        Sampling(**{control: value})
