"""Families of parts and the registry of them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from ouroboros.config import (
    FeedForwardPart,
    FeedForwardSpec,
    HeadPart,
    LoopPart,
    MixerPart,
    ModelSpec,
    NoFeedForwardSpec,
    NormPart,
    Part,
    ResidualPart,
    StemPart,
    TopologyPart,
    from_dict,
    to_dict,
)
from ouroboros.config.part import _KINDS, _MODULES, Place, build, family, is_family, kinds, module_of, part
from ouroboros.errors import OuroborosError
from ouroboros.schedule import parse

SHIPPED = {
    MixerPart: {
        *("attention", "latent_attention", "bottleneck_attention", "osam", "delta_rule"),
        *("cross", "split", "modulated_attention", "generated_attention"),
    },
    FeedForwardPart: {
        *("swiglu", "geglu", "relu2", "leaky_relu2", "gelu", "choke", "none", "modulated_swiglu"),
        *("modulated_geglu", "generated_swiglu"),
    },
    NormPart: {"rms", "layer"},
    ResidualPart: {"additive", "delta", "scaled", "none"},
    LoopPart: {
        *("flow", "inject", "embedding", "loop_smear", "anchor", "tap", "hyper", "norm", "gate", "update_gate", "gain"),
        *("contractive", "bridge", "static_diagonals", "static_cores", "controller", "matrix_controller", "halt"),
    },
    StemPart: {"ngram", "norm", "positions", "scale", "smear", "value_embedding", "unconnected_values"},
    HeadPart: {"linear"},
    TopologyPart: {"chain", "unet", "helix"},
}


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    kinds(MixerPart)
    for of, members in list(_KINDS.items()):
        monkeypatch.setitem(_KINDS, of, dict(members))


@dataclass(frozen=True, kw_only=True)
class Doubling(MixerPart):
    """A mixer from elsewhere."""

    kind: Literal["doubling"] = "doubling"
    factor: int = 2

    def parameters(self, width: int) -> int:
        return 0

    def flops(self, width: int, context: int, registers: int = 0) -> int:
        return 0


@pytest.mark.parametrize("of", SHIPPED, ids=lambda of: of.__name__)
def test_families(of: type[Part]) -> None:
    assert set(kinds(of)) == SHIPPED[of] and is_family(of)
    assert all(family(member) is of and not is_family(member) for member in kinds(of).values())
    kinds(of).clear()
    assert set(kinds(of)) == SHIPPED[of], "a copy"
    assert not any(is_family(other) for other in (Part, int, tuple[int, ...], None))


def test_a_part_from_elsewhere_is_read_written_and_built() -> None:
    part(module="builtins:dict")(Doubling)
    spec = ModelSpec().replace(mixer=Doubling(factor=3))
    assert kinds(MixerPart)["doubling"] is Doubling
    assert from_dict(ModelSpec, to_dict(spec)) == spec
    assert module_of(spec.block.mixer) is dict is _MODULES[Doubling], "imported once"


def test_is_built_of_the_specification_and_what_its_family_is_built_from() -> None:
    part(module=lambda *given: given)(Doubling)
    spec = Doubling()
    assert build(spec, 16, 1e-6) == (spec, 16, 1e-6)


def test_a_kind_belongs_to_one_part() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(Doubling):
        kind: Literal["attention"] = "attention"

    with pytest.raises(OuroborosError, match="'attention' is registered twice"):
        part(module=None)(Other)


def test_what_a_part_does_not_say_is_plain() -> None:
    model, mixer, residual = ModelSpec(), Doubling(), ResidualPart(kind="x")
    assert mixer.heads(16) == (1, 1, 16) and mixer.rotary(16) is None and mixer.keeps == "keys"
    assert mixer.prefix_flops(8) == (0, 0) and not (mixer.rebuilds_keys or mixer.flops_are_rounded)
    assert mixer.cache_values(8) == mixer.state_values(8) == mixer.recent_values(8) == 0
    assert list(mixer.warnings(model)) == [] and mixer.check(model) is None
    assert residual.channels == 1 and residual.form == "vector" and residual.entrance_parameters(8) == 0
    assert (
        residual.parameters(8) == residual.flops(8) == residual.reader_parameters(8) == residual.reader_values(8) == 0
    )
    assert residual.start_parameters(8) == residual.start_values(8) == 0
    assert mixer.at(Place(parse("3").segments[0], 1)) is mixer and not mixer.reads_other
    loop, stem, topology = LoopPart(kind="x"), StemPart(kind="x"), TopologyPart(kind="x")
    assert loop.parameters(8, 3) == loop.flops(8, 3) == 0 and LoopPart.neutral() == loop.watches == ()
    assert stem.parameters(model) == stem.flops(model) == stem.recent_values(8) == 0 and stem.longest(model) is None
    assert topology.parameters(model) == topology.flops(model, parse("3")) == 0 and topology.crossed(model) == set()
    assert HeadPart(kind="x").flops(model) == 2 * 257 * 256 and HeadPart(kind="x").parameters(model) == 0
    assert (
        not StemPart.replaces_rotary
        and not StemPart.provides
        and not FeedForwardSpec.absent
        and NoFeedForwardSpec().absent
    )


def test_specifications_need_no_framework() -> None:
    code = "import ouroboros.config.parts, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
