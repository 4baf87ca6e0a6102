"""``convert`` on a crawler checkpoint: weights of a recorded model with the program's settings beside them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ouroboros.model.reading import load_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "data" / "crawler"


@pytest.fixture
def source(tmp_path):
    """The submission in small, as the published program saves it, with its settings."""
    case = json.loads((GOLDEN / "ouroboros_mini.json").read_text())
    tensors, base = (load_file(GOLDEN / f"{name}.safetensors") for name in ("ouroboros_mini", "base_params"))
    names = [name.removeprefix("grad/") for name in tensors if name.startswith("grad/")]
    state = {name: tensors.get(f"param/{name}", base.get(name)) for name in names}
    torch.save(state, tmp_path / "final_model.pt")
    save_file(state, tmp_path / "final_model.safetensors")
    settings = {**case["hyperparameters"], "train_seq_len": tensors["ids"].shape[1]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path, tensors


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_published_checkpoint_becomes_a_model(cli, source, suffix):
    folder, recorded = source
    result = cli("convert", folder / f"final_model.{suffix}", "--out", folder / "model")
    assert result.status == 0 and result.err == ""
    assert "crawler, width 32, layout '1 crawler:(1)x2 2', vocabulary 64" in result.out
    model = load_model(folder / "model")
    with torch.no_grad():
        logits = model(recorded["ids"].long(), use_cache=False).logits
        torch.testing.assert_close(logits, recorded["logits"], rtol=1e-4, atol=2e-5)
        more = model.with_loops(3)(recorded["ids"].long()).logits
    assert not torch.allclose(more, logits, atol=1e-3)


def test_settings_elsewhere_and_as_json(cli, source):
    folder, _ = source
    settings = folder / "config.json"
    settings.rename(folder / "settings.json")
    arguments = ["convert", folder / "final_model.pt", "--out", folder / "model"]
    assert "config.json is missing" in cli(*arguments).error() and not (folder / "model").exists()
    facts = cli(*arguments, "--config", folder / "settings.json", "--json").json
    assert facts["system"] == "Crawler" and facts["crawler_loops"] == 2 and not facts["tokenizer"]


def test_wrong_settings_are_one_line(cli, source):
    folder, _ = source
    settings = json.loads((folder / "config.json").read_text())
    arguments = ["convert", folder / "final_model.pt", "--out", folder / "model"]
    for name, value, words in (
        ("crawler_loop", 2, "unknown key 'crawler_loop'; did you mean 'crawler_loops'?"),
        ("num_flat_layers", "nine", "num_flat_layers"),
        ("num_flat_layers", 4, "the tensors do not belong together"),
        ("num_heads", 0, "num_heads must be >= 1, got 0"),
    ):
        (folder / "config.json").write_text(json.dumps({**settings, name: value}))
        assert words in cli(*arguments).error() and not (folder / "model").exists(), name
