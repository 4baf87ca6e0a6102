"""Published R-HRM checkpoints: sizes from shapes, names, numbers of the original, directories."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ouroboros.api import load
from ouroboros.config.parts.latent import BottleneckAttentionSpec
from ouroboros.config.parts.stem import LearnedPositionsSpec
from ouroboros.convert.checkpoint import Checkpoint, Published
from ouroboros.convert.readers import convert
from ouroboros.data.tokenize import byte_tokenizer, train_bpe
from ouroboros.errors import OuroborosError
from ouroboros.model.reading import load_model
from ouroboros.systems.rhrm import checkpoint as rhrm
from ouroboros.systems.rhrm.checkpoint import sizes_of, to_model


def checkpoint(
    width: int = 12,
    heads: int = 3,
    latent: int = 5,
    inner: int = 20,
    registers: int | None = 2,
    vocab: int = 257,
    table: int | None = None,
) -> dict[str, Tensor]:
    """Tensors of a published model; ``table`` rows of positions make it the first revision."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    block = "shared_block."
    head_dim = width // heads
    tensors = {
        "token_embedding.weight": random(vocab, width),
        "ln_f.scale": 1 + random(width),
        block + "ln1.scale": 1 + random(width),
        block + "ln2.scale": 1 + random(width),
        block + "attn.q_down.weight": random(latent, width),
        block + "attn.kv_down.weight": random(latent, width),
        block + "attn.q_up.weight": random(width, latent),
        block + "attn.k_up.weight": random(width, latent),
        block + "attn.v_up.weight": random(width, latent),
        block + "attn.out_proj.weight": random(width, width),
        block + "ffn.w1.weight": random(inner, width),
        block + "ffn.w1.bias": random(inner),
        block + "ffn.w2.weight": random(inner, width),
        block + "ffn.w2.bias": random(inner),
        block + "ffn.w3.weight": random(width, inner),
        block + "ffn.w3.bias": random(width),
    }
    tensors["lm_head.weight"] = tensors["token_embedding.weight"]
    if registers is not None:
        tensors["reasoning_tokens"] = random(1, registers, width)
    if table is not None:
        return {**tensors, "position_embedding.weight": random(table, width)}
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    return {
        **tensors,
        block + "attn.q_norm.scale": 1 + random(head_dim),
        block + "attn.k_norm.scale": 1 + random(head_dim),
        block + "attn.rotary_emb.inv_freq": frequencies,
    }


def plain_logits(tensors: dict[str, Tensor], ids: Tensor, loops: int, heads: int) -> Tensor:
    """Logits (T, V) by the published formulas, for one sequence, written out."""
    t = {name.removeprefix("shared_block."): value.double() for name, value in tensors.items()}

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-8).sqrt() * gain

    x = t["token_embedding.weight"][ids]
    if "position_embedding.weight" in t:
        x = x + t["position_embedding.weight"][: len(ids)]
    registers = t["reasoning_tokens"][0] if "reasoning_tokens" in t else x[:0]
    x = torch.cat((registers, x))
    n, head_dim = len(x), x.shape[1] // heads
    angle = torch.arange(n).double()[:, None] * 10_000.0 ** -(torch.arange(0, head_dim, 2).double() / head_dim)

    def rotated(v: Tensor) -> Tensor:
        a, b = v.chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)

    for _ in range(loops):
        h = norm(x, t["ln1.scale"])
        q, k, v = (
            (h @ t[f"attn.{down}.weight"].T @ t[f"attn.{up}.weight"].T).view(n, heads, head_dim).transpose(0, 1)
            for down, up in (("q_down", "q_up"), ("kv_down", "k_up"), ("kv_down", "v_up"))
        )
        if "attn.q_norm.scale" in t:
            q, k = rotated(norm(q, t["attn.q_norm.scale"])), rotated(norm(k, t["attn.k_norm.scale"]))
        scores = q @ k.mT / head_dim**0.5 + torch.full((n, n), -torch.inf).triu(1)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1) @ t["attn.out_proj.weight"].T
        h = norm(x, t["ln2.scale"])
        gate, up = (h @ t[f"ffn.{w}.weight"].T + t[f"ffn.{w}.bias"] for w in ("w1", "w2"))
        x = x + (nn.functional.silu(gate) * up) @ t["ffn.w3.weight"].T + t["ffn.w3.bias"]
    return 0.1 * norm(x, t["ln_f.scale"])[len(registers) :] @ t["token_embedding.weight"].T


@pytest.mark.parametrize(
    "options", [{}, {"registers": None}, {"registers": 0}, {"table": 16}, {"table": 16, "registers": None}]
)
def test_the_model_computes_the_published_formulas(options):
    tensors = checkpoint(**options)
    model = to_model(tensors, loops=3, heads=3)
    ids = torch.tensor([5, 200, 17, 17, 3, 99, 256, 0])
    with torch.no_grad():
        found = model(ids[None]).logits[0]
    torch.testing.assert_close(found, plain_logits(tensors, ids, 3, 3).float(), rtol=0, atol=1e-6)
    assert model.schedule.notation == "(1)x3" and not model.training
    kept = sum(t.numel() for name, t in tensors.items() if name not in ("lm_head.weight", FREQUENCIES))
    assert sum(p.numel() for p in model.parameters()) == kept


FREQUENCIES = "shared_block.attn.rotary_emb.inv_freq"


def test_sizes_come_from_shapes():
    expected = {"d_model": 12, "heads": 3, "head_dim": 4, "d_latent": 5, "d_ff": 20, "prefix_tokens": 2}
    assert sizes_of(checkpoint()) == {**expected, "vocab_size": 257}
    spec = to_model(checkpoint(table=16), loops=2, heads=2).config.model_spec
    mixer = spec.block.mixer
    assert isinstance(mixer, BottleneckAttentionSpec)
    assert (spec.stem, spec.max_position_embeddings, mixer.qk_norm) == ((LearnedPositionsSpec(),), 16, "none")
    assert (mixer.num_heads, mixer.head_dim, mixer.latent_rank) == (2, 6, 5)
    assert (spec.head.logit_scale, spec.block.norm.eps, spec.register_std) == (0.1, 1e-8, 1.0)


def test_the_first_revision_does_not_tell_its_heads():
    with pytest.raises(OuroborosError, match="number of heads leaves no trace.*width 12 .*give --heads"):
        sizes_of(checkpoint(table=16))
    assert sizes_of(checkpoint(width=256, heads=8, table=16, vocab=9))["heads"] == 4  # the preset of this width
    with pytest.raises(OuroborosError, match="the checkpoint has 3 heads, not 4"):
        sizes_of(checkpoint(), heads=4)
    with pytest.raises(OuroborosError, match="5 heads do not divide the 12 channels"):
        sizes_of(checkpoint(table=16), heads=5)


def test_loops_of_the_presets_are_a_guess_that_is_said(caplog):
    def made(width: int) -> Published:
        return rhrm.convert(Checkpoint(path=Path("x.pth"), content=checkpoint(width=width, heads=4, vocab=9)))

    with caplog.at_level(logging.WARNING):
        assert [made(width).sizes["loops"] for width in (256, 512, 768)] == [4, 8, 12]
    assert len(caplog.records) == 3 and "leaves no trace in a checkpoint: 4, as in the published" in caplog.text
    with pytest.raises(OuroborosError, match=r"width 384 is no published preset's \(256, 512, 768\): give --loops"):
        made(384)


@pytest.mark.parametrize("place", ["", "shared_block."])
def test_a_compiled_models_prefix_is_removed(place):
    """Of the whole model, or of the block alone."""
    stored = {n.replace(place, f"{place}_orig_mod.", 1) if place in n else n: t for n, t in checkpoint().items()}
    assert any("_orig_mod." in name for name in stored)
    read = Checkpoint(path=Path("x.pth"), content=stored).tensors()
    expected, found = (to_model(tensors, loops=2).state_dict() for tensors in (checkpoint(), read))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def changed(**edits: Tensor | None) -> dict[str, Tensor]:
    tensors = checkpoint()
    for name, tensor in edits.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return tensors


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"ln_f.scale": None}, "ln_f.scale missing"),
        ({"lm_head.weight": torch.zeros(257, 12)}, "lm_head.weight differs from token_embedding.weight"),
        ({"reasoning_tokens": torch.zeros(2, 12)}, r"reasoning_tokens has shape \(2, 12\), expected \(1, tokens, 12\)"),
        (
            {"token_embedding.weight": torch.zeros(12), "lm_head.weight": None},
            r"weight has shape \(12,\), expected 2 axes",
        ),
        ({"shared_block.ln1.scale": torch.zeros(13)}, "tensors do not belong together: .*input_layernorm"),
        ({"shared_block.attn.k_norm.scale": None}, "tensors do not belong together: Missing.*k_norm"),
    ],
)
def test_tensors_that_are_no_such_model_are_named(edits, words):
    with pytest.raises(OuroborosError, match=words) as caught:
        to_model(changed(**edits), loops=2)
    assert "\n" not in str(caught.value)


def test_a_directory_is_written_that_loads_as_the_same_model(tmp_path, caplog):
    torch.save(checkpoint(), tmp_path / "best_model.pth")
    byte_tokenizer().save(tmp_path / "tokenizer")
    made = convert(tmp_path / "best_model.pth", tmp_path / "out", loops=3, tokenizer=tmp_path / "tokenizer")
    model, tokenizer = load(tmp_path / "out")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, to_model(checkpoint(), loops=3)(ids).logits)
    assert tokenizer("a").input_ids == [97] and model.config.eos_token_id == 256
    assert (made.sizes["loops"], bool(made.tokenizer), made.sizes["positions"]) == (
        3,
        True,
        "rope",
    ) and caplog.text == ""
    assert made.system == "R-HRM"
    assert made.model.num_parameters() == model.num_parameters()


def test_without_a_tokenizer_it_says_so(tmp_path, caplog):
    torch.save(checkpoint(), tmp_path / "best_model.pth")
    assert not convert(tmp_path / "best_model.pth", tmp_path / "out", loops=1).tokenizer
    assert "has no tokenizer; give --tokenizer DIR" in caplog.text
    assert load_model(tmp_path / "out").schedule.loops == 1
    with pytest.raises(OuroborosError, match="holds no tokenizer"):
        load(tmp_path / "out")


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    torch.save(checkpoint(), tmp_path / "best_model.pth")
    train_bpe([b"some words " * 30], 260).save(tmp_path / "bpe")
    before = sorted(tmp_path.rglob("*"))
    source, out = tmp_path / "best_model.pth", tmp_path / "out"
    for options, words in (
        ({}, r"best_model.pth: the number of loops leaves no trace"),
        ({"loops": 0}, "loops must be >= 1|x0"),
        ({"loops": 2, "tokenizer": tmp_path / "bpe"}, "vocabulary of 257 and the tokenizer .*bpe of 260"),
        ({"loops": 2, "tokenizer": tmp_path / "none"}, "tokenizer .*none': no such directory"),
        ({"loops": 2, "heads": 7}, "has 3 heads, not 7"),
    ):
        with pytest.raises(OuroborosError, match=words):
            convert(source, out, **options)
    monkeypatch.setattr(rhrm, "to_model", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, loops=2)
    assert sorted(tmp_path.rglob("*")) == before
