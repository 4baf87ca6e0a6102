"""Published styles: found by the model's specification, in what every system enters."""

import json

import pytest

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.recipes import RECIPES
from ouroboros.registry import found, load
from ouroboros.serve import styles
from ouroboros.serve.sampling import Sampling
from ouroboros.serve.styles import PLACE, Style, published_sampling


def saved(path, spec: ModelSpec):
    """A directory that looks like a model with this specification."""
    OuroborosConfig.from_spec(spec).save_pretrained(path)
    (path / "model.safetensors").touch()
    return path


def test_a_style_is_that_of_the_system_which_recognises_the_model(tmp_path, monkeypatch):
    entries = {
        "wide": Style(recognises=lambda model: model.hidden_size > 100, sampling=Sampling(top_k=1)),
        "narrow": Style(recognises=lambda model: model.hidden_size == 16, sampling=Sampling(top_k=2)),
    }
    monkeypatch.setattr(styles, "found", lambda place: {name: name for name in entries if place == PLACE})
    monkeypatch.setattr(styles, "load", entries.__getitem__)
    small = {"mixer": AttentionSpec(num_heads=2), "ffn": FeedForwardSpec(intermediate_size=16)}
    model = saved(tmp_path / "a", ModelSpec(hidden_size=16, **small))
    assert published_sampling(model) == Sampling(top_k=2)
    other = saved(tmp_path / "b", ModelSpec(hidden_size=32, **small))
    with pytest.raises(OuroborosError, match=r"of no published system .* \(wide, narrow\); leave out --style"):
        published_sampling(other)


def test_every_entry_is_a_style_and_no_model_has_two():
    entries = [load(target) for target in found(PLACE).values()]
    assert entries and all(isinstance(entry, Style) for entry in entries)
    for value in RECIPES.values():
        assert sum(entry.recognises(value.model) for entry in entries) <= 1, value.name


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"model_type": "llama"}', json.dumps({"model_type": "ouroboros", "spec": {"mixer": 1}})],
)
def test_what_is_no_model(content, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(content)
    with pytest.raises(OuroborosError, match="cannot load the model: "):
        published_sampling(tmp_path)
    with pytest.raises(OuroborosError, match="no such model directory"):
        published_sampling(tmp_path / "nowhere")
