"""Start of the command line: seconds of ``ouroboros --help`` beside a bare interpreter, and what it imports."""

from __future__ import annotations

import subprocess
import sys

from common import alternate, load, parser, report, spread, timed

HEAVY = ("torch", "transformers", "datasets", "numpy", "matplotlib")


def main() -> None:
    """Run the measurement."""
    chosen = parser(__doc__).parse_args()
    started = load()
    commands = {
        "ouroboros --help": [sys.executable, "-m", "ouroboros.cli", "--help"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    arms = {name: (lambda command=command: timed(lambda: _run(command))) for name, command in commands.items()}
    seconds = alternate(arms, chosen.rounds or (2 if chosen.quick else 21))
    listing = _run([sys.executable, "-X", "importtime", "-m", "ouroboros.cli", "--help"])
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in listing.splitlines() if "|" in line}
    assert "ouroboros" in loaded, "the listing of imports was not understood"
    report(
        "startup",
        started,
        seconds={name: spread(values) for name, values in seconds.items()},
        imported={name: name in loaded for name in HEAVY},
    )


def _run(command: list[str]) -> str:
    """Standard error of a command that must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr


if __name__ == "__main__":
    main()
