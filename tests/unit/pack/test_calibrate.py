"""Whole models as codes: the order of stages, what is reported, and what it is worth."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from variants import BASE, VARIANTS

from ouroboros.config import ModelSpec, OptimSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.optim import build_optimizers
from ouroboros.pack import calibrate
from ouroboros.pack.calibrate import Quantized, apply, quantize_model
from ouroboros.pack.coded import Coded
from ouroboros.pack.gptq import solve
from ouroboros.pack.plan import DEFAULT, Rule, uniform
from ouroboros.pack.quantize import SQUARES, Clip, choose_steps
from ouroboros.pack.statistics import gather
from ouroboros.recipes import RECIPES, recipe


def built(spec: ModelSpec) -> OuroborosForCausalLM:
    torch.manual_seed(0)
    made = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return made


def texts(spec: ModelSpec, rows: int = 4, length: int = 16) -> list[Tensor]:
    return list(torch.randint(spec.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1)))


def dense(value: Coded | Tensor) -> Tensor:
    return value.dense() if isinstance(value, Coded) else value


def codes(made: Quantized, name: str) -> Tensor:
    value = made.tensors[name]
    assert isinstance(value, Coded)
    return value.codes


LOOPED = BASE.replace(layout="1 (1)x3 1", tie_embeddings=False)
LOOP, ONCE = "model.decoder.layers.1.", "model.decoder.layers.0."


@pytest.mark.parametrize("mode", ["loop-aware", "per-call", "rounding"])
def test_the_model_is_left_as_it_was_and_takes_the_tensors(mode):
    model, rows = built(LOOPED), texts(LOOPED)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = quantize_model(model, uniform(4), rows, mode=mode)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert made.tensors.keys() == made.report.keys() == before.keys()
    apply(model, made.tensors)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, dense(made.tensors[name]).float()), name
    methods = {line.method for line in made.report.values()}
    assert methods == {"float16", "rounding"} | ({"gptq"} if mode != "rounding" else set())


def test_every_recipe_packs():
    for name in RECIPES:
        spec = recipe(name, "tiny").model
        model, rows = built(spec), texts(spec, rows=2)
        made = quantize_model(model, DEFAULT, rows)
        with torch.no_grad():
            before = model(input_ids=rows[0][None]).logits
            apply(model, made.tensors)
            after = model(input_ids=rows[0][None]).logits
        assert float((after - before).std()) < 0.2 * float(before.std()), name


def test_loops_are_coded_by_what_they_read_in_the_packed_model():
    model, rows, bits = built(LOOPED), texts(LOOPED), 4
    plan = uniform(bits)
    found = quantize_model(model, plan, rows)
    flat = quantize_model(model, plan, rows, mode="per-call")
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name in original if name.startswith(LOOP) and isinstance(found.tensors[name], Coded)]
    for name in original:
        if name.startswith(ONCE) and isinstance(found.tensors[name], Coded):
            assert torch.equal(codes(found, name), codes(flat, name))  # nothing was coded before
    # By hand: codes of all that is read once, then the loop twice.
    now: dict[str, Coded | Tensor] = dict(found.tensors) | {name: original[name] for name in names}
    now["lm_head.weight"] = original["lm_head.weight"]
    for _ in range(2):
        apply(model, now)
        statistics = gather(model, rows)
        for name in names:
            steps = choose_steps(original[name], bits)
            moment = statistics.moment(name)
            assert moment is not None
            solved = solve(original[name], moment, steps, bits)
            now[name] = Coded(codes=solved.codes_RC, scales=steps, bits=bits, shape=tuple(original[name].shape))
    for name in names:
        value = now[name]
        assert isinstance(value, Coded) and torch.equal(value.codes, codes(found, name))
    assert any(not torch.equal(codes(found, name), codes(flat, name)) for name in names)


def test_weighting_changes_loops_alone():
    model, rows = built(LOOPED), texts(LOOPED)
    mean, last = (quantize_model(model, uniform(3), rows, weighting=w) for w in ("mean", "last"))
    differ = {
        name for name, value in mean.tensors.items() if isinstance(value, Coded) and not torch.equal(*(
            codes(made, name) for made in (mean, last)))
    }  # fmt: skip
    assert differ and all(name.startswith(LOOP) or name == "lm_head.weight" for name in differ)
    every = quantize_model(model, uniform(3), rows, weighting=(0.0, 0.0, 1.0))
    assert all(torch.equal(codes(every, name), codes(last, name)) for name in differ)


@pytest.mark.parametrize("name", ["u-net around a loop, scaled residual", "helix, registers", "two loops", "registers"])
def test_codes_do_not_depend_on_the_number_of_threads(name):
    spec, threads = VARIANTS[name], torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(quantize_model(built(spec), uniform(4), texts(spec)))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for tensor, value in found[0].tensors.items():
        assert torch.equal(dense(value), dense(found[1].tensors[tensor])), tensor


class OwnProduct(nn.Linear):
    """A map that is computed otherwise than torch's linear."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_fallbacks_are_errors_unless_they_are_allowed():
    model, rows, name = built(LOOPED), texts(LOOPED), f"{LOOP}mlp.up_proj.weight"
    model.model.decoder.layers[1].mlp.up_proj = OwnProduct(32, 48, bias=False)
    with pytest.raises(OuroborosError, match=r"up_proj\.weight: rounded, as it is read by .* method rounding"):
        quantize_model(model, DEFAULT, rows)
    made = quantize_model(model, DEFAULT, rows, allow_fallbacks=True)
    assert made.report[name].fallback and made.report[name].method == "rounding"
    assert len(made.exceptions) == 1 and name in made.exceptions[0]
    planned = quantize_model(model, DEFAULT.first(Rule(where=name, method="rounding")), rows)
    assert not planned.exceptions and torch.equal(codes(planned, name), codes(made, name))


class Stacked(nn.Module):
    """Two maps in one tensor, and a filter over channels, which is none."""

    PARAMETER_ROLES = {"weight": "vector", "filter": "vector"}

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(2, 48, 32))
        self.filter = nn.Parameter(torch.randn(1, 1, 48))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight[0]) + nn.functional.linear(x, self.weight[1]) * self.filter[0, 0]


def test_maps_that_are_stacked_are_coded_each_by_itself():
    torch.manual_seed(0)
    model, rows, path = built(LOOPED), texts(LOOPED, rows=8), f"{ONCE}mlp.up_proj"
    model.model.decoder.layers[0].mlp.up_proj = stacked = Stacked()
    plan = uniform(3).first(Rule(where="*up_proj.weight", bits=3, group=16), Rule(where="*filter", bits=3))
    made, found = quantize_model(model, plan, rows), gather(model, rows)
    weight, line = made.tensors[f"{path}.weight"], made.report[f"{path}.weight"]
    assert isinstance(weight, Coded) and line.method == "gptq" and not line.notes and not made.exceptions
    for number, w_RC in enumerate(stacked.weight.detach()):
        h_CC, steps = found.moment(f"{path}.weight[{number}]"), choose_steps(w_RC, 3, group=16)
        assert h_CC is not None
        solved = Coded(codes=solve(w_RC, h_CC, steps, 3).codes_RC, scales=steps, bits=3, shape=(48, 32))
        assert torch.equal(weight.dense()[number], solved.dense())
    assert line.objective is not None and line.rounding is not None and line.objective < 0.9 * line.rounding
    assert made.report[f"{path}.filter"].method == "rounding" and not made.report[f"{path}.filter"].fallback


def test_more_damping_is_an_error_unless_it_is_allowed(monkeypatch):
    def unwilling(w_RC, h_CC, steps_RG, bits):
        return solve(w_RC, h_CC - 0.3 * h_CC.diagonal().mean() * torch.eye(len(h_CC)), steps_RG, bits)

    monkeypatch.setattr(calibrate, "solve", unwilling)
    with pytest.raises(OuroborosError, match="damping raised to 0.1; damping raised to 1"):
        quantize_model(built(LOOPED), DEFAULT, texts(LOOPED))
    made = quantize_model(built(LOOPED), DEFAULT, texts(LOOPED), allow_fallbacks=True)
    assert not any(line.fallback for line in made.report.values())


def test_the_report_says_what_gptq_is_worth():
    made = quantize_model(built(LOOPED), uniform(3), texts(LOOPED, rows=8))
    lines = [line for line in made.report.values() if line.method == "gptq"]
    gains = [line.objective / line.rounding for line in lines if line.objective and line.rounding]
    assert len(gains) == len(lines) > 10
    assert sum(gains) / len(gains) < 0.9
    assert all(0 < line.entropy <= 3 for line in lines)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(value):
    model = built(BASE)
    with torch.no_grad():
        model.model.decoder.layers[0].mlp.up_proj.weight[3, 2] = value  # pyrefly: ignore
    with pytest.raises(OuroborosError, match=r"'model\.decoder\.layers\.0\.mlp\.up_proj\.weight' holds NaN"):
        quantize_model(model, DEFAULT, texts(BASE))


def test_numbers_that_float16_cannot_hold_are_refused_by_name():
    model = built(BASE)
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    with pytest.raises(OuroborosError, match=r"'model\.norm\.weight' has numbers beyond .* keep it as float32"):
        quantize_model(model, DEFAULT, texts(BASE))


def test_tensors_of_another_model_are_refused():
    model, made = built(BASE), quantize_model(built(BASE), DEFAULT, [], mode="rounding")
    with pytest.raises(OuroborosError, match=r"'model\.norm\.weight' is missing"):
        apply(model, {name: value for name, value in made.tensors.items() if name != "model.norm.weight"})
    with pytest.raises(OuroborosError, match="'other' is not one of the model"):
        apply(model, {**made.tensors, "other": torch.zeros(1)})
    with pytest.raises(OuroborosError, match=r"has shape \(3,\), the model wants \(32,\)"):
        apply(model, {**made.tensors, "model.norm.weight": torch.zeros(3)})


def test_an_unknown_mode():
    with pytest.raises(OuroborosError, match="mode is loop-aware"):
        quantize_model(built(BASE), DEFAULT, texts(BASE), mode="magic")  # pyrefly: ignore


def test_a_weighting_that_nothing_asks_for():
    with pytest.raises(OuroborosError, match="mode per-call puts visits together"):
        quantize_model(built(BASE), DEFAULT, texts(BASE), mode="per-call", weighting="last")


def sentences(rows: int, length: int, seed: int) -> Tensor:
    """Every id is that of three places before it, or up to two more: what a small loop learns in seconds."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(13, (rows, 3), generator=generator)
    columns = list(start.T)
    while len(columns) < length:
        noise = torch.randint(3, (rows,), generator=generator)
        columns.append((columns[-3] + noise) % 13)
    return torch.stack(columns, dim=1)


@pytest.fixture(scope="module")
def trained() -> Iterator[OuroborosForCausalLM]:
    spec = BASE.replace(layout="1 (1)x4 1", vocab_size=13, hidden_size=32)
    torch.manual_seed(0)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).train()
    optimizers, steps = build_optimizers(model, OptimSpec(lr=0.02), muon_dtype=torch.float32), 150
    for step in range(steps):
        x = sentences(16, 33, seed=step)
        model(input_ids=x[:, :-1], targets=x[:, 1:].contiguous()).loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * (1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
    yield model.eval()


@torch.no_grad()
def loss(model: OuroborosForCausalLM) -> float:
    x = sentences(200, 33, seed=10_000)
    return float(model(input_ids=x[:, :-1], targets=x[:, 1:].contiguous(), use_cache=False).loss)


def test_held_out_loss_of_a_trained_loop(trained):
    rows = list(sentences(200, 32, seed=20_000))
    before, whole = loss(trained), {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    cost = dict.fromkeys(("rounding", "per-call", "loop-aware"), 0.0)
    for clip in (SQUARES, Clip(by="quantile", value=1.0), Clip(by="sigma", value=2.5)):
        for mode in cost:
            apply(trained, quantize_model(trained, uniform(3, tables=8, clip=clip), rows, mode=mode).tensors)
            cost[mode] += (loss(trained) - before) / 3
            trained.load_state_dict(whole)
    assert cost["loop-aware"] < 0.7 * cost["rounding"]
    assert cost["loop-aware"] <= cost["per-call"] + 0.05 * cost["rounding"]
