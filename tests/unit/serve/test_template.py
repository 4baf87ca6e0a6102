"""Templates: found by name or written, and that of a run's heaviest source."""

import dataclasses

import pytest

from ouroboros.config import DataSpec
from ouroboros.data.formats import formats
from ouroboros.errors import OuroborosError
from ouroboros.recipes import recipe
from ouroboros.serve.template import find_template, recipe_template


def test_names_templates_and_none():
    assert find_template("none") is None
    assert find_template("metamath") is formats()["metamath"]
    written = find_template("Ask {a}:\\nTell {b}")
    assert written is not None and written.prompt("me") == "Ask me:\nTell"


def test_every_named_format_is_usable_or_says_why():
    for name, form in formats().items():
        if form.prompt("x") is None:
            with pytest.raises(OuroborosError, match=f"template '{name}' has no second column.*use .*metamath.*none"):
                find_template(name)
        else:
            assert find_template(name) is form


def test_unknown_names_offer_the_nearest():
    with pytest.raises(OuroborosError, match="format 'metamth': unknown; did you mean 'metamath'"):
        find_template("metamth")


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        (("python:",), None),
        (("a.jsonl@qa=0.4", "b.jsonl@mbpp=0.6"), "mbpp"),
        (("a.jsonl@qa", "b.jsonl@mbpp"), "qa"),
        (("a.jsonl@qa=0.4", "notes.txt=0.6"), None),
        (("mix:rhrm",), "tinygsm"),
        (("mix:rhrm:gone=2", "b.jsonl@qa=1"), "qa"),
        (("a.jsonl@cosmopedia=2", "b.jsonl@qa"), None),
    ],
)
def test_the_template_of_the_heaviest_source(sources, name):
    trained = dataclasses.replace(recipe("gpt", "tiny"), data=DataSpec(sources=sources))
    found = recipe_template(trained)
    assert (found.name if found else None) == name
