"""What a sharded step sends, by the collectives of a group of processes of which one alone is real; two real ones train
in tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec, OptimSpec, TrainSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.optim import build_optimizers
from ouroboros.schedule import parse
from ouroboros.train.distributed import Workers
from ouroboros.train.sharding import Shards, reused_blocks, shards_of, whole
from ouroboros.train.state import gathered, model_tensors, pack_optimizers

PROCESSES = 4


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=PROCESSES)
    yield
    torch.distributed.destroy_process_group()


def model_of(layout: str = "1 (2)x3 1", **options: Any) -> OuroborosForCausalLM:
    parts = {"mixer": AttentionSpec(num_heads=2), "ffn": FeedForwardSpec(intermediate_size=24)}
    spec = ModelSpec(layout=layout, vocab_size=64, hidden_size=16, max_position_embeddings=32)
    torch.manual_seed(0)
    return OuroborosForCausalLM(OuroborosConfig.from_spec(spec.replace(**parts, **options))).train()


class Sent(TorchDispatchMode):
    """The collectives of a context: their names, and the numbers of their larger side."""

    def __init__(self) -> None:
        super().__init__()
        self.gathers: list[int] = []
        self.reductions: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith("c10d."):
            numbers = max(x.numel() for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor))
            (self.gathers if "gather" in name else self.reductions).append(numbers)
        return function(*args, **(kwargs or {}))


def backward(model: nn.Module, **options: Any) -> None:
    ids = torch.arange(16)[None]
    model(input_ids=ids, targets=ids, use_cache=False, **options).loss.backward()


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("loops", "backprop"), [(None, None), (7, None), (7, 2), (1, None)])
def test_a_looped_block_is_gathered_once_and_reduced_once(loops, backprop, recomputed):
    model = model_of()
    block = sum(p.numel() for p in model.model.decoder.layers[0].parameters())
    rest = sum(p.numel() for p in model.parameters()) - 4 * block
    if recomputed:
        model.activation_checkpointing_enable()
    shards = Shards(model, [], main=True, processes=PROCESSES)
    for _ in range(2):
        with Sent() as sent:
            backward(model, loops=loops, backprop_loops=backprop)
            shards.settle()
        # Two looped blocks once; the other two once for each direction. No gradient passes truncated loops.
        cut = backprop is not None
        assert sorted(sent.gathers) == sorted([rest] + (6 - cut) * [block])
        assert sorted(sent.reductions) == sorted([rest] + (4 - cut) * [block])
        trained = [
            p.grad is not None and p.grad.shape == p.shape for p in model.model.decoder.layers[cut:].parameters()
        ]
        assert all(trained)
        model.zero_grad()


def test_accumulated_gradients_are_reduced_once_and_looped_blocks_stay():
    model = model_of()
    shards = Shards(model, [], main=True, processes=PROCESSES)
    with Sent() as first, shards.apart():
        backward(model)
    assert not first.reductions and len(first.gathers) == 7
    with Sent() as second:
        backward(model)
        shards.settle()
    # Looped blocks reduce what the first pass has left, too, when the second one begins to leave them.
    assert len(second.reductions) == 7 and len(second.gathers) == 5


def test_every_process_has_its_part_of_weights_gradients_and_optimiser_state():
    model = model_of(tie_embeddings=True)
    total = sum(p.numel() for p in model.parameters())
    shards = Shards(model, [], main=False, processes=PROCESSES)
    optimizers = build_optimizers(model, OptimSpec(muon_precision="fp32"))
    backward(model)
    shards.settle()
    for optimizer in optimizers:
        optimizer.step()
    assert sum(p.to_local().numel() for p in model.parameters()) == total / PROCESSES
    assert sum(p.grad.to_local().numel() for p in model.parameters()) == total / PROCESSES
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = [tensor for tensor in pack_optimizers(optimizers, names)[0].values() if tensor.ndim]
    matrices = sum(p.numel() for p in model.model.decoder.parameters() if p.ndim == 2)
    assert sum(tensor.to_local().numel() for tensor in state) == (matrices + 2 * (total - matrices)) / PROCESSES


def test_one_process_keeps_whole_weights_for_evaluation():
    """The group is none, so all parts but the own one come back as they were before: not at all."""
    model = model_of()
    expected = {name: tensor.clone() for name, tensor in model_tensors(model).items()}
    shards = Shards(model, [], main=True, processes=PROCESSES)
    with shards.whole(model) as plain:
        assert plain is not model and plain.training
        for name, tensor in model_tensors(plain).items():
            part = -(-len(tensor) // PROCESSES)
            assert tensor.shape == expected[name].shape and torch.equal(tensor[:part], expected[name][:part])
    other = Shards(twin := model_of(), [], main=False, processes=PROCESSES)
    with other.whole(twin) as given:
        assert given is twin
    assert gathered(model_tensors(twin), keep=False) == {}


def test_nothing_is_divided_unless_asked_for_and_among_several():
    model = model_of()
    assert shards_of(TrainSpec(), model, None, Workers(0, 2)) is None
    assert shards_of(TrainSpec(sharding="full"), model, None, Workers()) is None
    with whole(model, None) as same:
        assert same is model
    tensors = model_tensors(model)
    assert all(found is tensors[name] for name, found in gathered(tensors, keep=True).items())


def test_blocks_that_are_visited_more_than_once():
    assert reused_blocks(parse("2 (1)x1 1")) == {2}
    assert reused_blocks(parse("3")) == set()
    assert reused_blocks(parse("A:2 1 A")) == {0, 1}


def test_a_single_number_is_refused():
    model = model_of()
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(OuroborosError, match=r"train\.sharding: scale is a single number"):
        Shards(model, [], main=True, processes=PROCESSES)
