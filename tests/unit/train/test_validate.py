"""Validation: a fixed sample, scored with the weights that would be exported."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from ouroboros.train.distributed import Workers
from ouroboros.train.log import MetricsLog, Progress, read_metrics
from ouroboros.train.validate import ValidationFailed, Validator, validate, validation_sample

DOCUMENTS = [b"aaaa", b"bbbbbbbb", b"", b"cc"]


def sample(limit: int) -> list[bytes]:
    data = SimpleNamespace(documents=lambda split: DOCUMENTS if split == "valid" else [b"wrong split"])
    return validation_sample(data, limit)


def test_the_sample_is_cut_to_its_limit_and_always_the_same():
    assert sorted(sample(100)) == [b"aaaa", b"bbbbbbbb", b"cc"]
    for limit in range(1, 15):
        chosen = sample(limit)
        assert sum(map(len, chosen)) == min(limit, 14) and chosen == sample(limit)
        assert all(whole.startswith(cut) for whole, cut in zip(sample(100), chosen))


def test_the_sample_is_not_cut_inside_a_character():
    data = SimpleNamespace(documents=lambda split: ["\u4e16\u754c".encode()])
    assert [validation_sample(data, limit) for limit in (2, 5, 6)] == [[], [b"\xe4\xb8\x96"], data.documents("valid")]


@pytest.mark.parametrize("decay", [0.0, 0.99])
def test_the_averaged_weights_are_scored_without_dropout_and_the_model_is_left_alone(decay, make, trainer_of):
    recipe = make(**{"train.ema_decay": decay, "model.block.dropout": 0.5})
    trainer = trainer_of(recipe)
    if trainer.average is not None:
        trainer.average.follow(trainer.model, 1, 0.0)
    documents = validation_sample(trainer.data, 100)
    before = validate(trainer, documents)
    assert before.bits_per_byte == validate(trainer, documents).bits_per_byte and before.bytes == 100
    assert before.window == 32
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1)
    kept = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    after = validate(trainer, documents)
    assert (after.bits_per_byte == before.bits_per_byte) == (decay > 0)  # the average has not been updated since
    assert all(torch.equal(value, kept[name]) for name, value in trainer.model.state_dict().items())


class Main(Workers):
    """Keeps what it sends."""

    def sum(self, *values: float) -> list[float]:
        SENT.append(values)
        return list(values)


class Other(Workers):
    """Receives what the main process sent."""

    def sum(self, *values: float) -> list[float]:
        assert not any(values)
        return list(SENT.pop(0))


SENT: list[tuple[float, ...]] = []


def test_every_process_learns_the_outcome_and_keeps_the_same_counters(make, trainer_of, scores, tmp_path):
    """Also where the main process alone has failed, so that none waits for another."""
    SENT.clear()
    recipe = make(**{"train.eval_every": 1, "train.max_bad_validations": 2})
    main, other = trainer_of(recipe), trainer_of(recipe)
    main.workers, other.workers = Main(0, 2), Other(1, 2)
    quiet = Progress(quiet=True)
    scores(2.0, OSError("gone"), 2.5, math.nan, OSError("gone"), OSError("gone for good"), stderr=None)
    pairs = Validator(main, MetricsLog(tmp_path / "metrics.jsonl"), quiet), Validator(other, MetricsLog(None), quiet)
    assert [[one.run() for one in pairs] for _ in range(5)] == [[True, True], *[[False, False]] * 4]
    messages = []
    for one in pairs:
        with pytest.raises(ValidationFailed) as caught:
            one.run()
        messages.append(str(caught.value))
    assert messages == [
        "2 validations in a row failed, the last one with OSError: gone for good",
        "2 validations in a row failed, see the main process",
    ]
    ours, theirs = (dataclasses.replace(trainer.counters, seconds=0.0) for trainer in (main, other))
    assert ours == theirs and (ours.failed_validations, ours.validations_without_best) == (3, 2)
    assert (ours.valid_bits_per_byte, ours.valid_nats_per_token) == (None, None)


def test_real_scores_are_recorded_in_both_units(make, trainer_of, tmp_path):
    trainer = trainer_of(make(**{"train.eval_every": 5}))
    validator = Validator(trainer, MetricsLog(tmp_path / "metrics.jsonl"), Progress(quiet=True))
    assert validator.run() and validator.goal() == ""
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["nats_per_token"] == trainer.counters.valid_nats_per_token == pytest.approx(math.log(257), rel=0.05)
    assert record["bits_per_byte"] == pytest.approx(record["nats_per_token"] / math.log(2))  # a token is a byte
    assert record["nats_per_token_stderr"] is None  # one piece of text


def test_validation_is_due_at_intervals_and_at_the_end(make, trainer_of):
    trainer = trainer_of(make(**{"train.eval_every": 5}))
    validator = Validator(trainer, MetricsLog(None), Progress(quiet=True))
    due = []
    for trainer.counters.step in range(1, 12):
        due.append(validator.due(last=trainer.counters.step == 11))
    assert [step for step, yes in enumerate(due, start=1) if yes] == [5, 10, 11]
    assert not Validator(trainer_of(make()), MetricsLog(None), Progress(quiet=True)).due(last=True)


def test_without_text_to_validate_on_a_target_is_said_to_be_off(make, trainer_of, caplog):
    changes = {"train.eval_every": 1, "data.valid_fraction": 0.0, "train.target_loss": 2.1, "train.patience": 3}
    validator = Validator(trainer_of(make(**changes)), MetricsLog(None), Progress(quiet=True))
    assert validator.goal() == "" and not validator.due(last=True)
    assert "validation is off, and with it train.target_loss and train.patience" in caplog.text
