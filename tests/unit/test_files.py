"""Flushing and asking for processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ouroboros.files import flush, process_alive


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
