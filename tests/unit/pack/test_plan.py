"""Every tensor of every model has a rule, and rules say what they mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from variants import BASE, VARIANTS

from ouroboros.config import ModelSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.pack.plan import DEFAULT, Plan, Rule, entries, uniform
from ouroboros.recipes import RECIPES, recipe


def built(spec: ModelSpec) -> OuroborosForCausalLM:
    torch.manual_seed(0)
    return OuroborosForCausalLM(OuroborosConfig.from_spec(spec))


MODELS = {f"recipe {name}": recipe(name, "tiny").model for name in RECIPES} | VARIANTS


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_every_model_is_covered(name):
    with torch.device("meta"):
        model = built(MODELS[name])
    chosen = DEFAULT.choose(model)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert chosen.keys() == model.state_dict().keys() - tied
    for entry, rule in chosen.values():
        assert rule.keep or entry.tensor.numel() > 512, f"{entry.name}: codes for a small tensor"
        assert not (rule.keep and entry.role in ("matrix", "embedding") and entry.tensor.numel() > 512), entry.name


def test_places():
    model = built(BASE.replace(layout="1 (1)x2 a:1 1 a", tie_embeddings=False))
    place = {entry.name: entry.place for entry in entries(model)}
    layers = {name.split(".")[3]: place[name] for name in place if ".layers." in name}
    assert layers == {"0": "once", "1": "looped", "2": "looped", "3": "once"}
    assert place["model.embed_tokens.weight"] == place["lm_head.weight"] == place["model.norm.weight"] == "outside"


def test_loop_parts_are_looped():
    place = {entry.name: entry.place for entry in entries(built(VARIANTS["loop smear, anchor, two loops"]))}
    assert {where for name, where in place.items() if ".loops." in name} == {"looped"}


def test_mixed_settings():
    mixed = DEFAULT.first(Rule(role="matrix", place="looped", bits=8), Rule(role="matrix", place="once", bits=6))
    bits = {name: rule.bits for name, (entry, rule) in mixed.choose(built(BASE)).items() if entry.role == "matrix"}
    assert {bits[name] for name in bits if ".layers.0." in name} == {6}
    assert {bits[name] for name in bits if ".layers.1." in name} == {8}


def test_other_bits_for_what_is_coded():
    """What is kept stays so, and the first that fits a tensor decides."""
    model = built(BASE)
    plain = uniform(6).choose(model)
    mixed = uniform(6).mixed(model, ["*.1.mlp.*=3", "looped=8", "outside=4"], "--bits-of").choose(model)
    for name, (entry, rule) in mixed.items():
        if plain[name][1].keep is not None:
            assert rule == plain[name][1]
            continue
        looped = 3 if ".mlp." in name else 8
        assert rule.bits == {"once": 6, "looped": looped, "outside": 4}[entry.place], name
        assert (rule.clip, rule.method) == (plain[name][1].clip, plain[name][1].method)
    assert {rule.bits for _, rule in mixed.values() if rule.keep is None} == {3, 4, 6, 8}
    assert uniform(6).mixed(model, [], "--bits-of") == uniform(6)


@pytest.mark.parametrize(
    "texts",
    [
        ["*.expert.*=4"],
        ["*norm*=4"],
        ["*.mlp.*=4", "*.up_proj.*=8"],
        ["*=4", "looped=8"],
    ],
    ids=["no such name", "kept as numbers", "decided before", "place decided before"],
)
def test_bits_for_no_tensor_are_refused(texts):
    with pytest.raises(OuroborosError, match=r"^--bits-of: .* decides for no tensor .* for example, model"):
        DEFAULT.mixed(built(BASE), texts, "--bits-of")


def test_a_place_that_the_model_does_not_have_is_refused():
    with pytest.raises(OuroborosError, match="'looped=8' decides for no tensor"):
        DEFAULT.mixed(built(BASE.replace(layout="2", loop=())), ["looped=8"], "--bits-of")


def test_the_first_rule_that_fits_decides():
    plan = DEFAULT.first(Rule(where="*.mlp.*", keep="float32"), Rule(where="*.mlp.up_proj.*", bits=3))
    rule = plan.choose(built(BASE))["model.decoder.layers.0.mlp.up_proj.weight"][1]
    assert rule.keep == "float32"


def test_tensors_without_a_rule_are_named():
    plan = Plan((Rule(role="matrix"),))
    with pytest.raises(OuroborosError, match=r"no rule says what becomes of model\.embed_tokens\.weight"):
        plan.choose(built(BASE))


def test_a_pattern_of_nothing_is_refused():
    with pytest.raises(OuroborosError, match=r"'\*\.expert\.\*' is the name of no tensor"):
        DEFAULT.first(Rule(where="*.expert.*")).choose(built(BASE))


def test_a_foreign_parameter_is_named():
    model = built(BASE)
    model.model.decoder.layers[0].mlp.foreign = nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(OuroborosError, match=r"layers\.0\.mlp\.foreign"):
        DEFAULT.choose(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"role": "weights"}, "role is one of"),
        ({"place": "loop"}, "place is one of"),
        ({"bits": 1}, "2 to 8 bits"),
        ({"group": -1}, "number of columns"),
        ({"keep": "bfloat16"}, "float16 or float32"),
        ({"method": "magic"}, "gptq or rounding"),
    ],
)
def test_rules_that_mean_nothing(options, message):
    with pytest.raises(OuroborosError, match=message):
        Rule(**options)


def test_uniform_has_bits_of_its_own_for_tables():
    bits = {name: rule.bits for name, (_, rule) in uniform(4, tables=7).choose(built(BASE)).items() if not rule.keep}
    assert bits["model.embed_tokens.weight"] == 7
    assert set(bits.values()) == {4, 7}
