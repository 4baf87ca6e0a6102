"""Everything that the pages about concepts, tasks and systems show is run, each page in a directory of its own."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for name in ("concepts", "how-to", "systems")
    for path in (DOCS / name).glob("*.md")
)
NEEDS = {"how-to/transformers.md": ("peft", "trl")}
"""Packages of an extra that a page shows."""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", PAGES)
def test_page(name, open_page, capsys):
    missing = [package for package in NEEDS.get(name, ()) if find_spec(package) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    open_page(f"docs/{name}").run(capsys.readouterr)


def test_every_page_is_in_the_index():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    linked = {*pages} - {"index.md"} - {page for page in pages if page.startswith("adr/0")}
    assert not [page for page in sorted(linked) if f"({page}" not in index], "docs/index.md links every page"


def test_every_place_for_systems_is_documented():
    offered = {
        name
        for path in (ROOT / "src").rglob("*.py")
        for name in re.findall(r"""\bfound\("(\w+)"\)""", path.read_text(encoding="utf-8"))
    }
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert not [name for name in sorted(offered) if f"`{name}`" not in guide], "CONTRIBUTING lists every place"
