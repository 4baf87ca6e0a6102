"""How the published program made its artifact smaller, for comparison; the tensors have their published names.

What differs from :mod:`ouroboros.pack`: no step is below ``1 / 31`` or ``1 / 127`` of one, however small the weights
are; the step of 8-bit codes, and that of GPTQ, is rounded to float16 only after coding with it; and what the program
calls GPTQ never takes fixed columns out of the inverse. On inputs that are not correlated it is GPTQ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ouroboros.errors import check
from ouroboros.pack.coded import Coded
from ouroboros.pack.quantize import least_squares
from ouroboros.pack.statistics import gather
from ouroboros.systems.crawler.checkpoint import Names, to_model
from ouroboros.systems.crawler.published import Published

PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
INT8_PERCENTILE = 0.9999984
SMALL = 65_536
"""Numbers of a tensor up to which it is stored as float16."""
DAMPING, BLOCK = 0.002, 64
CONTROLS = (
    *("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight", "smear", "dtg_gate", "ve_layer_scales"),
    "ve_shared.scale",
)
SHARED = "crawler_blocks."
INSTRUCTIONS = ("loop_inst_proj", "loop_inst_up")

Scheme = Literal["passthrough", "passthrough_ctrl", "int6", "int8"]


def scheme_of(
    name: str, tensor: Tensor, *, naive: bool = False, int8_shared: bool = False, small: int = SMALL
) -> Scheme:
    """What becomes of a tensor: ``passthrough`` is float16 (whole numbers stay), ``passthrough_ctrl`` float32.

    Args:
        name: published name.
        tensor: of it, shape and type alone count.
        naive: the path without GPTQ, which has no ``int8_shared``.
        int8_shared: the shared blocks get 8 bits.
        small: numbers up to which a tensor is kept.
    """
    if not tensor.is_floating_point() or tensor.numel() <= small:
        return "passthrough"
    if any(control in name for control in CONTROLS):
        return "passthrough_ctrl"
    if int8_shared and not naive and name.startswith(SHARED):
        return "int8"
    return "int6" if ".mlp." in name or ".attn." in name or ".proj." in name else "int8"


def int6(w: Tensor) -> Coded:
    """Rounding to codes in [-31, 31] with one of :data:`PERCENTILES` for the whole matrix, that of the least squared
    error; other tensors have one step, of their largest weight."""
    if w.ndim != 2:
        step_11 = w.abs().max().reshape(1, 1).float() / 31
        step_11 = torch.where(step_11 > 0, step_11, 1.0).half()
        return _coded(w.reshape(1, -1), step_11.float(), step_11, 6, tuple(w.shape))
    found = []
    for percentile in PERCENTILES:
        step_R1 = (_clips(w, percentile) / 31).clamp(min=1 / 31).half()
        coded = _coded(w, step_R1.float(), step_R1, 6, tuple(w.shape))
        found.append((float((w.float() - coded.dense()).square().mean()), coded))
    return min(found, key=lambda pair: pair[0])[1]


def int8(w: Tensor) -> Coded:
    """Rounding to codes in [-127, 127] with a step for each row of a matrix, and one for any other tensor; the step is
    stored as float16, and coded with before that."""
    rows = w if w.ndim == 2 else w.reshape(1, -1)
    step_R1 = _clips(rows, INT8_PERCENTILE) / 127
    # The floor of rows; a tensor of another shape has none, and a step of one if all of it is zero.
    step_R1 = step_R1.clamp(min=1 / 127) if w.ndim == 2 else torch.where(step_R1 > 0, step_R1, 1.0)
    return _coded(rows, step_R1, step_R1.half(), 8, tuple(w.shape))


def row_scales(w_RC: Tensor, most: int = 31) -> Tensor:
    """The steps of GPTQ's codes, (R, 1) float32: for each row that of the best of :data:`PERCENTILES`."""
    steps = ((_clips(w_RC, percentile) / most).clamp(min=1 / most) for percentile in PERCENTILES)
    return least_squares(w_RC, steps, lambda step_R1: _codes(w_RC, step_R1, most))


def gptq(w_RC: Tensor, h_CC: Tensor, *, most: int = 31, damping: float = DAMPING, block: int = BLOCK) -> Coded:
    """What the program ships as GPTQ: columns by ascending diagonal, and the inverse as it is, whole, for all of them.

    Args:
        w_RC: the matrix.
        h_CC: second moment of its input.
        most: the largest code.
        damping: share of the mean diagonal that is added.
        block: columns after which the rest is updated.
    """
    step_R1 = row_scales(w_RC.float(), most)
    h_CC = h_CC.float().clone()
    h_CC.diagonal()[h_CC.diagonal() == 0] = 1.0
    h_CC.diagonal().add_(damping * h_CC.diagonal().mean())
    order = h_CC.diagonal().argsort()
    h_CC, left_RC = h_CC[order][:, order], w_RC.float()[:, order].clone()
    lower_CC, failed = torch.linalg.cholesky_ex(h_CC)
    g_CC = torch.diag(1 / h_CC.diagonal().clamp(min=1e-6)) if bool(failed) else torch.cholesky_inverse(lower_CC)
    codes_RC = torch.zeros_like(left_RC)
    for start in range(0, left_RC.shape[1], block):
        stop = min(start + block, left_RC.shape[1])
        errors_RB = torch.zeros_like(left_RC[:, start:stop])
        for column in range(start, stop):
            w_R = left_RC[:, column]
            codes_RC[:, column] = _codes(w_R, step_R1[:, 0], most)
            error_R = (w_R - codes_RC[:, column] * step_R1[:, 0]) / g_CC[column, column].clamp(min=1e-8)
            left_RC[:, column + 1 : stop] -= error_R[:, None] * g_CC[column, column + 1 : stop]
            errors_RB[:, column - start] = error_R
        left_RC[:, stop:] -= errors_RB @ g_CC[start:stop, stop:]
    codes_RC = codes_RC[:, order.argsort()].to(torch.int8)
    return Coded(codes=codes_RC, scales=step_R1.half(), bits=most.bit_length() + 1, shape=tuple(w_RC.shape))


def moments(
    tensors: Mapping[str, Tensor],
    settings: Published,
    rows: Sequence[Tensor],
    *,
    loop_aware: bool,
    small: int = SMALL,
    context: int = 2048,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Second moments of the inputs of linear maps by published name, without ``.weight``: of the model as it is, and
    those that the codes are made with.

    The second ones differ with ``loop_aware`` alone: what shared blocks and instructions read is gathered again with
    the coded weights of all other maps in place.

    Args:
        tensors: of the model.
        settings: of the model.
        rows: ids of texts, (T,) each.
        loop_aware: see above.
        small: numbers up to which a tensor is kept.
        context: tokens of a sequence, to which the rotation is scaled.
    """
    names = {name.removesuffix(".weight"): our for name in tensors if (our := _map_of(name, settings)) is not None}
    plain = gather(to_model(tensors, settings, context=context), rows)
    first = {name: h for name, our in names.items() if (h := plain.moment(our)) is not None}
    if not loop_aware:
        return first, first
    coded = {}
    for layer, h_CC in first.items():
        name = f"{layer}.weight"
        if not _again(layer) and scheme_of(name, tensors[name], small=small) in ("int6", "int8"):
            coded[name] = gptq(tensors[name], h_CC).dense()
    again = [names[layer] for layer in first if _again(layer)]
    found = gather(to_model({**tensors, **coded}, settings, context=context), rows, again)
    second = {layer: found.moment(our) for layer, our in names.items() if our in again}
    return first, first | {layer: h for layer, h in second.items() if h is not None}


def export(
    tensors: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    *,
    naive: bool = False,
    int8_shared: bool = False,
    small: int = SMALL,
) -> dict[str, Coded | Tensor]:
    """Every tensor as the program stores it.

    Args:
        tensors: of the model.
        hessians: second moments by name without ``.weight``; where one is missing, 6-bit codes are rounded.
        naive: all codes are rounded.
        int8_shared: see :func:`scheme_of`.
        small: numbers up to which a tensor is kept.
    """
    stored: dict[str, Coded | Tensor] = {}
    for name, tensor in tensors.items():
        scheme = scheme_of(name, tensor, naive=naive, int8_shared=int8_shared, small=small)
        h_CC = None if naive else hessians.get(name.removesuffix(".weight"))
        if scheme == "int6":
            fits = h_CC is not None and tensor.ndim == 2 and len(h_CC) == tensor.shape[1]
            stored[name] = gptq(tensor, h_CC) if fits and h_CC is not None else int6(tensor)
        elif scheme == "int8":
            stored[name] = int8(tensor)
        else:
            kept = torch.float16 if scheme == "passthrough" else torch.float32
            stored[name] = tensor.to(kept) if tensor.is_floating_point() else tensor
    return stored


def prune(tensors: Mapping[str, Coded], requested: int) -> dict[str, Coded]:
    """Codes of which up to ``requested`` ones of size 1 are made zero, those of the smallest steps first; of equal
    steps in the order of tensors, rows and columns. The program asks for eight for each byte that it is too large."""
    places, costs = [], []
    for name, coded in tensors.items():
        ones = (coded.codes.abs() == 1).nonzero()
        places += [(name, row, column) for row, column in ones.tolist()]
        costs.append(coded.scales.float().square()[ones[:, 0], 0])
    chosen = torch.cat(costs).argsort(stable=True)[:requested].tolist() if costs else []
    codes = {name: coded.codes.clone() for name, coded in tensors.items()}
    for index in chosen:
        name, row, column = places[index]
        codes[name][row, column] = 0
    return {name: dataclasses.replace(coded, codes=codes[name]) for name, coded in tensors.items()}


def shuffled(data: bytes, stride: int) -> bytes:
    """Every ``stride``-th byte, from each start in turn, behind ``BSHF`` and the stride."""
    check(1 <= stride <= 255, f"stride must be 1 to 255, got {stride}")
    return b"BSHF" + bytes([stride]) + b"".join(data[start::stride] for start in range(stride))


def _again(layer: str) -> bool:
    """Whether the second phase gathers what the layer reads, and leaves its weights as they are."""
    return layer.startswith((SHARED, *INSTRUCTIONS, "delta"))


def _map_of(name: str, settings: Published) -> str | None:
    """Our name of a published linear map; None for other tensors."""
    if not name.endswith(".weight") or name.endswith("embed.weight") or name == "tok_emb.weight":
        return None
    if name == "lm_head.weight":
        return name
    ours = Names(settings).ours(name)
    return None if ours is None or ours[1] is not None else f"model.{ours[0]}"


def _clips(w_RC: Tensor, percentile: float) -> Tensor:
    """The quantile of each row's absolute weights, (R, 1); as the program does it, to the last bit."""
    return torch.quantile(w_RC.abs().float(), percentile, dim=1, keepdim=True)


def _codes(w: Tensor, step: Tensor, most: int) -> Tensor:
    """Nearest codes in [-most, most], halves to even, float32."""
    return (w.float() / step).round().clamp(-most, most)


def _coded(w_RC: Tensor, step_R1: Tensor, stored_R1: Tensor, bits: int, shape: tuple[int, ...]) -> Coded:
    codes_RC = _codes(w_RC, step_R1, 2 ** (bits - 1) - 1).to(torch.int8)
    return Coded(codes=codes_RC, scales=stored_R1, bits=bits, shape=shape)
