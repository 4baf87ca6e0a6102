"""A part with parameters that are dead in every way there is: each is found, named with its reason, and may be declared
so; everything beside it is alive."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from ouroboros.config import FeedForwardSpec, ModelSpec, OptimSpec, Recipe, StemPart
from ouroboros.config.needs import needs, untried
from ouroboros.config.part import _KINDS, kinds, part
from ouroboros.errors import OuroborosError
from ouroboros.eval import liveness as proof
from ouroboros.eval.liveness import ParameterLife, Report, liveness, parameter_lives
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.part import Started
from ouroboros.optim import build_optimizers
from ouroboros.recipes import recipe

DEAD = {
    "unconnected": "no logit depends on it, no gradient reaches it, 10 steps do not move it",
    "multiplied_by_zero": "no logit depends on it, its gradient is zero from its start on, 10 steps do not move it",
    "cancelled": "no logit depends on it",
    "saddle_left": "its gradient is zero from its start on, 10 steps do not move it",
    "saddle_right": "its gradient is zero from its start on, 10 steps do not move it",
    "stopped": "no gradient reaches it, 10 steps do not move it",
    "forgotten": "no optimiser group holds it",
}


class Toy(Started):
    """Adds to embeddings. ``up`` starts at zero, which keeps the gradient of ``down`` at zero for one step."""

    def __init__(self, spec: ToySpec, model: ModelSpec) -> None:
        super().__init__()
        for name in (*DEAD, "down", "up"):
            setattr(self, name, nn.Parameter(torch.empty(model.hidden_size)))
        self.spec = spec
        self.untrained = frozenset(DEAD if spec.declared else ())
        self.reset_parameters()

    def reset_parameters(self, init: Any = None) -> None:
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, 0.0 if name in ("saddle_left", "saddle_right", "up") else 0.3)

    def forward(self, x_BTD: Tensor, ids_BT: Tensor | None, visit: Any) -> Tensor:
        silent = 0 * self.multiplied_by_zero + self.cancelled - self.cancelled.detach()
        products = self.saddle_left * self.saddle_right + self.down * self.up
        return x_BTD + silent + products + self.spec.scale * self.stopped.detach() + self.forgotten


@dataclass(frozen=True, kw_only=True)
class ToySpec(StemPart):
    kind: Literal["toy_dead"] = "toy_dead"
    declared: bool = False
    scale: float = 1.0
    ignored: int = 3
    seldom: int = dataclasses.field(default=3, metadata=untried("acts on Sundays"))
    slope: float = dataclasses.field(default=0.5, metadata=needs("declared"))

    def parameters(self, model: ModelSpec) -> int:
        return 9 * model.hidden_size


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds(StemPart)
    monkeypatch.setitem(_KINDS, StemPart, dict(_KINDS[StemPart]))
    part(module=Toy)(ToySpec)


def toy(**options: Any) -> Recipe:
    model = ModelSpec(layout="1", vocab_size=41, hidden_size=32).replace(ffn=FeedForwardSpec(intermediate_size=24))
    return Recipe(
        name="toy",
        model=dataclasses.replace(model, stem=(ToySpec(**options),)),
        # Decay of everything, which moves what has a gradient of zeros.
        optim=OptimSpec(weight_decay=0.5, decay="all"),
    )


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimisers that hold every trained parameter but one."""

    def built(model: nn.Module, *arguments: Any, **options: Any) -> Any:
        forgotten = model.get_parameter("model.stem.toy_dead.forgotten")
        optimizers = build_optimizers(model, *arguments, **options)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["params"] = [parameter for parameter in group["params"] if parameter is not forgotten]
        return optimizers

    monkeypatch.setattr(proof, "build_optimizers", built)


def reasons(report: Report) -> dict[str, str]:
    return {life.name.removeprefix("model.stem.toy_dead."): life.why for life in report.dead_parameters}


def test_each_way_of_being_dead_is_found_and_named(forgetful: None) -> None:
    report = liveness(toy(), seed=1)
    assert reasons(report) == DEAD and not report.ok
    lives = {life.name.rpartition(".")[2]: life for life in report.parameters}
    awake = [(life.function, life.gradient, life.group, life.moves) for life in (lives["down"], lives["up"])]
    assert awake == [(True, True, "vector", True)] * 2
    assert lives["forgotten"].gradient and lives["forgotten"].group is None
    assert lives["cancelled"].moves and not lives["cancelled"].function
    assert all(life.numbers == 32 for life in report.dead_parameters)


def test_what_is_declared_is_no_fault(forgetful: None) -> None:
    faulty = [life for life in parameter_lives(toy(declared=True)) if life.why]
    assert {life.name.rpartition(".")[2] for life in faulty} == DEAD.keys()
    assert not any(life.dead for life in faulty)


def test_switches_of_the_model() -> None:
    found = {switch.name.removeprefix("model.stem.toy_dead."): switch for switch in liveness(toy()).switches}
    assert (found["scale"].acts, found["scale"].dead) == ("function", False)
    assert (found["declared"].acts, found["declared"].dead) == ("training", False)
    assert (found["ignored"].dead, found["ignored"].why) == (True, "another value changes nothing")
    assert (found["seldom"].dead, found["seldom"].why) == (False, "declared: it acts on Sundays")
    assert (found["slope"].dead, found["slope"].why) == (False, "needs stem.toy_dead.declared = on")
    set_ = {switch.name: switch for switch in liveness(toy(slope=0.7)).switches}["model.stem.toy_dead.slope"]
    assert set_.dead and set_.why.endswith(", but is set")


def test_the_wiring_decides_and_not_the_chance_of_a_draw() -> None:
    def shown(seed: int) -> list[ParameterLife]:
        return list(parameter_lives(recipe("osam", "tiny"), seed=seed))

    state = torch.random.get_rng_state()
    assert shown(0) == shown(1) and not [life.name for life in shown(2) if life.why]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_trained_model_is_left_as_it_is() -> None:
    given = toy(declared=True)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(given.model)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not [life.name for life in parameter_lives(given, model) if life.dead]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_a_loss_is_refused() -> None:
    given = toy()
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(given.model))
    nn.init.constant_(model.get_parameter("model.norm.weight"), float("nan"))
    with pytest.raises(OuroborosError, match="liveness: the loss of training step 0 is not finite"):
        parameter_lives(given, model)


def test_patterns() -> None:
    life = parameter_lives(toy())[0]
    names = {"a.layers.10.q.weight": "a.layers.*.q.weight", "up.0": "up.*", "h2.w1": "h2.w1"}
    assert {name: dataclasses.replace(life, name=name).pattern for name in names} == names
