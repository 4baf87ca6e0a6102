"""Count sketches, and the bilinear feature of two sketched vectors (Pham and Pagh 2013).

A sketch is a fixed linear map ``S`` from D coordinates to M buckets: coordinate j is added to bucket ``h_j`` with the
sign ``s_j``. The circular convolution of two sketches holds every product of two coordinates once, at bucket
``(h_i + h_j) mod M``: a linear map of the D x D products, so that a linear map behind it needs no convolution.
Shapes: N rows, D width, M buckets, R outputs, F = M // 2 + 1 frequencies. Complex vectors are pairs (N, 2, D).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ouroboros.config.parts.osam import BAND, bilinear_flops, direct_is_faster

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
    total_DD = query.bucket_D[:, None] + key.bucket_D
    return torch.where(total_DD < buckets, total_DD, total_DD - buckets)  # processors divide numbers one by one


def convolution(first_N2D: Tensor, second_N2D: Tensor, query: Sketch, key: Sketch, buckets: int) -> Tensor:
    """``Re(S q * S k)`` (N, M) by adding up products: the least work for a few rows."""
    signs = torch.outer(query.sign_D, key.sign_D).to(first_N2D.dtype)
    products = torch.bmm(*_sides(first_N2D, second_N2D, 0, first_N2D.shape[-1], symmetric=False))
    pairs = (products * signs).flatten(1)
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
    symmetric = shared and width > BAND
    if not direct_is_faster(width, buckets, symmetric=symmetric):
        return spectral_map(first_N2D, second_N2D, precise, *query, *key, dtype)
    signs = torch.outer(query.sign_D, key.sign_D).to(precise.dtype)
    # Rows of the transposed map are contiguous, so that gathering them, and adding their gradients up, is fast.
    weight_CR = precise.t().contiguous().index_select(0, pair_buckets(query, key, buckets).flatten())
    weight_DDR = (weight_CR * signs.flatten()[:, None]).unflatten(0, (width, width))
    return bilinear_map(first_N2D, second_N2D, weight_DDR, symmetric, dtype)


@torch.library.custom_op("ouroboros::bilinear_map", mutates_args=())
def bilinear_map(first: Tensor, second: Tensor, weight: Tensor, symmetric: bool, dtype: torch.dtype) -> Tensor:
    """``sum_ij Re(a_i b_j) W_ij`` for (N, 2, D) twice and (D, D, R), some rows at a time: products are not kept.

    With ``symmetric`` the map is that in its first two axes, and the products i, j and j, i are added up first.
    An operator of its own, so that compiled programs do not form all products either.
    """
    bands = _bands(weight.shape[0], symmetric)
    matrices = [weight[low:high, low:].flatten(0, 1).to(dtype) for low, high in bands]
    out = first.new_empty(first.shape[0], weight.shape[2], dtype=dtype)
    for a, b, z in zip(first.split(ROWS), second.split(ROWS), out.split(ROWS), strict=True):
        for index, (band, matrix_CR) in enumerate(zip(bands, matrices, strict=True)):
            pairs_NC = torch.bmm(*_sides(a, b, *band, symmetric)).flatten(1).to(dtype)
            torch.addmm(z, pairs_NC, matrix_CR, beta=float(index > 0), out=z)
    return out


@bilinear_map.register_fake
def _(first: Tensor, second: Tensor, weight: Tensor, symmetric: bool, dtype: torch.dtype) -> Tensor:
    return first.new_empty(first.shape[0], weight.shape[2], dtype=dtype)


@torch.library.custom_op("ouroboros::bilinear_map_backward", mutates_args=())
def bilinear_map_backward(
    grad_NR: Tensor, first: Tensor, second: Tensor, weight: Tensor, symmetric: bool, needs: list[bool]
) -> list[Tensor]:
    """Gradients of both factors and of the map; empty tensors where ``needs`` says no."""
    dtype, bands = grad_NR.dtype, _bands(weight.shape[0], symmetric)
    grads = [torch.zeros_like(x) if needed else x.new_empty(0) for x, needed in zip((first, second, weight), needs)]
    for low, high in bands:
        banded_CR = weight[low:high, low:].flatten(0, 1)
        matrix_RC = banded_CR.to(dtype).t()
        grad_banded = torch.zeros_like(banded_CR)
        for start in range(0, len(first), ROWS):
            rows = slice(start, start + ROWS)
            left, right = _sides(first[rows], second[rows], low, high, symmetric)
            g = grad_NR[rows]
            if needs[2]:
                _add_product(grad_banded, torch.bmm(left, right).flatten(1).to(dtype).t(), g)
            if needs[0] or needs[1]:
                grad_pairs = (g @ matrix_RC).to(first.dtype).view(len(g), high - low, -1)
                _sides_backward(grad_pairs, left, right, low, high, *(grad[rows] for grad in grads[:2]))
        if needs[2]:
            grads[2][low:high, low:] = grad_banded.view(high - low, -1, weight.shape[2])
    return grads


@bilinear_map_backward.register_fake
def _(grad: Tensor, first: Tensor, second: Tensor, weight: Tensor, symmetric: bool, needs: list[bool]) -> list[Tensor]:
    return _like_needed((first, second, weight), needs)


def _keep_bilinear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.symmetric = inputs[3]


def _bilinear_gradients(ctx: Any, grad_NR: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    found = bilinear_map_backward(grad_NR.contiguous(), *ctx.saved_tensors, ctx.symmetric, needs)
    return (*(grad if needed else None for grad, needed in zip(found, needs, strict=True)), None, None)


bilinear_map.register_autograd(_bilinear_gradients, setup_context=_keep_bilinear)


@register_flop_formula(torch.ops.ouroboros.bilinear_map)
def _(first_shape: Any, second_shape: Any, weight_shape: Any, symmetric: bool, *rest: Any, **_: Any) -> int:
    return first_shape[0] * bilinear_flops(weight_shape[0], weight_shape[2], symmetric=symmetric)


def _like_needed(inputs: tuple[Tensor, ...], needs: list[bool]) -> list[Tensor]:
    return [torch.empty_like(x) if needed else x.new_empty(0) for x, needed in zip(inputs, needs, strict=True)]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, whose factors may have fewer bits."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _bands(width: int, symmetric: bool) -> list[tuple[int, int]]:
    """First and last coordinate of every band; one band where all products are needed."""
    if not symmetric:
        return [(0, width)]
    return [(low, min(low + BAND, width)) for low in range(0, width, BAND)]


def _sides(a: Tensor, b: Tensor, low: int, high: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Two factors (N, high - low, K) and (N, K, D - low) whose product is a band's products."""
    if not symmetric:
        return torch.stack((a[:, 0], -a[:, 1]), dim=-1), b
    left = torch.stack((a[:, 0, low:high], -a[:, 1, low:high], b[:, 0, low:high], -b[:, 1, low:high]), dim=-1)
    right = torch.cat((b[:, :, low:], a[:, :, low:]), dim=1)
    right[:, 2:, : high - low] = 0  # within the band itself both orders are formed already
    return left, right


def _sides_backward(
    grad: Tensor, left: Tensor, right: Tensor, low: int, high: int, grad_a: Tensor, grad_b: Tensor
) -> None:
    """Add a band's share to the gradients of both factors, where wanted, from that of its products (N, C, D - low)."""
    sign = grad.new_tensor((1.0, -1.0))[:, None]
    symmetric = right.shape[1] == 4
    if grad_a.numel() or symmetric:
        grad_left = torch.bmm(right, grad.mT)
        if grad_a.numel():
            grad_a[:, :, low:high] += grad_left[:, :2] * sign
        if grad_b.numel() and symmetric:
            grad_b[:, :, low:high] += grad_left[:, 2:] * sign
    if grad_b.numel() or symmetric:
        grad_right = torch.bmm(left.mT, grad)
        if grad_b.numel():
            grad_b[:, :, low:] += grad_right[:, :2]
        if grad_a.numel() and symmetric:
            grad_a[:, :, high:] += grad_right[:, 2:, high - low :]


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
            _add_product(grad_matrix, g.t(), torch.view_as_real(_cross(fa, fb)).flatten(1).to(dtype))
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
    return _like_needed((first, second, weight), rest[-1])


def _keep_spectral(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _spectral_gradients(ctx: Any, grad_NR: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    found = spectral_map_backward(grad_NR.contiguous(), *ctx.saved_tensors, needs)
    wanted = (grad if needed else None for grad, needed in zip(found, needs, strict=True))
    return (*wanted, None, None, None, None, None)


spectral_map.register_autograd(_spectral_gradients, setup_context=_keep_spectral)


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
