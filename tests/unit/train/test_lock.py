"""One process per run directory."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import ouroboros
from ouroboros.errors import OuroborosError
from ouroboros.train.lock import run_lock

HOLD = """
import sys, time
from pathlib import Path
from ouroboros.train.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def holder(path: Path) -> subprocess.Popen[str]:
    source = str(Path(ouroboros.__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        env={**os.environ, "PYTHONPATH": source},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_another_process_is_refused_and_a_dead_one_taken_over(tmp_path, caplog):
    with holder(tmp_path) as process:
        with pytest.raises(OuroborosError) as caught, run_lock(tmp_path):
            pass
        message = str(caught.value)
        assert f"in use by process {process.pid} on {socket.gethostname()} since 2" in message
        process.send_signal(signal.SIGKILL)
        process.wait()
    with caplog.at_level(logging.INFO), run_lock(tmp_path):
        assert f"process {process.pid}, which did not end cleanly" in caplog.text


def test_the_lock_is_exclusive_within_a_process_and_released_after(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            with run_lock(tmp_path):
                assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
                with pytest.raises(OuroborosError, match=f"process {os.getpid()} on"), run_lock(tmp_path):
                    pass
            assert (tmp_path / ".lock").read_text() == ""
    assert caplog.text == ""  # a clean end is not reported as a takeover


def test_the_lock_is_released_when_the_block_fails(tmp_path):
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    with run_lock(tmp_path):
        pass


def test_a_lock_kept_by_a_child_of_a_dead_process_is_explained(tmp_path):
    record = {"pid": 2**22 + 1, "host": socket.gethostname(), "since": "2020-01-01T00:00:00+00:00"}
    with run_lock(tmp_path):
        (tmp_path / ".lock").write_text(json.dumps(record))
        with pytest.raises(OuroborosError, match="has ended but left a child process running"), run_lock(tmp_path):
            pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x", "host": 1, "since": 2}', "\x00\x00"])
def test_a_lock_file_with_other_content_is_no_obstacle(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with run_lock(tmp_path):
        (tmp_path / ".lock").write_text(content)
        with pytest.raises(OuroborosError, match="in use by another process"), run_lock(tmp_path):
            pass
