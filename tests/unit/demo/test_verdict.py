"""What single runs allow to say."""

from __future__ import annotations

import pytest

from ouroboros.demo.verdict import SEED_NOISE, judge, late_fall
from ouroboros.eval.baselines import Baseline
from ouroboros.eval.stats import Difference, verdict_of

NAMES = ("loop", "twin")


def losses(*values):
    return [{"kind": "train", "step": i, "bits_per_byte": v} for i, v in enumerate(values)] + [{"kind": "valid"}]


FLAT = losses(*([1.6] * 20))


def difference(delta, reach=0.01):
    low, high = delta - reach, delta + reach
    return Difference(delta=delta, stderr=reach / 2, low=low, high=high, verdict=verdict_of(low, high), units=20)


def baselines(gram=2.2):
    return [
        Baseline(name=name, bits_per_byte=bits, bytes=100, train_bytes=100, detail="")
        for name, bits in (("order-4 n-gram (all)", gram), ("order-4 n-gram (seen)", gram + 1), ("xz (all)", 1.4))
    ]


@pytest.mark.parametrize(
    ("delta", "verdict", "words"),
    [
        (-0.05, "win", "loop wins"),
        (0.05, "loss", "twin wins"),
        (0.005, "cannot tell", "contains zero"),
        (-SEED_NOISE / 2, "cannot tell", "with another seed"),
    ],
)
def test_the_difference_says_who_won(delta, verdict, words):
    found = judge(NAMES, (1.5, 1.5 - delta), difference(delta), baselines(), [FLAT, FLAT])
    assert found.verdict == verdict and words in found.sentence


def test_a_sure_difference_within_the_noise_of_seeds_is_none():
    found = judge(NAMES, (1.5, 1.5), difference(-0.005, 0.001), baselines(), [FLAT, FLAT])
    assert found.verdict == "cannot tell" and "with another seed that may be 0.03 more or less" in found.sentence


def test_models_that_an_ngram_beats_have_not_been_trained_enough():
    found = judge(NAMES, (2.25, 2.3), difference(-0.05), baselines(), [FLAT, FLAT])
    assert found.verdict == "too little training" and "an n-gram (2.200 bits per byte)" in found.sentence
    assert judge(NAMES, (2.15, 2.3), difference(-0.15), baselines(), [FLAT, FLAT]).verdict == "win"


def test_models_that_still_fall_steeply_have_not_been_trained_enough():
    steep = losses(*(2.0 - 0.05 * i for i in range(21)))
    assert late_fall(steep) == pytest.approx(0.5) and late_fall(FLAT) == 0
    steeper = losses(*(3.0 - 0.07 * i for i in range(21)))
    found = judge(NAMES, (1.5, 1.6), difference(-0.1), baselines(), [FLAT, steeper])
    assert found.verdict == "too little training" and "0.70 bits per byte off" in found.sentence


def test_too_few_records_say_nothing():
    assert late_fall(losses(3.0, 2.0)) == float("inf")
