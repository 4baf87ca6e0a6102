"""Flushing and asking for processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ouroboros.files import flush, process_alive, replacing


def test_process_alive():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert process_alive(os.getpid()) and process_alive(1)
    assert not process_alive(child.pid) and not process_alive(2**80)


def test_files_and_directories_are_flushed(tmp_path, monkeypatch: pytest.MonkeyPatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path):
        flush(path)
    assert flushed == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "missing")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ValueError, match="half-way"), replacing(path) as temporary:
        temporary.write_text("ne")
        raise ValueError("half-way")
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [*tmp_path.iterdir()] == [path]
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "nowhere" / "file") as temporary:
        temporary.write_text("new")
