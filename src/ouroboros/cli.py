"""The command line: finds the verb in ``ouroboros.verbs``, runs it, turns errors into one line and a status.

Status: 0 the verb did what it says; 1 it could not; 2 wrong usage; 130 and 143 stopped by SIGINT or SIGTERM.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import MutableMapping, Sequence

from ouroboros.errors import OuroborosError, UsageError, nearest

VERBS = {
    "demo": ("demo", "train a looped model and its plain twin on bundled text; writes report.html"),
    "recipes": ("show", "list the recipes"),
    "show": ("show", "draw a recipe's schedule and its exact costs"),
    "train": ("train", "train a recipe on your text"),
    "resume": ("train", "continue an interrupted run, bit for bit"),
    "tokenizer": ("tokenizer", "train a byte-level BPE tokenizer"),
    "eval": ("evaluate", "score a model in bits per byte"),
    "check": ("check", "run the correctness harness and the audit on a model or recipe"),
    "generate": ("talk", "continue a prompt"),
    "chat": ("talk", "talk to a model"),
    "serve": ("serve", "answer over HTTP: OpenAI's interface, and a page to talk to the model"),
    "convert": ("convert", "make a model directory of a pretrained model or a published checkpoint"),
    "pack": ("pack", "write a model as one small file, within a budget of bytes"),
    "inspect": ("inspect", "list what a packed file holds"),
    "compare": ("compare", "train a recipe and its plain twins, and say which is better"),
    "export": ("export", "write a model in the form of another library"),
    "ablate": ("ablate", "run a study: what each of several changes to a recipe brings"),
    "report": ("report", "write a page about a run, a study or a comparison"),
    "doctor": ("doctor", "say what this machine and its installation can do, and what is missing"),
    "completion": ("completion", "print a script that lets a shell complete verbs and options"),
}
"""Verb: module in ``ouroboros.verbs`` and summary. The module has a function of the verb's name."""


THREAD_RUNTIME = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
"""How long a thread that waits for another one spins before it sleeps: turns of GNU's loop, milliseconds of LLVM's and
Intel's runtime. Left alone it spins for many milliseconds, and beside a busy program that keeps the thread it waits for
from running. The number of turns costs nothing on an idle machine; training that is slowed all the same goes on with
fewer threads (:mod:`ouroboros.train.threads`). Both are measured, see docs/benchmarks.md."""


def let_waiting_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Set :data:`THREAD_RUNTIME` where the user has not said how threads wait; needed before torch is loaded."""
    if not {"OMP_WAIT_POLICY", *THREAD_RUNTIME} & environment.keys():
        environment.update(THREAD_RUNTIME)


class Terminated(SystemExit):
    """SIGTERM, which ends a verb as Ctrl-C does: what it was writing is removed on the way out."""


def _terminate(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    raise Terminated(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    if arguments is None:  # the process is ours
        let_waiting_threads_sleep(os.environ)
        signal.signal(signal.SIGTERM, _terminate)
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from ouroboros import __version__

        sys.stdout.write(f"ouroboros {__version__}\n")
        return 0
    verb, rest = argv[0], argv[1:]
    try:
        if verb not in VERBS:
            raise UsageError(f"unknown verb {verb!r}{nearest(verb, VERBS)}")
        module = importlib.import_module(f"ouroboros.verbs.{VERBS[verb][0]}")
        status = getattr(module, verb)(rest)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _give_up_output()  # the reader has gone; nothing is left to say
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except Terminated:
        sys.stderr.write("terminated\n")
        return 143
    except (OuroborosError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        sys.stderr.write(f"error: {' '.join(text.split()) or type(error).__name__}\n")
        _give_up_output()
        return 2 if isinstance(error, UsageError) else 1


def _give_up_output() -> None:
    """Close standard output if it takes no more; else the interpreter would try again, and complain, as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            sys.stdout.close()


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "".join(f"  {verb:<{width}}  {summary}\n" for verb, (_, summary) in VERBS.items())
    return (
        "usage: ouroboros VERB [OPTIONS]\n\nLanguage models that reuse their weights.\n\n"
        f"verbs:\n{verbs}\n`ouroboros VERB --help` lists a verb's options.\n"
    )


def _run_as_module() -> None:
    """``python -m ouroboros.cli``, which is also how ``torchrun`` starts its workers.

    A worker leaves at once when its work is done and written: threads of the process group can keep an interpreter
    from ending, and the launcher waits for it.
    """
    status = main()
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    _run_as_module()
