"""What is computed of the delta residuals for the page."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ouroboros.api import build
from ouroboros.config import Recipe, to_json
from ouroboros.data import open_prepared, prepare
from ouroboros.errors import OuroborosError
from ouroboros.eval.residuals import record
from ouroboros.recipes import recipe
from ouroboros.report import delta as module
from ouroboros.report import report_from_run
from ouroboros.report.delta import DeltaFacts, delta_facts, held_out_sample, look_at, sample_size

DeltaModel = Callable[..., tuple[Any, Recipe, torch.Tensor]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, delta_model: DeltaModel) -> Path:
    """A finished run of a delta model."""
    place = tmp_path_factory.mktemp("made")
    model, made, _ = delta_model()
    (place / "a.txt").write_text("Some words and more words of a text. " * 60)
    data = dataclasses.replace(made.data, sources=("a.txt",), sequence_length=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        prepare(data, "run/data")
    made = dataclasses.replace(made, data=data)
    model.save_pretrained(place / "run")
    (place / "run" / "recipe.json").write_text(to_json(made))
    (place / "run" / "metrics.jsonl").write_text("")
    return place / "run"


def made_by(run: Path) -> Recipe:
    from ouroboros.train.rundir import RunDirectory

    return RunDirectory(run).read_recipe()


def test_a_run_is_looked_at_on_its_held_out_text(run: Path) -> None:
    facts = delta_facts(run, made_by(run))
    assert facts is not None and facts == delta_facts(run, made_by(run))
    tokens = open_prepared(run / "data").tokens("test", 0)
    assert (facts.model, facts.split, facts.length) == ("finished model", "test", 16)
    assert facts.sequences == len(tokens) // 16 and facts.tokens == facts.sequences * 16
    assert report_from_run(run).delta == facts


def test_a_plain_model_is_not_even_loaded(tmp_path: Path) -> None:
    assert delta_facts(tmp_path, recipe("gpt", "tiny")) is None


def test_a_run_that_cannot_be_looked_at_says_so(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "model.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        report = report_from_run(copy)
    assert report.delta is None and "the part about the delta residuals is left out" in caplog.text
    assert any("takes a checkpoint of the run and its held-out text" in note for note in report.notes)


def test_sample_is_seeded_and_does_not_overlap(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_prepared(run / "data")
    split, sample = held_out_sample(data, 3, 8)
    assert split == "test" and sample.shape == (3, 8) and sample.dtype == np.int64
    assert np.array_equal(sample, held_out_sample(data, 3, 8)[1])
    blocks = {tuple(block) for block in data.tokens("test", 0)[: len(data.tokens("test", 0)) // 8 * 8].reshape(-1, 8)}
    assert {tuple(row) for row in sample} <= blocks
    whole = held_out_sample(data, 10**6, 10**6)[1]
    assert np.array_equal(whole[0], data.tokens("test", 0))
    parts: dict[str, Any] = {"valid": np.arange(9), "test": np.zeros(1, np.uint16)}
    monkeypatch.setattr(type(data), "tokens", lambda self, split, source: parts[split])
    assert held_out_sample(data, 2, 4)[0] == "valid"
    parts["valid"] = np.zeros(0, np.uint16)
    with pytest.raises(OuroborosError, match=r"no held-out text; set data\.test_fraction"):
        held_out_sample(data, 2, 4)


def test_large_models_are_looked_at_on_less(monkeypatch: pytest.MonkeyPatch) -> None:
    small = recipe("gpt", "tiny")
    assert np.prod(sample_size(small)) == module.MAX_TOKENS
    monkeypatch.setattr(module, "MAX_RECORDED", 6 * small.model.hidden_size * 300)
    assert np.prod(sample_size(small)) <= 300 and sample_size(small)[0] >= 1


def test_numbers_are_those_of_the_records(delta_model: DeltaModel, facts: DeltaFacts) -> None:
    model, _, ids = delta_model("1 (1)x2", values=3)
    records = record(model, ids)
    assert [(use.slot, use.sublayer) for use in facts.uses] == [(one.slot, one.sublayer) for one in records]
    for use, one in zip(facts.uses, records, strict=True):
        assert sum(use.gates) == pytest.approx(1) == sum(use.targets)
        first = (one.beta < 0.1).float().mean().item()
        assert use.gates[0] == pytest.approx(first)
        # The channels' squares add up to that of the state.
        assert one.gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt().mean().item() == pytest.approx(
            use.summary.state_norm_after, rel=1e-4
        )
        assert len(use.channel_norms) == 3 and use.cosines is not None
        low, mean, high = use.cosines
        assert -1 <= low <= mean <= high <= 1 + 1e-5
    k = torch.stack([one.direction for one in records])
    expected = (k[0] * k[3]).sum(-1).double()
    assert facts.signed_coherence[0][3] == pytest.approx(expected.mean().item(), abs=1e-6)
    assert facts.coherence[3][0] == pytest.approx(expected.abs().mean().item(), abs=1e-6)
    assert facts.coherence[2][2] == pytest.approx(1, abs=1e-4)


def test_product_ends_with_at_most_as_many_small_values_as_residuals(facts: DeltaFacts) -> None:
    product = facts.product
    assert product is not None and product.tokens == facts.tokens
    assert [len(values) for values in product.values] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= value <= 1 + 1e-6 for values in product.values for value in values)
    assert all(0 <= count <= at + 1 for at, count in enumerate(product.below))
    # The first shortcut's only value is its eigenvalue's size.
    use = facts.uses[0].summary
    assert product.values[0][0] <= max(abs(value) for value in use.eigenvalue) + 1e-3


def test_coupling_is_of_the_strongest_features(delta_model: DeltaModel, facts: DeltaFacts) -> None:
    model, _, ids = delta_model("1 (1)x2", values=3)
    coupling = facts.coupling
    assert coupling is not None
    one = next(r for r in record(model, ids) if (r.slot, r.sublayer) == (coupling.slot, coupling.sublayer))
    k = one.direction[coupling.sequence, coupling.position]
    assert one.erased[coupling.sequence, coupling.position] == one.erased.max()
    a, b = coupling.features[0], coupling.features[1]
    assert coupling.matrix[0][1] == pytest.approx(-coupling.beta * k[a].item() * k[b].item(), abs=1e-6)
    assert abs(k[a]) == k.abs().max() and 0 < coupling.share <= 1 + 1e-6


def test_readings_of_every_compressor(delta_model: DeltaModel, facts: DeltaFacts) -> None:
    model, _, _ = delta_model("1 (1)x2", values=3)
    assert [reading.name for reading in facts.readings] == ["block 0", "block 1", "read-out"]
    assert facts.readings[0].read == pytest.approx([1 / 3] * 3)
    assert facts.readings[0].weights == pytest.approx(model.model.readout.folded().mean(0).tolist())
    model, made, ids = delta_model("1", values=2, compressor="token", kernel=2)
    with torch.no_grad():
        model.model.readout.weight.fill_(0.25)
    assert look_at(model, made, ids, name="x", split="test").readings[-1].weights == pytest.approx([0.25, 0.25])


def test_before_training_is_a_new_model_of_the_seed(delta_model: DeltaModel, facts: DeltaFacts) -> None:
    _, made, ids = delta_model("1 (1)x2", values=3)
    before = torch.get_rng_state()
    look = module._before_training(made, ids)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(made.train.seed)
    records = record(build(made), ids)
    assert facts.start_gates == look[0] == [one.beta.median().item() for one in records]
    assert facts.start_norms == [one.state_norm_after.mean().item() for one in records]


def test_forced_gates_within_a_budget(
    delta_model: DeltaModel, facts: DeltaFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(facts.ablations) == 18 and facts.ablation_tokens == facts.tokens
    model, made, ids = delta_model("1")
    monkeypatch.setattr(module, "ABLATION_FLOPS", 1)
    assert look_at(model, made, ids, name="x", split="test").ablation_tokens == 2 * ids.shape[1]
    for name in ("MAX_ABLATION_FLOPS", "MAX_ABLATION_VISITS"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 1)
            found = look_at(model, made, ids, name="x", split="test")
        assert found.ablations == [] and found.ablation_tokens == 0


def test_control_that_only_writes(delta_model: DeltaModel) -> None:
    model, made, ids = delta_model("1", erase=False)
    found = look_at(model, made, ids, name="x", split="test")
    assert found.product is None and found.coupling is None and not found.erase and found.readings == []
    assert found.headline == (
        "Of 2 residuals none erases, because this control only writes; the median gate is below 0.5 in 0, from 0.5 to"
        " 1.5 in 2, and 1.5 or more in 0."
    )


def test_ranges_of_targets(delta_model: DeltaModel, facts: DeltaFacts) -> None:
    assert facts.target_range == (0.0, 4.0)
    model, made, ids = delta_model("1", value="constant")
    found = look_at(model, made, ids, name="x", split="test")
    assert found.target_range is None and found.uses[0].targets == ()
    model, made, ids = delta_model("1", value="linear")
    found = look_at(model, made, ids, name="x", split="test")
    assert found.target_range is not None and found.target_range[0] < found.target_range[1]
    assert sum(found.uses[0].targets) == pytest.approx(1)


def test_headline_counts_residuals(facts: DeltaFacts) -> None:
    def gates(*medians: float) -> DeltaFacts:
        uses = [
            dataclasses.replace(use, summary=dataclasses.replace(use.summary, beta=(0.0, 0.0, b, 2.0, 2.0)))
            for use, b in zip(facts.uses, medians, strict=False)
        ]
        return dataclasses.replace(facts, uses=uses)

    assert gates(0.1, 0.7, 1.2, 1.6).headline == (
        "Of 4 residuals, 1 keeps (median gate below 0.5), 2 erase and 1 reflects (1.5 or more);"
        " 2 have a median gate above 1, so they turn round what lies along their direction."
    )
    assert gates(0.1, 0.2).headline.endswith("0 erase and 0 reflect (1.5 or more); 0 have a median gate above 1.")
    assert "1 has a median gate above 1, so it turns round what lies along its direction." in gates(0.1, 1.2).headline
