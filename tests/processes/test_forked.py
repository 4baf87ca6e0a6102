"""A forked program is like one of a fresh interpreter, as far as a test can see."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import install

REPORT = """
import json, os, signal, sys
print(json.dumps({
    "argv": sys.argv, "name": __name__, "path": sys.path[0], "cwd": os.getcwd(), "own": os.environ.get("OWN"),
    "read": sys.stdin.read(), "buffered": not sys.stdout.write_through,
    "coded": [(stream.encoding, stream.errors) for stream in (sys.stdin, sys.stdout, sys.stderr)],
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "terminate": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
}))
print("caf\\u00e9", file=sys.stderr)
sys.exit(3)
"""
Ran = subprocess.CompletedProcess[str]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Ran]:
    """Runs a text as a script, in its directory."""

    def ran(executable: str, script: str, *arguments: str, **options: Any) -> Ran:
        (tmp_path / "script.py").write_text(script, encoding="utf-8")
        given: dict[str, Any] = {"cwd": tmp_path, "input": "said", "timeout": 100, "capture_output": True, "text": True}
        return subprocess.run([executable, "script.py", *arguments], **{**given, **options})

    return ran


def is_forked(ran: Ran) -> bool:
    """Whether a script that prints its modules had torch without importing it."""
    return "torch" in ran.stdout.split()


MODULES = "import sys; print(*sys.modules)"


def test_a_fork_is_what_python_would_be(run: Callable[..., Ran], python: str) -> None:
    forked, fresh = (run(executable, REPORT, "a b", "\u00e9") for executable in (python, sys.executable))
    assert (forked.returncode, forked.stderr) == (3, "caf\u00e9\n")
    assert (fresh.returncode, fresh.stdout, fresh.stderr) == (forked.returncode, forked.stdout, forked.stderr)
    assert is_forked(run(python, MODULES)) and not is_forked(run(sys.executable, MODULES))


def test_another_environment_is_one_of_a_fresh_interpreter(run: Callable[..., Ran], python: str) -> None:
    ran = run(python, f"{MODULES}; import os; print(os.environ['OWN'])", env={**os.environ, "OWN": "1"})
    assert ran.stdout.endswith("\n1\n") and not is_forked(ran)


def test_variables_that_are_read_when_they_are_needed_may_differ(run: Callable[..., Ran], python: str) -> None:
    """The terminal's size among them, which importing readline sets without Python's knowledge."""
    wanted = {"COLUMNS": "33", "RANK": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": "/nowhere"}
    script = f"{MODULES}; import os; print(*map(os.environ.get, {list(wanted)}), '/nowhere' in sys.path)"
    ran = run(python, script, env={**os.environ, **wanted})
    assert ran.stdout.endswith(f"\n{' '.join(wanted.values())} True\n") and is_forked(ran)


def test_whoever_comes_first_does_not_decide(run: Callable[..., Ran], tmp_path: Path) -> None:
    """The server has the environment in which it was installed, whatever the first program has."""
    folder = tmp_path / "own"
    folder.mkdir()
    python, held = install(str(folder))
    try:
        assert not is_forked(run(python, MODULES, env={**os.environ, "OWN": "1"}))
        assert is_forked(run(python, MODULES))
    finally:
        os.close(held)


def test_options_of_python_are_for_a_fresh_interpreter(python: str) -> None:
    ran = subprocess.run([python, "-c", MODULES], capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0 and ran.stdout and not is_forked(ran)


@pytest.mark.parametrize(
    "ending", ["", "sys.exit()", "sys.exit('said')", "sys.stdout.close()", "raise KeyboardInterrupt"]
)
def test_an_end_is_that_of_python(run: Callable[..., Ran], python: str, ending: str) -> None:
    script = f"import atexit, sys, tempfile; atexit.register(print, 'end'); print(1)\n{ending}\n"
    forked, fresh = (run(executable, script) for executable in (python, sys.executable))
    assert (forked.returncode, forked.stdout) == (fresh.returncode, fresh.stdout)
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_nobody_reads(run: Callable[..., Ran], python: str) -> None:
    statuses = []
    for executable in (python, sys.executable):
        with open("/dev/full", "w") as full:
            ran = run(executable, "print(1)", capture_output=False, stdout=full, stderr=subprocess.PIPE)
        assert "No space left on device" in ran.stderr
        statuses.append(ran.returncode)
    # 1 where PYTHONUNBUFFERED makes the script itself fail, 120 where the interpreter does at its end.
    assert statuses in ([1, 1], [120, 120])


def test_what_is_not_caught_is_a_traceback(run: Callable[..., Ran], python: str) -> None:
    ran = run(python, "import atexit; atexit.register(print, 'end'); [][1]")
    assert (
        ran.returncode == 1 and ran.stdout == "end\n" and ran.stderr.endswith("IndexError: list index out of range\n")
    )


def test_another_server_is_not_needed_behind_a_program_that_went_wrong(run: Callable[..., Ran], python: str) -> None:
    assert run(python, "import os; os.abort()").returncode == -signal.SIGABRT
    assert run(python, "import os; os._exit(7)").returncode == 7


WAITING = """
import os, signal, sys, time
def heard(number, frame):
    os.write(1, b"heard\\n")  # print may be under way
    sys.exit(9)
if sys.argv[1] == "catch":
    signal.signal(signal.SIGTERM, heard)
print(os.getpid(), flush=True)
while True:
    time.sleep(0.01)
"""


@pytest.fixture
def waiting(python: str, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts the script above, and ends it if the test does not."""
    with contextlib.ExitStack() as stack:

        def started(how: str) -> subprocess.Popen[str]:
            (tmp_path / "script.py").write_text(WAITING)
            command = [python, str(tmp_path / "script.py"), how]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            return process

        yield started


@pytest.mark.parametrize(("how", "status"), [("catch", 9), ("leave", -signal.SIGTERM)])
def test_signals_arrive(waiting: Callable[[str], subprocess.Popen[str]], how: str, status: int) -> None:
    process = waiting(how)
    assert process.stdout is not None and int(process.stdout.readline()) != process.pid
    process.terminate()
    assert process.wait(timeout=60) == status
    assert process.stdout.read() == ("heard\n" if how == "catch" else "")


def test_a_process_that_is_killed_takes_its_fork_with_it(waiting: Callable[[str], subprocess.Popen[str]]) -> None:
    process = waiting("leave")
    assert process.stdout is not None
    fork, end = int(process.stdout.readline()), time.monotonic() + 60
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    while Path(f"/proc/{fork}").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
