"""What parts of a model say of themselves while it is trained."""

import pytest

from ouroboros.train.parts import warnings


def test_memories_have_telemetry_on_request_and_idle_buckets_are_named(make, trainer_of, caplog):
    mixer = {"kind": "osam", "buckets": 200, "readout_hidden": 8}
    trainer = trainer_of(make(**{"model.layout": "2", "model.mixer": mixer}))
    assert "mixer.buckets is 200 and a width of 16 has 136 products" in caplog.text
    (first, second) = (trainer.step(telemetry=True).telemetry or {})["memory"]
    assert (first["slot"], second["slot"]) == (0, 1) and first["phi_norm"] > 0
    assert trainer.step().telemetry is None


def test_losses_of_read_and_skipped_positions_are_told_apart(make, trainer_of):
    mixer = {"kind": "osam", "buckets": 20, "readout_hidden": 8}
    every = trainer_of(make(**{"model.mixer": mixer})).step(telemetry=True)
    assert "loss_by_reading" not in (every.telemetry or {})
    trainer = trainer_of(make(**{"model.mixer": {**mixer, "kupdate": 4}}))
    step = trainer.step(telemetry=True)
    parts = (step.telemetry or {})["loss_by_reading"]
    T = trainer.recipe.data.sequence_length
    reads = len(range(0, T, 4))
    assert (reads * parts["read"] + (T - reads) * parts["skipped"]) / T == pytest.approx(step.loss, rel=1e-5)


def test_telemetry_changes_no_step(make, trainer_of):
    recipe = make(**{"model.mixer": {"kind": "osam", "buckets": 20, "readout_hidden": 8, "dropout": 0.2}})
    asked, plain = trainer_of(recipe), trainer_of(recipe)
    for _ in range(2):
        assert asked.step(telemetry=True).loss == plain.step().loss


def test_gates_that_will_not_learn_are_said(make):
    def said(**changes):
        return warnings(make(**changes).model)

    (line,) = said(**{"model.residual": "delta", "model.delta.beta_init": 0.0})
    assert "model.delta.beta_init 0 starts the gates where their derivative is almost 0" in line
    assert said(**{"model.delta.beta_init": 0.0}) == []
    assert said(**{"model.residual": "delta", "model.delta.beta_init": 0.01}) == []
