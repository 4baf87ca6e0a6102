"""Telemetry of memories against states that are formed in full, and the reach of a sketch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros import registry
from ouroboros.config import FeedForwardSpec, ModelSpec
from ouroboros.config.parts.loop import LoopEmbeddingSpec
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.osam import Osam
from ouroboros.nn.sketch import apply_sketch
from ouroboros.systems.osam.measure import part_records, reading_losses, telemetry
from ouroboros.systems.osam.recipe import osam_published

D, T = 12, 21


def model_of(mixer: dict[str, Any], **changes: Any) -> OuroborosForCausalLM:
    torch.manual_seed(0)
    options = {"buckets": 27, "readout_hidden": 5, **mixer}
    spec = ModelSpec().replace(
        **{
            "layout": "2",
            "vocab_size": 31,
            "hidden_size": D,
            "mixer": OsamSpec(**options),
            "ffn": FeedForwardSpec(intermediate_size=20),
            **changes,
        }
    )
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += (0.5 if name.endswith("_raw") else 0.1) * torch.randn_like(parameter)
    return model


def states_after(model: OuroborosForCausalLM, ids: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [layer.read() for layer in model(ids, use_cache=True).past_key_values.layers]


@pytest.mark.parametrize(
    "mixer",
    [
        {},
        {"kupdate": 3},
        {"value_path": False},
        {"independent_hashes": True, "sketch_values": False, "frequencies": 3, "decay": True, "normalisation": "rms"},
    ],
    ids=str,
)
@pytest.mark.parametrize("registers", [0, 2])
def test_norms_are_those_of_the_sketched_states(mixer: dict[str, Any], registers: int) -> None:
    mixer = {"detach_state": not registers, **mixer}
    model, ids = model_of(mixer, registers=registers), torch.randint(0, 31, (3, T))
    records = telemetry(model, ids, stride=1, rows=None)
    every = mixer.get("kupdate", 1)
    assert [(r.slot, r.block, r.loop) for r in records] == [(0, 0, 0), (1, 1, 0)]
    for position in (registers + every, records[0].positions[-1]):
        position -= position % every
        text = position - registers
        states = states_after(model, ids[:, : text + 1])
        for record, state, block in zip(records, states, model.model.decoder.layers):
            own: Osam = block.self_attn
            at = record.positions.index(position)
            pairs = state.unflatten(1, (2, -1))
            sketched = apply_sketch(pairs.mT, own.key_sketch, own.spec.buckets)
            assert record.key_norm[at] == pytest.approx(sketched[:, :, -1].norm(dim=(1, 2)).mean().item(), rel=1e-4)
            if not own.spec.value_path:
                assert record.value_norm is None and record.gate_value == 0
                continue
            values = sketched[:, :, :-1] if own.spec.sketch_values else pairs[..., :-1].mT
            assert record.value_norm is not None
            assert record.value_norm[at] == pytest.approx(values.norm(dim=(1, 3)).mean().item(), rel=1e-4)
    for record in records:
        assert all(position % every == 0 for position in record.positions)
        value = 0.0 if record.value_norm is None else sum(record.value_norm) / len(record.value_norm)
        assert record.s1_norm == pytest.approx(sum(record.key_norm) / len(record.key_norm) + value, rel=1e-5)
        assert record.phi_norm == pytest.approx(sum(record.feature_norm) / len(record.feature_norm), rel=1e-5)
        assert len(record.omega) == mixer.get("frequencies", 1)


def test_positions_are_thinned_and_sequences_are_few() -> None:
    model, ids = model_of({"kupdate": 2}), torch.randint(0, 31, (3, T))
    (first, _), (all_of_them, _) = telemetry(model, ids, stride=3, rows=1), telemetry(model, ids[:1], stride=1)
    assert first.positions == [0, 6, 12, 18]
    chosen = [all_of_them.positions.index(position) for position in first.positions]
    assert first.key_norm == pytest.approx([all_of_them.key_norm[at] for at in chosen], rel=1e-5)
    assert first.feature_norm[0] == 0 and min(first.feature_norm[1:]) > 0
    long = telemetry(model, torch.randint(0, 31, (1, 700)))[0]
    assert 5 <= len(long.positions) <= 20 and long.positions[-1] > 600


def test_every_visit_has_a_record_and_the_model_is_left_as_it_was() -> None:
    model = model_of({}, layout="1 (1)x3", loop=(LoopEmbeddingSpec(),)).train()
    ids = torch.randint(0, 31, (2, 9))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    records = telemetry(model, ids)
    assert [(r.slot, r.block, r.loop) for r in records] == [(0, 0, 0), (1, 1, 0), (2, 1, 1), (3, 1, 2)]
    assert len({r.key_norm[-1] for r in records}) == 4 and records[1].theta_q == records[2].theta_q
    assert model.training and all(not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {"positions", "phi_norm", "reached_buckets"} <= records[0].to_dict().keys()


def test_other_mixers_have_no_such_memory() -> None:
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(ModelSpec(layout="1", hidden_size=16)))
    with pytest.raises(OuroborosError, match="memory telemetry is of osam, not of attention"):
        telemetry(model, torch.zeros(1, 3, dtype=torch.long))
    assert part_records(model, torch.zeros(1, 3, dtype=torch.long).numpy()) == {}


def test_a_stride_that_meets_nothing_is_refused() -> None:
    with pytest.raises(OuroborosError, match="no position that reads is divisible by the stride 50"):
        telemetry(model_of({"detach_state": False}, registers=1), torch.zeros(1, 9, dtype=torch.long), stride=50)


def test_reached_buckets_of_the_published_sizes() -> None:
    for size, buckets in (("default", 1_324), ("quick-start", 3_555)):
        model = OuroborosForCausalLM(OuroborosConfig.from_spec(osam_published(size).model))
        (record,) = telemetry(model, torch.zeros(1, 2, dtype=torch.long))
        assert record.reached_buckets == buckets


def test_losses_of_read_and_skipped_positions() -> None:
    """Registers count as positions: the text begins at theirs."""
    ids = torch.randint(0, 31, (3, 12), generator=torch.Generator().manual_seed(1))
    model = model_of({"kupdate": 5, "detach_state": False}, registers=2)
    found = reading_losses(model, ids.numpy())
    with torch.no_grad():
        logits = model(ids).logits.double()
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(0)
    assert found["read"] == pytest.approx(nats[[3, 8]].mean().item(), rel=1e-5)
    assert found["skipped"] == pytest.approx(nats[[0, 1, 2, 4, 5, 6, 7, 9, 10]].mean().item(), rel=1e-5)
    assert reading_losses(model_of({}), ids.numpy()) == {}
    records = part_records(model, ids.numpy())
    assert records["loss_by_reading"] == found and [record["slot"] for record in records["memory"]] == [0, 1]
    assert set(part_records(model_of({}), ids.numpy())) == {"memory"}


def test_training_finds_them() -> None:
    assert registry.load(registry.found("telemetry")["osam"]) is part_records
