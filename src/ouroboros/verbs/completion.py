"""``ouroboros completion SHELL``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import tyro

from ouroboros.verbs.options import describe, parse, say

_ANY_OF: Any = Union  # a type checker wants its members spelt out
FILES = """
# Where tyro's function knows nothing, as for the name of a model, bash completes names of files.
_ouroboros_or_files() {
  _tyro_ouroboros
  [[ -n "${COMPREPLY[*]}" ]] || COMPREPLY=()
}
complete -o default -F _ouroboros_or_files ouroboros
"""
"""Behind the script for bash."""


@dataclass(frozen=True)
class CompletionOptions:
    """Print a script that lets a shell complete the verbs of ouroboros and their options. The script asks Python at
    each completion, and knows the options that each verb lists with --help."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """The shell to write the script for."""


def completion(arguments: Sequence[str]) -> int:
    """The verb ``completion``."""
    options = parse(CompletionOptions, "completion", arguments)
    from ouroboros.cli import VERBS  # which imports this module

    verbs = []
    for verb, (module, summary) in VERBS.items():
        cls, given = describe(getattr(importlib.import_module(f"ouroboros.verbs.{module}"), verb))
        verbs.append(Annotated[cls, tyro.conf.subcommand(name=verb, description=summary, **given)])
    program = _ANY_OF[tuple(verbs)]
    try:
        # A switch has one spelling for each of its values on the command line, and no verb has verbs of its own.
        tyro.cli(
            program,
            prog="ouroboros",
            args=["--tyro-write-completion", options.shell, "-"],
            config=(tyro.conf.AvoidSubcommands,),
        )
    except SystemExit as stop:  # how tyro ends when it has written the script
        say(FILES if options.shell == "bash" else "")
        return int(stop.code or 0)
    raise AssertionError("tyro has parsed options where it was asked for a script")
