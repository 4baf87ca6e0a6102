"""Published OSAM checkpoints: in and out, the two ids they lack, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ouroboros.api import load, load_model, open_model
from ouroboros.config import FeedForwardSpec, ModelSpec, NormSpec, OsamSpec
from ouroboros.convert.osam import (
    FORM,
    NAMES,
    VALUE_PATH,
    characters_of,
    export,
    from_model,
    published_state,
    to_model,
    to_spec,
)
from ouroboros.convert.systems import convert
from ouroboros.data.tokenize import byte_tokenizer, character_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.osam import Osam
from ouroboros.recipes.osam import osam_published

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "data" / "osam"
CHARACTERS = [*" abcdefghijklmnop"]


def golden(name: str = "kupdate3") -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Published tensors, ids and the logits recorded for them."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    state = {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}
    return state, tensors["input_ids"], tensors["logits"]


def document(name: str = "kupdate3", **changes: Any) -> dict[str, Any]:
    """A published file."""
    state, _, _ = golden(name)
    V, d = state["embed.weight"].shape
    cfg = {"vocab_size": V, "d_model": d, "m": 64, "readout_hidden": 32, "enable_val": True, "use_freq_cache": False}
    every = 3 if name == "kupdate3" else 1
    return {
        "state_dict": state,
        "cfg": cfg,
        "train_cfg": {"kupdate": every, "dropout": 0.1, "freeze_phase": False, "text_path": None, "lr": 3e-3},
        "stoi": {c: i for i, c in enumerate(CHARACTERS)},
        "itos": dict(enumerate(CHARACTERS)),
        **changes,
    }


def saved(tmp_path: Path, content: dict[str, Any], name: str = "osam.pt") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def test_a_published_file_becomes_a_directory_with_its_characters(tmp_path: Path) -> None:
    _, ids, logits = golden()
    made = convert(saved(tmp_path, document()), tmp_path / "model")
    assert (made.system, made.tokenizer, made.sizes["kupdate"], made.sizes["m"]) == ("OSAM", True, 3, 64)
    assert "17 characters" in made.summary
    opened = open_model(tmp_path / "model")
    model, tokenizer = opened.model, opened.tokenizer
    mixer = model.model.spec.mixer
    assert (mixer.kupdate, mixer.dropout, mixer.buckets, mixer.readout_hidden) == (3, 0.1, 64, 32)
    assert tokenizer.kind == "chars" and tokenizer.encode(b"ba c").tolist() == [2, 1, 0, 3]
    assert (tokenizer.unknown_id, tokenizer.eos_id, model.config.eos_token_id) == (17, 18, 18)
    with torch.no_grad():
        found = model(ids, use_cache=False).logits
    torch.testing.assert_close(found[..., :17], logits, atol=5e-6, rtol=0)
    assert load(tmp_path / "model")[1].decode([2, 1]) == "ba"


def test_the_spare_ids_take_no_part_in_anything(tmp_path: Path) -> None:
    """Whatever the text: their logits are one number, below the others by more than float32 sees."""
    state, _, _ = golden()
    model = to_model(state, characters=CHARACTERS)
    plain = to_model(state)
    ids = torch.randint(0, 17, (8, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (each(ids, use_cache=False).logits for each in (model, plain))
    spare = found[..., 17:]
    assert spare.std() < 1e-3 and (found[..., :17].mean(-1, keepdim=True) - spare).min() > 30
    torch.testing.assert_close(found[..., :17], expected, atol=2e-6, rtol=0)
    assert torch.equal(torch.logsumexp(found, -1), torch.logsumexp(found[..., :17], -1))
    hostile = torch.nn.functional.layer_norm(1e3 * torch.randn(2000, 16), (16,))
    states = hostile * state["osam.ln.weight"] + state["osam.ln.bias"]
    with torch.no_grad():
        logits = model.logits(states)
    assert (logits[:, :17].logsumexp(-1) - logits[:, 17:].amax(-1)).min() > 30
    torch.manual_seed(0)
    drawn = model.generate(ids[:, :9], do_sample=True, temperature=1.5, top_k=0, max_new_tokens=60, eos_token_id=None)
    assert drawn.max() < 17
    # An unknown character reads as a space (as published), the end of text as nothing at all.
    embed = model.model.embed_tokens.weight
    assert torch.equal(embed[17], embed[0]) and not embed[18].any()
    cache, after = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[18, 18]]), past_key_values=cache)
        model(torch.tensor([[18, 18, 5]]), past_key_values=after)
    assert not cache.layers[0].read().any() and after.layers[0].read().any()


def test_without_a_space_unknown_characters_read_as_the_first_one() -> None:
    state, _, _ = golden()
    model = to_model(state, characters=[*"abcdefghijklmnopq"])
    assert torch.equal(model.model.embed_tokens.weight[17], state["embed.weight"][0])
    other = to_model(state, characters=sorted([*"!#abcdefghijklmn "]))
    assert torch.equal(other.model.embed_tokens.weight[17], state["embed.weight"][0])


def test_an_untrained_model_warns_that_it_may_draw_them(caplog: pytest.LogCaptureFixture) -> None:
    state, _, _ = golden("default")
    model = to_model(state, characters=CHARACTERS)
    assert "next to no bias" in caplog.text and not model.lm_head.weight[17:].any()


def test_kupdate_stays_with_the_model_unless_another_is_given(tmp_path: Path) -> None:
    source = saved(tmp_path, document())
    convert(source, tmp_path / "other", kupdate=1)
    model, _ = load(tmp_path / "other")
    assert model.model.spec.mixer.kupdate == 1
    assert to_spec(golden()[0], train_cfg={"kupdate": 0}).mixer.kupdate == 1  # less counts as 1 there
    with pytest.raises(OuroborosError, match=r"osam.pt: mixer\.kupdate must be >= 1, got 0"):
        convert(source, tmp_path / "third", kupdate=0)


def test_a_file_of_tensors_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    state, ids, logits = golden("default_perturbed")
    made = convert(saved(tmp_path, {f"_orig_mod.{name}": value for name, value in state.items()}), tmp_path / "model")
    assert not made.tokenizer and "value path is on" in caplog.text and "does not say kupdate" in caplog.text
    with torch.no_grad():
        found = load_model(tmp_path / "model")(ids, use_cache=False).logits
    torch.testing.assert_close(found, logits, atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", ["kupdate3", "odd_m_collisions", "hash_seed7"])
def test_out_and_in_again_is_the_same(name: str, tmp_path: Path) -> None:
    content = document(name)
    content["cfg"] = {}
    convert(saved(tmp_path, content), tmp_path / "model")
    opened = open_model(tmp_path / "model")
    model, tokenizer = opened.model, opened.tokenizer
    assert export(model, tokenizer, tmp_path / "back.pt") == 17
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == content.keys() and back["state_dict"].keys() == NAMES.keys()
    for key, tensor in content["state_dict"].items():
        assert back["state_dict"][key].dtype == tensor.dtype and torch.equal(back["state_dict"][key], tensor), key
    assert back["stoi"] == content["stoi"] and back["itos"] == content["itos"]
    assert back["train_cfg"]["kupdate"] == content["train_cfg"]["kupdate"] and back["cfg"]["vocab_size"] == 17
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []
    with pytest.raises(OuroborosError, match="back.pt exists; choose another --out"):
        export(model, tokenizer, tmp_path / "back.pt")


def test_without_the_value_path_its_tensors_are_at_their_start(caplog: pytest.LogCaptureFixture) -> None:
    state, ids, logits = golden("no_valpath")
    model = to_model(state, {"enable_val": False})
    assert not any("value" in name or "v_proj" in name for name, _ in model.named_parameters())
    found, again = from_model(model), from_model(model)
    assert "value path: its published tensors, which are not used, are at their start" in caplog.text
    assert found.keys() == state.keys() and set(VALUE_PATH) < state.keys()
    assert all(torch.equal(found[name], again[name]) for name in found)
    for name in state.keys() - set(VALUE_PATH):
        assert torch.equal(found[name], state[name]), name
    torch.testing.assert_close(found["osam.Wv.weight"] @ found["osam.Wv.weight"].t(), torch.eye(16))
    assert found["osam.gate_val_raw"].item() == -2.5 and found["osam.v_proj.1.weight"].abs().max() <= 0.25
    back = to_model(found, {"enable_val": False})
    with torch.no_grad():
        torch.testing.assert_close(back(ids, use_cache=False).logits, logits, atol=5e-6, rtol=0)


def test_export_leaves_out_the_ids_that_are_not_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = character_tokenizer([b"some text"])
    assert text.unknown_id is not None
    base = osam_published("tiny").model
    mixer = dataclasses.replace(base.mixer, kupdate=2, freq_cache=True, detach_state=False)
    spec = dataclasses.replace(base, vocab_size=text.vocab_size, mixer=mixer)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec, eos_token_id=text.eos_id)).eval().bfloat16()
    export(model, text, tmp_path / "o.pt")
    content = torch.load(tmp_path / "o.pt", weights_only=True)
    assert content["cfg"]["vocab_size"] == text.unknown_id == len(content["stoi"]) and content["cfg"]["use_freq_cache"]
    assert torch.equal(content["state_dict"]["head.weight"], model.lm_head.weight[: text.unknown_id].float())
    assert content["state_dict"]["osam.theta_q_raw"].shape == () and list(content["itos"].values()) == [*" emostx"]
    assert "reads the memory at every position, not at every 2-th" in caplog.text
    with pytest.raises(OuroborosError, match="tokenizer of this model is 'bytes' and .* only 'chars'"):
        export(model, byte_tokenizer(), tmp_path / "p.pt")
    with pytest.raises(OuroborosError, match="cannot write .*nowhere/p.pt"):
        export(model, text, tmp_path / "nowhere" / "p.pt")


OTHER = {
    "layout": {"layout": "2"},
    "registers": {"registers": 2, "mixer": OsamSpec(buckets=27, readout_hidden=5, detach_state=False)},
    "residual": {"residual": "delta"},
    "tie_embeddings": {"tie_embeddings": True, "head_std": None},
    "logit_scale": {"logit_scale": 0.5},
    "logit_softcap": {"logit_softcap": 3.0},
    "embedding_norm": {"embedding_norm": True},
    "positions": {"positions": "learned", "max_position_embeddings": 64},
    "ffn.kind": {"ffn": FeedForwardSpec(intermediate_size=8)},
    "norm.kind": {"norm": NormSpec(placement="final", eps=1e-5)},
    "norm.placement": {"norm": NormSpec(kind="layer", eps=1e-5)},
    "norm.eps": {"norm": NormSpec(kind="layer", placement="final", eps=1e-6)},
    "mixer.kind": {"mixer": ModelSpec().mixer},
    **{
        f"mixer.{name}": {"mixer": OsamSpec(**{"buckets": 64, "readout_hidden": 32, name: value})}
        for name, value in {
            "independent_hashes": True,
            "sketch_values": False,
            "frequencies": 2,
            "decay": True,
            "normalisation": "rms",
            "gate_cap": 0.5,
        }.items()
    },
}


@pytest.mark.parametrize("field", FORM)
def test_another_form_is_refused_by_its_field(field: str) -> None:
    spec = dataclasses.replace(osam_published("tiny").model, **OTHER[field])
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec))
    with pytest.raises(OuroborosError, match=rf"model\.{field} is .* and the published program knows only"):
        from_model(model)


def test_every_field_is_of_the_form_or_free() -> None:
    """A new field is one or the other: it changes what a model computes, or it does not."""
    free = {
        *("vocab_size", "hidden_size", "max_position_embeddings", "dropout", "init_std", "embedding_std", "head_std"),
        *("output_init", "zero_init_outputs", "register_std", "delta", "loop", "ffn", "norm", "mixer"),
    }
    own = {name for name in FORM if "." not in name}
    assert {field.name for field in dataclasses.fields(ModelSpec)} == own | free
    inner = {"buckets", "readout_hidden", "kupdate", "value_path", "freeze_phase", "detach_state", "freq_cache"}
    inner |= {"hash_seed", "dropout", "gate_start", "time_scales"}  # the last two: where training starts
    of_mixer = {name.removeprefix("mixer.") for name in FORM if name.startswith("mixer.")}
    assert {field.name for field in dataclasses.fields(OsamSpec)} == inner | of_mixer
    assert {f"norm.{field.name}" for field in dataclasses.fields(NormSpec)} <= set(FORM)


def tensors_with(**changes: Any) -> dict[str, Any]:
    state = {**golden()[0], **changes}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state_dict": tensors_with(**{"osam.Wq.weight": None})}, r"osam\.Wq\.weight missing"),
        ({"state_dict": tensors_with(**{"osam.Wx": torch.ones(2)})}, r"osam\.Wx unknown"),
        ({"state_dict": tensors_with(**{"embed.weight": torch.ones(17)})}, r"embed\.weight has shape \(17,\)"),
        (
            {"state_dict": tensors_with(**{"osam.ln.bias": torch.ones(3)})},
            r"osam\.ln\.bias has shape \(3,\), expected \(16,\)",
        ),
        ({"state_dict": tensors_with(**{"head.weight": torch.full((17, 16), torch.nan)})}, "holds NaN or infinity"),
        ({"state_dict": tensors_with(**{"osam.cs.h": torch.full((16,), 64)})}, r"osam\.cs\.h must .* 0 to 63"),
        ({"state_dict": tensors_with(**{"osam.cs.sign": torch.zeros(16)})}, r"osam\.cs\.sign must hold a sign"),
        ({"state_dict": {"osam.x": 3}}, r"entry 'osam\.x' is a int, not a tensor"),
        ({"cfg": {"d_model": 64}}, r"cfg\.d_model is 64 but embed\.weight has shape \(17, 16\)"),
        ({"cfg": {"m": 32}}, r"cfg\.m is 32 but osam\.readout\.0\.weight has shape \(32, 64\)"),
        ({"cfg": {"enable_val": "yes"}}, "enable_val must be true or false, got 'yes'"),
        ({"cfg": [1]}, "entry 'cfg' is no dictionary with names"),
        ({"train_cfg": {"kupdate": "3"}}, r"train_cfg\.kupdate must be a whole number"),
        ({"train_cfg": {"dropout": 2.0}}, r"mixer\.dropout must be in"),
        ({"stoi": {"a": 0}}, "stoi and itos are not each other's inverse"),
        ({"stoi": None}, "stoi and itos must both be dictionaries"),
        ({"stoi": {"b": 0, "a": 1}, "itos": {0: "b", 1: "a"}}, "the ids in stoi are not the characters' ranks"),
        ({"stoi": {"ab": 0}, "itos": {0: "ab"}}, "stoi must give the id of single characters"),
        ({"stoi": {"a": 0}, "itos": {0: "a"}}, r"has 1 characters and 17 rows in embed\.weight"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(OuroborosError, match=f"osam.pt: .*{words}"):
        convert(saved(tmp_path, document(**changes)), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_its_own_characters_leave_no_room_for_a_tokenizer(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path / "bytes")
    with pytest.raises(OuroborosError, match="holds the characters it was trained with: leave --tokenizer out"):
        convert(saved(tmp_path, document()), tmp_path / "model", tokenizer=tmp_path / "bytes")


def test_a_file_without_characters_has_none() -> None:
    assert characters_of({"state_dict": {}}) is None
    assert characters_of({"stoi": {"a": 0, "b": 1}, "itos": {0: "a", 1: "b"}}) == ["a", "b"]


def test_the_frame_of_a_state_is_that_of_position_0() -> None:
    """The published sum is of tokens that turn; rows of a batch may be at positions of their own."""
    torch.manual_seed(0)
    mixer = Osam(OsamSpec(buckets=9, readout_hidden=4, freq_cache=True), 6, 1e-5)
    state = torch.randn(2, 12, 7)
    here, there = published_state(mixer, state, 5), published_state(mixer, state, torch.tensor([5, 8]))
    for one, other in zip(here, there):
        assert torch.equal(one[0], other[0]) and not torch.allclose(one[1], other[1])
    turned = torch.polar(torch.ones(()), 5 * mixer.turn().frequency_D[0])
    kappa = torch.complex(state[:, :6, -1], state[:, 6:, -1]) * turned
    expected = torch.zeros(2, 9, dtype=torch.complex64)
    for j in range(6):
        expected[:, mixer.key_buckets[j]] += mixer.key_signs[j] * kappa[:, j]
    torch.testing.assert_close(torch.complex(here.K[:, 0], here.K[:, 1]), expected)
    assert here.FK is not None
    torch.testing.assert_close(here.FK, torch.fft.fft(expected, norm="ortho"))
    alone = Osam(OsamSpec(buckets=9, readout_hidden=4, value_path=False), 6, 1e-5)
    assert published_state(alone, state[..., -1:], 5)[1:] == (None, None)
    fading = Osam(OsamSpec(buckets=9, readout_hidden=4, decay=True), 6, 1e-5)
    with pytest.raises(OuroborosError, match=r"mixer\.decay has no published form"):
        published_state(fading, state, 5)


def test_settings_without_a_trace_in_tensors_are_the_callers() -> None:
    spec = to_spec(golden()[0], {"use_freq_cache": True}, {"freeze_phase": True}, gate_cap=1.0)
    assert (spec.mixer.freq_cache, spec.mixer.freeze_phase, spec.mixer.gate_cap) == (True, True, 1.0)
    assert spec.mixer.hash_seed == 42 and spec.vocab_size == 17
