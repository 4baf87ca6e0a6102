"""Everything the README shows is run, and what it prints is what is shown, numbers aside."""

import subprocess
import sys
from pathlib import Path

import pytest

from ouroboros.cli import main

ROOT = Path(__file__).resolve().parents[2]
JOBS = {"train", "resume", "eval", "generate", "chat", "show", "convert", "report", "check", "pack", "serve"}


@pytest.mark.timeout(400)
def test_commands_and_python_in_order(open_page, capsys):
    page = open_page("README.md")
    page.run(capsys.readouterr)
    assert page.verbs >= JOBS
    assert "<svg" in (page.place / "run.html").read_text(encoding="utf-8")


def test_what_show_prints_is_what_the_readme_shows(open_page, capsys):
    assert main(["show", "loop"]) == 0
    shown = capsys.readouterr().out
    blocks = open_page("README.md").blocks("text")
    assert any(shown.strip() in block for block in blocks), "README's drawing of `show loop` is out of date"


def test_the_picture_is_what_its_script_draws():
    drawn = subprocess.run(
        [sys.executable, "runs/looping_picture.py"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert drawn.stdout == (ROOT / "docs" / "looping.svg").read_text(encoding="utf-8")
