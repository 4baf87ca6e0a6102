"""Count sketches against dense matrices, and maps behind a convolution against the convolution by transforms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ouroboros.nn import sketch as module
from ouroboros.nn.sketch import (
    Sketch,
    apply_sketch,
    convolution,
    draw_sketch,
    gram_matrix,
    map_of_convolution,
    pair_buckets,
    reachable_buckets,
)

DOUBLE = torch.float64


def dense(sketch: Sketch, buckets: int) -> Tensor:
    """``S`` (M, D), entry by entry."""
    matrix = torch.zeros(buckets, len(sketch.bucket_D), dtype=DOUBLE)
    for j, (bucket, sign) in enumerate(zip(sketch.bucket_D.tolist(), sketch.sign_D.tolist())):
        matrix[bucket, j] = sign
    return matrix


def by_transforms(first: Tensor, second: Tensor, query: Sketch, key: Sketch, buckets: int) -> Tensor:
    """``Re(S q * S k)`` with complex transforms of complex sketches, as published but for its factor."""
    a, b = (
        torch.fft.fft(torch.complex(x[:, 0], x[:, 1]) @ dense(table, buckets).t().to(torch.complex128))
        for x, table in ((first, query), (second, key))
    )
    return torch.fft.ifft(a * b).real


def tables(width: int, buckets: int, shared: bool) -> tuple[Sketch, Sketch]:
    key = draw_sketch(width, buckets, 42)
    return (key if shared else draw_sketch(width, buckets, 43)), key


def factors(rows: int, width: int) -> tuple[Tensor, Tensor]:
    first, second = torch.randn(2, rows, 2, width, dtype=DOUBLE).unbind()
    return first.requires_grad_(), second.requires_grad_()


def test_a_table_follows_from_its_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two = draw_sketch(200, 7, 42), draw_sketch(200, 7, 42)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(draw_sketch(200, 7, 43).bucket_D, one.bucket_D)
    assert one.bucket_D.dtype == torch.int64 and set(one.bucket_D.tolist()) == set(range(7))
    assert set(one.sign_D.tolist()) == {-1.0, 1.0}
    # First all buckets, then all signs, so that the buckets do not depend on how signs are drawn.
    generator = torch.Generator().manual_seed(42)
    assert torch.equal(torch.randint(0, 7, (200,), generator=generator), one.bucket_D)


@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 5))
@settings(max_examples=25)
def test_sketch_and_its_gram_matrix(width: int, buckets: int, seed: int) -> None:
    table = draw_sketch(width, buckets, seed)
    S, x = dense(table, buckets), torch.randn(3, 2, width, dtype=DOUBLE)
    torch.testing.assert_close(apply_sketch(x, table, buckets), x @ S.t())
    assert torch.equal(gram_matrix(table, DOUBLE), S.t() @ S)


@given(st.integers(1, 9), st.integers(1, 15), st.booleans())
@settings(max_examples=25)
def test_the_convolution_is_that_of_transforms(width: int, buckets: int, shared: bool) -> None:
    query, key = tables(width, buckets, shared)
    first, second = factors(4, width)
    found = convolution(first, second, query, key, buckets)
    torch.testing.assert_close(found, by_transforms(first, second, query, key, buckets))
    # Bucket n holds the signed products of all i, j with h_i + h_j = n mod m.
    one = torch.zeros(4, buckets, dtype=DOUBLE)
    for i in range(width):
        for j in range(width):
            product = first[:, 0, i] * second[:, 0, j] - first[:, 1, i] * second[:, 1, j]
            bucket = int(query.bucket_D[i] + key.bucket_D[j]) % buckets
            one[:, bucket] += (query.sign_D[i] * key.sign_D[j] * product).detach()
    torch.testing.assert_close(found, one)
    assert (found.abs().amax(0) > 0).sum() == reachable_buckets(query, key, buckets)
    assert pair_buckets(query, key, buckets).max() < buckets


@pytest.mark.parametrize(("width", "buckets"), [(10, 27), (12, 7), (40, 64), (40, 1), (40, 501)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_both_forms_of_the_map_and_their_gradients(
    width: int, buckets: int, shared: bool, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd lengths, more coordinates than buckets, several bands, more rows than are worked on at a time."""
    monkeypatch.setattr(module, "direct_is_faster", lambda *_, **__: direct)
    query, key = tables(width, buckets, shared)
    first, second = factors(module.ROWS + 3, width)
    weight = torch.randn(5, buckets, dtype=DOUBLE, requires_grad=True)
    expected = by_transforms(first, second, query, key, buckets) @ weight.t()
    found = map_of_convolution(first, second, weight, query, key, shared=shared, dtype=DOUBLE)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (first, second, weight), cotangent)
    for gradient, of in zip(torch.autograd.grad(found, (first, second, weight), cotangent), wanted):
        torch.testing.assert_close(gradient, of)
    for index, one in enumerate((first, second, weight)):
        alone = [x if x is one else x.detach() for x in (first, second, weight)]
        found = map_of_convolution(*alone, query, key, shared=shared, dtype=DOUBLE)
        torch.testing.assert_close(torch.autograd.grad(found, one, cotangent)[0], wanted[index])


@pytest.mark.parametrize("direct", [True, False])
def test_only_the_product_is_in_the_shorter_format(direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "direct_is_faster", lambda *_, **__: direct)
    query, key = tables(20, 64, True)
    first, second = (x.detach().float() for x in factors(9, 20))
    weight = torch.randn(5, 64)
    exact = map_of_convolution(first, second, weight, query, key, shared=True, dtype=torch.float32)
    low = map_of_convolution(first, second, weight.bfloat16(), query, key, shared=True, dtype=torch.bfloat16)
    assert (exact.dtype, low.dtype) == (torch.float32, torch.bfloat16)
    assert 1e-4 < (low.float() - exact).norm() / exact.norm() < 2e-2


def test_features_of_independent_tables_are_unbiased_and_those_of_one_are_not() -> None:
    """Mean inner products of features over tables: ``<q,q'><k,k'>`` with two tables (Pham and Pagh 2013, lemma 2); with
    one, the pairs i, j and j, i always meet, and the pairs i, i and j, j without a sign where their buckets are one."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(5, generator=generator, dtype=DOUBLE) for _ in range(2))
    q2, k2 = k + 0.1, q - 0.2
    true = (q @ q2) * (k @ k2)
    N, m = 2000, 11
    alike = (q * k * q2 * k2).sum()
    biased = true + (q @ k2) * (k @ q2) - alike + ((q @ k) * (q2 @ k2) - alike) / m
    assert abs(biased - true) > 1
    pairs = [torch.stack((torch.stack(it), torch.zeros(2, 5, dtype=DOUBLE)), dim=1) for it in ((q, q2), (k, k2))]
    for shared, expected in ((False, true), (True, biased)):
        found = []
        for seed in range(N):
            key = draw_sketch(5, m, 2 * seed)
            query = key if shared else draw_sketch(5, m, 2 * seed + 1)
            one, two = convolution(*pairs, query, key, m)
            found.append(one @ two)
        sample = torch.stack(found)
        assert abs(sample.mean() - expected) < 4 * sample.std() / math.sqrt(N), shared
