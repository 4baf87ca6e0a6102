"""More than one process: ``torchrun --nproc-per-node N -m ouroboros.cli train ...``; gloo on CPU, NCCL on CUDA."""

from __future__ import annotations

import contextlib
import datetime
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from ouroboros.errors import first_line

logger = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds that a finished process waits for its peers, and for its process group to end."""


@dataclass(frozen=True)
class Workers:
    """This process among its peers."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.world_size > 1

    def sum(self, *values: float) -> list[float]:
        """Element-wise sum over all processes, in float64."""
        if not self.distributed:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        if dist.get_backend() == "nccl":
            tensor = tensor.cuda()
        dist.all_reduce(tensor)
        return tensor.tolist()

    def any(self, flag: bool) -> bool:
        """True on every process if true on one, so that all stop at the same step."""
        return self.sum(float(flag))[0] > 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.distributed:
            dist.barrier()

    def wrap(self, model: nn.Module, *, uneven: bool = False) -> nn.Module:
        """``model`` in DistributedDataParallel, or itself when alone.

        Args:
            model: the same on every process.
            uneven: whether a step may leave out some parameters, as one of fewer loops leaves out those of later loops.
        """
        if not self.distributed:
            return model
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=uneven)


@contextlib.contextmanager
def workers() -> Iterator[Workers]:
    """Join the process group that ``torchrun`` describes; alone when started without it.

    ``torchrun`` speaks through the environment: ``torch.distributed`` reads it, nothing else here does.
    """
    if not dist.is_torchelastic_launched():
        yield Workers()
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store, rank, world_size = next(rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        if backend == "nccl":
            torch.cuda.set_device(dist.get_node_local_rank())
        yield Workers(rank, world_size)
        _part(store, rank, world_size)
    finally:
        _leave(backend)


def _part(store: dist.Store, rank: int, world_size: int, patience: float = PATIENCE) -> None:
    """Wait until no process is within a collective any more, by way of the store.

    A process that tears its connections down while a peer is still in the last barrier can leave the peer there for
    ever: gloo's barrier ends on one side before the other. The store does not depend on those connections; where the
    first process keeps it, that process goes last.
    """
    limit = datetime.timedelta(seconds=patience)
    try:
        if store.add("ouroboros/arrived", 1) == world_size:
            store.set("ouroboros/all", "arrived")
        store.wait(["ouroboros/all"], limit)
        if store.add("ouroboros/gone", 0 if rank == 0 else 1) == world_size - 1:
            store.set("ouroboros/others", "gone")
        if rank == 0:
            store.wait(["ouroboros/others"], limit)
    except dist.DistError as error:
        logger.warning("a process ends without its peers: %s", first_line(error))


def _leave(backend: str, patience: float = PATIENCE) -> None:
    """Leave the group; with gloo, whose teardown can wait for a peer that has gone first, for a limited time only."""
    if backend != "gloo":
        dist.destroy_process_group()
        return
    teardown = threading.Thread(target=dist.destroy_process_group, daemon=True)
    teardown.start()
    teardown.join(patience)
    if teardown.is_alive():
        logger.warning("the process group did not end within %.0f s; leaving without it", patience)
