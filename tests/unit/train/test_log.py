"""Metrics as JSON lines, and the progress line."""

import errno
import io
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from ouroboros.errors import OuroborosError
from ouroboros.train import log
from ouroboros.train.log import (
    MetricsLog,
    Progress,
    Status,
    read_metrics,
    remaining_seconds,
    resident_bytes,
    status_line,
)


def refuse_constants(name: str) -> None:
    raise AssertionError(f"{name} is not strict JSON")


def test_records_are_on_the_file_at_once_in_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsLog(path)
    metrics.write({"step": 1, "loss": float("nan"), "nested": {"x": [float("inf"), 1.5]}, "ok": True})
    metrics.write({"step": np.int64(2), "loss": torch.tensor(0.5), "curve": torch.ones(2), "f": np.float32("nan")})
    lines = path.read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse_constants) for line in lines] == [
        {"step": 1, "loss": None, "nested": {"x": [None, 1.5]}, "ok": True},
        {"step": 2, "loss": 0.5, "curve": [1.0, 1.0], "f": None},
    ]
    assert read_metrics(path)[1]["loss"] == 0.5


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = leaves | st.lists(leaves, max_size=3) | st.dictionaries(st.text(max_size=3), leaves, max_size=3)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=5), values, max_size=4))
def test_any_record_is_one_line_of_strict_json(tmp_path, record):
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    MetricsLog(path).write(record)
    (line,) = path.read_bytes().splitlines()
    assert json.loads(line, parse_constant=refuse_constants).keys() == record.keys()
    assert len(read_metrics(path)) == 1


def test_resume_removes_the_steps_to_be_taken_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsLog(path)
    for step in range(1, 6):
        metrics.write({"step": step})
    metrics.write({"event": "stopped"})
    MetricsLog(path, resume_step=3).write({"step": 4, "again": True})
    steps = [record.get("step") for record in read_metrics(path)]
    assert steps == [1, 2, 3, None, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("resume_step", [None, 5])
def test_a_last_line_torn_at_any_length_is_removed(tmp_path, resume_step, caplog):
    whole, last = b'{"step": 1}\n', b'{"step": 2, "loss": 1.0}\n'
    for length in range(len(last)):
        path = tmp_path / f"{length}.jsonl"
        path.write_bytes(whole + last[:length])
        assert read_metrics(path)[0] == {"step": 1}
        MetricsLog(path, resume_step=resume_step).write({"step": 9})
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 9]
    assert "line 2 is incomplete" in caplog.text


def test_broken_lines_elsewhere_are_removed_with_a_warning(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\xff\n[1]\n{"step": 2}\n')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    MetricsLog(path)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert "line 2" in caplog.text and "line 3" in caplog.text


def test_an_intact_file_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n')
    before = path.stat().st_ino
    MetricsLog(path, resume_step=1)
    assert path.stat().st_ino == before


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write = os.write
    calls = []

    def half_then_fail(descriptor, data):
        calls.append(data)
        if len(calls) == 1:
            return write(descriptor, data[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    metrics = MetricsLog(path)
    metrics.write({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half_then_fail)
        with pytest.raises(OuroborosError, match=r"metrics\.jsonl: cannot write metrics: No space left"):
            metrics.write({"step": 2})
    metrics.write({"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


def test_what_is_not_json_and_paths_that_cannot_be_opened_are_errors(tmp_path):
    with pytest.raises(OuroborosError, match="cannot write metrics"):
        MetricsLog(tmp_path / "m.jsonl").write({"x": object()})
    with pytest.raises(OuroborosError, match="cannot open the metrics: No such file"):
        MetricsLog(tmp_path / "missing" / "m.jsonl")


STATUS = Status(step=1234, progress=0.5, loss=1.25, bits_per_byte=1.8, tokens_per_second=9700.4, peak_share=0.314)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(terminal: bool, quiet: bool = False) -> str:
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=terminal, width=200, color_system=None, legacy_windows=False)
    with Progress(console, quiet=quiet, every=10.0, clock=clock) as progress:
        for step in range(1, 26):
            progress.update(replace(STATUS, step=step, progress=step / 100))
            clock.now += 1.0
        progress.message("saved [step 25]")
    return stream.getvalue()


def test_elsewhere_a_plain_line_every_so_often_and_the_last_at_the_end():
    lines = run(terminal=False).splitlines()
    shown = [line.split("step ")[1].split()[0] for line in lines]
    assert shown == ["1", "11", "21", "25]", "25"]
    assert "ETA 1:15" in lines[-1] and "\x1b" not in "".join(lines)


def test_on_a_terminal_the_line_is_redrawn():
    text = run(terminal=True)
    assert "step 17 " in text and "saved [step 25]" in text and "\x1b" in text


def test_quiet_shows_nothing():
    assert run(terminal=False, quiet=True) == "" and run(terminal=True, quiet=True) == ""


def test_a_console_on_stderr_is_made_when_none_is_given(capsys):
    with Progress() as progress:
        progress.update(replace(STATUS, step=1))
    captured = capsys.readouterr()
    assert captured.out == "" and "step 1 " in captured.err


def test_status_line_shows_what_is_known():
    known = " 50.0%  step 1,234  loss 1.2500  1.8000 bits/byte  9,700 tok/s  31% of peak"
    assert status_line(STATUS, None, None) == known
    status = replace(STATUS, note="loops 4")
    assert status_line(status, 3725.0, 1_500_000_000) == f"{known}  ETA 1:02:05  1.50 GB  loops 4"
    assert status_line(status, 75, None) == f"{known}  ETA 1:15  loops 4"


def test_remaining_time_counts_from_where_this_session_began():
    assert remaining_seconds(10.0, 0.5, 0.75) == pytest.approx(10.0)
    assert remaining_seconds(10.0, 0.5, 0.5) is None


def test_memory_is_measured(monkeypatch):
    before = resident_bytes()
    assert before is not None and 10**7 < before < 10**11
    peak = log._peak_bytes()
    assert peak is not None and 0.5 * before < peak < 10**11
