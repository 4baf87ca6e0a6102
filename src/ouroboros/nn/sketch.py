"""Count sketches, and the bilinear feature of two sketched vectors (Pham and Pagh 2013).

A sketch is a fixed linear map ``S`` from D coordinates to M buckets: coordinate j is added to bucket ``h_j`` with the
sign ``s_j``. The circular convolution of two sketches holds every product of two coordinates once, at bucket
``(h_i + h_j) mod M``: a linear map of the D x D products, so that a linear map behind it needs no convolution.
Shapes: N rows, D width, M buckets, R outputs, F = M // 2 + 1 frequencies. Complex vectors are pairs (N, 2, D).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ouroboros.accounting import BAND, direct_is_faster

ROWS = 256
"""Rows worked on at a time, so that their products or spectra stay in a core's cache."""


class Sketch(NamedTuple):
    """The table of a count sketch."""

    bucket_D: Tensor
    """int64, in [0, M)."""
    sign_D: Tensor
    """+1 or -1."""


def draw_sketch(width: int, buckets: int, seed: int) -> Sketch:
    """A table from a seed, on the CPU: first all buckets, then all signs, from one generator (as published)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    bucket_D = torch.randint(0, buckets, (width,), generator=generator, device="cpu")
    bit_D = torch.randint(0, 2, (width,), generator=generator, device="cpu")
    return Sketch(bucket_D, 2.0 * bit_D.to(torch.float32) - 1.0)


def apply_sketch(x: Tensor, sketch: Sketch, buckets: int) -> Tensor:
    """``S x``: (..., D) to (..., M); coordinates of one bucket are added up."""
    zeros = x.new_zeros(*x.shape[:-1], buckets)
    return zeros.index_add(-1, sketch.bucket_D, x * sketch.sign_D.to(x.dtype))


def gram_matrix(sketch: Sketch, dtype: torch.dtype) -> Tensor:
    """``S^T S`` (D, D): the identity, and +1 or -1 where two coordinates share a bucket."""
    sign_D = sketch.sign_D.to(dtype)
    return torch.outer(sign_D, sign_D) * (sketch.bucket_D[:, None] == sketch.bucket_D)


def reachable_buckets(query: Sketch, key: Sketch, buckets: int) -> int:
    """How many buckets of the feature some pair of coordinates falls into; the others stay 0 for ever."""
    return int(torch.unique(pair_buckets(query, key, buckets)).numel())


def pair_buckets(query: Sketch, key: Sketch, buckets: int) -> Tensor:
    """(D, D), the bucket of coordinate i of the first factor times coordinate j of the second."""
    return (query.bucket_D[:, None] + key.bucket_D) % buckets


def products(first_N2D: Tensor, second_N2D: Tensor) -> Tensor:
    """(N, D, D), the real parts of all products of two complex coordinates."""
    flipped = torch.stack((first_N2D[:, 0], -first_N2D[:, 1]), dim=-1)
    return flipped @ second_N2D


def convolution(first_N2D: Tensor, second_N2D: Tensor, query: Sketch, key: Sketch, buckets: int) -> Tensor:
    """``Re(S q * S k)`` (N, M) by adding up products: the least work for a few rows."""
    signs = torch.outer(query.sign_D, key.sign_D).to(first_N2D.dtype)
    pairs = (products(first_N2D, second_N2D) * signs).flatten(1)
    zeros = pairs.new_zeros(pairs.shape[0], buckets)
    return zeros.index_add(1, pair_buckets(query, key, buckets).flatten(), pairs)


def map_of_convolution(
    first_N2D: Tensor,
    second_N2D: Tensor,
    weight_RM: Tensor,
    query: Sketch,
    key: Sketch,
    *,
    shared: bool,
    dtype: torch.dtype,
) -> Tensor:
    """``W Re(S q * S k)``: (N, 2, D) twice to (N, R), without the convolution's M numbers per row.

    Args:
        first_N2D: complex query coordinates.
        second_N2D: complex coordinates of the memory.
        weight_RM: the map behind the convolution.
        query: table of the first factor.
        key: table of the second.
        shared: the two tables are the same, so that the products i, j and j, i share a column.
        dtype: of the matrix product, and of the result.
    """
    precise = weight_RM.to(first_N2D.dtype)
    width, buckets = first_N2D.shape[-1], weight_RM.shape[1]
    if not direct_is_faster(width, buckets):
        return spectral_map(first_N2D, second_N2D, precise, *query, *key, dtype)
    signs = torch.outer(query.sign_D, key.sign_D).to(precise.dtype)
    # Rows of the transposed map are contiguous, so that gathering them, and adding their gradients up, is fast.
    weight_CR = precise.t().contiguous().index_select(0, pair_buckets(query, key, buckets).flatten())
    weight_CR = weight_CR * signs.flatten()[:, None]
    if torch.compiler.is_compiling():
        return products(first_N2D, second_N2D).flatten(1).to(dtype) @ weight_CR.to(dtype)
    bands = _bands(width) if shared else ((0, width),)
    return _Direct.apply(first_N2D, second_N2D, weight_CR.view(width, width, -1), bands, dtype)


@functools.cache
def _bands(width: int) -> tuple[tuple[int, int], ...]:
    """First and last coordinate of every band."""
    return tuple((start, min(start + BAND, width)) for start in range(0, width, BAND))


class _Direct(torch.autograd.Function):
    """Products of two complex vectors times a matrix (D, D, R), some rows at a time; products are not kept.

    With several bands the matrix is symmetric in its first two axes, and the products i, j and j, i are added up first.
    """

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, weight: Tensor, bands: tuple[tuple[int, int], ...], dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(first, second, weight)
        ctx.bands, ctx.dtype = bands, dtype
        matrix_CR = _banded(weight, bands).to(dtype)
        out = [
            _pairs(a, b, bands).to(dtype) @ matrix_CR
            for a, b in zip(first.split(ROWS), second.split(ROWS), strict=True)
        ]
        return torch.cat(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NR: Tensor) -> tuple[Tensor | None, ...]:
        first, second, weight = ctx.saved_tensors
        bands, dtype = ctx.bands, ctx.dtype
        needs_first, needs_second, needs_weight = ctx.needs_input_grad[:3]
        banded = _banded(weight, bands)
        matrix_RC = banded.t().to(dtype)
        grad_matrix = torch.zeros_like(banded) if needs_weight else None
        firsts, seconds = [], []
        for a, b, g in zip(first.split(ROWS), second.split(ROWS), grad_NR.split(ROWS), strict=True):
            if grad_matrix is not None:
                grad_matrix += _pairs(a, b, bands).to(dtype).t() @ g
            if needs_first or needs_second:
                grad_a, grad_b = _pairs_backward(a, b, (g @ matrix_RC).to(a.dtype), bands, needs_second)
                firsts.append(grad_a)
                seconds.append(grad_b)
        grad_weight = None if grad_matrix is None else _unbanded(grad_matrix, weight, bands)
        return (
            torch.cat(firsts) if needs_first else None,
            torch.cat([grad for grad in seconds if grad is not None]) if needs_second else None,
            grad_weight,
            None,
            None,
        )


def _banded(weight: Tensor, bands: tuple[tuple[int, int], ...]) -> Tensor:
    """The rows of (D, D, R) that belong to a band and itself or later coordinates, (C, R)."""
    if len(bands) == 1:
        return weight.flatten(0, 1)
    return torch.cat([weight[low:high, low:].flatten(0, 1) for low, high in bands])


def _unbanded(grad_CR: Tensor, weight: Tensor, bands: tuple[tuple[int, int], ...]) -> Tensor:
    """The gradient of (D, D, R) from that of its banded rows: those left out were not used."""
    if len(bands) == 1:
        return grad_CR.view_as(weight)
    grad = torch.zeros_like(weight)
    at, width = 0, weight.shape[0]
    for low, high in bands:
        rows = (high - low) * (width - low)
        grad[low:high, low:] = grad_CR[at : at + rows].view(high - low, width - low, -1)
        at += rows
    return grad


def _sides(a: Tensor, b: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Two factors (N, high - low, 4) and (N, 4, D - low) whose product is a band's symmetric products."""
    left = torch.stack((a[:, 0, low:high], -a[:, 1, low:high], b[:, 0, low:high], -b[:, 1, low:high]), dim=-1)
    right = torch.cat((b[:, :, low:], a[:, :, low:]), dim=1)
    right[:, 2:, : high - low] = 0  # within the band itself both orders are formed already
    return left, right


def _pairs(a: Tensor, b: Tensor, bands: tuple[tuple[int, int], ...]) -> Tensor:
    """The products of (N, 2, D) and (N, 2, D) that meet the banded matrix, (N, C)."""
    if len(bands) == 1:
        return products(a, b).flatten(1)
    return torch.cat([torch.bmm(*_sides(a, b, low, high)).flatten(1) for low, high in bands], dim=1)


def _pairs_backward(
    a: Tensor, b: Tensor, grad_NC: Tensor, bands: tuple[tuple[int, int], ...], needs_second: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of both factors from that of their products."""
    width = a.shape[-1]
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b) if needs_second else None
    at = 0
    for low, high in bands:
        size = (high - low) * (width - low)
        grad = grad_NC[:, at : at + size].view(-1, high - low, width - low)
        at += size
        _band_backward(a, b, grad, low, high, len(bands) > 1, grad_a, grad_b)
    return grad_a, grad_b


def _band_backward(
    a: Tensor, b: Tensor, grad: Tensor, low: int, high: int, both: bool, grad_a: Tensor, grad_b: Tensor | None
) -> None:
    """Add one band's share (N, high - low, D - low)."""
    sign = a.new_tensor((1.0, -1.0))[:, None]
    grad_a[:, :, low:high] += torch.bmm(b[:, :, low:], grad.mT) * sign
    if grad_b is not None:
        grad_b[:, :, low:] += torch.bmm(a[:, :, low:high] * sign, grad)
    if both and high < a.shape[-1]:
        later = grad[:, :, high - low :]
        grad_a[:, :, high:] += torch.bmm(b[:, :, low:high] * sign, later)
        if grad_b is not None:
            grad_b[:, :, low:high] += torch.bmm(a[:, :, high:], later.mT) * sign


@torch.library.custom_op("ouroboros::spectral_map", mutates_args=())
def spectral_map(
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    query_bucket: Tensor,
    query_sign: Tensor,
    key_bucket: Tensor,
    key_sign: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The same map in the frequency domain: by Parseval the inverse transform moves into the map's rows.

    ``W psi = sum_f c_f (Re W_f Re Psi_f + Im W_f Im Psi_f) / M`` with ``c_f`` 1 at frequency 0 (and M / 2), else 2.
    An operator of its own, because compilers do not take complex numbers.
    """
    query, key = Sketch(query_bucket, query_sign), Sketch(key_bucket, key_sign)
    matrix_CR = _folded(weight).to(dtype).t()
    out = []
    for a, b in zip(first.split(ROWS), second.split(ROWS), strict=True):
        fa, fb = _spectra(a, query, weight.shape[1]), _spectra(b, key, weight.shape[1])
        out.append(torch.view_as_real(_cross(fa, fb)).flatten(1).to(dtype) @ matrix_CR)
    return torch.cat(out)


@spectral_map.register_fake
def _(first: Tensor, second: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return first.new_empty(first.shape[0], weight.shape[0], dtype=rest[-1])


@torch.library.custom_op("ouroboros::spectral_map_backward", mutates_args=())
def spectral_map_backward(
    grad_NR: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    query_bucket: Tensor,
    query_sign: Tensor,
    key_bucket: Tensor,
    key_sign: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of both factors and of the map; empty tensors where ``needs`` says no."""
    query, key = Sketch(query_bucket, query_sign), Sketch(key_bucket, key_sign)
    buckets, dtype = weight.shape[1], grad_NR.dtype
    folded = _folded(weight)
    matrix_RC = folded.to(dtype)
    grad_matrix = torch.zeros_like(folded)
    firsts, seconds = [first.new_empty(0)], [first.new_empty(0)]
    for a, b, g in zip(first.split(ROWS), second.split(ROWS), grad_NR.split(ROWS), strict=True):
        fa, fb = _spectra(a, query, buckets), _spectra(b, key, buckets)
        if needs[2]:
            grad_matrix += g.t() @ torch.view_as_real(_cross(fa, fb)).flatten(1).to(dtype)
        if not (needs[0] or needs[1]):
            continue
        grad = torch.view_as_complex((g @ matrix_RC).to(a.dtype).view(len(g), -1, 2))
        if needs[0]:
            firsts.append(_spectra_backward(grad, fb, query, buckets))
        if needs[1]:
            seconds.append(_spectra_backward(grad, fa, key, buckets))
    grad_weight = _unfolded(grad_matrix, buckets) if needs[2] else weight.new_empty(0)
    return [torch.cat(firsts[1:] or firsts), torch.cat(seconds[1:] or seconds), grad_weight]


@spectral_map_backward.register_fake
def _(grad: Tensor, first: Tensor, second: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    needed = zip((first, second, weight), rest[-1], strict=True)
    return [torch.empty_like(x) if wanted else x.new_empty(0) for x, wanted in needed]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _gradients(ctx: Any, grad_NR: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    found = spectral_map_backward(grad_NR.contiguous(), *ctx.saved_tensors, needs)
    wanted = (grad if needed else None for grad, needed in zip(found, needs, strict=True))
    return (*wanted, None, None, None, None, None)


spectral_map.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.ouroboros.spectral_map)
def _(first_shape: Any, second_shape: Any, weight_shape: Any, *rest: Any, **_: Any) -> int:
    return 2 * first_shape[0] * 2 * (weight_shape[1] // 2 + 1) * weight_shape[0]


def _spectra(x_N2D: Tensor, sketch: Sketch, buckets: int) -> Tensor:
    """Spectra (N, 2, F) of the sketches of real and imaginary parts."""
    return torch.fft.rfft(apply_sketch(x_N2D, sketch, buckets))


def _cross(fa: Tensor, fb: Tensor) -> Tensor:
    """(N, F): the spectrum of the real part of the convolution of two complex sequences."""
    return torch.addcmul(fa[:, 0] * fb[:, 0], fa[:, 1], fb[:, 1], value=-1)


def _spectra_backward(grad_NF: Tensor, other: Tensor, sketch: Sketch, buckets: int) -> Tensor:
    """Gradient (N, 2, D) of one factor's coordinates from that of the cross spectrum and the other factor's spectra.

    The adjoint of a real transform is ``M irfft`` of the gradient with its inner frequencies halved.
    """
    weights = _parseval(buckets, grad_NF.real)
    inner = grad_NF / weights
    grad = torch.stack((inner * other[:, 0].conj(), -inner * other[:, 1].conj()), dim=1)
    sequence = torch.fft.irfft(grad, n=buckets, norm="forward")
    return sequence.index_select(-1, sketch.bucket_D) * sketch.sign_D.to(sequence.dtype)


def _parseval(buckets: int, like: Tensor) -> Tensor:
    """How often a frequency of the half spectrum stands in the whole one, (F,)."""
    counts = like.new_full((buckets // 2 + 1,), 2.0)
    counts[0] = 1.0
    if buckets % 2 == 0:
        counts[-1] = 1.0
    return counts


def _folded(weight_RM: Tensor) -> Tensor:
    """The map's rows as they meet a half spectrum: (R, 2 F), real and imaginary parts side by side."""
    buckets = weight_RM.shape[1]
    spectrum = torch.fft.rfft(weight_RM) * (_parseval(buckets, weight_RM) / buckets)
    return torch.view_as_real(spectrum).flatten(1)


def _unfolded(grad_RC: Tensor, buckets: int) -> Tensor:
    """Gradient of the map (R, M) from that of its folded rows: the factors of folding and of the adjoint cancel."""
    spectrum = torch.view_as_complex(grad_RC.view(len(grad_RC), -1, 2))
    return torch.fft.irfft(spectrum, n=buckets)
