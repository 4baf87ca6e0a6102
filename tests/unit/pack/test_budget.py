"""Budgets are kept and used, whatever the model, and bytes go where they are worth most."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from variants import BASE

from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.pack.budget import Fit, choose, fit, measure, parse_size, plan_of
from ouroboros.pack.calibrate import Quantized, quantize_model
from ouroboros.pack.coded import Coded
from ouroboros.pack.plan import DEFAULT, Rule
from ouroboros.pack.quantize import SQUARES
from ouroboros.pack.write import pack
from ouroboros.recipes import recipe

SPEC = BASE.replace(layout="1 (1)x3 1")


@functools.cache
def looped() -> tuple[OuroborosForCausalLM, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(SPEC)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    ids = torch.randint(SPEC.vocab_size, (6, 16), generator=torch.Generator().manual_seed(1))
    return model, tuple(ids)


def size_of(made: Quantized) -> int:
    return len(pack(SPEC, made.tensors))


@functools.cache
def bounds() -> tuple[int, int]:
    """Bytes of the file with eight bits, and of the smallest one."""
    model, ids = looped()
    items = measure(model, ids)
    smallest = plan_of(items, choose(items, 0))
    return size_of(quantize_model(model, DEFAULT, ids)), size_of(quantize_model(model, smallest, ids))


def fitted(budget: int) -> Fit:
    model, ids = looped()
    return fit(model, ids, budget, size_of)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.97])
def test_the_budget_is_used_and_never_exceeded(share):
    whole, smallest = bounds()
    budget = round(smallest + share * (whole - smallest))
    found = fitted(budget)
    assert found.feasible and found.size == size_of(found.made)
    assert 0.97 * budget <= found.size <= budget


def test_files_of_one_budget_can_be_made_more_equal():
    whole, smallest = bounds()
    model, ids = looped()
    budget = round(smallest + 0.6 * (whole - smallest))
    found = fit(model, ids, budget, size_of, enough=0.991)
    assert 0.991 * budget <= found.size <= budget


def test_a_model_that_fits_has_eight_bits():
    whole, _ = bounds()
    found, model = fitted(whole), looped()
    assert found.feasible and found.size == whole
    assert {line.bits for line in found.made.report.values()} == {0, 8}
    plain = quantize_model(model[0], DEFAULT, model[1])
    for name, tensor in plain.tensors.items():
        other = found.made.tensors[name]
        assert not isinstance(tensor, Coded) or (isinstance(other, Coded) and torch.equal(tensor.codes, other.codes))


def test_an_impossible_budget_ends_with_the_smallest_file():
    _, smallest = bounds()
    found = fitted(smallest // 2)
    assert not found.feasible and found.size == smallest


def test_bits_that_are_fixed_stay_so_and_the_others_share_the_rest():
    whole, smallest = bounds()
    budget, (model, ids) = (whole + smallest) // 2, looped()
    plan = DEFAULT.mixed(model, ["looped=8", "*embed*=3"], "--bits-of")
    found = fit(model, ids, budget, size_of, plan=plan)
    bits = {entry.place: set[int]() for entry, _ in plan.choose(model).values()}
    for name, (entry, rule) in plan.choose(model).items():
        if rule.keep is None:
            bits[entry.place].add(found.made.report[name].bits)
    assert bits["looped"] == {8} and bits["outside"] == {3} and min(bits["once"]) < 8
    assert found.feasible and 0.97 * budget <= found.size <= budget


def test_the_same_choice_every_time():
    whole, smallest = bounds()
    one, two = fitted((whole + smallest) // 2), fitted((whole + smallest) // 2)
    assert pack(SPEC, one.made.tensors) == pack(SPEC, two.made.tensors)


def test_what_matters_more_gets_more_bytes():
    model, ids = looped()
    items = measure(model, ids)
    target = sum(item.settings[len(item.settings) // 2].size for item in items)
    before = choose(items, target)
    item = items[-1]
    item.loss_per_error *= 1000
    after = choose(items, target)
    name = item.entry.name
    assert after[name].size > before[name].size and after[name].error < before[name].error
    for settings in (before, after):
        assert 0.97 * target <= sum(setting.size for setting in settings.values()) <= target


def test_settings_are_worth_less_and_less():
    model, ids = looped()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for item in measure(model, ids):
        sizes, errors = [s.size for s in item.settings], [s.error for s in item.settings]
        assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True) and len(sizes) > 5
        gains = [(a - b) / (d - c) for a, b, c, d in zip(errors, errors[1:], sizes, sizes[1:])]
        assert gains == sorted(gains, reverse=True)
        assert (item.settings[-1].bits, item.settings[-1].clip) == (8, SQUARES)
        assert item.loss_per_error > 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_maps_that_are_stacked_have_rows_of_their_own():
    spec = recipe("controller-first", "tiny").model
    torch.manual_seed(0)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()
    plan = DEFAULT.first(Rule(where="*.0.mlp.bases.down_proj.A?", bits=8), Rule(keep="float32"))
    ids = list(torch.randint(spec.vocab_size, (2, 9)))
    for item in measure(model, ids, plan):
        bases, rows, columns = item.entry.tensor.shape
        assert item.w_RC.shape == (bases * rows, columns) and len(item.weight_C) == columns
        assert not torch.equal(item.weight_C, torch.ones(columns).double())


def test_weights_that_are_no_numbers_are_refused_by_name():
    model, ids = looped()
    name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("q_proj.weight"))
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = float("nan")
        with pytest.raises(OuroborosError, match=f"{name}' holds NaN"):
            fit(model, ids, 10_000, size_of)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@pytest.mark.parametrize(
    ("text", "size"),
    [("300000", 300_000), ("256kB", 256_000), ("1.5 MB", 1_500_000), ("16mb", 16_000_000), ("12,000 B", 12_000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "12 apples", "256KiB", "-5", "0", "kB", "0.2"])
def test_what_is_no_size(text):
    with pytest.raises(OuroborosError, match=r"is no size: give bytes, such as 300000, 256kB or 1MB"):
        parse_size(text)
