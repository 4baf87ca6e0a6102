"""``export``, and ``convert`` of what it goes back to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from ouroboros.data.tokenize import byte_tokenizer


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    """A tiny random one with a tokenizer of bytes."""
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "head_dim": 6}
    torch.manual_seed(0)
    config = Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "donor")
    byte_tokenizer().save(tmp_path / "donor")
    return tmp_path / "donor"


def test_there_and_back(cli: Any, donor: Path, tmp_path: Path) -> None:
    facts = cli("convert", donor, "--out", tmp_path / "ours", "--layout", "1 (1)x2", "--keep", "0,2", "--json").json
    assert facts["system"] == "Qwen3" and not facts["identity"] and facts["layers"] == [0, 2] and facts["tokenizer"]
    assert facts["proof"]["difference"] <= facts["proof"]["tolerance"] == 1e-4
    assert cli("generate", tmp_path / "ours", "--prompt", "a", "--max-new-tokens", "2", "--json").status == 0
    back = cli("export", tmp_path / "ours", "--to", "donor", tmp_path / "back", "--json").json
    assert back["layers"] == 3 and back["family"] == "Qwen3" and back["proof"]["difference"] < 1e-4
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    result = cli("export", tmp_path / "ours", "--to", "donor", tmp_path / "bare", "--no-tokenizer")
    assert "bare: Qwen3, 3 layers" in result.out and not (tmp_path / "bare" / "tokenizer.json").exists()


def test_refusals(cli: Any, donor: Path, tmp_path: Path) -> None:
    assert "donor.json" not in cli("export", tmp_path / "none", "--to", "donor", tmp_path / "x").error()
    assert "gguff" in cli("export", donor, "--to", "gguff", tmp_path / "x").error(2)
    cli("convert", donor, "--out", tmp_path / "ours")
    (tmp_path / "ours" / "donor.json").unlink()
    assert "has no donor.json" in cli("export", tmp_path / "ours", "--to", "donor", tmp_path / "x").error()
    (donor / "tokenizer.json").unlink()
    assert "--no-tokenizer" in cli("convert", donor, "--out", tmp_path / "y").error()
    assert cli("convert", donor, "--out", tmp_path / "y", "--no-tokenizer").status == 0
    assert (
        "--layout is about reading"
        in cli("convert", donor, "--out", tmp_path / "z", "--to", "osam", "--layout", "3").error()
    )
