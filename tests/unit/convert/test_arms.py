"""The arms of a healing: what each adds to a cut donor, and what of it is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ouroboros.config import Recipe
from ouroboros.convert.arms import TRAINED, Steering, trained
from ouroboros.convert.heal import Healing
from ouroboros.optim import left_out_parameters, untrained_parameters
from ouroboros.train.low_rank import LowRank

Make = Callable[..., Healing]


def test_every_arm_has_a_bridge_last_and_gains_where_there_are_several_loops() -> None:
    steering = Steering(rank=3, style=5, pooling="prefix")
    for loops in (1, 2):
        gain = ["gain"] if loops > 1 else []
        for arm in ("healed", "low-rank", "norms"):
            assert [part.kind for part in steering.parts(arm, loops)] == [*gain, "bridge"]
        static, controller = (steering.parts(arm, loops) for arm in ("static", "controller"))
        assert [part.kind for part in static[1:]] == [part.kind for part in controller[1:]] == [*gain, "bridge"]
        known: Any = controller[0]
        assert (known.rank, known.style, known.pooling) == (3, 5, "prefix")
        assert static[0].kind != controller[0].kind


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("arm", [*TRAINED, "norms"])
def test_of_the_donor_an_arm_trains_what_it_says(name: str, arm: str, healing: Make) -> None:
    """``healed`` and those that steer nothing, ``norms`` its vectors, ``low-rank`` additions to its matrices."""
    work = healing(name, steering=Steering(rank=3, style=5))
    model = work.cut(arm)
    recipe = trained(work.plan.recipe, arm, work.plan.steering, model)
    never = left_out_parameters(model, recipe.optim) | untrained_parameters(model)
    added = LowRank(model, recipe.train.low_rank, 0).factors.keys()
    whole = {key: value for key, value in model.named_parameters() if key not in never}
    parts = {key for key in whole if ".loops." in key}
    assert parts == {key for key, _ in model.named_parameters() if ".loops." in key and ".bases." not in key}
    layers = {key: value.ndim for key, value in model.named_parameters() if key.startswith("model.decoder.layers.")}
    vectors = {key for key, axes in layers.items() if axes == 1} | {"model.norm.weight"}
    matrices = {key for key, axes in layers.items() if axes == 2 and ".bases." not in key}
    expected: dict[str, set[str]] = {"norms": vectors, "low-rank": matrices}
    assert whole.keys() - parts == expected.get(arm, set())
    assert added == (matrices if arm == "low-rank" else set())


def test_a_recipe_is_named_after_its_arm_and_keeps_the_rest(healing: Make) -> None:
    work = healing()
    given: Recipe = work.plan.recipe
    found = trained(given, "healed", work.plan.steering, work.cut("healed"))
    assert found.name == "heal-healed" and found.data == given.data and found.train == given.train
    assert found.model == work.cut("healed").config.model_spec
    low = trained(given, "low-rank", Steering(low_rank=7), work.cut("low-rank")).train.low_rank
    assert low.rank == 7
