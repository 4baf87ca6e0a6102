"""Starts programs in processes of their own, without the seconds in which each of them would import torch.

:func:`install` writes an executable that stands for Python: with ``-m ouroboros.cli ..`` or ``script.py ..`` it does
what ``python`` does. The first use starts a server, which imports the library once and then forks for every program.
The fork takes over arguments, directory, environment and the three standard streams, has the signal handlers of an
interpreter that starts, and ends as an interpreter ends. The process that was started passes signals on, lives as long
as the fork, and ends as it does. If it is killed, the fork is killed.

What an interpreter has for good once it runs cannot be taken over: with other variables in the environment than the
server has, with options of Python, and at a terminal, a fresh interpreter takes over. Limits of resources and process
groups are those of the server; who sets them starts Python itself.
"""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import sys
import time

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGABRT, signal.SIGUSR1)
ANY = re.compile(
    "PYTEST_|OUROBOROS_TESTS_PYTHON=|PYTHONPATH=|PYTHONUNBUFFERED=|PYTHONFAULTHANDLER=|GOMP_SPINCOUNT=|KMP_BLOCKTIME="
    "|PWD=|OLDPWD=|SHLVL=|_=|COLUMNS=|LINES=|RANK=|WORLD_SIZE=|LOCAL_|GROUP_|ROLE_|MASTER_|TORCHELASTIC_|TORCH_NCCL_"
    "|TORCHINDUCTOR_CACHE_DIR=|_TORCHINDUCTOR_"
)
"""Variables that may differ from those of the server: the fork reads Python's, the server sets those of threads as the
command does, those by which ``torchrun`` tells its workers of each other are read when they join, and torch reads where
compiled code is kept when it compiles."""
MODULES = ("ouroboros.", "torch.distributed.run")
PATIENCE = 100.0
REFUSED = b"\xff"


def install(folder: str) -> tuple[str, int]:
    """Write the executable, and the environment that the server will have. Returns the path, and a pipe: the server
    ends when all who hold it open have ended."""
    path, life = os.path.join(folder, "python"), os.path.join(folder, "life")
    os.mkfifo(life)
    with open(os.path.join(folder, "environment"), "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write("\0".join(f"{name}={value}" for name, value in os.environ.items()))
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"#!{sys.executable} -IS\nimport sys\nsys.path.append({os.path.dirname(__file__)!r})\n")
        file.write(f"import forked\nforked.ask({folder!r}, sys.argv[1:])\n")
    os.chmod(path, 0o700)
    return path, os.open(life, os.O_RDWR)


def ask(folder: str, program: list[str]) -> None:
    """Have a program run by the server, or by a fresh interpreter; does not return."""
    if program[:1] == ["-u"]:  # as torchrun starts its workers
        os.environ["PYTHONUNBUFFERED"] = "1"
        program = program[1:]
    server = None if not _ours(program) or any(map(_terminal, range(3))) else _connected(folder)
    if server is None:
        os.execv(sys.executable, [sys.executable, *program])
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: server.send(bytes([number])))
    words = [os.getcwd(), str(len(program)), *program, *(f"{name}={value}" for name, value in os.environ.items())]
    request = os.fsencode("\0".join(words))
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    answer = server.recv(1)
    if answer == REFUSED:
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, *program])
    status = int.from_bytes(server.recv(4), "big", signed=True) if answer else 70
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _ours(program: list[str]) -> bool:
    """Whether it is a module or a script of ours: scripts of other libraries, as Ray's, may need what a fork is not."""
    if program[:1] == ["-m"]:
        return program[1].startswith(MODULES)
    return bool(program) and program[0].endswith(".py") and "site-packages" not in program[0]


def _terminal(stream: int) -> bool:
    try:
        return os.isatty(stream)
    except OSError:  # it is closed, which cannot be passed on either
        return True


def _connected(folder: str) -> socket.socket | None:
    """A connection to the server, which is started if there is none; nothing if it does not answer."""
    server, begun = socket.socket(socket.AF_UNIX), time.monotonic()
    while time.monotonic() < begun + PATIENCE and not os.path.exists(os.path.join(folder, "failed")):
        try:
            server.connect(os.path.join(folder, "socket"))
            return server
        except FileNotFoundError:
            _start_server(folder)
            time.sleep(0.05)
        except ConnectionRefusedError:
            break
    return None


def _start_server(folder: str) -> None:
    """Start it, unless that was done before."""
    try:
        log = os.open(os.path.join(folder, "server.log"), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return
    import subprocess

    with open(os.path.join(folder, "environment"), encoding="utf-8", errors="surrogateescape") as file:
        own = dict(one.split("=", 1) for one in file.read().split("\0"))
    command = [sys.executable, os.path.abspath(__file__), folder]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=own)


def serve(folder: str, own: list[str]) -> list[str]:
    """Fork for every request as long as anyone needs it. Returns in the forks alone, with the program to become."""
    import select

    life = os.open(os.path.join(folder, "life"), os.O_RDONLY | os.O_NONBLOCK)
    woken, waker = socket.socketpair()
    for one in (woken, waker):
        one.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    running: dict[int, socket.socket] = {}
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(folder, "socket.new"))
    listener.listen(64)
    os.rename(os.path.join(folder, "socket.new"), os.path.join(folder, "socket"))
    while True:
        ready, _, _ = select.select([life, listener, woken, *running.values()], [], [])
        if woken in ready:
            woken.recv(4096)
        for process, connection in list(running.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                _answer(running.pop(process), b"\0" + code.to_bytes(4, "big", signed=True))
            elif connection in ready:  # signals, or the end of the process that asked
                for number in connection.recv(64) or bytes([signal.SIGKILL]):
                    os.kill(process, number)
        if life in ready:
            for process in running:
                os.kill(process, signal.SIGKILL)
            os._exit(0)
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        program, environment, directory, streams = _receive(connection)
        if _known(environment) != own:
            _answer(connection, REFUSED)
        elif process := os.fork():
            running[process] = connection
        else:
            signal.set_wakeup_fd(-1)
            for one in (woken, waker, listener, connection, *running.values()):
                one.close()
            os.close(life)
            _take_over(environment, directory, streams)
            if program[0] == "-m":  # what a script starts, it may want to look at: by its number in the kernel
                sys.executable = os.path.join(folder, "python")
            return program
        for stream in streams:
            os.close(stream)


def _receive(connection: socket.socket) -> tuple[list[str], list[str], str, list[int]]:
    """The program, the environment, the directory and the three streams of a request."""
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    size, request = int.from_bytes(head, "big"), b""
    while len(request) < size:
        request += connection.recv(size - len(request))
    directory, count, *words = os.fsdecode(request).split("\0")
    return words[: int(count)], words[int(count) :], directory, streams


def _known(environment: list[str]) -> list[str]:
    """The variables that decide whether the server's interpreter is the one that is asked for."""
    return sorted(one for one in environment if not ANY.match(one))


def _answer(connection: socket.socket, answer: bytes) -> None:
    with connection:
        try:
            connection.sendall(answer)
        except OSError:  # the process that asked was killed
            return


def _take_over(environment: list[str], directory: str, streams: list[int]) -> None:
    """Be the process that was asked for."""
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(one.split("=", 1) for one in environment)
    through = bool(os.environ.get("PYTHONUNBUFFERED"))
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in added if path and path not in sys.path]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)  # what it does with bytes that are no text follows from the locale
        mode, buffering = "r" if number == 0 else "w", 1 if number == 2 else -1
        if through and number:  # as the interpreter has them then: what cannot be written fails at once
            raw = open(number, "wb", 0, closefd=False)  # noqa: SIM115
            new = io.TextIOWrapper(raw, old.encoding, old.errors, write_through=True)
        else:
            new = open(number, mode, buffering, old.encoding, old.errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("PYTHONFAULTHANDLER"):
        import faulthandler

        faulthandler.enable()


def run(program: list[str]) -> None:
    """Run a module or a script as the interpreter's main program."""
    import runpy

    if program[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(program[0])), program
        runpy.run_path(program[0], run_name="__main__")


def end(status: int) -> None:
    """Do what an interpreter does at its end, but do not take its modules apart, which takes half a second."""
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # the interpreter has something to say about that
        sys.exit(status)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def become(program: list[str]) -> None:
    """Be the interpreter of a program from its beginning to its end."""
    try:
        run(program)
    except SystemExit as stop:
        if not isinstance(stop.code, int | None):
            raise
        end((stop.code or 0) & 0xFF)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        end(-signal.SIGINT)
    end(0)


def prepare() -> None:
    """Import what takes long, and nothing that starts a thread: a fork would be without it."""
    import gc
    import importlib
    import pkgutil

    from ouroboros import cli, verbs

    cli.let_waiting_threads_sleep(os.environ)
    del sys.modules["ouroboros.cli"]  # which is about to be run, and not imported
    names = [f"ouroboros.verbs.{module.name}" for module in pkgutil.iter_modules(verbs.__path__)]
    for name in (*names, "ouroboros.api", "ouroboros.model.modeling", "ouroboros.train.run", "transformers.generation"):
        importlib.import_module(name)
    if os.path.isdir("/proc/self/task"):
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"{threads} threads; a process that forks must have one"
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    started_with = _known([f"{name}={value}" for name, value in os.environ.items()])
    try:
        prepare()
    except BaseException:
        open(os.path.join(sys.argv[1], "failed"), "w").close()
        raise
    become(serve(sys.argv[1], started_with))
