"""Fields that another one makes idle."""

import dataclasses
import typing

import pytest

from ouroboros.config import OptimSpec, TrainSpec
from ouroboros.config.needs import is_on, needs
from ouroboros.config.train import LoopTraining


def test_a_need_names_the_other_field_and_the_values_that_count():
    assert needs("kind", "a", "b") == {"needs": (("kind", ("a", "b")),)}
    assert is_on("b", ("a", "b")) and not is_on("c", ("a", "b"))
    assert is_on(0.5, ()) and not any(is_on(value, ()) for value in (0, 0.0, None, False, ()))


@pytest.mark.parametrize("spec", [OptimSpec, LoopTraining, TrainSpec])
def test_every_need_names_a_field_and_values_that_it_can_have(spec):
    fields = {field.name: field for field in dataclasses.fields(spec)}
    hints, found = typing.get_type_hints(spec), 0
    for field in fields.values():
        for path, values in field.metadata.get("needs", ()):
            assert path in fields and path != field.name
            assert set(values) <= set(typing.get_args(hints[path]) if values else ())
            found += 1
    assert found
