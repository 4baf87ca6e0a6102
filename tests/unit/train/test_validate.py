"""Validation: a fixed sample, scored with the weights that would be exported."""

from types import SimpleNamespace

import pytest
import torch

from ouroboros.train.validate import validate, validation_sample

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


@pytest.mark.parametrize("decay", [0.0, 0.99])
def test_the_averaged_weights_are_scored_without_dropout_and_the_model_is_left_alone(decay, make, trainer_of):
    recipe = make(**{"train.ema_decay": decay, "model.dropout": 0.5})
    trainer = trainer_of(recipe)
    documents = validation_sample(trainer.data, 100)
    before = validate(trainer, documents, "before")
    assert before.bits_per_byte == validate(trainer, documents).bits_per_byte and before.bytes == 100
    assert before.model == "before" and before.window == 32
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1)
    kept = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    after = validate(trainer, documents)
    assert (after.bits_per_byte == before.bits_per_byte) == (decay > 0)  # the average has not been updated
    assert all(torch.equal(value, kept[name]) for name, value in trainer.model.state_dict().items())
