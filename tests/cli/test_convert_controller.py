"""``convert`` on checkpoints of the Controller: what was trained, on a tiny random pretrained model."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from ouroboros.api import open_model
from ouroboros.config.parts.loop import BridgeSpec, LoopGainSpec
from ouroboros.config.parts.modulated import ControllerSpec
from ouroboros.convert.donors import find, tensors_of
from ouroboros.convert.families import spec_of
from ouroboros.convert.recursive import recursive
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.eval.subject import perturb

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "data" / "controller"


TRAINED = ("controller.", "gate.", "step_norm.", "static_diags", "halter.", "recurrence_gate.")
"""What names of trained tensors begin with."""


def case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of a recorded case."""
    hyper = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["hyper"]
    return hyper, load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture
def pretrained(tmp_path: Path) -> Any:
    """Writes a tiny random Qwen2 as a directory of transformers."""

    def made(weights: dict[str, Tensor] | None = None, **sizes: Any) -> Path:
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        model = Qwen2ForCausalLM(Qwen2Config(rope_parameters=rope, max_position_embeddings=64, **sizes))
        model.load_state_dict(weights or {}, strict=False)
        model.save_pretrained(tmp_path / "donor")
        return tmp_path / "donor"

    return made


@pytest.fixture
def donor(pretrained: Any) -> Path:
    """The recorded pretrained model."""
    hyper, tensors = case("base_model")
    return pretrained(
        {name: tensor for name, tensor in tensors.items() if name.startswith("model.")},
        vocab_size=hyper["vocab"],
        hidden_size=hyper["hidden"],
        intermediate_size=hyper["ffn"],
        num_hidden_layers=hyper["layers"],
        num_attention_heads=hyper["heads"],
        num_key_value_heads=hyper["kv_heads"],
        rms_norm_eps=hyper["rms_norm_eps"],
        tie_word_embeddings=True,
    )


def write(folder: Path, name: str, **more: Any) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """A checkpoint with what a case trains, and settings beside it: what tensors do not tell, and ``more``."""
    hyper, tensors = case(name)
    folder.mkdir(exist_ok=True)
    save_file({n: t for n, t in tensors.items() if n.startswith(TRAINED)}, folder / "trained.safetensors")
    settings = {key: hyper[key] for key in ("n_prelude", "recurrent_layer", "n_coda", "alpha") if key in hyper}
    (folder / "config.json").write_text(json.dumps(settings | more))
    return folder / "trained.safetensors", hyper, tensors


def logits_of(model: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return open_model(model).model(ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("v2_depth3", "Controller"),
        ("v2_static", "static diagonals"),
        ("refiner_gated", "refiner"),
        ("refiner_plain", "refiner"),
    ],
)
def test_a_published_checkpoint_becomes_a_model(cli, tmp_path, donor, name, form):
    source, hyper, tensors = write(tmp_path / "source", name)
    depth = hyper["depth"]
    arguments = ["--donor", donor, "--depth", str(depth), "--json"]
    facts = cli("convert", source, "--out", tmp_path / "model", *arguments).json
    assert facts["system"] == "the Controller" and facts["form"] == form and not facts["tokenizer"]
    split = (hyper.get("n_prelude"), hyper.get("n_coda"))
    expected = f"7 loop:1 (loop)x{depth}" if form == "refiner" else f"{split[0]} loop:(1)x{depth} {split[1]}"
    assert facts["layout"] == expected
    torch.testing.assert_close(
        logits_of(tmp_path / "model", tensors["input_ids"]), tensors["logits"], rtol=1e-4, atol=2e-5
    )


def test_adaptive_depth_and_settings_elsewhere(cli, tmp_path, donor):
    depth = case("v2_adaptive")[0]["max_recurrence"]
    source, _, tensors = write(tmp_path / "source", "v2_adaptive", adaptive=True, depth=depth)
    settings = source.with_name("config.json").rename(tmp_path / "settings.json")
    result = cli("convert", source, "--out", tmp_path / "model", "--donor", donor, "--config", settings)
    assert result.status == 0 and f"Controller, layout '2 loop:(1)x{depth} 2', rank 4, on" in result.out
    torch.testing.assert_close(
        logits_of(tmp_path / "model", tensors["input_ids"]), tensors["logits"], rtol=1e-4, atol=2e-5
    )


def test_the_shared_block_brings_its_own_embeddings_and_the_donor_its_tokenizer(cli, tmp_path, pretrained):
    hyper, tensors = case("v1_model")
    names = {"vocab_size": "vocab", "hidden_size": "d", "intermediate_size": "ffn"}
    names |= {"num_attention_heads": "heads", "num_key_value_heads": "kv"}
    donor = pretrained(num_hidden_layers=2, rms_norm_eps=1e-6, **{name: hyper[key] for name, key in names.items()})
    own = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
    torch.save(own, tmp_path / "shared.pt")
    facts = cli(
        *("convert", tmp_path / "shared.pt", "--out", tmp_path / "model", "--donor", donor),
        *("--depth", str(hyper["phase2_depth"]), "--json"),
    ).json
    assert facts["form"] == "shared block" and facts["layout"] == f"loop:(1)x{hyper['phase2_depth']}"
    torch.testing.assert_close(
        logits_of(tmp_path / "model", tensors["input_ids"]), tensors["phase2.logits"], rtol=1e-4, atol=2e-5
    )


def test_the_donors_tokenizer_is_taken(cli, tmp_path, pretrained):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4}
    donor = pretrained(vocab_size=320, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    byte_tokenizer().save(donor)
    source, *_ = write(tmp_path / "source", "v2_depth3")
    facts = cli("convert", source, "--out", tmp_path / "model", "--donor", donor, "--json").json
    assert facts["tokenizer"] and facts["layout"] == "2 loop:(1)x8 2", "the published depth"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_preludes": 1}, "unknown 'n_preludes'; did you mean 'n_prelude'?"),
        ({"alpha": "much"}, "alpha must be a number, got 'much'"),
        ({"n_coda": True}, "n_coda must be a whole number, got True"),
        ({"recurrent_layer": 7}, "the looped layer 7 is not between prelude (layers before 2) and coda (from 6 of 8"),
        ({"rank": 5}, "config: rank is 5, and the tensors have 4"),
        ({"depth": 0}, "the number of loops must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(cli, tmp_path, donor, settings, message):
    source, *_ = write(tmp_path / "source", "v2_depth3", **settings)
    found = cli("convert", source, "--out", tmp_path / "model", "--donor", donor).error()
    assert message in found and "trained.safetensors" in found and not (tmp_path / "model").exists()


def test_what_is_missing_is_said(cli, tmp_path, donor, pretrained):
    source, *_ = write(tmp_path / "source", "v2_depth3")
    arguments = ["convert", source, "--out", tmp_path / "model"]
    assert "give the pretrained model with --donor DIR" in cli(*arguments).error()
    assert "is no pretrained model" in cli(*arguments, "--donor", tmp_path / "source").error()
    tensors = load_file(source)
    for changed, message in (
        ({"gate.gate_proj.bias": None}, "Missing key(s)"),
        ({"step_norm.weights": None}, "step_norm.weights is missing"),
        ({"gate.other": torch.zeros(1)}, "gate.other: no tensor of the published system"),
        ({"gate.gate_proj.bias": torch.full((32,), torch.nan)}, "'gate.gate_proj.bias' holds NaN or infinity"),
    ):
        save_file({n: t for n, t in {**tensors, **changed}.items() if t is not None}, source)
        assert message in cli(*arguments, "--donor", donor).error()
    save_file(tensors, source)
    (source.with_name("config.json")).write_text(json.dumps({"n_prelude": 1, "recurrent_layer": 2, "n_coda": 1}))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    other = pretrained(vocab_size=32, num_hidden_layers=4, **sizes)
    assert "do not belong together: size mismatch" in cli(*arguments, "--donor", other).error()


def test_a_split_is_refused_for_a_refiner_and_halting_without_its_network(cli, tmp_path, donor):
    source, *_ = write(tmp_path / "source", "refiner_plain", n_prelude=2)
    arguments = ["convert", source, "--out", tmp_path / "model", "--donor", donor]
    assert "n_prelude is for checkpoints with prelude and coda" in cli(*arguments).error()
    source, *_ = write(tmp_path / "source", "v2_static", adaptive=True)
    assert "adaptive is true, and there is no halting network" in cli(*arguments).error()


def test_depth_is_chosen_when_a_steered_donor_talks(cli, tmp_path, pretrained, monkeypatch):
    """``generate`` and ``chat``, with a cache, write what the model writes without one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
    source = find(pretrained(vocab_size=257, num_key_value_heads=2, tie_word_embeddings=True, **sizes))
    kept = ((0,), (3,), (5,))
    parts = (ControllerSpec(rank=3, style=4, pooling="prefix"), LoopGainSpec(form="channel"), BridgeSpec())
    model = recursive(
        tensors_of(source.family, source.model()), spec_of(source.config), "1 loop:(1)x2 1", kept, parts, rank=3
    )
    perturb(model.model.decoder.loops, 0.3)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save(tmp_path / "model")
    # The command begins a text with the token that ends one.
    ids = torch.tensor([[256, *b"abc"]])
    given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 256, "use_cache": False, "do_sample": False}
    seen = []
    for loops in (1, 2, 4):
        options = ["--loops", loops, "--max-new-tokens", 12, "--temperature", 0]
        facts = cli("generate", tmp_path / "model", "--prompt", "abc", "--json", *options).json
        view = model.with_loops(loops)
        with torch.no_grad():
            seen.append(view(ids).logits)
        expected = byte_tokenizer().decode(view.generate(ids, max_new_tokens=12, **given)[0, 4:].tolist())
        assert facts["loops"] == loops and facts["continuations"] == [expected.decode("utf-8", "replace")]
        monkeypatch.setattr("sys.stdin", io.StringIO("abc\n"))
        assert cli("chat", tmp_path / "model", *options).status == 0
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.pairwise(seen)), "depth matters"
