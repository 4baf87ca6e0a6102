"""``recipes`` and ``show``."""

import pytest

from ouroboros.accounting import cost
from ouroboros.recipes import RECIPES, recipe, sizes


def test_recipes_lists_every_recipe_and_size(cli):
    result = cli("recipes")
    assert result.status == 0 and result.err == ""
    facts = cli("recipes", "--json").json
    assert set(facts) == set(RECIPES)
    for name, row in facts.items():
        assert tuple(row["sizes"]) == sizes(name) and name in result.out and row["description"] in result.out
        for size, numbers in row["sizes"].items():
            assert numbers["parameters"] == cost(recipe(name, size).model).parameters
            assert f"{numbers['parameters']:,}" in result.out


def test_show_draws_the_schedule_and_its_costs(cli):
    result = cli("show", "loop")
    assert result.status == 0 and "[2]-[3]" in result.out and "x 2" in result.out
    facts = cli("show", "loop", "--json").json
    expected = cost(recipe("loop").model, context=512)
    assert facts["parameters"] == expected.parameters and facts["flops_per_token"] == expected.flops_per_token
    assert facts["cache_bytes_per_token"] == expected.cache_bytes_per_token()
    assert facts["bytes_at_6_bits"] == expected.parameters * 6 // 8 and facts["state_bytes"] == 0
    for number in ("parameters", "flops_per_token", "training_flops_per_token", "cache_bytes_per_token"):
        assert f"{facts[number]:,}" in result.out


def test_show_takes_loops_context_size_and_model_options(cli):
    plain, more = (cli("show", "loop", *extra, "--json").json for extra in ([], ["--loops", "5"]))
    assert more["model"]["layout"] == "2 (2)x5 2" and more["parameters"] == plain["parameters"]
    assert more["flops_per_token"] > plain["flops_per_token"]
    assert cli("show", "loop", "--context", "64", "--json").json["flops_per_token"] < plain["flops_per_token"]
    assert cli("show", "loop", "--model.hidden-size", "128", "--json").json["model"]["hidden_size"] == 128
    for arguments in (["gpt", "--size", "tiny"], ["--size", "tiny", "gpt"], ["--size=tiny", "gpt"]):
        assert cli("show", *arguments, "--json").json["parameters"] == cost(recipe("gpt", "tiny").model).parameters


@pytest.mark.parametrize(
    ("arguments", "mixer"),
    [
        (["loop", "--model.mixer.num-heads", "2"], {"kind": "attention", "num_heads": 2}),
        (["rhrm", "--model.mixer.kv-rank", "32"], {"kind": "latent_attention", "kv_rank": 32}),
        (["--size", "tiny", "rhrm", "--model.mixer.kv-rank", "8"], {"kind": "latent_attention", "kv_rank": 8}),
        (["rhrm-published", "--model.mixer.latent-rank", "16"], {"kind": "bottleneck_attention", "latent_rank": 16}),
    ],
)
def test_the_mixers_own_options_are_plain_options(arguments, mixer, command):
    """Of the real command: which of several specifications a field holds is the recipe's to say."""
    found = command("show", *arguments, "--json").json["model"]["block"]["mixer"]
    assert {name: found[name] for name in mixer} == mixer


def test_help_shows_the_options_of_the_recipe_that_is_named(cli):
    for recipe_name, own, other in (("rhrm", "--model.mixer.kv-rank", "qkv-bias"), ("loop", "qkv-bias", "kv-rank")):
        shown = cli("show", recipe_name, "--help").out
        assert own in shown and other not in shown
    assert "did you mean '--model.mixer.kv-rank'?" in cli("show", "rhrm", "--model.mixer.kvrank", "3").error(2)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["lop"], 1, "unknown recipe 'lop'; did you mean 'loop'?"),
        (["--size", "tiny", "lop"], 1, "unknown recipe 'lop'"),
        (["loop", "--size", "smaall"], 1, "unknown size 'smaall'; did you mean 'small'?"),
        (["loop", "--model.layout", "(2)x0"], 2, "layout '(2)x0', column 5"),
        (["loop", "--model.layout", "((1)x2"], 2, "column 1: unexpected '((1)x2'"),
        (["loop", "--model.layout", ""], 2, "layout '', column 1: is empty"),
        (["loop", "--loops", "0"], 1, "loops must be >= 1"),
        (["gpt", "--loops", "2"], 1, "layout '6' has no loop"),
        (["loop", "--model.mixer.num-heads", "3"], 2, "multiple of mixer.num_heads (3)"),
        (["loop", "--model.hiden-size", "3"], 2, "did you mean '--model.hidden-size'?"),
        ([], 2, "Missing"),
    ],
)
def test_bad_input(arguments, status, words, cli):
    assert words in cli("show", *arguments).error(status)
