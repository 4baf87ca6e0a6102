"""What an arm changes."""

import pytest

from ouroboros.ablate.changes import changed, differences, fingerprint
from ouroboros.errors import OuroborosError


def test_a_name_is_no_difference(small):
    renamed = changed(small, {"name": "other", "description": "as well"})
    assert differences(small, renamed) == {} and fingerprint(small) == fingerprint(renamed)
    other = changed(small, {"optim.lr": 0.5})
    assert differences(small, other) == {"optim.lr": (small.optim.lr, 0.5)} and fingerprint(small) != fingerprint(other)


def test_a_part_is_one_difference(small):
    assert differences(small, changed(small, {"model.block.residual": {"kind": "delta"}})) == {
        "model.block.residual": ("additive", "delta")
    }
    gated = changed(small, {"model.loop.gate": {"bias": -1.0}})
    assert differences(small, gated) == {"model.loop.gate": (None, "gate")}
    assert differences(gated, changed(gated, {"model.loop.gate": None})) == {"model.loop.gate": ("gate", None)}
    assert differences(gated, changed(gated, {"model.loop.gate.bias": 2.0})) == {"model.loop.gate.bias": (-1.0, 2.0)}


def test_parts_of_a_list_stand_in_the_order_of_the_registry(small):
    one = changed(small, {"model.loop.gate": {}, "model.loop.norm": {"rows": 2}})
    assert one == changed(small, {"model.loop.norm": {"rows": 2}, "model.loop.gate": {}})


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("optim.lrr", 1.0, "unknown field 'optim.lrr'; did you mean 'optim.lr'?"),
        ("opti.lr", 1.0, "unknown field 'opti.lr'; did you mean 'optim'?"),
        ("model.loop.gat", {}, "unknown part 'gat' of model.loop; did you mean 'gate'?"),
        ("model.loop.gate", 3, "model.loop.gate is a part: give a mapping"),
        ("optim.lr", "fast", "optim.lr"),
    ],
)
def test_an_unknown_field_or_value_is_refused_by_name(small, path, value, words):
    with pytest.raises(OuroborosError) as caught:
        changed(small, {path: value}, where="arm 'x'")
    assert words in str(caught.value) and str(caught.value).startswith("arm 'x'")
