from __future__ import annotations

import sysconfig
from collections import defaultdict
from pathlib import Path

import pytest

from ouroboros.data import bundled
from ouroboros.data.bundled import bundled_files
from ouroboros.errors import OuroborosError


def test_files_are_sorted_python_sources_of_about_seven_megabytes() -> None:
    files = list(bundled_files())
    names = [name for name, _ in files]
    assert names == sorted(names)
    assert {"argparse.py", "asyncio/base_events.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    assert 5_000_000 < sum(path.stat().st_size for _, path in files) < 11_000_000


def test_tests_and_tables_are_left_out() -> None:
    parts = {part for name, _ in bundled_files() for part in Path(name).parts}
    assert not parts & {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "site-packages",
        "stringprep.py",
    }
    assert not any(part.startswith("_sysconfigdata") for part in parts)


def test_no_file_is_mostly_a_copy_of_another() -> None:
    """Half of a file's six-line windows in another file would be a leak between splits."""
    windows: dict[int, set[str]] = defaultdict(set)
    own: dict[str, list[int]] = {}
    for name, path in bundled_files():
        lines = [line.strip() for line in path.read_bytes().split(b"\n")]
        lines = [line for line in lines if line and not line.startswith(b"#")]
        own[name] = [hash(tuple(lines[i : i + 6])) for i in range(len(lines) - 5)]
        for window in own[name]:
            windows[window].add(name)
    shares = {name: sum(len(windows[w]) > 1 for w in found) / len(found) for name, found in own.items() if found}
    assert {name: share for name, share in shares.items() if share >= 0.5} == {}


def test_a_synthetic_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "argparse.py",
        "b/z.py",
        "b/a.py",
        "b/test/x.py",
        "b/c.txt",
        ".h/x.py",
        "test_x.py",
        "token.py",
        "b/token.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [name for name, _ in bundled_files()] == ["argparse.py", "b/a.py", "b/token.py", "b/z.py"]


def test_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(OuroborosError, match="no standard library sources"):
        list(bundled_files())
