"""What every test relies on: pinned threads, no network, no user cache, shared fixtures."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from forked import install
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Set before anything imports torch or the hub client; worker and child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Where torch keeps compiled code: left open, torch writes its choice into the environment when it is imported.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"torchinductor-{os.getuid()}"))

ENVIRONMENT = pytest.StashKey[dict[str, str]]()
"""Before any test file was imported."""

# The first call of a torch operator can take seconds, so a deadline would measure imports.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--golden DIR``."""
    parser.addoption(
        "--golden",
        action="append",
        type=Path,
        default=[],
        metavar="DIR",
        help="also check the golden cases of this directory (same layout as tests/golden/data); may be repeated",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a golden directory without cases; give the run a hub cache of its own, which its workers inherit, and a
    Python that starts quickly."""
    for path in config.getoption("golden"):
        if not path.is_dir():
            raise pytest.UsageError(f"--golden {path}: not a directory")
        if not any(path.rglob("*.json")):
            raise pytest.UsageError(f"--golden {path}: no cases (*.json) in it")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell that starts the suite in the background has it ignore interrupts, and so would all that it starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        cache = tempfile.mkdtemp(prefix="ouroboros-tests-")
        os.environ["HF_HOME"] = cache
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
        os.environ["OUROBOROS_TESTS_PYTHON"], held = install(cache)
        config.add_cleanup(lambda: os.close(held))
    config.stash[ENVIRONMENT] = dict(os.environ)


def _is_local(address: Any) -> bool:
    """Whether a socket address stays on this machine: a path, ``localhost`` or a loopback number."""
    if not isinstance(address, tuple):
        return True
    host = address[0]
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host in ("", "localhost", None):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuse every connection and look-up beyond the loopback interface, for the whole suite."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(address: Any) -> None:
        if not _is_local(address):
            raise RuntimeError(f"a test tried to reach {address!r}; the suite runs without a network")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        check(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        check(address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host != socket.gethostname():  # torch.distributed looks up its own machine
            check((host,))
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


def pytest_collection_finish(session: pytest.Session) -> None:
    """Give back the environment: see :func:`same_environment`. Importing all files has written into it, too."""
    _give_back(session.config.stash[ENVIRONMENT])


@pytest.fixture(scope="module", autouse=True)
def same_environment() -> Iterator[None]:
    """Give back the environment at the end of every file: libraries write into it, as torch does when it compiles, and
    a program of a later file would start with that, and not as a fork of the server, which has another one."""
    before = dict(os.environ)
    yield
    _give_back(before)


def _give_back(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if name != "PYTEST_CURRENT_TEST"})


@pytest.fixture(scope="session")
def python() -> str:
    """What starts a program of ours in a process of its own as ``sys.executable`` does, but without importing torch
    anew: see ``tests/processes/forked.py``."""
    return os.environ["OUROBOROS_TESTS_PYTHON"]


@pytest.fixture(scope="session")
def given_back() -> Callable[[], AbstractContextManager[None]]:
    """A context that gives back what the command line sets for its whole process: other tests see none of it."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        import torch
        from transformers.utils import logging as hf_logging

        torch.set_num_threads(1)
        library = logging.getLogger("ouroboros")
        level, verbosity = library.level, hf_logging.get_verbosity()
        try:
            yield
        finally:
            library.setLevel(level)
            hf_logging.set_verbosity(verbosity)
            hf_logging.enable_progress_bar()

    return context


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A directory of real text beside the project, for optional checks; skips the test where there is none."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no real data beside the project")
    return path
