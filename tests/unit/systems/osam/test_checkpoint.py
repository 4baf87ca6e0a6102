"""Published OSAM checkpoints: what they become, the two ids they lack, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ouroboros.api import load, open_model
from ouroboros.convert.readers import convert
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.model.reading import load_model
from ouroboros.systems.osam.checkpoint import characters_of, to_model

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "data" / "osam"
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
    assert (made.system, bool(made.tokenizer), made.sizes["kupdate"], made.sizes["m"]) == ("OSAM", True, 3, 64)
    assert "17 characters" in made.summary
    opened = open_model(tmp_path / "model")
    model, tokenizer = opened.model, opened.tokenizer
    mixer = model.model.spec.block.mixer
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
    assert model.model.spec.block.mixer.kupdate == 1
    assert to_model(golden()[0], train_cfg={"kupdate": 0}).model.spec.block.mixer.kupdate == 1  # less counts as 1 there
    with pytest.raises(OuroborosError, match=r"osam.pt: settings: mixer\.kupdate must be >= 1, got 0"):
        convert(source, tmp_path / "third", kupdate=0)


def test_a_file_of_tensors_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    state, ids, logits = golden("default_perturbed")
    made = convert(saved(tmp_path, {f"_orig_mod.{name}": value for name, value in state.items()}), tmp_path / "model")
    assert not made.tokenizer and "value path is on" in caplog.text and "does not say kupdate" in caplog.text
    with torch.no_grad():
        found = load_model(tmp_path / "model")(ids, use_cache=False).logits
    torch.testing.assert_close(found, logits, atol=5e-6, rtol=0)


def tensors_with(**changes: Any) -> dict[str, Any]:
    state = {**golden()[0], **changes}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state_dict": tensors_with(**{"osam.Wq.weight": None})}, r"osam\.Wq\.weight missing"),
        ({"state_dict": tensors_with(**{"embed.weight": torch.ones(17)})}, r"embed\.weight has shape \(17,\)"),
        (
            {"state_dict": tensors_with(**{"osam.ln.bias": torch.ones(3)})},
            r"osam\.ln\.bias has shape \(3,\), expected \(16,\)",
        ),
        ({"state_dict": tensors_with(**{"osam.cs.h": torch.full((16,), 64)})}, r"osam\.cs\.h must .* 0 to 63"),
        ({"state_dict": tensors_with(**{"osam.cs.sign": torch.zeros(16)})}, r"osam\.cs\.sign must hold a sign"),
        ({"state_dict": {"osam.x": 3}}, r"entry 'osam\.x' is a int, not a tensor"),
        ({"cfg": {"d_model": 64}}, r"cfg\.d_model is 64 but embed\.weight has shape \(17, 16\)"),
        ({"cfg": {"m": 32}}, r"cfg\.m is 32 but osam\.readout\.0\.weight has shape \(32, 64\)"),
        ({"cfg": {"enable_val": "perhaps"}}, "value_path: Input should be a valid boolean"),
        ({"cfg": [1]}, "entry 'cfg' is no dictionary with names"),
        ({"train_cfg": {"kupdate": "often"}}, "kupdate: Input should be a valid integer"),
        ({"train_cfg": {"dropout": 2.0}}, r"mixer\.dropout must be in"),
        ({"stoi": {"a": 0}}, "and be each other's inverse"),
        ({"stoi": None}, "stoi and itos must be dictionaries"),
        ({"stoi": {"b": 0, "a": 1}, "itos": {0: "b", 1: "a"}}, "must give each character its rank"),
        ({"stoi": {"ab": 0}, "itos": {0: "ab"}}, "must be dictionaries of single characters"),
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


def test_settings_without_a_trace_in_tensors_are_the_callers() -> None:
    spec = to_model(golden()[0], {"use_freq_cache": True}, {"freeze_phase": True}, gate_cap=1.0).model.spec
    mixer = spec.block.mixer
    assert (mixer.freeze_phase, mixer.gate_cap, mixer.hash_seed, spec.vocab_size) == (True, 1.0, 42, 17)
