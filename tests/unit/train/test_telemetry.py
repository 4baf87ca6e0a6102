"""Per-loop telemetry against its formulas."""

import math

import pytest
import torch

from ouroboros.api import build
from ouroboros.model.executor import observe
from ouroboros.train.telemetry import LoopTelemetry

B, T, D = 2, 3, 8


def test_records_follow_the_formulas():
    generator = torch.Generator().manual_seed(0)
    x0, x1, x2 = (torch.randn(B, T, D, generator=generator) for _ in range(3))
    x1.requires_grad_()
    probe = LoopTelemetry()
    probe(1, 0, x0, x1)
    z = x1 * 2 + x2
    probe(1, 1, x1, z)
    (z.sum() * 3).backward()
    first, second = probe.collect()
    assert (first["segment"], first["loop"], second["loop"]) == (1, 0, 1)
    assert first["state_norm"] == pytest.approx(math.sqrt(x1.detach().square().mean()), rel=1e-6)
    ratio = ((x1 - x0).norm(dim=-1) / x0.norm(dim=-1)).mean().item()
    assert first["update_ratio"] == pytest.approx(ratio, rel=1e-6)
    assert first["cosine"] is None
    cosine = torch.nn.functional.cosine_similarity(z - x1, x1 - x0, dim=-1).mean().item()
    assert second["cosine"] == pytest.approx(cosine, rel=1e-5)
    # d(3 sum(2 x1 + x2)) is 3 at z and 6 at x1, in every one of B T D entries.
    assert second["grad_norm"] == pytest.approx(3 * math.sqrt(B * T * D), rel=1e-6)
    assert first["grad_norm"] == pytest.approx(6 * math.sqrt(B * T * D), rel=1e-6)


def test_segments_are_compared_with_themselves_alone():
    x = torch.ones(B, T, D)
    probe = LoopTelemetry()
    probe(0, 0, x, 2 * x)
    probe(2, 0, x, 3 * x)
    probe(2, 1, 3 * x, 4 * x)
    assert [record["cosine"] for record in probe.records] == [None, None, pytest.approx(1.0)]


def test_without_backward_there_is_no_gradient_and_a_zero_state_no_division_by_zero():
    probe = LoopTelemetry()
    probe(0, 0, torch.zeros(B, T, D), torch.ones(B, T, D))
    (record,) = probe.collect()
    assert record["grad_norm"] is None and math.isfinite(record["update_ratio"])


def test_on_a_model_the_states_are_the_models_and_the_loss_is_unchanged(make):
    torch.manual_seed(0)
    model = build(make(**{"model.layout": "1 (2)x3 1"})).train()
    ids = torch.randint(0, 256, (B, 8))
    probe = LoopTelemetry()
    plain = model(ids, labels=ids).loss
    with observe(model, on_loop=probe):
        probed = model(ids, labels=ids).loss
    assert plain.item() == probed.item()
    probed.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    records = probe.collect()
    assert [record["loop"] for record in records] == [0, 1, 2] and len({r["segment"] for r in records}) == 1
    assert all(record["grad_norm"] > 0 and -1 <= (record["cosine"] or 0) <= 1 for record in records)
    model.zero_grad()
    plain.backward()
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in model.named_parameters())


def test_truncated_backpropagation_shows_as_missing_gradients(make):
    torch.manual_seed(0)
    model = build(make(**{"model.layout": "1 (1)x4 1", "model.loop": [{"kind": "inject"}]})).train()
    ids = torch.randint(0, 256, (B, 8))
    probe = LoopTelemetry()
    with observe(model, on_loop=probe):
        model(ids, labels=ids, backprop_loops=2).loss.backward()
    assert [record["grad_norm"] is not None for record in probe.collect()] == [False, False, True, True]
