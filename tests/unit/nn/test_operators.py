"""The shortcut as an operator, against the dense matrix and against a running model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.errors import OuroborosError
from ouroboros.eval.windows import evaluating
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.operators import (
    Erasure,
    coherence,
    deltanet,
    invert_update,
    product,
    product_singular_values,
    trajectory,
    update,
)
from ouroboros.systems.delta.measure import record, watching

GATES = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0]), st.floats(0, 2))
LENGTHS = st.one_of(st.just(1.0), st.floats(0.05, 1))


def directions(seed: int, *shape: int, length: float = 1.0) -> Tensor:
    """Random float64 directions of one length."""
    k = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return length * k / k.norm(dim=-1, keepdim=True)


def full(k: Tensor, b: float) -> Tensor:
    return torch.full(k.shape[:-1], b, dtype=k.dtype)


def close(found: Tensor, expected: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), D=st.integers(1, 9), b=GATES, q=LENGTHS)
def test_spectrum_is_that_of_the_matrix(seed: int, D: int, b: float, q: float) -> None:
    k = directions(seed, 3, D, length=q)
    operator = Erasure(k, full(k, b))
    A, eye = operator.dense(), torch.eye(D, dtype=k.dtype)
    close(A, A.mT)
    close(operator.eigenvalues(), torch.linalg.eigvalsh(A))
    close(operator.singular_values(), torch.linalg.svdvals(A))
    close(operator.determinant, torch.linalg.det(A))
    close(operator.trace, A.diagonal(dim1=-2, dim2=-1).sum(-1))
    close(operator.orthogonality_defect, (A.mT @ A - eye).abs().amax((-2, -1)))
    close(operator.involution_defect, (A @ A - eye).abs().amax((-2, -1)))
    close(operator.projection_defect, (A @ A - A).abs().amax((-2, -1)))
    close((A @ k[..., None])[..., 0], operator.eigenvalue[..., None] * k)
    close(A.mT @ A, eye - b * (2 - b * q * q) * k[..., :, None] * k[..., None, :])
    assert (operator.singular_values() <= 1 + 1e-12).all()
    if abs(1 - b * q * q) > 1e-6:
        torch.testing.assert_close(operator.condition, torch.linalg.cond(A), atol=0, rtol=1e-6)


def test_identity_involution_and_projection() -> None:
    k = directions(0, 5)
    keep, erase, reflect = (Erasure(k, torch.tensor(b, dtype=k.dtype)) for b in (0.0, 1.0, 2.0))
    x = directions(1, 5)
    assert torch.equal(keep.apply(x), x)
    close(erase.apply(erase.apply(x)), erase.apply(x), 1e-15)
    close(reflect.apply(reflect.apply(x)), x, 1e-15)
    close(reflect.apply(x).norm(), x.norm(), 1e-15)
    close(reflect.inverse(x).x, reflect.apply(x), 1e-15)
    assert erase.projection_defect < 1e-15 < erase.involution_defect
    assert reflect.involution_defect < 1e-15 < reflect.projection_defect
    assert Erasure(torch.ones(1, dtype=k.dtype), torch.tensor(1.0).double()).condition == torch.inf


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), D=st.integers(2, 9), V=st.integers(1, 4), b=GATES, q=LENGTHS)
def test_apply_is_the_matrix_on_every_channel(seed: int, D: int, V: int, b: float, q: float) -> None:
    k, x = directions(seed, 3, D, length=q), 2 * directions(seed + 1, 3, V, D)
    operator = Erasure(k, full(k, b))
    A = operator.dense()
    close(operator.apply(x), x @ A)
    close(operator.apply(x[:, 0]), (A @ x[:, 0, :, None])[..., 0])
    across = x - (x * k[:, None]).sum(-1, keepdim=True) * k[:, None] / q**2
    close(operator.apply(across), across)
    assert (operator.apply(x).norm(dim=-1) <= x.norm(dim=-1) + 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), V=st.sampled_from([None, 1, 3]), b=GATES, q=LENGTHS)
def test_update_contracts_and_is_inverted(seed: int, V: int | None, b: float, q: float) -> None:
    k = directions(seed, 4, 6, length=q)
    x = 3 * directions(seed + 1, *((4, 6) if V is None else (4, V, 6)))
    v = 2 * directions(seed + 2, *x.shape[:-1])
    gate, along = full(k, b), k if V is None else k[:, None]
    after = update(x, k, gate, v)
    factor = 1 - b * q * q
    close((along * after).sum(-1) - q * q * v, (factor * (along * x).sum(-1)) + b * q * q * v - q * q * v)
    if q == 1:
        close((along * after).sum(-1) - v, factor * ((along * x).sum(-1) - v))
    if abs(factor) > 1e-8:
        before, condition = invert_update(after, k, gate, v)
        torch.testing.assert_close(before, x, atol=1e-13 * condition.max().item(), rtol=0)
        close(Erasure(k, gate).inverse(Erasure(k, gate).apply(x)).x, x, 1e-13 * condition.max().item())
        close(condition, torch.full_like(condition, 1 / abs(factor)), 1e-9 / abs(factor))
    if b == 1 and q == 1:
        close((along * after).sum(-1), v, 1e-14)


def test_inverse_uses_the_true_length() -> None:
    k = (directions(0, 4, 256) * (1 + 2e-3)).float()  # bfloat16 directions are off by this much
    x, b = torch.randn(4, 256), torch.full((4,), 1.2)
    back = Erasure(k, b).inverse(Erasure(k, b).apply(x)).x
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)
    unit = Erasure(k / k.norm(dim=-1, keepdim=True), b).inverse(Erasure(k, b).apply(x)).x
    assert (unit - x).abs().max() > 1e-3


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 1e-4), (torch.float64, 1e-8)])
def test_inversion_is_refused_below_the_gap(dtype: torch.dtype, gap: float) -> None:
    k = torch.eye(4, dtype=dtype)[:2]
    for share, refused in ((0.5, True), (2.0, False)):
        b = torch.tensor([0.5, 1 - share * gap], dtype=dtype)
        if refused:
            with pytest.raises(OuroborosError, match=r"cannot be inverted: .* condition number is 2e\+0"):
                Erasure(k, b).inverse(k)
            with pytest.raises(OuroborosError, match="cannot be inverted"):
                invert_update(k, k, b, b)
        else:
            assert Erasure(k, b).inverse(k).condition[1].item() == pytest.approx(0.5 / gap, rel=1e-3)
    with pytest.raises(OuroborosError, match="condition number is inf"):
        Erasure(k, torch.ones(2, dtype=dtype)).inverse(k)


def test_the_least_precise_input_decides_the_gap() -> None:
    k, b = torch.eye(4, dtype=torch.float64)[0], torch.tensor(1 - 1e-6, dtype=torch.float64)
    Erasure(k, b).inverse(k)
    with pytest.raises(OuroborosError, match="below 0.0001, .* or give float64"):
        Erasure(k, b).inverse(k.float())
    with pytest.raises(OuroborosError, match="inverted from float32 or float64, got bfloat16"):
        Erasure(k, b).inverse(k.bfloat16())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), b=st.tuples(GATES, GATES), q=LENGTHS)
def test_two_updates_interact_by_one_cross_term(seed: int, b: tuple[float, float], q: float) -> None:
    k, gates = directions(seed, 2, 5, length=q), torch.tensor(b, dtype=torch.float64)
    first, second = (Erasure(k[at], gates[at]).dense() for at in (0, 1))
    outer = [k[at][:, None] * k[at] for at in (0, 1)]
    cross = b[0] * b[1] * (k[0] @ k[1]) * k[1][:, None] * k[0]
    eye = torch.eye(5, dtype=k.dtype)
    close(second @ first, eye - b[0] * outer[0] - b[1] * outer[1] + cross)
    close(product(eye, k, gates).mT, second @ first)
    close(first @ second - second @ first, cross.mT - cross)
    aside = k[1] - (k[0] @ k[1]) * k[0] / q**2
    for other in (k[0], -k[0], aside):
        pair = torch.stack((k[0], other))
        close(product(eye, pair, gates), product(eye, pair.flip(0), gates.flip(0)))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), N=st.integers(1, 8), D=st.integers(1, 6), q=LENGTHS)
def test_singular_values_of_a_product(seed: int, N: int, D: int, q: float) -> None:
    k = directions(seed, 2, N, D, length=q)
    b = 2 * torch.rand(2, N, dtype=k.dtype, generator=torch.Generator().manual_seed(seed))
    found = product_singular_values(k, b)
    assert found.shape == (2, N, min(N, D)) and found.dtype == torch.float64
    assert (found <= 1 + 1e-12).all()
    for row in range(2):
        A = torch.eye(D, dtype=k.dtype)
        for n in range(N):
            A = Erasure(k[row, n], b[row, n]).dense() @ A
            exact = torch.linalg.svdvals(A)
            mine = torch.cat((found[row, n], torch.ones(max(D - N, 0), dtype=k.dtype)))
            close(mine.sort(descending=True).values, exact)


def test_singular_values_with_repeated_and_missing_directions() -> None:
    k = directions(0, 1, 6).repeat(3, 1)
    k[2] = 0
    found = product_singular_values(k, torch.tensor([0.5, 0.5, 1.0]).double())
    close(found[:, -1], torch.tensor([0.5, 0.25, 0.25]).double())
    close(found[:, :-1], torch.ones(3, 2).double())


def test_depth_is_the_delta_rule_over_time() -> None:
    k, b, v, start = directions(0, 7, 5), torch.rand(7).double(), directions(1, 7, 3), directions(2, 3, 5)
    close(deltanet(k, b, v, start), trajectory(start, k, b, v), 1e-14)
    batch = deltanet(k.expand(2, 7, 5), b.expand(2, 7), v.expand(2, 7, 3))
    close(batch[1], trajectory(torch.zeros(3, 5).double(), k, b, v), 1e-14)


def test_coherence_is_the_signed_product_of_directions() -> None:
    k = directions(0, 4, 6)
    close(coherence(k)[1, 3], k[1] @ k[3])
    close(coherence(k).diagonal(), torch.ones(4).double())


def test_wrong_shapes_are_named() -> None:
    k, b = directions(0, 2, 3, 4), torch.ones(2, 3)
    with pytest.raises(OuroborosError, match=r"the gate needs .*\(2, 3\); got \(3,\)"):
        Erasure(k, b[0])
    with pytest.raises(OuroborosError, match=r"got \(2, 3, 5\) for \(2, 3, 4\)"):
        Erasure(k, b).apply(torch.zeros(2, 3, 5))
    with pytest.raises(OuroborosError, match=r"targets for a state \(2, 3, 2, 4\) are \(2, 3, 2\), got \(2, 3\)"):
        update(torch.zeros(2, 3, 2, 4), k, b, b)


def test_low_precision_states_are_summed_wider() -> None:
    k, x = directions(0, 64).bfloat16(), directions(1, 64).bfloat16()
    operator = Erasure(k, torch.tensor(1.0))
    exact = Erasure(k.double(), torch.tensor(1.0).double()).apply(x.double())
    assert torch.equal(operator.apply(x), exact.bfloat16())


def running_model(values: int, eps: float = 1e-6) -> tuple[OuroborosForCausalLM, Tensor]:
    """A looped model with gates all over (0, 2), as after training, and ids for it; a large ``eps`` shortens k."""
    spec = ModelSpec(layout="1 (1)x2 1", vocab_size=61, hidden_size=32).replace(
        mixer=AttentionSpec(num_heads=2, qk_norm="after_rope"),
        ffn=FeedForwardSpec(intermediate_size=85),
        residual=DeltaSpec(values=values, eps=eps),
    )
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name:
                parameter.normal_(std=1.5)
    return model, torch.randint(61, (2, 9))


@pytest.mark.parametrize("values", [1, 4])
def test_properties_hold_in_a_running_model(values: int) -> None:
    """The state after each residual is the update of the state before it, contracts along k, and can be inverted."""
    model, ids = running_model(values)
    states = []

    def keep(visit: object, sublayer: str, residual: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        states.append((args[0], output))

    with evaluating(model), watching(model, keep):
        model(ids, use_cache=False)
    records = record(model, ids)
    assert len(records) == len(states) == 8
    for before, (x, after) in zip(records, states):
        k, b, v = before.direction, before.beta, before.value if values > 1 else before.value[..., 0]
        torch.testing.assert_close(update(x, k, b, v), after, atol=2e-5, rtol=1e-5)
        operator = Erasure(k, b)
        torch.testing.assert_close(operator.eigenvalue.float(), before.eigenvalue)
        factor = operator.eigenvalue[..., None].float()
        shrunk = factor * (before.projection - before.value)
        projection = ((after if values > 1 else after[..., None, :]) @ k[..., None])[..., 0]
        torch.testing.assert_close(projection - before.value, shrunk, atol=2e-5, rtol=1e-4)
        sure = operator.eigenvalue.abs() > 0.01
        back = invert_update(after[sure], k[sure], b[sure], v[sure])
        torch.testing.assert_close(back.x, x[sure], atol=2e-3, rtol=1e-3)
        assert (back.condition <= 100).all()
    k = torch.stack([r.direction for r in records], dim=-2)
    b = torch.stack([r.beta for r in records], dim=-1)
    spread = product_singular_values(k, b)
    assert spread.shape == (2, 9, 8, 8) and (spread <= 1 + 1e-6).all() and spread.min() < 0.9


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_the_spectrum_holds_for_directions_and_gates_of_a_running_model(eps: float) -> None:
    """Facts of one shortcut against the matrix, with the true length of a guarded direction."""
    records = record(*running_model(1, eps))
    k = torch.stack([r.direction for r in records]).double().flatten(0, -2)
    b = torch.stack([r.beta for r in records]).double().flatten()
    operator, D, square = Erasure(k, b), k.shape[-1], k.square().sum(-1)
    assert b.min() < 0.2 and b.max() > 1.8 and ((square > 0.999).all() if eps < 1e-3 else square.max() < 0.99)
    A, eye, outer = operator.dense(), torch.eye(D, dtype=k.dtype), k[:, :, None] * k[:, None, :]
    close(operator.eigenvalue, 1 - b * square)
    close(operator.eigenvalues(), torch.linalg.eigvalsh(A))
    close(operator.singular_values(), torch.linalg.svdvals(A))
    close(operator.determinant, torch.linalg.det(A))
    close(operator.trace, A.diagonal(dim1=-2, dim2=-1).sum(-1))
    close(A.mT @ A, eye - (b * (2 - b * square))[:, None, None] * outer)
    assert (torch.linalg.matrix_norm(A, ord=2) <= 1 + 1e-6).all()
    across = torch.linalg.qr(torch.cat((k[:, :, None], eye[:, :3].expand(len(k), D, 3)), dim=-1)).Q[..., 1]
    close(operator.apply(across), across)
    sure = operator.eigenvalue.abs() > 1e-3
    inverse = torch.stack([Erasure(k[sure], b[sure]).inverse(row.expand(int(sure.sum()), D)).x for row in eye], dim=-1)
    close(inverse, torch.linalg.inv(A[sure]), 1e-8)
    torch.testing.assert_close(operator.condition[sure], torch.linalg.cond(A[sure]), atol=0, rtol=1e-6)
    unit = k / square.sqrt()[:, None]
    for gate, defect in ((0.0, "involution"), (2.0, "involution"), (2.0, "orthogonality"), (1.0, "projection")):
        assert getattr(Erasure(unit, torch.full_like(b, gate)), f"{defect}_defect").max() < 1e-12, (gate, defect)


@pytest.mark.parametrize("values", [1, 4])
def test_products_and_duality_hold_for_a_running_model(values: int) -> None:
    """Two updates interact by the cross term, all of them by a product that is 1 outside their span; depth is time."""
    records = record(*running_model(values))
    k = torch.stack([r.direction for r in records], dim=-2).double()[0]
    b = torch.stack([r.beta for r in records], dim=-1).double()[0]
    v = torch.stack([r.value for r in records], dim=-2).double()[0]
    N, D = k.shape[-2:]
    eye, outer = torch.eye(D, dtype=k.dtype), k[..., :, None] * k[..., None, :]
    first, second = (Erasure(k[:, at], b[:, at]).dense() for at in (0, 1))
    angle = (k[:, 0] * k[:, 1]).sum(-1)
    cross = (b[:, 0] * b[:, 1] * angle)[:, None, None] * k[:, 1, :, None] * k[:, 0, None, :]
    singles = [b[:, at, None, None] * outer[:, at] for at in (0, 1)]
    close(second @ first, eye - singles[0] - singles[1] + cross)
    close(coherence(k)[:, 0, 1], angle)
    A = eye.expand(len(k), D, D)
    for at in range(N):
        A = Erasure(k[:, at], b[:, at]).dense() @ A
    exact, found = torch.linalg.svdvals(A), product_singular_values(k, b)[:, -1]
    assert (exact <= 1 + 1e-6).all() and ((exact - 1).abs() > 1e-6).sum(-1).max() <= N
    close(torch.cat((found, found.new_ones(len(k), D - N)), -1).sort(-1, descending=True).values, exact)
    start = torch.randn(len(k), v.shape[-1], D, dtype=k.dtype, generator=torch.Generator().manual_seed(0))
    deep = trajectory(start, k.transpose(0, 1), b.T, v.transpose(0, 1)).transpose(0, 1)
    close(deltanet(k, b, v, start), deep, 1e-12)
