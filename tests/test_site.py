"""The site of the documentation is built without a network, and its links lead somewhere."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Links(HTMLParser):
    """What an HTML page points to, and the anchors it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given["id"] or ""} if "id" in given else set()
        target = given.get("src") or given.get("href")
        if target:
            (self.targets if tag == "a" else self.loaded).add(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make site` writes it."""
    where = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs/site"]
    made = subprocess.run(
        [*command, "-d", where / "trees", ".", where / "html"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert made.returncode == 0 and not made.stderr, made.stderr
    return where / "html"


@pytest.mark.timeout(400)
def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    pages = {path: Links(path) for path in site.rglob("*.html") if "_downloads" not in path.parts}
    assert len(pages) > 30
    broken = []
    for path, page in pages.items():
        for target in page.targets | page.loaded:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                broken += [f"{path.name} loads {target}"] if target in page.loaded else []
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not file.is_file() or (anchor and file in pages and anchor not in pages[file].anchors):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert not broken, broken


def test_every_document_is_a_page(site):
    documents = [path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]]
    missing = [str(path) for path in documents if not (site / path.with_suffix(".html")).is_file()]
    assert not missing, missing


def test_docstrings_of_the_public_interface_are_on_the_site(site):
    page = (site / "docs" / "site" / "api.html").read_text(encoding="utf-8")
    for name in ("ouroboros.build", "ouroboros.load", "ouroboros.RECIPES", "ouroboros.config.ModelSpec.layout"):
        assert f'id="{name}"' in page, name
    assert "A trained model in evaluation mode" in page
