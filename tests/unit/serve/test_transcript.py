"""Transcripts: whole lines, appended, nothing of another file touched, nothing lost when the disk is full."""

import datetime
import json
import os

import pytest

from ouroboros.errors import OuroborosError
from ouroboros.serve.transcript import Transcript


def turns(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def test_turns_are_appended_with_their_time(tmp_path):
    path = tmp_path / "talk.jsonl"
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    Transcript(path).add("caf\u00e9 \udcff", "hello", loops=2)
    Transcript(path).add("again", "yes", loops=3)
    assert [(turn["user"], turn["model"], turn["loops"]) for turn in turns(path)] == [
        ("caf\u00e9 \udcff", "hello", 2),
        ("again", "yes", 3),
    ]
    time = datetime.datetime.fromisoformat(turns(path)[0]["time"])
    assert time.utcoffset() == datetime.timedelta(0) and before <= time <= datetime.datetime.now(datetime.UTC)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"notes\n", 1),
        (b"{}\n", 1),
        (b'{"time": "t", "user": "u", "model": "m"}\nnotes\n', 2),
        (b'{"time": "t", "user": "u", "model": "m"}\n{"time": "t", "us', 2),
        (b"\xff\xfe\x00\n", 1),
        (b"[1]\n", 1),
    ],
)
def test_another_file_is_left_as_it_is(content, line, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(OuroborosError, match=f"line {line} is no turn of a conversation.*choose another file"):
        Transcript(path)
    assert path.read_bytes() == content


def test_an_empty_file_is_taken(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.touch()
    Transcript(path).add("a", "b")
    assert len(turns(path)) == 1


def test_what_is_no_file_or_has_no_place(tmp_path):
    for path, words in (
        (tmp_path, "not a regular file"),
        (tmp_path / "no" / "where", "No such file or directory"),
        ("/dev/null", "not a regular file"),
    ):
        with pytest.raises(OuroborosError, match=f"transcript .*: {words}"):
            Transcript(type(tmp_path)(path))


def test_a_full_disk_takes_back_half_a_line_and_keeps_the_turn(tmp_path, monkeypatch):
    path = tmp_path / "talk.jsonl"
    transcript = Transcript(path)
    transcript.add("first", "1")
    whole = path.read_bytes()
    write = os.write

    def full(descriptor, content):
        write(descriptor, content[:7])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OuroborosError, match=r"No space left on device; 1 turn\(s\) are not in it yet"):
            transcript.add("second", "2")
        with pytest.raises(OuroborosError, match=r"2 turn\(s\)"):
            transcript.add("third", "3")
    assert path.read_bytes() == whole
    transcript.flush()
    assert [turn["user"] for turn in turns(path)] == ["first", "second", "third"]
    transcript.flush()
    assert len(turns(path)) == 3


def test_ctrl_c_while_writing_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "talk.jsonl"
    transcript = Transcript(path)

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            transcript.add("a", "b")
    assert path.read_bytes() == b""
    transcript.add("c", "d")
    assert [turn["user"] for turn in turns(path)] == ["a", "c"]
