"""The command itself: help, speed, unknown words, broken pipes, full disks."""

import os
import subprocess
import sys

import pytest

import ouroboros
from ouroboros import cli as module
from ouroboros.cli import THREAD_RUNTIME, VERBS, Terminated, let_waiting_threads_sleep
from ouroboros.errors import OuroborosError, UsageError


def test_help_lists_every_verb(cli):
    for word in ("--help", "-h", "help"):
        result = cli(word)
        assert result.status == 0 and result.err == ""
        assert all(f"  {verb} " in result.out and summary in result.out for verb, (_, summary) in VERBS.items())
    nothing = cli()
    assert nothing.status == 2 and nothing.out == result.out


def test_the_contract_names_its_verbs():
    """The verbs of the first release; names stay."""
    wanted = "demo recipes show train resume eval generate chat report check tokenizer"
    assert set(VERBS) >= set(wanted.split())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_says_what_it_does(verb, cli):
    result = cli(verb, "--help")
    assert result.status == 0 and result.err == ""
    assert f"usage: ouroboros {verb}" in result.out and "--help" in result.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_an_unknown_option_in_one_line(verb, cli, trained):
    first = {"resume": [trained], "export": ["loop", "out"], "completion": ["bash"]}.get(verb, ["loop"])
    message = cli(verb, *first, "--tempratur", "1").error(2)
    assert "--tempratur" in message or "required" in message.lower(), message
    assert f"ouroboros {verb} --help" in message


def test_version(cli):
    assert cli("--version").out == cli("-V").out == f"ouroboros {ouroboros.__version__}\n"


def test_an_unknown_verb_offers_the_nearest(cli):
    assert cli("trainn").error(2) == "unknown verb 'trainn'; did you mean 'train'?"
    assert "known: " in cli("xyzzy").error(2)


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (OuroborosError("two\n  lines"), 1, "error: two lines\n"),
        (UsageError("wrong"), 2, "error: wrong\n"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 1, "error: a.txt: No such file or directory\n"),
        (OSError("odd"), 1, "error: odd\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Terminated(143), 143, "terminated\n"),
    ],
)
def test_errors_become_one_line_and_a_status(raised, status, line, cli, monkeypatch):
    def failing(arguments):
        raise raised

    monkeypatch.setattr("ouroboros.verbs.show.recipes", failing)
    result = cli("recipes")
    assert (result.status, result.out, result.err) == (status, "", line)


def test_a_defect_is_not_dressed_up_as_a_users_error(cli, monkeypatch):
    def failing(arguments):
        raise TypeError("a bug")

    monkeypatch.setattr("ouroboros.verbs.show.recipes", failing)
    with pytest.raises(TypeError, match="a bug"):
        cli("recipes")


def test_help_is_quick(command):
    """Under 0.3 s of the processor's time, or not much more than Python takes to start where that is slow."""

    def seconds(run) -> float:
        before = os.times()
        run()
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    bare = [seconds(lambda: subprocess.run([sys.executable, "-c", "import re, json"], check=True)) for _ in range(3)]
    help_ = [seconds(lambda: command("--help", fresh=True)) for _ in range(3)]
    assert min(help_) < max(0.3, 6 * min(bare))


def test_a_reader_that_leaves_is_no_error_to_talk_about(spawn):
    process = spawn("recipes", fresh=True)
    process.stdout.close()
    assert process.wait(timeout=60) == 1 and process.stderr.read() == ""
    process.stderr.close()


def test_a_full_disk_under_standard_output_is_said_once(command):
    with open("/dev/full", "w") as full:
        result = command("recipes", stdout=full)
    assert result.status == 1 and result.err == "error: [Errno 28] No space left on device\n"


def test_each_verb_is_a_function_of_its_name():
    import importlib

    for verb, (name, _) in VERBS.items():
        assert callable(getattr(importlib.import_module(f"ouroboros.verbs.{name}"), verb))
    assert module.main is not None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, THREAD_RUNTIME),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_waiting_threads_sleep_unless_the_user_has_said_otherwise(given, expected):
    let_waiting_threads_sleep(given)
    assert given == expected
