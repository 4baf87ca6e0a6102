"""Published checkpoints: names, rows, axes, settings, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ouroboros.convert.checkpoint import Checkpoint, read
from ouroboros.convert.readers import reader_of
from ouroboros.errors import OuroborosError
from ouroboros.systems.crawler import checkpoint as crawler
from ouroboros.systems.crawler.checkpoint import READER, our_layout, our_tensors, to_model
from ouroboros.systems.crawler.published import Published

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "data" / "crawler"


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """The published tensors of a recorded model, its settings, and all that is recorded."""
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors, base = load_file(GOLDEN / f"{name}.safetensors"), load_file(GOLDEN / "base_params.safetensors")
    own = {key.removeprefix("param/"): value for key, value in tensors.items() if key.startswith("param/")}
    names = [key.removeprefix("grad/") for key in tensors if key.startswith("grad/")]
    settings = {**case["hyperparameters"], **case["settings"]}
    settings.pop("fake_quant")
    return {name: own.get(name, base.get(name)) for name in names}, settings, tensors


def saved(folder: Path, tensors: dict[str, Tensor], settings: Any) -> Checkpoint:
    """A checkpoint with its settings beside it."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return read(folder)


@pytest.mark.parametrize("name", ["crawler_all_on", "helix_cross_attention", "flat_model", "ouroboros_mini"])
def test_reads_a_directory(name: str, tmp_path: Path) -> None:
    tensors, settings, recorded = golden(name)
    for known in ("vocab_size", "model_dim"):  # the tensors show these
        settings.pop(known)
    context = recorded["ids"].shape[1]
    checkpoint = saved(tmp_path, tensors, {**settings, "train_seq_len": context})
    assert reader_of(checkpoint) is READER
    found = READER.convert(checkpoint, eos_token_id=3)
    assert found.sizes["model_dim"] == 32 and found.sizes["vocab_size"] == 64 and found.model.config.eos_token_id == 3
    kind = {"helix": "Helix", "flat_": "plain"}.get(name[:5], "crawler")
    assert found.summary.startswith(f"{kind}, width 32, layout ") and found.summary.endswith("vocabulary 64")
    with torch.no_grad():
        logits = found.model(recorded["ids"].long(), use_cache=False).logits
    torch.testing.assert_close(logits, recorded["logits"], rtol=1e-4, atol=2e-5)


def test_the_second_stream_of_helix_as_nothing_is_the_plain_model() -> None:
    """Merge gate at minus infinity and bridges of zero: what the flat blocks compute alone."""
    tensors, settings, recorded = golden("helix_linear")
    nothing = {"helix_merge_gate": -math.inf, "helix_f2c_up.weight": 0.0, "helix_c2f_up.weight": 0.0}
    changed = {name: torch.full_like(t, nothing[name]) if name in nothing else t for name, t in tensors.items()}
    helix, ids = to_model(changed, Published.read(settings)), recorded["ids"].long()
    flat = {
        name.replace("flat_blocks.", "blocks."): tensor
        for name, tensor in tensors.items()
        if not name.startswith(("crawler_blocks.", "helix_", "ve_"))
    }
    plain = {**settings, "num_layers": settings["num_flat_layers"], "helix_enabled": False, "ve_enabled": False}
    with torch.no_grad():
        expected = to_model(flat, Published.read(plain))(ids).logits
        torch.testing.assert_close(helix(ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(to_model(tensors, Published.read(settings))(ids).logits, expected, atol=0.01)


def test_rotations_of_both_signs() -> None:
    """The halves of the rotated channels change places; others, and other maps, stay."""
    settings = Published(model_dim=16, num_heads=2, rope_dims=4)
    weight = torch.arange(8.0)[:, None].expand(8, 16)
    found = our_layout("flat_blocks.0.attn.c_k.weight", weight, settings)
    assert found[:, 0].tolist() == [2, 3, 0, 1, 4, 5, 6, 7]
    assert our_layout("flat_blocks.0.attn.c_v.weight", weight, settings) is weight
    whole = our_layout("blocks.0.attn.c_q.weight", weight, dataclasses.replace(settings, rope_dims=0))
    assert whole[:, 0].tolist() == [4, 5, 6, 7, 0, 1, 2, 3]


def test_rows_are_put_together_and_what_is_unread_is_left_out() -> None:
    settings = Published(crawler_loops=3, anchor_dim=2, ve_layers="0,9", inst_dim=0)
    tensors = {f"loop_pos.{loop}": torch.full((4,), float(loop)) for loop in (2, 0, 1)}
    tensors |= {f"anchor_write.{loop}.weight": torch.ones(2, 4) for loop in range(3)}
    tensors |= {f"anchor_read.{loop}.weight": torch.full((4, 2), float(loop)) for loop in range(3)}
    tensors |= {f"ve_layer_scales.{row}": torch.ones(1) for row in range(2)}
    found = our_tensors(tensors, settings)
    loops = "model.decoder.loops.0."
    assert found[loops + "embedding.weight"][:, 0].tolist() == [0, 1, 2]
    assert found[loops + "anchor.read.0.weight"][0, 0] == 1 and loops + "anchor.read.2.weight" not in found
    assert loops + "anchor.write.1.weight" in found and loops + "anchor.write.2.weight" not in found
    assert [name for name in found if "value" in name] == ["model.decoder.layers.2.self_attn.value_scale"]


def changed(name: str, value: Tensor | None) -> dict[str, Tensor]:
    tensors = golden("crawler_plain")[0]
    return {n: t for n, t in {**tensors, name: value}.items() if t is not None}


@pytest.mark.parametrize(
    ("tensors", "settings", "words"),
    [
        (changed("tok_emb.weight", None), {}, "tok_emb.weight is missing"),
        (changed("other.weight", torch.ones(2)), {}, "not a tensor of Crawler: 'other.weight'"),
        (changed("loop_other.0.weight", torch.ones(2)), {}, "not a tensor of Crawler: 'loop_other.0.weight'"),
        (changed("flat_blocks.0.norm.weight", torch.ones(2)), {}, "not a tensor of Crawler: 'flat_blocks.0.norm"),
        (changed("smear.gate", torch.ones(3)), {}, "the tensors do not belong together: .*smear.gate"),
        (changed("flat_blocks.0.mlp.fc.weight", None), {}, "the tensors do not belong together: Missing key"),
        (changed("smear.gate", torch.full((32,), math.nan)), {}, "tensor 'smear.gate' holds NaN or infinity"),
        (changed("flat_blocks.0.attn.c_k.weight", torch.ones(12, 32)), {}, r"has shape \(12, 32\), which heads of 8"),
        (changed("flat_blocks.0.attn.c_q.weight", torch.ones(12)), {}, r"has shape \(12,\), which heads of 8"),
        (changed("ve_layer_scales.1", torch.ones(1)), {}, "ve_layers '0' has no number for ve_layer_scales.1"),
        (changed("loop_pos.1", torch.ones(9)), {}, "the rows of .*embedding.weight have different shapes"),
        ({}, {"num_flat_layers": 6}, "the tensors do not belong together"),
        ({}, {"model_dim": 64}, "the tensors do not belong together"),
        ({}, {"loops": 3}, "config.json: unknown key 'loops'; did you mean"),
        ({}, {"num_heads": "x"}, "config.json: num_heads"),
        ({}, {"train_seq_len": 0}, "config.json: train_seq_len must be a number of tokens"),
        ({}, "[1]", "config.json: holds a list, not an object of settings"),
        ({}, "{", "config.json: cannot be read: Expecting property name"),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, dict) else "",
)
def test_refused(tensors: dict[str, Tensor], settings: Any, words: str, tmp_path: Path) -> None:
    plain, known, _ = golden("crawler_plain")
    given = settings if isinstance(settings, str) else {**known, **settings}
    with pytest.raises(OuroborosError, match=words) as caught:
        READER.convert(saved(tmp_path, tensors or plain, given))
    assert "\n" not in str(caught.value)


def test_settings_are_needed_and_may_lie_elsewhere(tmp_path: Path) -> None:
    tensors, settings, _ = golden("crawler_plain")
    checkpoint = saved(tmp_path, tensors, settings)
    (tmp_path / "config.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(OuroborosError, match=r"config.json is missing, and how often .* or give --config FILE"):
        READER.convert(checkpoint)
    found = READER.convert(checkpoint, config=tmp_path / "elsewhere.json")
    assert found.model.config.max_position_embeddings == 2048, "unless train_seq_len says otherwise"


def test_other_checkpoints_are_not_recognised() -> None:
    for names in (["tok_emb.weight"], ["smear.gate"], ["token_embedding.weight"]):
        checkpoint = Checkpoint(path=Path("x.pt"), content={name: torch.ones(1) for name in names})
        assert not crawler.READER.recognises(checkpoint)
