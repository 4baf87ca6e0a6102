"""Which system a checkpoint is of, whose options are whose; the conversions are tested with each system."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ouroboros.api import load, open_model
from ouroboros.convert.checkpoint import Checkpoint
from ouroboros.convert.readers import convert, reader_of, readers
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.errors import OuroborosError


def holding(*names: str) -> Checkpoint:
    return Checkpoint(path=Path("some.pt"), content={name: torch.zeros(1) for name in names})


def test_the_content_tells_the_system():
    assert reader_of(holding("ln_f.scale", "shared_block.ln1.scale")).system == "R-HRM"
    for prefix in ("", "_orig_mod."):
        assert reader_of(holding(f"{prefix}transformer.h.0.ln_1.weight", "ln_f.weight")).system == "Deep Delta Learning"
    assert reader_of(holding("embed.weight", "osam.cs.h")).system == "OSAM"
    inside = Checkpoint(path=Path("some.pt"), content={"cfg": {}, "state_dict": {"osam.cs.h": torch.zeros(1)}})
    assert reader_of(inside).system == "OSAM"
    assert len({reader.system for reader in readers()}) == len(readers()) >= 3
    names = ", ".join(reader.system for reader in readers())
    with pytest.raises(OuroborosError, match=rf"some.pt: holds a, b, c, \.\.\., .* \({names}\)"):
        reader_of(holding("d", "c", "b", "a"))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (320, None),  # 257 rounded up to a multiple of 64
        (257, None),
        (319, "has a vocabulary of 319 and the tokenizer .* of 257: give the one it was trained with"),
        (384, "has a vocabulary of 384"),
        (256, "has a vocabulary of 256"),
    ],
)
def test_a_vocabulary_may_be_rounded_up(entries, words, tmp_path):
    """The spare rows become ids that decode to nothing, so that the directory loads."""
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    d = 4
    shapes = {"attn.c_q": (d, d), "attn.c_k": (d, d), "attn.c_v": (d, d), "attn.c_proj": (d, d), "ln_1": (d,)}
    shapes |= {"ln_2": (d,), "mlp.c_fc1": (10, d), "mlp.c_fc2": (10, d), "mlp.c_proj": (d, 10)}
    tensors = {f"transformer.h.0.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    tensors |= {"transformer.wte.weight": torch.ones(entries, d), "ln_f.weight": torch.ones(d)}
    torch.save(tensors, tmp_path / "x.pt")
    settings = {"vocab_size": entries, "hidden_size": d, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings |= {"head_dim": 2, "block_size": 8, "rope_ratio": 1.0, "use_qk_rmsnorm": False}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    given = {"tokenizer": tmp_path / "tokenizer"}
    if words is not None:
        with pytest.raises(OuroborosError, match=words):
            convert(tmp_path / "x.pt", tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()
        return
    made = convert(tmp_path / "x.pt", tmp_path / "out", **given)
    assert (made.system, bool(made.tokenizer), made.sizes["residual"]) == ("Deep Delta Learning", True, "additive")
    opened = open_model(tmp_path / "out")
    model, text = opened.model, opened.tokenizer
    assert text.vocab_size == model.config.vocab_size == entries and text.eos_id == 256
    assert len(load(tmp_path / "out")[1]) == entries


@pytest.mark.parametrize(
    ("name", "option", "owner"),
    [
        (
            "shared_block.x",
            {"config": Path("config.json")},
            "this is a checkpoint of R-HRM, and --config is for .*Deep",
        ),
        ("transformer.h.0.x", {"loops": 3}, "Deep Delta Learning, and --loops is for R-HRM: leave it out"),
        ("transformer.h.0.x", {"loops": None, "heads": 2}, "--heads is for R-HRM"),
        ("osam.x", {"loops": 2}, "this is a checkpoint of OSAM, and --loops is for R-HRM"),
        ("shared_block.x", {"kupdate": 2}, "--kupdate is for OSAM"),
    ],
)
def test_options_of_another_system_are_refused(name, option, owner, tmp_path):
    torch.save({name: torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(OuroborosError, match=f"x.pt: .*{owner}"):
        convert(tmp_path / "x.pt", tmp_path / "out", **option)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
