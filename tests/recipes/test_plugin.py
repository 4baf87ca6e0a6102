"""A part of every family, defined and registered here alone, passes the whole harness."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ouroboros.accounting import cost, describe
from ouroboros.config import (
    DataSpec,
    FeedForwardPart,
    FeedForwardSpec,
    HeadPart,
    LoopPart,
    MixerPart,
    ModelSpec,
    NormPart,
    OptimSpec,
    Recipe,
    ResidualPart,
    StemPart,
    TopologyPart,
    TrainSpec,
    from_dict,
    to_dict,
)
from ouroboros.config.part import _KINDS, Part, family, part
from ouroboros.eval.harness import run_harness
from ouroboros.nn.memory import with_recent
from ouroboros.nn.part import LoopModule, Projection, Residual, Started
from ouroboros.nn.topology import MAIN, Event, segment_steps
from ouroboros.nn.visit import VisitContext
from ouroboros.schedule import Schedule
from ouroboros.train.log import Progress
from ouroboros.train.run import resume, start
from ouroboros.verbs.parts import take_model


class Average(nn.Module):
    """A mixer with a state of constant size: the sum of all values so far, and their number."""

    def __init__(self, spec: Any, width: int, norm_eps: float) -> None:
        super().__init__()
        self.v_proj = Projection(width, width, bias=False)
        self.o_proj = Projection(width, width, bias=False)

    def forward(self, x_BTD: Tensor, visit: VisitContext) -> Tensor:
        v_BTD = self.v_proj(x_BTD)
        real_BT = v_BTD.new_ones(v_BTD.shape[:2]) if visit.padding is None else visit.padding.to(v_BTD.dtype)
        both = torch.cat((v_BTD * real_BT[..., None], real_BT[..., None]), dim=-1)
        sums = both.cumsum(dim=1)
        past = None if visit.memory is None else visit.memory.state()
        sums = sums if past is None else sums + past[:, None]
        if visit.memory is not None and visit.memory.keeps:
            visit.memory.carry(sums[:, -1], x_BTD.shape[1])
        return self.o_proj(sums[..., :-1] / sums[..., -1:].clamp(min=1))


class Tanh(nn.Module):
    OUTPUT_PROJECTIONS = ("out",)

    def __init__(self, spec: Any, width: int) -> None:
        super().__init__()
        self.inner, self.out = Projection(width, spec.inner, bias=False), Projection(spec.inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(x)))


class Centre(Started):
    """A norm that takes the mean away."""

    def __init__(self, spec: Any, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def reset_parameters(self, init: Any = None) -> None:
        nn.init.ones_(self.gain)

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(dim=-1, keepdim=True)) * self.gain


class Scaled(Residual):
    def __init__(self, spec: Any, width: int, dropout: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def reset_parameters(self, init: Any = None) -> None:
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor, update: Tensor, context: Tensor, read: Tensor) -> Tensor:
        return x + self.scale * update


class Anchor(LoopModule):
    """Pulls every loop towards what the first one produced: carries a value from loop to loop."""

    def __init__(self, spec: Any, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.pull = nn.Parameter(torch.zeros(width))

    def reset_parameters(self, init: Any = None) -> None:
        nn.init.zeros_(self.pull)

    def leave(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        first = carried.setdefault("first", z)
        return z + self.pull * (first - z)


class Smear(Started):
    """A stem part with a memory: adds a share of the previous token's embedding."""

    def __init__(self, spec: Any, model: ModelSpec) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(model.hidden_size))

    def reset_parameters(self, init: Any = None) -> None:
        nn.init.zeros_(self.share)

    def forward(self, x_BTD: Tensor, ids_BT: Tensor | None, visit: VisitContext) -> Tensor:
        if visit.padding is not None:
            x_BTD = x_BTD * visit.padding[..., None].to(x_BTD.dtype)
        return x_BTD + self.share * with_recent(visit.memory, "smear", x_BTD, 1)[:, :-1]


class Bias(Started):
    """A head that adds a bias for each token of the vocabulary."""

    def __init__(self, spec: Any, model: ModelSpec) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(model.vocab_size))

    def reset_parameters(self, init: Any = None) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.bias


class Skip(Started):
    """A topology that adds the stream at its start to the stream at its end."""

    def __init__(self, spec: Any, model: ModelSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(model.hidden_size))

    def reset_parameters(self, init: Any = None) -> None:
        nn.init.zeros_(self.weight)

    def steps(self, schedule: Schedule) -> Iterator[Any]:
        yield Event(self._save)
        yield from segment_steps(schedule)
        yield Event(self._merge)

    def _save(self, streams: dict[str, Tensor]) -> None:
        streams["saved"] = streams[MAIN]

    def _merge(self, streams: dict[str, Tensor]) -> None:
        streams[MAIN] = streams[MAIN] + self.weight * streams["saved"]


PARTS: list[tuple[type[nn.Module], type[Part]]] = []


def toy(module: type[nn.Module]) -> Callable[[Any], Any]:
    """As ``part``, at :func:`registered`."""

    def keep(spec: Any) -> Any:
        PARTS.append((module, spec))
        return spec

    return keep


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """Parts stay registered for good; those of here are taken out again, because other tests count what there is."""
    for module, spec in PARTS:
        part(module=module)(spec)
    yield
    for _, spec in PARTS:
        del _KINDS[family(spec)][spec().kind]


@toy(module=Average)
@dataclass(frozen=True, kw_only=True)
class AverageSpec(MixerPart):
    keeps = "state"
    kind: Literal["toy_average"] = "toy_average"

    def parameters(self, width: int) -> int:
        return 2 * width * width

    def flops(self, width: int, context: int, registers: int = 0) -> int:
        return 2 * 2 * width * width

    def state_values(self, width: int) -> int:
        return width + 1


@toy(module=Tanh)
@dataclass(frozen=True, kw_only=True)
class TanhSpec(FeedForwardPart):
    kind: Literal["toy_tanh"] = "toy_tanh"
    inner: int = 24

    def parameters(self, width: int) -> int:
        return 2 * width * self.inner

    def flops(self, width: int) -> int:
        return 4 * width * self.inner


@toy(module=Centre)
@dataclass(frozen=True, kw_only=True)
class CentreSpec(NormPart):
    kind: Literal["toy_centre"] = "toy_centre"

    def parameters(self, width: int) -> int:
        return width


@toy(module=Scaled)
@dataclass(frozen=True, kw_only=True)
class ScaledSpec(ResidualPart):
    kind: Literal["toy_scaled"] = "toy_scaled"

    def parameters(self, width: int) -> int:
        return width


@toy(module=Anchor)
@dataclass(frozen=True, kw_only=True)
class AnchorSpec(LoopPart):
    kind: Literal["toy_anchor"] = "toy_anchor"

    @classmethod
    def neutral(cls) -> tuple[LoopPart, ...]:
        return (cls(),)

    def parameters(self, width: int, loops: int) -> int:
        return width


@toy(module=Smear)
@dataclass(frozen=True, kw_only=True)
class SmearSpec(StemPart):
    kind: Literal["toy_smear"] = "toy_smear"

    def parameters(self, model: ModelSpec) -> int:
        return model.hidden_size

    def recent_values(self, width: int) -> int:
        return width


@toy(module=Bias)
@dataclass(frozen=True, kw_only=True)
class BiasSpec(HeadPart):
    kind: Literal["toy_bias"] = "toy_bias"

    def parameters(self, model: ModelSpec) -> int:
        return model.vocab_size


@toy(module=Skip)
@dataclass(frozen=True, kw_only=True)
class SkipSpec(TopologyPart):
    kind: Literal["toy_skip"] = "toy_skip"

    def parameters(self, model: ModelSpec) -> int:
        return model.hidden_size


BASE = ModelSpec(layout="1 (1)x2", vocab_size=67, hidden_size=32, max_position_embeddings=64).replace(
    ffn=FeedForwardSpec(intermediate_size=48)
)
TOYS: dict[str, dict[str, Any]] = {
    "mixer": {"mixer": AverageSpec()},
    "feed-forward network": {"ffn": TanhSpec()},
    "norm": {"norm": CentreSpec(placement="sandwich")},
    "residual": {"residual": ScaledSpec()},
    "loop part": {"loop": (AnchorSpec(),)},
    "stem part": {"stem": (SmearSpec(),)},
    "head": {"head": BiasSpec()},
    "topology": {"topology": SkipSpec()},
}
TOYS["all"] = {name: value for toy in TOYS.values() for name, value in toy.items()}
TOYS["all, registers"] = TOYS["all"] | {"registers": 2}


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_part_passes_the_harness(name: str) -> None:
    spec = BASE.replace(**TOYS[name])
    assert [f"{f.name}: {f.detail}" for f in run_harness(spec, quick=True) if not f.ok] == []


def test_all_toys_compile() -> None:
    assert [f"{f.name}: {f.detail}" for f in run_harness(BASE.replace(**TOYS["all"])) if not f.ok] == []


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_part_goes_through_json_and_is_shown(name: str) -> None:
    spec = BASE.replace(**TOYS[name])
    assert from_dict(ModelSpec, to_dict(spec)) == spec
    assert f"{cost(spec).parameters:,}" in describe(spec)


class StopAt(Progress):
    """Asks the run to stop after some steps, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        super().__init__(quiet=True)
        self.step = step

    def update(self, status: Any) -> None:
        if status.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_of_toy_parts_is_resumed(tmp_path: Path) -> None:
    """The same weights with and without an interruption."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog on the log. " * 60)
    recipe = Recipe(
        name="toy",
        model=BASE.replace(**TOYS["all"]),
        data=DataSpec(sources=(str(text),), tokenizer="bytes", sequence_length=16),
        optim=OptimSpec(muon_precision="fp32"),
        train=TrainSpec(
            steps=4, batch_size=2, threads=1, precision="fp32", compile="off", checkpoint_every=2, eval_bytes=256
        ),
    )
    start(recipe, tmp_path / "whole", progress=Progress(quiet=True))
    assert not start(recipe, tmp_path / "parts", progress=StopAt(2)).finished
    assert resume(tmp_path / "parts", progress=Progress(quiet=True)).finished
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_toy_parts_are_chosen_on_the_command_line() -> None:
    words = [
        "--model.mixer",
        "toy_average",
        "--model.loop.toy-anchor",
        "--model.ffn=toy_tanh",
        "--model.ffn.inner",
        "8",
    ]
    rest, model = take_model(words, BASE)
    assert rest == []
    assert model == dataclasses.replace(BASE.replace(mixer=AverageSpec(), ffn=TanhSpec(inner=8)), loop=(AnchorSpec(),))
