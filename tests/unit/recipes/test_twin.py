"""The plain twin: everything equal but the loops, and the promised quantity within 1 %."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.accounting import cost, training_flops
from ouroboros.config import FeedForwardSpec, LoopTraining, Recipe
from ouroboros.config.parts.loop import InjectionSpec, LoopEmbeddingSpec, LoopNormSpec, RecurrenceGateSpec
from ouroboros.errors import OuroborosError
from ouroboros.recipes import RECIPES, SIZES, recipe
from ouroboros.recipes.twin import twin
from ouroboros.schedule import parse

LOOPED = [name for name, value in RECIPES.items() if parse(value.model.layout).is_looped]


def with_model(base: Recipe, **changes) -> Recipe:
    return dataclasses.replace(base, model=base.model.replace(**changes))


def operations(value: Recipe) -> int:
    return training_flops(value.model, value.train.loops, (value.data.sequence_length + 1) // 2)


@pytest.mark.parametrize("name", LOOPED)
@pytest.mark.parametrize("size", SIZES)
def test_the_three_twins_of_every_looped_recipe(name, size):
    looped = recipe(name, size)
    schedule = parse(looped.model.layout)
    by_parameters, by_flops, by_depth = (twin(looped, match) for match in ("parameters", "flops", "depth"))
    assert cost(by_parameters.model).parameters == pytest.approx(cost(looped.model).parameters, rel=0.01)
    assert operations(by_flops) == pytest.approx(operations(looped), rel=0.01)
    assert by_parameters.model.layout == str(schedule.num_blocks)
    assert by_flops.model.layout == by_depth.model.layout == str(schedule.num_visits)
    block = looped.model.block
    plain = dataclasses.replace(block, mixer=block.mixer.unlooped, ffn=block.ffn.unlooped)
    assert by_depth.model.block == plain
    for other in (by_parameters, by_flops, by_depth):
        train = dataclasses.replace(looped.train, loops=LoopTraining())
        assert (other.data, other.optim, other.train) == (looped.data, looped.optim, train)
        assert all(not part.provides for part in other.model.stem)  # no block without overrides reads such a table
        changed = {name: getattr(looped.model, name) for name in ("layout", "loop", "overrides", "stem")}
        changed |= {"mixer": block.mixer, "ffn": block.ffn}
        assert other.model.replace(**changed) == looped.model
        assert other.name == f"{name}-twin" and not parse(other.model.layout).is_looped


def test_parameters_are_the_default():
    assert twin(recipe("loop")) == twin(recipe("loop"), "parameters")


@given(
    layout=st.sampled_from(["1 (1)x2 1", "2 (2)x3 2", "(2)x4", "(1)x2 1 (2)x3", "4 (1)x8"]),
    width=st.sampled_from([64, 128, 256]),
    inject=st.sampled_from([(), (InjectionSpec(mode="add"),), (InjectionSpec(mode="concat"),)]),
    parts=st.sets(st.sampled_from([LoopNormSpec(), LoopEmbeddingSpec(), RecurrenceGateSpec()])),
    ffn=st.sampled_from(
        [FeedForwardSpec(intermediate_size=700), FeedForwardSpec(kind="relu2", intermediate_size=400, bias=True)]
    ),
    match=st.sampled_from(["parameters", "flops"]),
)
def test_loop_parts_are_paid_for_in_width(layout, width, inject, parts, ffn, match):
    looped = with_model(recipe("loop"), layout=layout, hidden_size=width, loop=(*inject, *parts), ffn=ffn)
    plain = twin(looped, match)
    measure = (lambda r: cost(r.model).parameters) if match == "parameters" else operations
    assert measure(plain) == pytest.approx(measure(looped), rel=0.01)
    assert plain.model.loop == () and plain.model.block.ffn.kind == ffn.kind


def test_the_closest_width_is_chosen():
    looped = with_model(recipe("loop", "tiny"), loop=(RecurrenceGateSpec(),))
    plain = twin(looped)
    target = cost(looped.model).parameters
    width = plain.model.block.ffn.intermediate_size

    def off(size: int) -> int:
        ffn = dataclasses.replace(plain.model.block.ffn, intermediate_size=size)
        return abs(cost(plain.model.replace(ffn=ffn)).parameters - target)

    assert off(width) == min(off(size) for size in range(width - 3, width + 4))


def test_random_loops_and_curricula_are_dropped():
    base = recipe("loop", "tiny")
    train = dataclasses.replace(base.train, loops=LoopTraining(curriculum=((0.0, 1), (0.5, 2))))
    assert twin(dataclasses.replace(base, train=train)).train.loops == LoopTraining()


def test_a_recipe_without_loops_is_its_own_twin():
    plain = recipe("gpt", "tiny")
    assert twin(plain).model == plain.model


def test_no_twin_is_better_than_a_false_one():
    narrow = FeedForwardSpec(intermediate_size=1)
    looped = with_model(recipe("loop", "tiny"), ffn=narrow, layout="(1)x9")
    with pytest.raises(OuroborosError, match=r"no plain twin of layout '\(1\)x9' has equal parameters within 1 %"):
        twin(with_model(looped, ffn=FeedForwardSpec(intermediate_size=1)))
