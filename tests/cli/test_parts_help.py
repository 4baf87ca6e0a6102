"""--help of what chooses parts."""

import pytest


@pytest.mark.parametrize("verb", ["train", "show", "resume"])
def test_help_shows_how_parts_are_chosen(verb, cli, trained):
    shown = " ".join(cli(verb, trained if verb == "resume" else "loop", "--help").out.split())
    for option in (
        *("--model.residual {", "--model.loop.inject, --model.loop.no-inject", "--model.loop.inject.mode {add,concat}"),
        *("--model.loop.gate.bias FLOAT", "--model.stem.positions,", "--model.at.WHERE.OPTION VALUE"),
    ):
        assert option in shown
    assert ".kind" not in shown


def test_help_shows_the_options_of_a_chosen_part(cli):
    shown = cli("show", "gpt", "--model.residual", "delta", "--model.loop.gate", "--help").out
    assert "--model.residual.beta-init FLOAT" in shown
    assert "--model.residual.beta-init" not in cli("show", "gpt", "--help").out
