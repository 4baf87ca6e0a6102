"""Workers alone; several of them are tested in tests/distributed."""

import logging
import threading

import pytest
import torch
from torch import nn

from ouroboros.train import distributed
from ouroboros.train.distributed import Workers, workers


def test_alone_everything_is_the_identity():
    with workers() as crew:
        assert crew == Workers(rank=0, world_size=1)
        assert crew.is_main and not crew.distributed
        assert crew.sum(1.5, -2.0) == [1.5, -2.0]
        assert crew.any(True) and not crew.any(False)
        crew.barrier()
        model = nn.Linear(2, 2)
        assert crew.wrap(model) is model
    assert not torch.distributed.is_initialized()


def test_the_first_process_is_the_main_one():
    assert Workers(0, 2).is_main and not Workers(1, 2).is_main and Workers(1, 2).distributed


def test_processes_part_when_all_have_arrived():
    """The first one, which may keep the store, goes last."""
    store, order = torch.distributed.HashStore(), []

    def part(rank: int) -> None:
        distributed._part(store, rank, 3)
        order.append(rank)

    threads = [threading.Thread(target=part, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    threads[0].join(0.2)
    assert order == []
    part(2)
    for thread in threads:
        thread.join()
    assert sorted(order) == [0, 1, 2] and store.add("ouroboros/gone", 0) == 2


def test_a_process_does_not_wait_for_ever(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="ouroboros"):
        distributed._part(torch.distributed.HashStore(), 0, 2, patience=0.05)
    assert "a process ends without its peers" in caplog.text


def test_a_group_that_does_not_end_is_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    release = threading.Event()
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: release.wait(30))
    with caplog.at_level(logging.WARNING, logger="ouroboros"):
        distributed._leave("gloo", patience=0.01)
    release.set()
    assert "did not end within 0 s" in caplog.text
    ended = []
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: ended.append(True))
    for backend in ("gloo", "nccl"):
        distributed._leave(backend)
    assert ended == [True, True]
