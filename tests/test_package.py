"""The wheel: made of the archive that is published, installed alone, and used without the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet")


def run(*command: object, **options: object) -> str:
    """What a command prints; one that fails shows its errors."""
    made = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, **options)  # type: ignore
    assert made.returncode == 0, (command, made.stdout, made.stderr)
    return made.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built of the source archive, as `python -m build` does it."""
    where = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", where, cwd=ROOT)
    (archive,) = where.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(where / "source", filter="data")
    (source,) = (where / "source").iterdir()
    run(*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", where, source)
    (made,) = where.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Callable[..., str]:
    """Run the installed command in a directory outside the source tree."""
    target, outside = wheel.parent / "installed", wheel.parent / "outside"
    outside.mkdir()
    run(*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    where = run(sys.executable, "-c", "import ouroboros; print(ouroboros.__file__)", cwd=outside, env=environment)
    assert Path(where.strip()) == target / "ouroboros" / "__init__.py", "the source tree comes first"
    return lambda *words: run(target / "bin" / "ouroboros", *words, cwd=outside, env=environment)


def test_the_wheel_has_every_file_of_the_library(wheel):
    source = ROOT / "src"
    wanted = {path.relative_to(source).as_posix() for path in (source / "ouroboros").rglob("*") if path.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as opened:
        files = {name for name in opened.namelist() if ".dist-info/" not in name}
    assert files == wanted
    assert {Path(name).suffix for name in files} >= {".py", ".css", ".j2"}, "data files too"


def test_the_installed_command_works_outside_the_tree(installed):
    assert "usage: ouroboros VERB" in installed("--help")
    assert "osam" in installed("recipes") and "parameters" in installed("recipes")


@pytest.mark.timeout(400)
def test_the_installed_command_makes_a_page(installed, tmp_path):
    """Training, scoring and the page, whose template and style sheet are data files."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Note {n}: {n} times {n} is {n * n}.\n" for n in range(1500)))
    small = ("--minutes", "0.05", "--size", "tiny", "--tokenizer", "bytes")
    installed("demo", *small, "--data", text, "--out", tmp_path / "demo")
    assert "<style>" in (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")


def test_the_image_is_built_of_files_that_exist():
    """What can be checked without a container engine: what is copied exists and is not ignored, extras have names."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied and all((ROOT / word).exists() and f"!{word}" in kept for word in copied), copied
    extras = next(line for line in lines if line.startswith("ARG EXTRAS=")).partition("=")[2].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {*extras} <= project["optional-dependencies"].keys()
    assert {project["readme"], *project["license-files"]} <= {*copied}, "the build reads them"
