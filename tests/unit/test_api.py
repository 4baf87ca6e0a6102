"""The public interface: what is built, what is loaded, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

import ouroboros
from ouroboros import api, registry
from ouroboros.accounting import cost
from ouroboros.api import OpenedModel, build, load, open_model
from ouroboros.config import AttentionSpec, DataSpec, FeedForwardSpec, ModelSpec, Recipe, to_json
from ouroboros.data.tokenize import byte_tokenizer, train_bpe
from ouroboros.errors import OuroborosError
from ouroboros.model.reading import load_model
from ouroboros.recipes import recipe

SMALL = Recipe(
    name="small",
    model=ModelSpec(layout="1 (1)x2", hidden_size=16).replace(
        mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=16)
    ),
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A transformers directory."""
    torch.manual_seed(0)
    build(SMALL).save_pretrained(tmp_path / "model")
    byte_tokenizer().save(tmp_path / "model")
    return tmp_path / "model"


def text_tokenizer(path: Path):
    return open_model(path).tokenizer


def test_the_package_offers_the_public_names():
    assert ouroboros.build is api.build and ouroboros.load is api.load and ouroboros.RECIPES is api.RECIPES
    assert set(ouroboros.__all__) >= {"RECIPES", "build", "load"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ouroboros.nothing


@pytest.mark.parametrize("name", sorted(ouroboros.RECIPES))
def test_build_has_the_size_of_the_recipe(name):
    model = build(recipe(name, "tiny"))
    assert sum(p.numel() for p in model.parameters()) == cost(recipe(name, "tiny").model).parameters
    assert model.config.eos_token_id == (256 if recipe(name, "tiny").data.tokenizer == "bytes" else None)


def test_the_end_of_text_follows_the_tokenizer():
    bpe = Recipe(name="bpe", model=SMALL.model, data=DataSpec(tokenizer="bpe:300"))
    assert build(bpe).config.eos_token_id is None and build(bpe, eos_token_id=7).config.eos_token_id == 7
    assert build(SMALL, eos_token_id=3).config.eos_token_id == 3


def test_a_seed_decides_the_weights():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return build(SMALL).lm_head.weight

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_load_gives_model_and_tokenizer(saved):
    model, tokenizer = load(saved)
    torch.manual_seed(0)
    expected = build(SMALL)
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert tokenizer("abc").input_ids == [97, 98, 99] and tokenizer.decode([104, 105]) == "hi"
    assert torch.equal(AutoModelForCausalLM.from_pretrained(saved).lm_head.weight, model.lm_head.weight)
    assert load(str(saved))[0].schedule.notation == "1 (1)x2"


def test_loading_leaves_transformers_as_it_was(saved):
    for shown in (True, False):
        hf_logging.enable_progress_bar() if shown else hf_logging.disable_progress_bar()
        load_model(saved)
        assert hf_logging.is_progress_bar_enabled() is shown
    hf_logging.enable_progress_bar()


def test_what_is_no_model(tmp_path, saved):
    with pytest.raises(OuroborosError, match=r"no such model directory; `ouroboros train RECIPE --data SRC --out"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(OuroborosError, match="neither a finished model"):
        open_model(tmp_path)
    with pytest.raises(OuroborosError, match=r"config\.json is a file; give a run directory"):
        open_model(saved / "config.json")
    for suffix in ("pt", "pth", "bin", "pkl", "ckpt"):
        with pytest.raises(OuroborosError, match="pickled weights are never read"):
            open_model(tmp_path / f"weights.{suffix}")
    (saved / "model.safetensors").unlink()
    with pytest.raises(OuroborosError, match="neither a finished model"):
        load(saved)


def test_a_tokenizer_of_another_vocabulary_is_refused(saved):
    train_bpe([b"some words and some more words " * 20], 270).save(saved)
    for loader in (load, text_tokenizer):
        with pytest.raises(OuroborosError, match=r"model has a vocabulary of 257 and the tokenizer one of 270: they"):
            loader(saved)


def test_a_model_of_more_tokens_needs_its_own_tokenizer(saved):
    model = load_model(saved)
    model.resize_token_embeddings(260)
    model.save_pretrained(saved)
    assert load_model(saved).config.vocab_size == 260
    for loader in (load, text_tokenizer):
        with pytest.raises(OuroborosError, match=r"model has a vocabulary of 260 and the tokenizer one of 257: they"):
            loader(saved)


def test_no_tokenizer_is_one_line(saved):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (saved / file).unlink()
    for loader in (load, text_tokenizer):
        with pytest.raises(OuroborosError, match=r"holds no tokenizer \(tokenizer\.json\); copy the one") as caught:
            loader(saved)
        assert "\n" not in str(caught.value)
    assert load_model(saved).config.vocab_size == 257  # which needs none


def test_a_damaged_tokenizer_is_one_line(saved):
    (saved / "tokenizer.json").write_text("{")
    for loader in (load, text_tokenizer):
        with pytest.raises(OuroborosError, match="cannot (be loaded|load the tokenizer): .+") as caught:
            loader(saved)
        assert "\n" not in str(caught.value)


def test_the_text_tokenizer_is_the_same(saved):
    assert text_tokenizer(saved).encode(b"abc").tolist() == load(saved)[1]("abc").input_ids


def change(directory: Path, edit) -> None:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda w: w.pop("model.norm.weight"), r"do not fit .*missing keys: model\.norm\.weight"),
        (lambda w: w.update(stray=torch.zeros(2)), r"do not fit .*unexpected keys: stray"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), r"norm\.weight of shape \(3,\) for \(16,\)"),
        (lambda w: w["model.norm.weight"].fill_(float("nan")), r"weight 'model\.norm\.weight' holds NaN or infinity"),
        (lambda w: w["model.norm.weight"][:1].fill_(float("inf")), "holds NaN or infinity"),
    ],
)
def test_weights_that_do_not_fit_or_are_no_numbers(edit, words, saved, capfd):
    change(saved, edit)
    capfd.readouterr()
    with pytest.raises(OuroborosError, match=words):
        load_model(saved)
    assert capfd.readouterr() == ("", "")  # the message says it; transformers would print a table


def test_damaged_files_end_in_one_line(saved):
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (b"", content[:100], content[:-1], b"\xff" * 64):
        weights.write_bytes(damaged)
        with pytest.raises(OuroborosError, match="cannot load the model: .+") as caught:
            load_model(saved)
        assert "\n" not in str(caught.value)
    weights.write_bytes(content)
    (saved / "config.json").write_text("{")
    with pytest.raises(OuroborosError) as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_of_the_configuration_is_refused_by_name(saved):
    config = json.loads((saved / "config.json").read_text())
    config["spec"]["layuot"] = config["spec"].pop("layout")
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(OuroborosError, match=r"unknown key 'layuot'; did you mean 'layout'\?"):
        load_model(saved)


def test_pickled_weights_beside_the_configuration_are_not_read(saved):
    """A file that would run code when unpickled; it must not be touched."""
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch never'\ntR.")
    with pytest.raises(OuroborosError, match="neither a finished model"):
        load(saved)
    with pytest.raises(OuroborosError, match="cannot load the model"):
        load_model(saved)


def test_a_run_without_its_model_stands_for_its_newest_checkpoint(saved, tmp_path):
    from ouroboros.train.checkpoint import save

    model = load_model(saved)
    run = tmp_path / "run"
    for step in (1, 2):
        files = {"model.safetensors": dict(model.named_parameters())}
        save(run / "checkpoints", step, files=files, documents={}, extra=model.config.save_pretrained)
    assert open_model(run).directory == run / "checkpoints" / "step-00000002"
    assert open_model(run).model.schedule == model.schedule
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(OuroborosError, match="no checkpoint there"):
        open_model(run)


def test_what_is_opened_tells_its_specification_and_recipe_without_its_weights(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("ouroboros.model.reading.load_model", lambda directory: pytest.fail("the weights were read"))
    opened = open_model(saved)
    assert opened.spec == SMALL.model and opened.recipe is None and opened.run is None
    (saved / "recipe.json").write_text(to_json(SMALL))
    opened = open_model(saved)
    assert opened.recipe == SMALL and opened.run is not None and opened.run.path == opened.directory == saved
    for content in ("{", "[]", '{"spec": {}, "x": 1}', '{"spec": {"layuot": "2"}}'):
        (saved / "config.json").write_text(content)
        if content.startswith('{"spec": {}'):
            assert open_model(saved).spec == ModelSpec()
            continue
        with pytest.raises(OuroborosError, match="specification|layuot"):
            _ = open_model(saved).spec


def read_by_name(path: Path) -> OpenedModel | None:
    """An opener for the test below."""
    return OpenedModel(path, path.parent / "model") if path.suffix == ".packed" else None


def test_a_registered_opener_is_asked_first(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "found", lambda place: {"packed": "here:read_by_name"} if place == "openers" else {})
    monkeypatch.setattr(registry, "load", lambda target: read_by_name)
    packed = tmp_path / "file.packed"
    with pytest.raises(OuroborosError, match="no such model directory"):
        open_model(packed)
    packed.touch()
    assert open_model(packed).model.schedule == open_model(saved).model.schedule
    assert load(packed)[1]("abc").input_ids == [97, 98, 99]
