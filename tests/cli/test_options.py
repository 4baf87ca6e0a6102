"""Options: errors in one line, lists in both spellings, JSON that every reader can read."""

import io
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import tyro

from ouroboros.cli import VERBS
from ouroboros.errors import UsageError
from ouroboros.verbs.options import collect, emit_json, parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Example."""

    run: tyro.conf.Positional[Path]
    steps: int = 1
    kind: Literal["one", "two"] = "one"
    switch: bool = False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["r", "--stepz", "3"], ["--stepz", "did you mean --steps?"]),
        (["r", "--swich"], ["did you mean --switch?"]),
        (["r", "--steps", "many"], ["--steps", "many"]),
        (["r", "--steps"], ["--steps"]),
        (["r", "--kind", "three"], ["three", "'one', 'two'"]),
        ([], ["Missing", "run (required)"]),
        (["r", "s"], ["s"]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_errors_are_one_line_that_names_the_option(arguments, words, encoding, capsys, monkeypatch):
    """Also where the terminal has no Unicode, and the box is drawn otherwise."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(UsageError) as caught:
        parse(Options, "example", arguments)
    monkeypatch.undo()
    message = str(caught.value)
    assert (
        "\n" not in message
        and "--help" not in message.partition(";")[0]
        and message.endswith("see `ouroboros example --help`")
    )
    assert (
        not set(message) & set("\u2502\u256d\u2500\x1b|") and "---" not in message
    )  # nothing of the box around tyro's messages
    assert all(word in message for word in words), message
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_good_options_and_defaults():
    assert parse(Options, "example", ["a/b", "--steps", "4"]) == Options(run=Path("a/b"), steps=4)
    default = Options(run=Path("x"), kind="two")
    assert parse(Options, "example", ["y"], default=default) == Options(run=Path("y"), kind="two")


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_a_verb_has_a_sentence_of_help(verb, cli, trained, monkeypatch):
    """Those of the specifications too, and those that choose parts."""
    asked = {}
    with monkeypatch.context() as patch:
        patch.setattr("tyro.cli", lambda cls, **given: asked.update(given, cls=cls) or sys.exit(0))
        cli(verb, trained if verb == "resume" else "loop", "--help")
    with pytest.warns(DeprecationWarning):
        parser = tyro.extras.get_parser(asked["cls"], **{k: asked[k] for k in ("config", "default") if k in asked})
    for action in parser._actions:
        name = (*action.option_strings, action.dest)[0]
        sentence = re.sub(r"\((default: .*|required)\)|\x1b\[[0-9;]*m", "", str(action.help)).strip()
        assert name == "-h" or re.fullmatch(r"(``|[A-Z]).*\.", sentence, re.DOTALL), (name, sentence)


def test_help_goes_to_standard_output_and_ends_well(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Options, "example", ["--help"])
    assert stop.value.code in (0, None) and "usage: ouroboros example" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "collected"),
    [
        ("--data a --seed 1 --data b", "--data a b --seed 1"),
        ("x --data a b --data=c", "x --data a b c"),
        ("--data=a", "--data a"),
        ("x --seed 1", "x --seed 1"),
        ("x --data", "x --data"),
        ("--data.tokenizer bytes --data a", "--data.tokenizer bytes --data a"),
        ("--data a=0.5 --out r", "--data a=0.5 --out r"),
    ],
)
def test_repeated_lists_are_gathered(arguments, collected):
    assert collect(arguments.split(), "--data") == collected.split()


def test_json_is_one_strict_object(capsys):
    emit_json({"a": math.nan, "b": [math.inf, 1.5, {"c": -math.inf}], "d": (1, "\u00e9"), "e": None})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"a": None, "b": [None, 1.5, {"c": None}], "d": [1, "\u00e9"], "e": None}
