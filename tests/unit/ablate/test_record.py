"""What has to be equal before runs may be compared."""

import dataclasses

import pytest

from ouroboros.ablate.record import Measured, Result, check_comparable, code_version, environment, read_result
from ouroboros.config import from_json, to_json
from ouroboros.errors import OuroborosError

SCORE = Measured(
    bits_per_byte=2.0, stderr=None, bytes=8, data_sha256="a", window=4, stride=2, unit_nats=(1.5,), unit_bytes=(8,)
)
RESULT = Result(
    stage="s",
    arm="a",
    seed=1,
    run="s/a/seed-1",
    recipe="f",
    train_sha256="t",
    code="1",
    environment={"torch": "2", "threads": "1"},
    layout="2",
    parameters=1,
    weights_bytes=4,
    flops_per_token=6,
    steps=1,
    tokens=10,
    seconds=2.0,
    skipped=0,
    score=SCORE,
)


def test_a_result_is_read_as_it_was_written(tmp_path):
    assert from_json(Result, to_json(RESULT)) == RESULT and RESULT.tokens_per_second == 5
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").write_text('{"stage": "s", "seedd": 1}')
    with pytest.raises(OuroborosError, match=r"result.json: unknown key 'seedd'; did you mean 'seed'\?"):
        read_result(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"code": "2"}, r"code \(1 and 2\)"),
        ({"environment": {"torch": "3", "threads": "1"}}, r"torch \(2 and 3\)"),
        ({"score": dataclasses.replace(SCORE, data_sha256="b")}, r"held-out data_sha256 \(a and b\)"),
        ({"score": dataclasses.replace(SCORE, window=8)}, r"held-out window \(4 and 8\)"),
        ({"train_sha256": "u"}, r"training text \(t and u\)"),
    ],
)
def test_what_differs_is_named(changes, words):
    with pytest.raises(OuroborosError, match=f"stage s, arm a, seed 1 and stage s, arm a, seed 1 differ in {words}"):
        check_comparable([RESULT, RESULT, dataclasses.replace(RESULT, **changes)])


def test_equal_conditions_are_comparable():
    other = dataclasses.replace(RESULT, arm="b", train_sha256="u", environment=RESULT.environment | {"python": "9"})
    check_comparable([RESULT, other])
    check_comparable([RESULT])


def test_the_code_has_one_version_in_a_process():
    assert code_version() == code_version() and len(code_version().split("+")[1]) == 16
    assert environment(3, "fp32", "bf16")["threads"] == "3"
