"""Commands that are shown and not run, because they take hours or a container, name what exists."""

import re
import shlex
from pathlib import Path

import pytest

from ouroboros.cli import VERBS, main

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
SHOWN = re.compile(r"^    ((?:ouroboros|python) .*)$|^docker run .* (ouroboros .*)$|`(ouroboros [^`]*)`", re.MULTILINE)
"""An indented line, what a container runs, or a command within a sentence."""


def commands() -> list[tuple[str, list[str]]]:
    """Each command as words, with the document that shows it."""
    found = []
    for path in DOCUMENTS:
        for match in SHOWN.finditer(path.read_text(encoding="utf-8")):
            text = next(filter(None, match.groups()))
            found.append((path.relative_to(ROOT).as_posix(), shlex.split(text.replace("\n", " "), comments=True)))
    return found


def names(words: list[str]) -> set[str]:
    """The options among the words; those of specifications have a dot and depend on the recipe, and those behind a
    bare ``--`` are for another program."""
    own = words[: words.index("--")] if "--" in words else words
    return {name for word in own if word.startswith("--") and "." not in (name := word.partition("=")[0])}


def test_verbs_and_their_options_exist(capsys):
    wrong, known = [], {}
    for document, words in commands():
        if words[0] != "ouroboros" or words[1].isupper() or words[1].startswith("-"):
            continue
        verb = words[1]
        if verb not in VERBS:
            wrong.append(f"{document}: {verb}")
            continue
        if verb not in known:
            for more in ([], ["--heal"]) if verb == "convert" else ([],):
                with pytest.raises(SystemExit):
                    main([verb, *more, "--help"])
            known[verb] = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) | {"--help"}
        wrong += [f"{document}: ouroboros {verb} {option}" for option in sorted(names(words) - known[verb])]
    assert known and not wrong, wrong


def test_scripts_and_their_options_exist():
    wrong, scripts = [], set()
    for document, words in commands():
        if words[0] == "python" and words[1].endswith(".py"):
            script = ROOT / words[1]
            if not script.is_file():
                wrong.append(f"{document}: {words[1]}")
                continue
            scripts.add(script)
            sources = [script, *script.parent.glob("common*.py")]
            text = "".join(path.read_text(encoding="utf-8") for path in sources)
            wrong += [f"{document}: {words[1]} {option}" for option in names(words) if f'"{option}"' not in text]
    assert scripts and not wrong, wrong
