"""What is said of a study: ranks, intervals that know how many arms there are, one sentence."""

import dataclasses

import pytest

from ouroboros.ablate.record import Measured, Result
from ouroboros.ablate.study import Gate, Stage
from ouroboros.ablate.summary import summary, table


def result(arm: str, seed: int, bits: float, stage: str = "only") -> Result:
    nats = tuple(bits * 100 * 0.6931471805599453 for _ in range(20))
    score = Measured(
        bits_per_byte=bits,
        stderr=None,
        bytes=2000,
        data_sha256="d",
        window=8,
        stride=4,
        unit_nats=nats,
        unit_bytes=(100,) * 20,
    )
    facts = {"run": f"{stage}/{arm}/seed-{seed}", "recipe": "", "train_sha256": "", "code": "", "environment": {}}
    facts |= {"layout": "2", "parameters": 9, "weights_bytes": 36, "flops_per_token": 54, "steps": 2, "tokens": 4}
    return Result(stage=stage, arm=arm, seed=seed, seconds=1.0, skipped=0, score=score, **facts)


@pytest.fixture
def study(study_of):
    return study_of({"good": {"optim.lr": 0.02}, "same": {"optim.lr": 0.03}}, seeds=(1, 2, 3))


BITS = {"control": (2.0, 2.1, 2.2), "good": (1.9, 2.001, 2.099), "same": (2.02, 2.07, 2.21)}


def runs_of(bits: dict[str, tuple[float, ...]], *stages: str) -> list[Result]:
    """The runs of all arms: a score for each seed."""
    rows = [(arm, seed, value) for arm, row in bits.items() for seed, value in enumerate(row, 1)]
    return [result(*row, stage) for stage in stages or ("only",) for row in rows]


def test_a_clear_difference_wins_and_an_unclear_one_cannot_be_told(study):
    results = runs_of(BITS)
    found = summary(study, results, {"odd": "this arm equals the control"})
    (stage,) = found["stages"]
    assert [line["name"] for line in stage["arms"]] == ["good", "control", "same"]
    good, control, same = stage["arms"]
    assert good["verdict"] == "win" and same["verdict"] == "cannot tell" and control["verdict"] is None
    assert good["low"] < good["difference"] < good["high"] < 0
    assert found["answer"].startswith("Against control, in bits per byte: better: good (-0.1000); not told apart")
    text = "\n".join(table(found))
    assert "left out: odd: this arm equals the control" in text and "win" in text and text.endswith(found["answer"])


def test_an_arm_that_diverged_is_counted_and_two_stages_are_ranked(study):
    stages = (Stage(name="only", steps=1, gate=Gate(best=2)), Stage(name="long", steps=2))
    results = runs_of(BITS, "only", "long")
    found = summary(dataclasses.replace(study, stages=stages), results, {})
    assert found["rank_stability"] == [1.0] and found["stages"][0]["promoted"] == ["good", "same"]
    found = summary(study, [r for r in results[:9] if (r.arm, r.seed) != ("same", 3)], {})
    (line,) = (line for line in found["stages"][0]["arms"] if line["name"] == "same")
    assert found["stages"][0]["missing"] == {"same": [3]} and line["difference"] is None


def test_arms_that_are_no_longer_promoted_do_not_count(study):
    """Seeds that were added to the first stage may let another arm through than the one that was trained for long."""
    stages = (Stage(name="only", steps=1, gate=Gate(best=1)), Stage(name="long", steps=2))
    rows = runs_of(BITS, "only", "long")
    found = summary(dataclasses.replace(study, stages=stages), rows, {})
    assert [line["name"] for line in found["stages"][1]["arms"]] == ["good", "control"]
    assert found["stages"][1]["arms"][0]["p_value"] < found["stages"][0]["arms"][0]["p_value"]


def test_an_arm_that_diverged_is_named_and_ranked_last(study):
    rows = runs_of(BITS)
    some = summary(study, [r for r in rows if (r.arm, r.seed) != ("good", 3)], {})
    assert [line["name"] for line in some["stages"][0]["arms"]] == ["control", "same", "good"]
    assert some["stages"][0]["missing"] == {"good": [3]}
    none = summary(study, [r for r in rows if r.arm != "good"], {})
    assert none["stages"][0]["missing"] == {"good": [1, 2, 3]}
    assert none["answer"].endswith("without a result of every seed: good.")
    assert "good: no result with seed 1, 2, 3, so it is not compared" in table(none)
    assert summary(study, [r for r in rows if r.arm != "good"], {"good": "dead"})["stages"][0]["missing"] == {}


def test_repeats_of_the_control_are_no_question(study):
    again = dataclasses.replace(study, repeats=3)
    bits = BITS | {f"control-again-{number}": BITS["control"] for number in (1, 2, 3)}
    rows = runs_of(bits)
    found = summary(again, rows, {})
    lines = {line["name"]: line for line in found["stages"][0]["arms"]}
    assert "again" not in found["answer"]
    alone = summary(study, [r for r in rows if r.arm in BITS], {})["stages"][0]["arms"]
    assert lines["good"]["p_value"] == next(line["p_value"] for line in alone if line["name"] == "good")
    assert lines["control-again-1"]["p_value"] == 1.0 and lines["control-again-1"]["verdict"] == "cannot tell"
