"""What became of a cell, in words that tell a full disk from an arm's own failure."""

import errno

import pytest

from ouroboros.ablate import worker
from ouroboros.ablate.cells import Diverged, Stopped
from ouroboros.errors import OuroborosError


def failing(error):
    def run_cell(cell):
        raise error

    return run_cell


def raised_from(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Stopped("stopped", "SIGTERM"), {"stopped": "SIGTERM", "error": "stopped"}),
        (Diverged("away"), {"diverged": True, "error": "away"}),
        (OuroborosError("bad"), {"error": "bad", "lasting": False}),
        (
            raised_from(OuroborosError("full"), raised_from(OuroborosError("x"), OSError(errno.ENOSPC, "No space"))),
            {"error": "full", "lasting": True},
        ),
        (raised_from(OuroborosError("gone"), OSError(errno.ENOENT, "gone")), {"error": "gone", "lasting": False}),
    ],
)
def test_outcomes(monkeypatch, error, outcome):
    monkeypatch.setattr(worker, "run_cell", failing(error))
    assert worker.outcome(None) == outcome
