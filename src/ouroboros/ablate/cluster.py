"""Cells as tasks of Ray, on this machine or on several that share the study's directory and have this library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ouroboros.ablate.cells import Cell
from ouroboros.ablate.pool import Take
from ouroboros.config import from_json, to_dict
from ouroboros.errors import OuroborosError, check, first_line

LOCAL = "local"
"""In place of an address: a cluster of this machine's own, for as long as the study runs."""


def run_on_cluster(cells: Sequence[Cell], address: str, workers: int, take: Take) -> None:
    """Run the cells, begun in their order, as many at a time as the cluster has processors for.

    Args:
        cells: each asks for as many processors as it has threads.
        address: of a Ray cluster that runs, or :data:`LOCAL`.
        workers: how many cells a local cluster runs at a time.
        take: receives each cell and what became of it.

    Raises:
        OuroborosError: Ray is not installed, or the cluster cannot be reached.
    """
    try:
        import ray  # pyrefly: ignore (an extra)
    except ImportError:
        raise OuroborosError("--cluster needs Ray; install ouroboros-lm[cluster]") from None
    try:
        if address == LOCAL:
            count = workers * max(cell.threads for cell in cells)
            # At the loopback address, so that no other machine can reach it.
            ray.init(
                "local", num_cpus=count, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1"
            )
        else:
            ray.init(address=address, log_to_driver=False)
    except Exception as error:  # Ray has many kinds; the user needs one line
        raise OuroborosError(f"--cluster {address}: cannot be reached: {first_line(error)}") from error
    try:
        task: Any = ray.remote(max_retries=0)(_task)
        running = {task.options(num_cpus=cell.threads).remote(json.dumps(to_dict(cell))): cell for cell in cells}
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(ready)
            try:
                answer = json.loads(ray.get(ready))
            except ray.exceptions.RayError as error:
                answer = {"error": f"{cell.name}: its task ended: {first_line(error)}", "lasting": True}
            take(cell, answer)
    finally:
        ray.shutdown()


def _task(told: str) -> str:
    """Run a cell where Ray has placed it; both ways as JSON."""
    import torch

    from ouroboros.ablate.worker import outcome
    from ouroboros.model.pretrained import quiet_loading

    cell = from_json(Cell, told, where="cell")
    torch.set_num_threads(cell.threads)
    there = (cell.path.parents[2] / cell.data).is_dir()
    check(there, f"{cell.name}: {cell.root} is not there; the machines of a cluster share the study's directory")
    with quiet_loading():
        return json.dumps(outcome(cell))
