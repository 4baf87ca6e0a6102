"""The verdict from results that are made up, so that every case can be had."""

import dataclasses
import math

import numpy as np
import pytest

from ouroboros.ablate import compare
from ouroboros.ablate.cells import PACKED
from ouroboros.ablate.changes import changed
from ouroboros.ablate.compare import SAME_BYTES, Comparison, judge
from ouroboros.ablate.record import Measured, Packed, Result, read_result
from ouroboros.ablate.runner import run_study
from ouroboros.ablate.statistics import paired_runs
from ouroboros.ablate.study import Packing
from ouroboros.errors import OuroborosError
from ouroboros.recipes import recipe

BYTES = (4096,) * 8


def measured(bits: float, seed: int) -> Measured:
    """A score of about so many bits per byte, that differs by seed and by unit."""
    noise = np.random.default_rng(seed).normal(0, 0.001, len(BYTES))
    nats = tuple(float((bits + each) * 4096 * math.log(2)) for each in noise)
    mean = sum(nats) / math.log(2) / sum(BYTES)
    facts = {"stderr": None, "bytes": sum(BYTES), "data_sha256": "d", "window": 8, "stride": 4}
    return Measured(bits_per_byte=mean, unit_nats=nats, unit_bytes=BYTES, **facts)


def runs(
    arm: str, bits: float, seeds=(0, 1, 2), packed: float | None = None, feasible=True, size=750, **facts
) -> list[Result]:
    usual = {"stage": "runs", "run": "", "recipe": "", "train_sha256": "", "code": "", "environment": {}, "skipped": 0}
    usual |= {"layout": "3", "parameters": 1000, "weights_bytes": 4000, "flops_per_token": 6000, "steps": 10}
    usual |= {"tokens": 100, "seconds": 2.0} | facts
    made = []
    for seed in seeds:
        shift = 10 * sum(map(ord, arm)) + seed  # other noise for each arm
        file = None
        if packed is not None:
            file = Packed(bytes=size, score=measured(packed, shift), feasible=feasible, exceptions=0)
        made.append(Result(arm=arm, seed=seed, score=measured(bits, shift), packed=file, **usual))
    return made


def test_the_verdict_is_against_the_better_twin():
    twins = {"worse": runs("worse", 2.3), "good": runs("good", 2.1)}
    found = judge("parameters", runs("loop", 2.2), twins)
    assert found.verdict == "loss" and found.better == "good" and found.difference == pytest.approx(0.1, abs=0.01)
    assert found.low < found.difference < found.high and "loop loses at equal stored parameters" in found.sentence
    assert [t.verdict for t in found.twins] == ["win", "loss"] and found.seeds == (0, 1, 2)
    won = judge("parameters", runs("loop", 2.0), twins)
    assert won.verdict == "win" and "0.1" in won.sentence and "good, the better twin" in won.sentence
    near = judge("parameters", runs("loop", 2.1), twins)
    assert near.verdict == "cannot tell" and near.low < 0 < near.high and "contains zero" in near.sentence


def test_one_seed_cannot_tell():
    found = judge("parameters", runs("loop", 1.0, seeds=[4]), {"plain": runs("plain", 2.0, seeds=[4])})
    assert found.verdict == "cannot tell" and found.low is None and found.difference == pytest.approx(-1, abs=0.01)
    assert "one seed has no interval" in found.sentence


def test_the_same_model_cannot_be_told_from_itself():
    same = judge("parameters", runs("gpt", 2.0), {"again": runs("gpt", 2.0)})
    assert (same.difference, same.low, same.high) == (0, 0, 0) and same.verdict == "cannot tell"
    assert "exactly the same" in same.sentence


def test_packing_may_turn_the_verdict():
    own, twins = runs("loop", 2.0, packed=2.4), {"plain": runs("plain", 2.1, packed=2.2)}
    before, after = judge("bytes", own, twins), judge("bytes", own, twins, packed=True)
    assert (before.verdict, after.verdict) == ("win", "loss") and "packed" in after.sentence
    assert (before.recipe.bytes, after.recipe.bytes) == (4000, 750)
    tight = runs("loop", 2.0, packed=2.4, feasible=False)
    told = judge("bytes", tight, twins, packed=True)
    assert told.verdict == "cannot tell" and told.twins[0].verdict == "cannot tell"
    assert "with seed 0 the smallest packed file of loop has 750 bytes, which is above the budget" in told.sentence


def test_files_that_are_not_equally_large_decide_nothing():
    own = runs("loop", 2.0, packed=2.1, size=1000)
    near, far = (
        judge("bytes", own, {"plain": runs("plain", 2.2, packed=2.3, size=n)}, packed=True) for n in (991, 985)
    )
    assert near.verdict == "win" and far.verdict == "cannot tell" and far.difference == near.difference
    assert "with seed 0 the packed file of plain is 1.5 % smaller than that of loop" in far.sentence
    one = runs("plain", 2.2, packed=2.3, size=1000)[:2] + runs("plain", 2.2, [2], packed=2.3, size=1011)
    assert judge("bytes", own, {"plain": one}, packed=True).verdict == "cannot tell"  # the mean is within 1 %
    assert judge("parameters", own, {"plain": one}, packed=True).verdict == "win"  # where bytes need not be equal


@pytest.mark.usefixtures("alive")
def test_larger_files_are_packed_again_into_the_bytes_of_the_smallest(study_of, tmp_path):
    """With a budget that no model fills: each file has all of its bits, and the wider model the larger one."""
    packing = Packing(budget=100_000, mode="rounding", calibration_tokens=64)
    wide = {"wide": {"model.block.ffn.intermediate_size": 28}}
    before = run_study(study_of(wide, seeds=(1,), packing=packing), tmp_path / "out")
    sizes = [result.packed.bytes for result in before]
    assert sizes[1] > 1.01 * sizes[0]
    said: list[str] = []
    after = compare._equally_large(before, packing, tmp_path / "out", said.append)
    assert after[0] == before[0] and abs(after[1].packed.bytes / sizes[0] - 1) <= SAME_BYTES
    assert len(said) == 1 and "arm wide, seed 1: packed again" in said[0]
    place = tmp_path / "out" / after[1].run
    assert read_result(place) == after[1] and (place / PACKED).stat().st_size == after[1].packed.bytes
    assert after[1].packed.score.bits_per_byte != before[1].packed.score.bits_per_byte
    assert compare._equally_large(after, packing, tmp_path / "out", said.append) == list(after) and len(said) == 1


@pytest.mark.parametrize(
    ("match", "change", "deviation"),
    [("parameters", {"parameters": 1010}, 0.01), ("flops", {"tokens": 90}, -0.1), ("time", {"seconds": 3.0}, 0.5)],
)
def test_how_equal_the_twin_turned_out_is_measured(match, change, deviation):
    found = judge(match, runs("loop", 2.0), {"plain": runs("plain", 2.0, **change)})
    assert found.twins[0].deviation == pytest.approx(deviation)


def test_times_that_turned_out_unequal_decide_nothing():
    own = runs("loop", 2.0)
    close, far = (judge("time", own, {"plain": runs("plain", 2.3, seconds=seconds)}) for seconds in (2.1, 3.0))
    assert close.verdict == "win" and far.verdict == "cannot tell" and far.difference == close.difference
    assert "plain turned out to train +50 % longer" in far.sentence
    assert (close.twins[0].verdict, far.twins[0].verdict) == ("win", "cannot tell")


def test_a_seed_that_is_missing_on_one_side_is_named():
    with pytest.raises(OuroborosError, match="seed 2 is missing of arm 'plain', and arm 'loop' has it"):
        judge("parameters", runs("loop", 2.0), {"plain": runs("plain", 2.0, seeds=[0, 1])})
    with pytest.raises(OuroborosError, match="seed 5 is missing of arm 'loop'"):
        paired_runs(runs("loop", 2.0), runs("plain", 2.0, seeds=[0, 1, 2, 5]))
    with pytest.raises(OuroborosError, match="seed 0: was not packed"):
        paired_runs(runs("loop", 2.0), runs("plain", 2.0), packed=True)


def test_a_twin_that_diverges_is_left_out_and_the_other_is_judged(small, tmp_path, monkeypatch):
    recipe = changed(small, {"train.steps": 2})

    def study_runs(study, out, **kwargs):
        return (*runs("loop", 2.0), *runs("plain", 2.2), *runs("deep", 2.1, seeds=[0, 2]))

    monkeypatch.setattr(compare, "run_study", study_runs)
    (answer,) = compare.compare(Comparison(recipe=recipe), tmp_path / "out")
    assert answer["verdict"] == "win" and [twin["name"] for twin in answer["twins"]] == ["plain"]
    assert answer["left_out"] == {"deep": "it diverged with seed 1"}
    monkeypatch.setattr(compare, "run_study", lambda study, out, **kwargs: runs("loop", 2.0))
    with pytest.raises(OuroborosError, match="no twin is left at .*: plain: it diverged with seed 0, 1, 2; deep"):
        compare.compare(Comparison(recipe=recipe), tmp_path / "out")


def test_the_order_of_runs_does_not_matter():
    own, other = runs("loop", 2.0), runs("plain", 2.1)
    assert paired_runs(own[::-1], other) == paired_runs(own, other)


def test_bad_input():
    value = recipe("loop", "tiny")
    with pytest.raises(OuroborosError, match="exactly one of --steps"):
        Comparison(recipe=value)
    value = dataclasses.replace(value, train=dataclasses.replace(value.train, steps=3))
    with pytest.raises(OuroborosError, match="--seeds must be >= 1"):
        Comparison(recipe=value, seeds=0)
