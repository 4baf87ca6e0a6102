"""Workers alone; several of them are tested in tests/distributed."""

import torch
from torch import nn

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
