"""House rules that no linter expresses; the rest are ruff, pyrefly, import-linter and codespell (``make check``)."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

NO_UNIT_TEST = {
    "config/parts/residual.py": "kinds and counts; tests/unit/nn/test_residual.py tests what they build",
    "model/reading.py": "tests/unit/test_api.py; every model that is opened is read by it",
    "recipes/delta.py": "another path of ouroboros.systems.delta; tests/unit/systems/delta/test_published.py",
    "recipes/gpt.py": "a value; tests/recipes runs the harness on every recipe",
    "recipes/loop.py": "a value; tests/recipes runs the harness on every recipe",
}
"""Modules of src/ouroboros without a mirrored test file, each with the reason."""

FORBIDDEN_TEXT = {
    "a path of one machine": r"(?<![\w./-])/(work|root|home|tmp/w)/",
    "a folder outside the project": r"(?<![\w-])shared/",
    "a package host": r"pypi\.org|pythonhosted\.org|download\.pytorch\.org",
}
AUTHORSHIP = (
    r"(?i)\b(anthropic|claude|chatgpt|copilot|co-authored-by)\b"
    r"|\b(written|generated|made) (by|with) (an? )?(ai|llm|assistant|agent)\b"
)


@functools.cache
def project_files() -> tuple[Path, ...]:
    """Files that are, or would be, under version control."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = [git, "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    files = tuple(path for name in sorted(set(names)) if name and (path := ROOT / name).is_file())
    assert files, "git lists no file"
    return files


def relative(path: Path) -> str:
    """``path`` as written in messages: from the project's root, with forward slashes."""
    return path.relative_to(ROOT).as_posix()


def python_files(*folders: str) -> list[Path]:
    """The project's Python files in ``folders``."""
    return [p for p in project_files() if p.suffix == ".py" and relative(p).startswith(folders)]


def source_files() -> list[Path]:
    """The modules of the library."""
    return python_files("src/")


@functools.cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def text_lines() -> Iterator[tuple[Path, int, str]]:
    """Every line of every text file but this one, which has to spell out what it forbids."""
    for path in project_files():
        if path == Path(__file__).resolve() or path.name == "LICENSE":
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        yield from ((path, number, line) for number, line in enumerate(lines, 1))


def fail_with(problems: list[str], rule: str) -> None:
    """Fail with one line for each problem."""
    assert not problems, f"{rule}:\n  " + "\n  ".join(problems)


def test_files_are_short() -> None:
    lengths = {
        p: len(p.read_text(encoding="utf-8").splitlines()) for p in python_files("src/", "tests/", "benchmarks/")
    }
    long = [f"{relative(p)}: {n} lines" for p, n in lengths.items() if n > MAX_FILE_LINES]
    fail_with(long, f"no file has more than {MAX_FILE_LINES} lines; split it by responsibility")


def test_functions_are_short() -> None:
    problems = []
    for path in python_files("src/", "tests/", "benchmarks/"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    problems.append(f"{relative(path)}:{node.lineno}: {node.name} has {length} lines")
    fail_with(problems, f"no function has more than {MAX_FUNCTION_LINES} lines")


OF_PARTS_AND_SYSTEMS = ("systems/", "recipes/", "nn/", "config/")
TYPE_TEST = (
    r"isinstance\([^)]*(Spec|Part)\b|isinstance\([^)]*(Attention|Osam|Delta|Latent)|match [a-z_.]*\.kind"
    r"|\.kind (==|!=|in|not in) (?!kind\b|\w+\.kind\b)"  # a kind may be compared with another one
)
SYSTEM = r"(?i)\bosam|rhrm|r_hrm|deltaspec|\bddl\b|helix|crawler"


def shared_lines() -> Iterator[tuple[str, int, str]]:
    """The lines of the modules that belong to no part, no recipe and no published system."""
    for path in source_files():
        name = relative(path).removeprefix("src/ouroboros/")
        if not name.startswith(OF_PARTS_AND_SYSTEMS):
            lines = path.read_text(encoding="utf-8").splitlines()
            yield from ((name, number, line) for number, line in enumerate(lines, 1))


@pytest.mark.parametrize(
    ("pattern", "besides", "rule"),
    [
        # The kinds in data/ are those of sources and tokenizers; no part is known there.
        (TYPE_TEST, ("data/",), "no file but a part's own asks for its type or kind: its specification answers"),
        (SYSTEM, (), "no file outside systems/ names a published system: it enters a place of ouroboros.registry"),
    ],
    ids=["types", "names"],
)
def test_parts_and_systems_are_closed(pattern: str, besides: tuple[str, ...], rule: str) -> None:
    lines = [(f"{name}:{n}: {line.strip()}", line) for name, n, line in shared_lines() if not name.startswith(besides)]
    fail_with([shown for shown, line in lines if re.search(pattern, line)], rule)


def test_source_is_ascii() -> None:
    problems = [
        f"{relative(path)}:{number}: {line.strip()[:60]!r}"
        for path, number, line in text_lines()
        if relative(path).startswith("src/") and path.suffix == ".py" and not line.isascii()
    ]
    fail_with(problems, "source is ASCII")


def test_every_module_has_its_test() -> None:
    package = ROOT / "src" / "ouroboros"
    modules = {
        p.relative_to(package).as_posix() for p in source_files() if p.name not in ("__init__.py", "__main__.py")
    }
    untested = []
    for name in sorted(modules):
        module = Path(name)
        # The commands are tested as a user runs them, in tests/cli.
        folder = Path("cli") if name.startswith(("cli", "verbs/")) else "unit" / module.parent
        test = ROOT / "tests" / folder / f"test_{module.stem.lstrip('_')}.py"
        if not test.is_file() and name not in NO_UNIT_TEST:
            untested.append(f"src/ouroboros/{name}: no {relative(test)}")
        if test.is_file() and name in NO_UNIT_TEST:
            untested.append(f"NO_UNIT_TEST still lists {name}, which has a test now")
    untested += [f"NO_UNIT_TEST lists {name}, which does not exist" for name in NO_UNIT_TEST if name not in modules]
    fail_with(untested, "tests mirror the source, or NO_UNIT_TEST gives the reason")


@pytest.mark.parametrize("what", FORBIDDEN_TEXT)
def test_no_text_ties_the_project_to_a_place(what: str) -> None:
    pattern = re.compile(FORBIDDEN_TEXT[what])
    problems = [
        f"{relative(path)}:{number}: {line.strip()[:80]}"
        for path, number, line in text_lines()
        if not relative(path).startswith("tests/") and pattern.search(line)
    ]
    fail_with(problems, f"no file names {what}")


def test_no_authorship_notes() -> None:
    pattern = re.compile(AUTHORSHIP)
    problems = [f"{relative(p)}:{n}: {line.strip()[:80]}" for p, n, line in text_lines() if pattern.search(line)]
    fail_with(problems, "files do not say who or what wrote them")


def test_links_and_paths_in_documents_exist() -> None:
    link = re.compile(r"\]\(([^)\s]+)\)")
    quoted = re.compile(r"`((?:src|tests|docs|benchmarks)/[^`\s]*)`")
    problems = []
    for path, number, line in text_lines():
        if path.suffix != ".md":
            continue
        for target in link.findall(line):
            if not re.match(r"[a-z]+:|#", target) and not (path.parent / target.partition("#")[0]).exists():
                problems.append(f"{relative(path)}:{number}: broken link {target}")
        for target in quoted.findall(line):
            # <name> and * stand for what the reader chooses.
            if not set(target) & set("<*{") and not (ROOT / target.partition("::")[0]).exists():
                problems.append(f"{relative(path)}:{number}: no such file {target}")
    fail_with(problems, "links and paths in documents exist")


def imported_packages(path: Path) -> dict[str, bool]:
    """Top-level packages a file imports, and whether it does so when it is itself imported."""
    inside: set[ast.AST] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inside.update(ast.walk(node))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            inside.update(child for statement in node.body for child in ast.walk(statement))
    found: dict[str, bool] = {}
    for node in ast.walk(tree(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            package = name.partition(".")[0]
            found[package] = found.get(package, False) or node not in inside
    return found


def project_table() -> dict:
    """The ``[project]`` table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirement_names(requirements: list[str]) -> set[str]:
    """Distribution names in canonical form."""
    return {canonicalize_name(Requirement(r).name) for r in requirements}


OF_AN_EXTRA = ("serve/connection.py", "serve/server.py")
"""Modules that are nothing without an extra, imported by a verb that has looked for it."""


def test_imports_are_declared_and_declarations_used() -> None:
    project = project_table()
    core = requirement_names(project["dependencies"])
    extras = {
        name for key, r in project["optional-dependencies"].items() if key != "dev" for name in requirement_names(r)
    }
    problems, used = [], set()
    for path in source_files():
        for package, at_import in imported_packages(path).items():
            name = canonicalize_name(package)
            used.add(name)
            if package in sys.stdlib_module_names or package == "ouroboros" or name in core:
                continue
            if name not in extras:
                problems.append(f"{relative(path)} imports {package}, which pyproject.toml does not declare")
            elif at_import and relative(path).removeprefix("src/ouroboros/") not in OF_AN_EXTRA:
                problems.append(f"{relative(path)} imports {package}, an extra, at module level")
    problems += [f"pyproject.toml requires {name}, which nothing imports" for name in sorted(core - used)]
    fail_with(problems, "core dependencies are those that the code imports; extras are imported where they are used")


def test_lock_satisfies_pyproject() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), "name==version, one a line"
    names = [canonicalize_name(line.partition("==")[0]) for line in lines]
    assert names == sorted(set(names)), "sorted by name, each once"
    locked = dict(zip(names, (line.partition("==")[2] for line in lines), strict=True))
    project = project_table()
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["report"],
        *project["optional-dependencies"]["gguf"],
        *project["optional-dependencies"]["eval"],
        *project["optional-dependencies"]["serve"],
        *project["optional-dependencies"]["interop"],
        *project["optional-dependencies"]["dev"],
    ]
    problems = [
        text
        for text in wanted
        if (name := canonicalize_name((r := Requirement(text)).name)) not in locked or locked[name] not in r.specifier
    ]
    fail_with(problems, "requirements.lock meets pyproject.toml (core, report, gguf, eval, serve, interop, dev)")


def test_version_is_one() -> None:
    import ouroboros

    assert ouroboros.__version__ == project_table()["version"] == importlib.metadata.version("ouroboros-lm")


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("T201", 'print("done")\n'),
        ("TID251", 'import os\n\nx = os.environ["HOME"]\n'),
        ("TID251", 'import os\n\nx = os.getenv("HOME")\n'),
        ("TID251", 'import torch\n\nx = torch.load("weights.pt")\n'),
        ("TID251", "import pickle\n\npickle.dumps(1)\n"),
        ("S307", 'x = eval("1")\n'),
        ("S102", 'exec("x = 1")\n'),
        ("E722", "try:\n    x = 1\nexcept:\n    x = 2\n"),
        ("S110", "try:\n    x = 1\nexcept Exception:\n    pass\n"),
        ("SIM105", "try:\n    x = 1\nexcept ValueError:\n    pass\n"),
        ("D103", "def public():\n    return 1\n"),
        ("D101", "class Public:\n    x = 1\n"),
    ],
)
def test_ruff_enforces(rule: str, code: str) -> None:
    """The rules that ruff checks for us are switched on for library code."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", "src/ouroboros/example.py", "-"]
    source = f'"""Example."""\n\n{code}'
    result = subprocess.run(command, input=source, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert rule in result.stdout


@pytest.mark.parametrize("host", ["192.0.2.1", "example.invalid"])
def test_suite_has_no_network(host: str) -> None:
    with pytest.raises(RuntimeError, match="without a network"):
        socket.create_connection((host, 80), timeout=1)


def test_suite_may_use_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_help_does_not_import_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "ouroboros.cli", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    errors = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == 0, errors
    assert "demo" in result.stdout
    # Lines read "import time:  self | cumulative |   package.module".
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines() if "|" in line}
    assert "ouroboros" in loaded, "the listing of imports was not understood"
    assert not loaded & {"torch", "transformers", "datasets", "matplotlib"}
