"""Text in awkward forms, as a user meets it: compressed, packed, in directories, in UTF-16, gone or elsewhere.

What the command warns of is read from the log: in this process pytest has taken it before the command can.
"""

import gzip
import json
import os
import shutil
import zipfile

import pytest


@pytest.fixture
def train(cli, tiny, tmp_path):
    """Train two steps on a source into a new run."""

    def run(data, *more, out="run"):
        options = ["--data", data, "--out", tmp_path / out, "--size", "tiny", "--steps", "2", "--quiet", *tiny]
        return cli("train", "gpt", *options, *more)

    return run


def split_hashes(run):
    """The sha256 of the original bytes of every split."""
    files = json.loads((run / "data" / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".raw")}


def test_compressed_and_utf16_texts_are_the_texts_they_hold(train, cli, text, trained, tmp_path, caplog):
    plain = text.read_bytes()
    (tmp_path / "packed.txt").write_bytes(gzip.compress(plain))
    (tmp_path / "wide.txt").write_bytes(plain.decode().encode("utf-16"))
    assert train(text, out="plain").status == train(tmp_path / "packed.txt", out="packed").status == 0
    assert caplog.text == ""
    assert train(tmp_path / "wide.txt", "--data.tokenizer", "bpe:300", out="wide").status == 0
    assert "UTF-16 text, read as UTF-8 (bits per byte count the bytes of that): wide.txt" in caplog.text
    assert split_hashes(tmp_path / "plain") == split_hashes(tmp_path / "packed") == split_hashes(tmp_path / "wide")
    scores = [cli("eval", trained, "--data", path, "--json").json for path in (text, tmp_path / "packed.txt")]
    assert scores[0] == scores[1] and scores[0]["bytes"] == len(plain)
    made = [
        cli("tokenizer", "--data", path, "--vocab-size", 280, "--out", tmp_path / f"tok{i}", "--json").json
        for i, path in enumerate((text, tmp_path / "packed.txt"))
    ]
    assert made[0]["tokens"] == made[1]["tokens"]


def test_archives_are_refused_everywhere(train, cli, text, trained, tmp_path):
    path = tmp_path / "plain.txt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(text)
    calls = [
        train(path),
        cli("eval", trained, "--data", path),
        cli("tokenizer", "--data", path, "--vocab-size", 300, "--out", tmp_path / "tok"),
    ]
    for result in calls:
        assert "plain.txt': is a zip archive (" in result.error() and "; unpack it and name" in result.error()
    path.write_bytes(gzip.compress(text.read_bytes())[:-20])
    assert "plain.txt': its compressed data is cut off or damaged" in train(path).error()
    assert not (tmp_path / "run").exists()


def test_a_hub_layout_with_a_pipe_and_links(train, text, tmp_path, caplog):
    """The usual layout of a hub data set; its README is larger than its data, and no text to train on."""
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "README.md").write_text("documentation " * 9000)
    (tmp_path / "real").mkdir()
    lines = text.read_text().splitlines()
    for shard in range(2):
        records = "".join(json.dumps({"text": line}) + "\n" for line in lines[shard::2])
        folder = tmp_path / "real" if shard else hub
        (folder / f"train-{shard}.json.gz").write_bytes(gzip.compress(records.encode()))
    (hub / "more").symlink_to("../real")
    (hub / "loop").symlink_to(".")
    os.mkfifo(hub / "waiting.txt")
    assert train(hub).status == 0
    assert not caplog.records
    manifest = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    assert manifest["sources"][0]["kept"] == len(lines)
    assert "waiting.txt': is a named pipe or a device" in train(hub / "waiting.txt", out="other").error()


def test_resume_from_another_directory(train, cli, text, tmp_path, monkeypatch, caplog):
    for name in "ab":
        (tmp_path / name).mkdir()
    shutil.copy(text, tmp_path / "a" / "notes.txt")
    monkeypatch.chdir(tmp_path / "a")
    assert train("notes.txt", out="a/M").status == 0
    monkeypatch.chdir(tmp_path / "b")
    more = ("--allow-changes", "--quiet", "--train.steps")
    assert cli("resume", "../a/M", *more, 3).status == 0
    (tmp_path / "a" / "M").rename(tmp_path / "b" / "moved")
    (tmp_path / "b" / "notes.txt").write_text("another text of the same name")
    assert cli("resume", "moved", *more, 4).status == 0
    assert "notes.txt" not in caplog.text
    (tmp_path / "a" / "notes.txt").rename(tmp_path / "a" / "gone.txt")
    assert cli("resume", "moved", *more, 5).status == 0
    assert "not there any more; the run goes on with the text prepared from it, which is intact" in caplog.text
    (tmp_path / "a" / "notes.txt").write_text("changed")
    assert "source 'notes.txt': has changed since" in cli("resume", "moved", *more, 6).error()


def test_a_streamed_run_says_that_it_needs_its_text(train, cli, text, tmp_path):
    source = tmp_path / "lines.jsonl.gz"
    records = "".join(json.dumps({"text": line}) + "\n" for line in text.read_text().splitlines())
    source.write_bytes(gzip.compress(records.encode()))
    assert train(source, "--data.stream").status == 0
    again = ("resume", tmp_path / "run", "--allow-changes", "--quiet", "--train.steps")
    assert cli(*again, 3).status == 0
    source.unlink()
    assert "any more; a streamed run reads its text while it trains: put it back there" in cli(*again, 4).error()
