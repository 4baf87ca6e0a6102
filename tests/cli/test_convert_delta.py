"""``convert`` on published Deep Delta Learning checkpoints: the same logits before and after, or one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ouroboros.api import load
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.model.reading import load_model
from ouroboros.systems.delta import OuroborosConfig, OuroborosModel
from ouroboros.systems.delta.checkpoint import BLOCK_NAMES, OUTER_NAMES

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "data" / "delta"
SIZES = {
    "vocab_size": 257,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "head_dim": 8,
    "block_size": 32,
}
VARIANTS = {
    "vector": {},
    "vector, options": {
        "beta_single_linear": False,
        "beta_hidden_size": 5,
        "v_sigmoid": False,
        "k_eps": 1e-3,
        "use_k_shift": True,
        "use_v_shift": True,
        "use_output_gate": True,
        "use_qk_rmsnorm": False,
        "q_activation": "elu+1",
        "rope_ratio": 0.5,
        "mup": True,
    },
    "constant value, groups": {"v_constant": True, "v_constant_value": 1.5, "using_groupnorm": True},
    "channels": {"value_channels": 3, "state_shortconv_kernel_size": 3},
    "channels, expanded": {"value_channels": 4, "v_sigmoid_scale": 2.0, "embedding_conv": True},
    "tokens, expanded": {
        "value_channels": 2,
        "compressor": "token",
        "embedding_conv": True,
        "input_embed_shortconv_kernel_size": 3,
    },
}
"""Fields without their prefix."""
HOUSEKEEPING = {
    "architectures": ["GPT"],
    "model_type": "nanogpt-pro",
    "torch_dtype": "float32",
    "transformers_version": "4.57.1",
    "bias": False,
    "dropout": 0.0,
    "scale_attn_by_inverse_layer_idx": False,
    "ddl_state_read_init": None,
    "ddl_beta_init": 3.0,
    "eos_token_id": 7,
}
"""Of a published ``config.json``, without meaning for the logits."""


def published_model(variant: str) -> OuroborosModel:
    """A small model with weights of every kind away from their start."""
    own = {field for field in OuroborosConfig.__dataclass_fields__ if field.startswith("ouroboros_")}
    fields = {f"ouroboros_{name}" if f"ouroboros_{name}" in own else name: v for name, v in VARIANTS[variant].items()}
    torch.manual_seed(3)
    model = OuroborosModel(OuroborosConfig(**SIZES, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def published_settings(model: OuroborosModel) -> dict[str, object]:
    """Its ``config.json``: the fields of Deep Delta Learning, with what transformers adds."""
    chosen = {"ouroboros_compressor", "ouroboros_embedding_conv"}  # published as files of their own
    fields = {name: getattr(model.config, name) for name in OuroborosConfig.__dataclass_fields__ if name not in chosen}
    return {name.replace("ouroboros_", "ddl_"): value for name, value in fields.items()} | HOUSEKEEPING


def published_tensors(model: OuroborosModel) -> dict[str, Tensor]:
    """Its weights under the published names, with the published axes."""
    found: dict[str, Tensor] = {}
    mixer, residual = model.config.spec.block.mixer, model.config.spec.block.residual
    absent = {
        "attn.c_k.weight" if mixer.k_shift else "attn.c_k.linear.weight",
        "attn.c_v.weight" if mixer.v_shift else "attn.c_v.linear.weight",
        "attn.o_norm.weight" if mixer.head_norm else "attn.subln.weight",
        *(f"compress.{name}" for name in ["weight" if residual.compressor == "token" else "shortconv.weight"]),
        *(f"readout.{name}" for name in ["weight" if residual.compressor == "token" else "shortconv.weight"]),
        *(f"{part}.beta.{kind}" for part in ("ddl_attn", "ddl_mlp") for kind in ("weight", "bias")),
    }
    if residual.gate == "linear":
        absent = {name.replace(".beta.", ".beta_out.") for name in absent}
    blocks = {
        f"transformer.h.{index}.{theirs}": f"model.decoder.layers.{index}.{ours}"
        for index in range(SIZES["num_hidden_layers"])
        for theirs, ours in BLOCK_NAMES.items()
        if theirs not in absent
    }
    ours = model.model.state_dict()
    for name, mine in {**blocks, **{k: v for k, v in OUTER_NAMES.items() if k not in absent}}.items():
        if mine in ours:
            tensor = ours.pop(mine)
            if name.endswith(("shortconv.weight", "input_embed.conv.weight")):
                tensor = tensor.permute(2, 1, 0).reshape(-1, 1, tensor.shape[0])  # as a convolution stores it
            found[name] = tensor.contiguous()
    ours.pop("lm_head.weight")
    assert not ours, ours.keys()
    return {**found, "lm_head.weight": found["transformer.wte.weight"]}


def write(variant: str, directory: Path, weights: str = "model.safetensors") -> OuroborosModel:
    """A published checkpoint directory."""
    model = published_model(variant)
    directory.mkdir(exist_ok=True)
    tensors = published_tensors(model)
    if weights.endswith(".safetensors"):
        tensors.pop("lm_head.weight")
        save_file(tensors, directory / weights)
    else:
        torch.save(tensors, directory / weights)
    (directory / "config.json").write_text(json.dumps(published_settings(model)))
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_logits_before_and_after(variant, cli, tmp_path, caplog):
    model = write(variant, tmp_path / "published", "pytorch_model.bin" if "," in variant else "model.safetensors")
    result = cli("convert", tmp_path / "published", "--out", tmp_path / "model")
    assert result.status == 0 and result.out.count("\n") == 1 and "Deep Delta Learning" in result.out
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'model'} has no tokenizer; give --tokenizer DIR with the one the model was trained with"
    ]
    ids = torch.randint(0, SIZES["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, _ = model(ids, output_all_seq=True)
        converted = load_model(tmp_path / "model")
        found = converted(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (expected.std() > 1e-3) and converted.config.eos_token_id == 7


@pytest.mark.parametrize("case", sorted(path.stem for path in GOLDEN.glob("model-*.json")))
def test_the_recorded_logits_of_the_original(case, cli, tmp_path):
    recorded, tensors = json.loads((GOLDEN / f"{case}.json").read_text()), load_file(GOLDEN / f"{case}.safetensors")
    weights = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
    torch.save(weights, tmp_path / "trained.pt")
    (tmp_path / "settings.json").write_text(json.dumps(recorded["config"]))
    options = ["--config", tmp_path / "settings.json", "--json"]
    facts = cli("convert", tmp_path / "trained.pt", "--out", tmp_path / "model", *options).json
    assert (facts["system"], facts["parameters"]) == ("Deep Delta Learning", recorded["parameters"])
    with torch.no_grad():
        logits = load_model(tmp_path / "model")(tensors["in.ids"].long()).logits
    torch.testing.assert_close(logits, tensors["out.logits"], rtol=0, atol=recorded["tolerance"]["logits_atol"])


def test_sizes_are_reported_and_the_model_can_be_used(cli, tmp_path):
    model = write("tokens, expanded", tmp_path / "published")
    byte_tokenizer().save(tmp_path / "tokenizer")
    options = ["--tokenizer", tmp_path / "tokenizer", "--json"]
    facts = cli("convert", tmp_path / "published", "--out", tmp_path / "model", *options).json
    assert facts == {
        **SIZES,
        "source": str(tmp_path / "published"),
        "out": str(tmp_path / "model"),
        "system": "Deep Delta Learning",
        "parameters": model.get_num_params(),
        "residual": "delta, value channels: 2",
        "tokenizer": True,
    }
    assert cli("generate", tmp_path / "model", "--prompt", "x", "--max-new-tokens", 3, "--json").json["prompt"] == "x"
    assert load(tmp_path / "model")[0].config.eos_token_id == 256  # the tokenizer's
    again = cli("convert", tmp_path / "published", "--out", tmp_path / "again")
    shown = "24, 2 blocks, 3 heads of 8, residual delta, value channels: 2, vocabulary 257"
    assert shown in again.out


def test_settings_that_are_not_given_are_named(cli, tmp_path, caplog):
    write("vector", tmp_path / "p")
    given = {**SIZES, "ddl_k_eps": 1e-4, "rope_ratio": 1.0}
    (tmp_path / "p" / "config.json").write_text(json.dumps(given))
    assert cli("convert", tmp_path / "p", "--out", tmp_path / "model").status == 0
    expected = "config.json leaves open what no tensor shows, taken as published: ouroboros_v_sigmoid,"
    assert f"{expected} ouroboros_v_sigmoid_scale" in caplog.text
    assert load_model(tmp_path / "model").config.model_spec.block.residual.eps == 1e-4


def edited(tensors: dict[str, Tensor], **edits: Tensor | None) -> dict[str, Tensor]:
    return {name: t for name, t in {**tensors, **edits}.items() if t is not None}


@pytest.mark.parametrize(
    ("edits", "settings", "words"),
    [
        (
            {"transformer.wte.weight": torch.ones(24), "lm_head.weight": None},
            {},
            "embed_tokens.weight",
        ),
        ({"transformer.h.1.mlp.c_fc1.weight": torch.ones(9, 24)}, {}, "layers.1.mlp.gate_proj.weight"),
        ({"transformer.h.0.compress.weight": None}, {}, "layers.0.compressor.weight"),
        ({"input_embed.conv.weight": torch.ones(9, 1, 4)}, {}, "shape (9, 1, 4), expected filters of 4 value channels"),
        ({}, {"num_hidden_layers": 3}, "layers.2.input_layernorm.weight"),
        ({}, {"ddl_k_epz": 1e-5}, "unknown key 'ouroboros_k_epz'; did you mean 'ouroboros_k_eps'?"),
        ({}, {"ddl_k_eps": "small"}, "ouroboros_k_eps: Input should be a valid number"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, dict) else None,
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(edits, settings, words, cli, tmp_path):
    model = write("channels, expanded", tmp_path / "p", "pytorch_model.bin")
    torch.save(edited(published_tensors(model), **edits), tmp_path / "p" / "pytorch_model.bin")
    (tmp_path / "p" / "config.json").write_text(json.dumps(published_settings(model) | settings))
    line = cli("convert", tmp_path / "p", "--out", tmp_path / "model").error()
    assert words in line and line.startswith(str(tmp_path / "p" / "pytorch_model.bin"))
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_other_places_and_options(cli, tmp_path):
    write("vector", tmp_path / "p")

    def error(*options: object, source: Path = tmp_path / "p", status: int = 1) -> str:
        return cli("convert", source, "--out", tmp_path / "model", *options).error(status)

    assert "checkpoint of Deep Delta Learning, and --loops is for R-HRM: leave it out" in error("--loops", 3)
    assert "--heads is for R-HRM" in error("--heads", 3)
    byte_tokenizer().save(tmp_path / "tokenizer")
    assert "no such directory" in error("--tokenizer", tmp_path / "none")
    assert "nowhere.json is missing: put" in error("--config", tmp_path / "nowhere.json")
    (tmp_path / "list.json").write_text("[1]")
    assert "list.json: holds a list, not an object" in error("--config", tmp_path / "list.json")
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json: cannot be read" in error("--config", tmp_path / "broken.json")
    (tmp_path / "p" / "config.json").rename(tmp_path / "kept.json")
    line = error(source=tmp_path / "p" / "model.safetensors")
    assert "config.json is missing" in line and "put the published config.json there or give --config FILE" in line
    assert cli("convert", tmp_path / "p", "--out", tmp_path / "m", "--config", tmp_path / "kept.json").status == 0
    torch.save({"model": published_tensors(published_model("vector"))}, tmp_path / "training.pt")
    assert "which is of none of the systems that are read" in error(source=tmp_path / "training.pt")
    (tmp_path / "model.safetensors").write_text("hello")
    assert "cannot be read" in error(source=tmp_path / "model.safetensors")
    assert not (tmp_path / "model").exists()
