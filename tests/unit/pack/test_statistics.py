"""Second moments, visit by visit, against inputs that hooks of the test collect."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from variants import BASE, VARIANTS, model

from ouroboros.config import ModelSpec
from ouroboros.config.parts.halt import HaltSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.pack.statistics import gather, maps_of


def built(spec: ModelSpec) -> OuroborosForCausalLM:
    torch.manual_seed(0)
    made = OuroborosForCausalLM(OuroborosConfig.from_spec(spec))
    with torch.no_grad():  # maps that start at zero would leave nothing to see
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return made


def texts(spec: ModelSpec, rows: int = 3, length: int = 12) -> list[Tensor]:
    return list(torch.randint(spec.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1)))


def by_hooks(made: OuroborosForCausalLM, names: list[str], ids: Tensor) -> dict[str, list[Tensor]]:
    """The inputs of modules, call by call."""
    calls: dict[str, list[Tensor]] = defaultdict(list)

    def keep(name: str) -> Any:
        return lambda module, args: calls[name].append(args[0].detach().flatten(0, -2).double())

    hooks = [made.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.no_grad():
        made.eval()(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def close(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


NAMES = ["model.decoder.layers.1.self_attn.v_proj", "model.decoder.layers.1.mlp.down_proj", "lm_head"]


@pytest.mark.parametrize("tied", [True, False])
def test_every_visit_by_itself(tied):
    spec = BASE.replace(layout="1 (1)x3 1", tie_embeddings=tied)
    made, rows = built(spec), texts(BASE)
    found = gather(made, rows)
    for name, calls in by_hooks(made, NAMES, torch.stack(rows)).items():
        weight = "model.embed_tokens.weight" if tied and name == "lm_head" else f"{name}.weight"
        assert found.visits(weight) == list(range(len(calls)))
        for visit, x in enumerate(calls):
            assert found.counts[weight, visit] == len(x)
            close(found.sums[weight, visit] / len(x), moment(x))
        close(found.moment(weight), moment(torch.cat(calls)))
        close(found.moment(weight, "last"), moment(calls[-1]))
        close(found.moment(weight, (1.0, 3.0)), _weighted(calls))


def _weighted(calls: list[Tensor]) -> Tensor:
    factors = [1.0, 3.0, 3.0][: len(calls)]
    return torch.stack([f * moment(x) for f, x in zip(factors, calls, strict=True)]).sum(dim=0) / sum(factors)


def test_blocks_that_run_again_go_on_counting():
    made = built(BASE.replace(layout="1 a:1 1 (a)x2 a"))
    found = gather(made, texts(BASE))
    assert found.visits("model.decoder.layers.1.mlp.up_proj.weight") == [0, 1, 2, 3]
    assert found.visits("model.decoder.layers.2.mlp.up_proj.weight") == [0]


@pytest.mark.parametrize("name", ["registers", "delta token, loop all", "helix, registers", "controller, registers"])
def test_registers_are_not_counted(name):
    spec = VARIANTS[name]
    found = gather(built(spec), texts(spec, rows=2, length=9))
    inside = {key: count for key, count in found.counts.items() if ".layers." in key[0] and "bases" not in key[0]}
    assert inside
    assert set(inside.values()) <= {18, 36}  # some maps are applied twice in a visit
    spec = VARIANTS["latent, registers"]  # which makes keys of registers anew for every text
    counts = gather(built(spec), texts(spec, rows=2, length=9)).counts
    kept = counts["model.decoder.layers.0.self_attn.kv_b_proj.weight", 0]
    assert kept == 2 * (9 + spec.registers)


def test_positions_that_have_stopped_count():
    spec = model(loop=(HaltSpec(bias=8.0),), layout="1 (1)x3")
    found = gather(built(spec), texts(spec))
    assert [found.counts["model.decoder.layers.1.mlp.up_proj.weight", visit] for visit in range(3)] == [36] * 3


def test_rows_of_several_lengths_are_as_each_by_itself():
    made, rows = built(BASE), [row[: 5 + 3 * number] for number, row in enumerate(texts(BASE))]
    together, name = (
        gather(made, [*rows, torch.tensor([], dtype=torch.long)]),
        "model.decoder.layers.1.mlp.up_proj.weight",
    )
    alone = [gather(made, [row]) for row in rows]
    for visit in together.visits(name):
        close(together.sums[name, visit], sum((one.sums[name, visit] for one in alone), torch.tensor(0.0)))
        assert together.counts[name, visit] == sum(map(len, rows))


def test_batches_change_nothing_but_rounding():
    made, rows, name = built(BASE), texts(BASE, rows=7), "model.decoder.layers.0.mlp.up_proj.weight"
    whole, small = gather(made, rows), gather(made, rows, batch_tokens=24)
    close(small.moment(name), whole.moment(name))


def test_only_what_is_asked_for():
    found = gather(built(BASE), texts(BASE), ["model.decoder.layers.1.mlp.up_proj.weight"])
    assert {name for name, _ in found.sums} == {"model.decoder.layers.1.mlp.up_proj.weight"}


@pytest.mark.parametrize(
    ("name", "covered"),
    [
        ("delta channel, loop all", ".gate.proj.weight"),
        ("controller, registers", ".bases.q_proj.A"),
        ("static cores, bases of each loop", ".bases.up_proj.1.B"),
        ("helix by attention", ".k_proj.weight"),
        ("delta rule", ".o_proj.weight"),
        ("choke, tap", ".choke_down.0.weight"),
        ("value embedding, registers", "value_embedding.proj.weight"),
    ],
)
def test_maps_that_parts_call_as_functions(name, covered):
    spec = VARIANTS[name]
    made = built(spec)
    found = gather(made, texts(spec))
    names = [weight for weight, _ in made.named_parameters() if covered in weight]
    assert names and all(found.visits(weight) for weight in names)


@pytest.mark.parametrize("name", ["osam spectral, dropout", "osam kupdate"])
def test_a_map_that_is_folded_into_another_operation(name):
    spec = VARIANTS[name]
    made, weight = built(spec), "model.decoder.layers.0.self_attn.readout_in.weight"
    found = gather(made, texts(spec))
    inside = made.model.decoder.layers[0].self_attn
    assert found.visits(weight) and inside.folds
    features: list[Tensor] = []
    formed = inside.feature
    inside.feature = lambda *given: features.append(formed(*given)) or features[-1]  # pyrefly: ignore
    with torch.no_grad():
        ids = torch.stack(texts(spec))
        folded = made.eval()(input_ids=ids, use_cache=False).logits
        assert not features
        inside.folds = False
        formed_first = made(input_ids=ids, use_cache=False).logits
    close(found.sums[weight, 0], _sum(features[0]))
    torch.testing.assert_close(formed_first, folded, rtol=1e-3, atol=1e-3 * float(folded.abs().max()))


def _sum(x: Tensor) -> Tensor:
    x = x.flatten(0, -2).double()
    return x.T @ x


class OwnProduct(nn.Linear):
    """A map that is computed otherwise than torch's linear."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Backwards(nn.Linear):
    """A map by the transposed weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.T)


def test_what_is_no_map_is_known_by_its_reader():
    made = built(BASE)
    made.model.decoder.layers[1].mlp.up_proj = OwnProduct(32, 48, bias=False)
    found = gather(made, texts(BASE))
    name = "model.decoder.layers.1.mlp.up_proj.weight"
    assert found.moment(name) is None and found.read_by[name] == {"Tensor.matmul"}
    made.model.decoder.layers[1].self_attn.o_proj = Backwards(32, 32, bias=False)
    found, name = gather(made, texts(BASE)), "model.decoder.layers.1.self_attn.o_proj.weight"
    assert found.moment(name) is None and found.read_by[name] == {"linear"}
    spec = VARIANTS["choke grouped, tap of chosen blocks"]
    assert gather(built(spec), texts(spec)).read_by["model.decoder.layers.0.mlp.group_down"]


class Stacked(nn.Module):
    """Two maps in one tensor, of which each reads something else; a third one that nothing reads."""

    PARAMETER_ROLES = {"weight": "vector"}

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(3, 48, 32))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight[0]) + nn.functional.linear(x.square(), self.weight[1])


def test_maps_that_are_stacked_in_one_tensor():
    made, rows, path = built(BASE), texts(BASE), "model.decoder.layers.1.mlp.up_proj"
    made.model.decoder.layers[1].mlp.up_proj = Stacked()
    (calls,) = [c[0:2] for c in by_hooks(made, [path], torch.stack(rows)).values()]
    for names in (None, [f"{path}.weight"]):
        found = gather(made, rows, names)
        for visit, x in enumerate(calls):
            close(found.sums[f"{path}.weight[0]", visit] / len(x), moment(x))
            close(found.sums[f"{path}.weight[1]", visit] / len(x), moment(x.square()))
        assert found.moment(f"{path}.weight[2]") is None and found.moment(f"{path}.weight") is None
    assert maps_of("w", torch.zeros(2, 3, 4, 5)).keys() == {f"w[{number}]" for number in range(6)}


def test_the_model_is_left_as_it_was():
    made, rows = built(VARIANTS["biases, sandwich"]).train(), texts(BASE)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    gather(made, rows)
    assert made.training and not made.model.decoder.observers
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    with pytest.raises(OuroborosError):
        gather(made, [torch.tensor([10_000])])
    assert made.training and not made.model.decoder.observers


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "there is no text"), ([torch.tensor([1, 67])], "ids must be from 0 to 66"), ([torch.tensor([-1])], "from 0")],
)
def test_texts_that_cannot_be_read(rows, message):
    with pytest.raises(OuroborosError, match=message):
        gather(built(BASE), rows)


def test_weightings_that_mean_nothing():
    found, name = gather(built(BASE), texts(BASE)), "model.decoder.layers.1.mlp.up_proj.weight"
    with pytest.raises(OuroborosError, match="mean, last or factors"):
        found.moment(name, "first")
    with pytest.raises(OuroborosError, match="not all 0"):
        found.moment(name, (0.0,))
