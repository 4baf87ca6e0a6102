"""Files and directories appear whole or not at all; flushing and asking for processes."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ouroboros.errors import OuroborosError
from ouroboros.files import (
    append,
    flush,
    new_directory,
    process_alive,
    read_object,
    read_text,
    remove_leftovers,
    replacing,
    system_errors,
    whole_directory,
    write_whole,
)

DEAD_PID = 2**22 + 1  # above Linux's largest process id


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


def test_a_small_file_is_written_whole(tmp_path):
    write_whole(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content" and names(tmp_path) == ["file"]
    with pytest.raises(OuroborosError, match="cannot write .*nowhere/file: No such file"):
        write_whole(tmp_path / "nowhere" / "file", b"")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_what_is_appended_is_there_whole_or_not_at_all(error, tmp_path, monkeypatch):
    path, write, calls = tmp_path / "file", os.write, []
    append(path, b"one\n")

    def half_then_fail(descriptor, data):
        calls.append(data)
        if len(calls) > 1:
            raise error
        return write(descriptor, data[:2])

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(os, "write", half_then_fail)
        append(path, b"two\n")
    append(path, b"three\n", flushed=True)
    assert path.read_bytes() == b"one\nthree\n"


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_directory_gets_the_content(exists, tmp_path):
    out = tmp_path / "deep" / "model"
    if exists:
        out.mkdir(parents=True)
    with new_directory(out) as work:
        (work / "sub").mkdir()
        (work / "sub" / "file").write_text("content")
        (work / "private").write_text("")
        (work / "private").chmod(0o600)
        assert not out.exists() or not any(out.iterdir())
    assert (out / "sub" / "file").read_text() == "content"
    assert (out / "private").stat().st_mode == (out / "sub" / "file").stat().st_mode
    assert names(out.parent) == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("context", [new_directory, whole_directory])
def test_an_error_leaves_nothing(error, context, tmp_path):
    with pytest.raises(error), context(tmp_path / "model") as work:
        (work / "file").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_what_the_user_has_is_kept(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(OuroborosError, match="exists and is not an empty directory"), new_directory(out):
            pytest.fail("the body ran")
    with pytest.raises(OuroborosError, match="cannot write"), new_directory(tmp_path / "late") as work:
        (work / "file").touch()
        (tmp_path / "late" / "file").mkdir(parents=True)  # someone else's, meanwhile
    assert names(tmp_path) == ["file", "late"] and (tmp_path / "late" / "file").is_dir()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OuroborosError, match=r"cannot write .*: Not a directory"),
        new_directory(tmp_path / "file" / "m"),
    ):
        pytest.fail("the body ran")
    with pytest.raises(OuroborosError, match="cannot write .*: No space left"), new_directory(tmp_path / "model"):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == ["file"]


def test_a_directory_is_replaced_and_sealed_when_its_content_is_on_the_disk(tmp_path, monkeypatch):
    flushed: list[str] = []
    monkeypatch.setattr("ouroboros.files.flush", lambda path: flushed.append(path.name))

    def seal(work: Path) -> None:
        assert flushed[0] == "file" and work.name in flushed
        (work / "marker").touch()

    for content in ("old", "new"):
        flushed.clear()
        with whole_directory(tmp_path / "model", seal=seal) as work:
            (work / "file").write_text(content)
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["file", "marker"]
    assert (tmp_path / "model" / "file").read_text() == "new"


def test_system_errors_that_are_told_as_text_are_system_errors_again():
    with pytest.raises(OSError, match="No space left") as caught, system_errors():
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="another"), system_errors():
        raise RuntimeError("another")


def test_leftovers_of_ended_processes_of_this_machine_are_removed(tmp_path):
    host = socket.gethostname()
    gone = [
        f".a.tmp-{DEAD_PID}",
        f".b.tmp-{host}-{DEAD_PID}",
        f".c.tmp-{host}-{os.getpid()}-x12",
        f".d.tmp-{os.getpid()}",
    ]
    kept = [f".a.tmp-{host}-{os.getppid()}", f".a.tmp-elsewhere-{DEAD_PID}", ".a.tmp", "a.tmp-1", "notes"]
    for name in gone[:2] + kept:
        (tmp_path / name).mkdir()
    for name in gone[2:]:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, "b")
    assert names(tmp_path) == sorted({*gone, *kept} - {gone[1]})
    with whole_directory(tmp_path / "model") as work:
        remove_leftovers(tmp_path)
        assert work.is_dir()  # this process is writing it
    assert names(tmp_path) == sorted([*kept, "model"])
    remove_leftovers(tmp_path / "missing")


def test_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "good").write_text("caf\u00e9", encoding="utf-8")
    assert read_text(tmp_path / "good") == "caf\u00e9"
    (tmp_path / "bad").write_bytes(b"\xff\xfe")
    with pytest.raises(OuroborosError, match="bad: not UTF-8 text; the file is damaged"):
        read_text(tmp_path / "bad")
    with pytest.raises(OuroborosError, match="none: cannot read: No such file"):
        read_text(tmp_path / "none")


@pytest.mark.parametrize("content", ["", "{", "[]", "1", "[" * 100_000])
def test_what_is_no_json_object_is_refused(tmp_path, content):
    path = tmp_path / "values.json"
    path.write_text(content)
    with pytest.raises(OuroborosError, match="values.json: expected a JSON object; the file is damaged"):
        read_object(path)
    path.write_text('{"a": [1]}')
    assert read_object(path) == {"a": [1]}
