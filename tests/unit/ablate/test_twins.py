"""Twins are plain, equal in what they are to be equal in, and of sound shapes."""

import dataclasses

import pytest

from ouroboros.ablate.twins import deep_twin, measure, opponent, twins_of
from ouroboros.accounting import cost
from ouroboros.config import LoopTraining, NoFeedForwardSpec
from ouroboros.errors import OuroborosError
from ouroboros.recipes import RECIPES, SIZES, recipe

LOOPED = [name for name, value in RECIPES.items() if value.model.schedule.is_looped]


@pytest.mark.parametrize("name", LOOPED)
@pytest.mark.parametrize("size", SIZES)
def test_the_deep_twin_of_every_looped_recipe_is_narrower_and_has_as_many_parameters(name, size):
    looped = recipe(name, size)
    model = deep_twin(looped).model
    assert cost(model).parameters == pytest.approx(cost(looped.model).parameters, rel=0.01)
    assert model.layout == str(looped.model.schedule.num_visits) and model.hidden_size < looped.model.hidden_size
    assert model.hidden_size % 4 == 0 and model.block.mixer.heads(model.hidden_size).width % 2 == 0
    shapes = [m.block.ffn.hidden_width / m.hidden_size for m in (model, looped.model)]
    assert size == "tiny" or shapes[0] == pytest.approx(shapes[1], rel=0.4)  # few widths are left to tiny models


def test_two_twins_of_equal_parameters_and_one_of_equal_operations():
    looped = recipe("loop", "tiny")
    plain, deep = twins_of(looped, "parameters")
    assert [twin.name for twin in (plain, deep)] == ["plain", "deep"]
    assert (plain.recipe.model.layout, deep.recipe.model.layout) == ("3", "4")
    assert "model.layout" in plain.changes and "model.hidden_size" in deep.changes
    (long,) = twins_of(looped, "flops")
    context = (looped.data.sequence_length + 1) // 2
    wanted, found = (measure(r.model, "flops", context) for r in (looped, long.recipe))
    assert found == pytest.approx(wanted, rel=0.01) and long.recipe.model.layout == "4"
    same = ("data", "optim", "train")
    assert all(getattr(t.recipe, n) == getattr(looped, n) for t in (plain, deep, long) for n in same)


RANDOM, GROWING = LoopTraining(sampling="uniform", max=6), LoopTraining(curriculum=((0.0, 1), (0.5, 2)))


@pytest.mark.parametrize("loops", [RANDOM, GROWING])
def test_operations_are_those_of_the_loops_that_are_trained(loops):
    """Not those of the layout, which a training with random or growing counts does not spend."""
    looped = recipe("loop", "tiny")
    looped = dataclasses.replace(looped, train=dataclasses.replace(looped.train, loops=loops))
    context = (looped.data.sequence_length + 1) // 2
    wanted = measure(looped.model, "flops", context, loops)
    assert abs(wanted / measure(looped.model, "flops", context) - 1) > 0.05
    (long,) = twins_of(looped, "flops")
    assert measure(long.recipe.model, "flops", context) == pytest.approx(wanted, rel=0.01)
    other = opponent(recipe("gpt", "tiny"), looped, "flops").recipe
    found = measure(other.model, "flops", context, other.train.loops)
    assert found == pytest.approx(measure(recipe("gpt", "tiny").model, "flops", context), rel=0.01)


def test_a_larger_vocabulary_makes_the_deep_twin_no_larger():
    looped = recipe("loop", "tiny")
    looped = dataclasses.replace(looped, model=looped.model.replace(vocab_size=2048))
    found = deep_twin(looped).model
    assert found.vocab_size == 2048 and cost(found).parameters == pytest.approx(cost(looped.model).parameters, rel=0.01)


def test_what_has_no_twin_says_so():
    with pytest.raises(OuroborosError, match="gpt has no loop.*--against RECIPE"):
        twins_of(recipe("gpt", "tiny"), "parameters")
    looped = recipe("loop", "tiny")
    bare = dataclasses.replace(looped, model=looped.model.replace(ffn=NoFeedForwardSpec()))
    with pytest.raises(OuroborosError, match="no feed-forward network"):
        twins_of(bare, "flops")
    thin = looped.model.replace(ffn=looped.model.block.ffn.replace(intermediate_size=1), hidden_size=4)
    with pytest.raises(OuroborosError, match="no width below 4"):
        deep_twin(dataclasses.replace(looped, model=thin))


def test_another_recipe_is_resized_only_where_it_is_not_equal():
    own = recipe("loop", "tiny")
    assert opponent(own, own, "parameters").repeat and opponent(own, own, "parameters").recipe == own
    wide = recipe("gpt", "tiny")
    other = dataclasses.replace(wide, model=wide.model.replace(ffn=wide.model.block.ffn.replace(intermediate_size=99)))
    made = opponent(own, other, "parameters").recipe
    assert cost(made.model).parameters == pytest.approx(cost(own.model).parameters, rel=0.01)
    assert made.data == own.data and made.train.batch_size == own.train.batch_size and made.optim == other.optim
    same = opponent(own, recipe("gpt", "tiny"), "parameters").recipe
    assert same.model.block.ffn == recipe("gpt", "tiny").model.block.ffn
