"""`ouroboros pack` as a user runs it: budgets, scores, and errors of one line."""

from __future__ import annotations

import errno
import json
import os
import signal
import time

import pytest

SMALL = ["--max-bytes", "300", "--calibration-tokens", "256"]


@pytest.fixture(scope="module")
def larger(text, tmp_path_factory, given_back, tiny):
    """A run whose model has about 90 kB with eight bits."""
    from ouroboros.cli import main

    run = tmp_path_factory.mktemp("larger") / "run"
    options = ["--data", str(text), "--out", str(run), "--size", "tiny", "--steps", "2", "--quiet", *tiny]
    with given_back():
        assert (
            main(["train", "loop", *options, "--model.hidden-size", "64", "--model.ffn.intermediate-size", "128"]) == 0
        )
    return run


def test_budgets_through_the_real_command(larger, command, tmp_path):
    """64 kB bind and are used; 256 kB hold the model with eight bits whole."""
    small, large = (tmp_path / name for name in ("small.pack", "large.pack"))
    found = command("pack", larger, "--budget", "64kB", "--out", small, "--json", *SMALL)
    assert found.status == 0, found.err
    facts = found.json
    assert facts["file"] == str(small) and facts["bytes"] == small.stat().st_size
    assert 0.97 * 64_000 <= facts["bytes"] <= 64_000
    assert facts["feasible"] and facts["fallbacks"] == [] and facts["method"] == "loop-aware"
    assert facts["calibration"]["text"] == "training text" and facts["calibration"]["tokens"] >= 200
    assert abs(facts["bits_per_byte_after"] - facts["bits_per_byte_before"]) < 0.2
    claimed = command("inspect", small, "--json").json["score"]
    assert claimed["bits_per_byte"] == facts["bits_per_byte_after"]
    assert claimed["data_sha256"] == facts["held_out"]["data_sha256"]

    told = command("pack", larger, "--budget", "256kB", "--out", large, *SMALL)
    assert told.status == 0, told.err
    assert 64_000 < large.stat().st_size <= 256_000
    assert {t["stored"] for t in command("inspect", large, "--json").json["tensors"]} == {"int8", "float16"}
    assert "of the packed file, read by another process: " in told.out
    assert "int8" in told.out and "matrix, looped" in told.out


def test_bits_for_all_and_text_of_ones_own(trained, text, cli, tmp_path):
    out = tmp_path / "four.pack"
    given = ["--calibration", text, "--held-out", text]
    facts = cli("pack", trained, "--bits", 4, "--out", out, *given, "--json", *SMALL).json
    assert facts["calibration"]["text"] == str(text) and facts["budget"] is None
    assert {width for group in facts["groups"] for width in group["stored"]} == {"int4", "float16"}
    assert sum(group["numbers"] for group in facts["groups"]) == facts["numbers"]
    same = tmp_path / "again.pack"
    assert cli("pack", trained, "--bits", 4, "--out", same, *given, *SMALL).status == 0
    assert same.read_bytes() == out.read_bytes()


def test_a_model_without_text_writes_its_own(trained, cli, tmp_path):
    out = tmp_path / "six.pack"
    assert cli("pack", trained, "--bits", 8, "--mode", "rounding", "--out", out, *SMALL).status == 0
    again = cli("pack", out, "--bits", 6, "--out", tmp_path / "again.pack", "--json", *SMALL)
    assert again.status == 0, again.err
    assert again.json["calibration"]["text"] == "written by the model"
    assert again.json["bits_per_byte_before"] is None and again.json["bits_per_byte_after"] is None


def test_an_impossible_budget_ends_with_the_smallest_file(trained, cli, tmp_path):
    out = tmp_path / "smallest.pack"
    found = cli("pack", trained, "--budget", 2000, "--out", out, "--json", *SMALL)
    assert found.status == 1
    facts = json.loads(found.out)
    assert not facts["feasible"] and facts["bytes"] == out.stat().st_size > 2000
    assert found.err == (
        f"error: no file of this model has 2,000 bytes or less: {out} is the smallest there is, with"
        f" {facts['bytes']:,}\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --budget and --bits"),
        (["--budget", "1MB", "--bits", "6"], "give one of --budget and --bits"),
        (["--budget", "much"], "budget 'much' is no size"),
        (["--bits", "9"], "--bits must be 2 to 8"),
        (["--bits", "8", "--mode", "rounding", "--calibration", "x"], "--calibration changes nothing"),
        (["--bits", "8", "--calibration", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_one_line(trained, cli, tmp_path, options, message):
    out = tmp_path / "m.pack"
    assert message in cli("pack", trained, "--out", out, *options).error()
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_to_calibrate(larger, cli, tmp_path):
    found = cli("pack", larger, "--bits", 8, "--calibration-tokens", 64, "--out", tmp_path / "m.pack")
    assert "64 tokens leave" in found.error() and "its 128 inputs rank-deficient" in found.error()


def test_no_place_to_write(trained, cli, tmp_path):
    assert "make it first" in cli("pack", trained, "--bits", 8, "--out", tmp_path / "no" / "m.pack").error()
    assert ".bin is an ending of pickles" in cli("pack", trained, "--bits", 8, "--out", tmp_path / "m.bin").error()
    assert "is a directory" in cli("pack", trained, "--bits", 8, "--out", tmp_path).error()


@pytest.mark.parametrize(
    ("number", "status", "line"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n")]
)
def test_stopped_while_the_file_is_scored(trained, spawn, tmp_path, monkeypatch, number, status, line):
    """What was there stays, nothing half-written is left, and the process that scores ends too."""
    out, scratch = tmp_path / "m.pack", tmp_path / "scratch"
    scratch.mkdir()
    out.write_bytes(b"before")
    given = ["--bits", 8, "--mode", "rounding", "--out", out, *SMALL, "--quiet"]
    monkeypatch.setenv("TMPDIR", str(scratch))
    with spawn("pack", trained, *given, start_new_session=True) as process:
        waiting = time.monotonic() + 60
        while not any(scratch.glob("ouroboros-*/*.txt")) and time.monotonic() < waiting:
            time.sleep(0.02)
        assert any(tmp_path.glob(".m.pack.tmp-*"))
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # a terminal sends it to both processes
        else:
            process.send_signal(number)
        said = process.communicate(timeout=60)
    assert (process.returncode, *said) == (status, "", line)
    assert sorted(tmp_path.iterdir()) == [out, scratch] and out.read_bytes() == b"before"
    assert list(scratch.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("where", ["ouroboros.verbs.pack._score_again", "pathlib.Path.write_bytes"])
def test_a_full_disk(trained, cli, tmp_path, monkeypatch, where):
    def full(path, content, *_):
        if isinstance(content, bytes):
            with path.open("wb") as file:
                file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(where, full)
    out = tmp_path / "m.pack"
    found = cli("pack", trained, "--bits", 8, "--mode", "rounding", "--out", out, *SMALL, "--quiet")
    assert found.error() == f"cannot write {out}: No space left on device"
    assert list(tmp_path.iterdir()) == []
