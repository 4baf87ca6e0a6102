"""Recorded numbers of the delta residual: its parts and its closed forms.

The files store an expanded state as (B, T, D, V); ours is (B, T, V, D).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.errors import OuroborosError
from ouroboros.nn import operators
from ouroboros.nn.delta import ChannelCompressor, DeltaResidual, Expansion, TokenCompressor

Tensors = dict[str, Tensor]

close = functools.partial(torch.testing.assert_close, check_dtype=False)
GATES = {"one linear": "linear", "linear-tanh-linear": "two_layer"}
NAMES = {
    "beta.weight": "gate.proj.weight",
    "beta.bias": "gate.proj.bias",
    "beta_in.weight": "gate.hidden_proj.weight",
    "beta_out.weight": "gate.proj.weight",
    "beta_out.bias": "gate.proj.bias",
    "v_proj.weight": "value_proj.weight",
    "v_proj.bias": "value_proj.bias",
}
"""Parameters of a residual: published name to ours."""


def part(tensors: Tensors, prefix: str, suffix: str = "") -> Tensors:
    """The tensors below ``prefix`` that end in ``suffix``, under the rest of their names."""
    chosen = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix) and name.endswith(suffix)}
    return {name.removeprefix(prefix).removesuffix(suffix): tensor for name, tensor in chosen.items()}


def state(tensor: Tensor) -> Tensor:
    """A published state (..., D, V) as ours (..., V, D), and back."""
    return tensor.mT if tensor.ndim == 4 else tensor


def limits(case: dict[str, Any], kind: str) -> dict[str, float]:
    """Tolerances of ``forward`` or ``grad``; where one of the two is not given it is 0."""
    tolerance = case["tolerance"]
    return {"atol": tolerance.get(f"{kind}_atol", 0.0), "rtol": tolerance.get(f"{kind}_rtol", 0.0)}


def residual_of(case: dict[str, Any], tensors: Tensors, **changes: Any) -> DeltaResidual:
    """The residual of a case with its parameters."""
    settings, parameters = case["settings"], part(tensors, "param.")
    constant = settings.get("v_constant")
    value = "constant" if constant is not None else "sigmoid" if settings.get("v_sigmoid", True) else "linear"
    options = {
        "values": settings.get("d_v", 1),
        "gate": GATES[settings.get("beta_gate", "one linear")],
        "gate_hidden": parameters["beta_in.weight"].shape[0] if "beta_in.weight" in parameters else 1,
        "value": value,
        "value_scale": settings.get("v_sigmoid_scale", 4.0),
        "value_constant": 0.0 if constant is None else constant,
        "eps": settings["k_eps"],
        "kernel": settings.get("d_v", 1),
    }
    layer = DeltaResidual(DeltaSpec(**{**options, **changes}), settings["d"])
    if value == "constant":  # the original keeps an unused projection
        parameters = {name: tensor for name, tensor in parameters.items() if not name.startswith("v_proj.")}
    layer.load_state_dict({NAMES[name]: tensor for name, tensor in parameters.items()})
    return layer


def run_residual(layer: DeltaResidual, tensors: Tensors) -> tuple[Tensor, Tensors]:
    """The output in the published layout, and gradients of the inputs under their published names."""
    inputs = {name: tensors[f"in.{name}"].clone().requires_grad_() for name in ("x", "k_in", "context")}
    read = inputs["x"]
    if "in.v_in" in tensors:
        read = inputs["v_in"] = tensors["in.v_in"].clone().requires_grad_()
    layer.zero_grad()
    y = state(layer(state(inputs["x"]), inputs["k_in"], inputs["context"], read))
    gradients: Tensors = {}
    if "in.cotangent" in tensors:
        y.backward(tensors["in.cotangent"])
        gradients = {name: tensor.grad for name, tensor in inputs.items() if tensor.grad is not None}
    return y.detach(), gradients


def compare_gradients(
    case: dict[str, Any], found: Tensors, layer: nn.Module, names: dict[str, str], expected: Tensors
) -> None:
    """Gradients of inputs (``found``) and parameters against published ones."""
    ours = dict(layer.named_parameters())
    assert expected
    for name, gradient in expected.items():
        parameter = ours.get(names.get(name, ""))
        value = found.get(name) if name in found or parameter is None else parameter.grad
        if value is None:  # what a constant target leaves unused has no gradient here and zeros there
            assert name.startswith("v_") and case["settings"]["v_constant"] is not None, name
            value = torch.zeros_like(gradient)
        close(value, gradient, **limits(case, "grad"), msg=lambda text, name=name: f"{name}: {text}")


def residual(case: dict[str, Any], path: Path, work: Path) -> None:
    """Direction, gate, projection, target, the update, and all gradients."""
    tensors = load_file(path.with_suffix(".safetensors"))
    layer = residual_of(case, tensors)
    y, gradients = run_residual(layer, tensors)
    with torch.no_grad():
        read = tensors.get("in.v_in", tensors["in.x"])
        k, beta, v = layer.terms(tensors["in.k_in"], tensors["in.context"], read)
        x = state(tensors["in.x"]) if "in.v_in" in tensors else tensors["in.x"][..., None, :]
        projection = (x * k[..., None, :]).sum(-1)
    found = {"k": k, "beta": beta, "v": v, "proj": projection, "y": y}
    expected = part(tensors, "out.")
    assert expected.keys() <= found.keys() and "y" in expected
    for name, value in expected.items():
        close(found[name], value, **limits(case, "forward"), msg=lambda text, name=name: f"{name}: {text}")
    published = {name: tensor for name, tensor in part(tensors, "grad.").items() if tensor.numel()}
    compare_gradients(case, gradients, layer, NAMES, published)


def in_bfloat16(case: dict[str, Any], path: Path, work: Path) -> None:
    """Inputs and parameters in bfloat16: at least as close to the float32 answer as the original."""
    tensors = load_file(path.with_suffix(".safetensors"))
    layer = residual_of(case, tensors).to(torch.bfloat16)
    y, _ = run_residual(layer, tensors)
    assert y.dtype == torch.bfloat16
    error = (y.float() - tensors["out.y_fp32"]).abs().max().item()
    original = (tensors["out.y_bf16"].float() - tensors["out.y_fp32"]).abs().max().item()
    assert original == pytest.approx(case["measured"]["max_abs_error_of_the_original_in_bf16"])
    assert error <= original


def edge_direction(case: dict[str, Any], path: Path, work: Path) -> None:
    """Outputs of length 0 to huge under both guards; a zero output changes nothing."""
    tensors, settings = load_file(path.with_suffix(".safetensors")), case["settings"]
    zero = tensors["in.k_norm"] == 0
    close(tensors["in.k_in"].norm(dim=-1)[0], tensors["in.k_norm"], atol=0, rtol=1e-4)
    pairs = set()
    for suffix in part(tensors, "out.y."):
        guard, _, eps = suffix.partition("_eps")
        pairs.add((guard, float(eps)))
        layer = residual_of(case, tensors, guard=guard, eps=float(eps))
        y, gradients = run_residual(layer, tensors)
        assert y.isfinite().all()
        assert torch.equal(y[:, zero], tensors["in.x"][:, zero])
        close(y, tensors[f"out.y.{suffix}"], **limits(case, "forward"))
        published = part(tensors, "grad.", f".{suffix}")
        assert {"x", "k_in"} <= published.keys() <= gradients.keys()
        for name, gradient in published.items():
            assert gradients[name].isfinite().all()
            # Relative to each token's gradient: entries range over ten orders of magnitude.
            size = gradient.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
            error = ((gradients[name] - gradient) / size).abs().max()
            assert error <= case["tolerance"]["grad_rtol"], (name, suffix, error)
    assert pairs == {(guard, eps) for guard in case["meaning"] for eps in settings["k_eps"]}


def edge_gate(case: dict[str, Any], path: Path, work: Path) -> None:
    """Saturated gates: channel 0 of the context is the logit."""
    tensors = load_file(path.with_suffix(".safetensors"))
    close(tensors["in.context"][0, :, 0], tensors["in.beta_logit"])
    residual(case, path, work)


def fused_guard(case: dict[str, Any], path: Path, work: Path) -> None:
    """The guard is eps, not eps times the root of the width: the reference numbers and not the fused ones."""
    tensors = load_file(path.with_suffix(".safetensors"))
    layer = residual_of(case, tensors)
    y, gradients = run_residual(layer, tensors)
    close(y, tensors["out.y.reference"], **limits(case, "forward"))
    assert (y - tensors["out.y.reference"]).norm() < (y - tensors["out.y.fused"]).norm()
    ours = dict(layer.named_parameters())
    for name, gradient in part(tensors, "grad.", ".reference").items():
        found = gradients[name] if name in gradients else ours[NAMES[name]].grad
        assert found is not None, name
        error = (found - gradient).norm() / gradient.norm()
        assert error <= case["tolerance"]["grad_rtol"], (name, error)


def compress_channel(case: dict[str, Any], path: Path, work: Path) -> None:
    """The filter along the value channels, folded and applied."""
    tensors, settings = load_file(path.with_suffix(".safetensors")), case["settings"]
    assert settings["left_padding"] == (settings["kernel"] - 1) // 2
    layer = ChannelCompressor(DeltaSpec(values=settings["d_v"], kernel=settings["kernel"]), settings["d"])
    layer.load_state_dict(part(tensors, "param."))
    x = tensors["in.x"].clone().requires_grad_()
    y = layer(state(x), None, None, "mixer")
    close(layer.folded(), tensors["out.folded_weight"], **limits(case, "forward"))
    close(y, tensors["out.y"], **limits(case, "forward"))
    y.backward(tensors["in.cotangent"])
    assert x.grad is not None
    compare_gradients(case, {"x": x.grad}, layer, {"weight": "weight", "read": "read"}, part(tensors, "grad."))


class Kept:
    """The last entries of each name, as a cache keeps them."""

    def __init__(self) -> None:
        self.entries: Tensors = {}

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def recent(self, name: str, x: Tensor, count: int) -> Tensor:
        past = self.entries.get(name, x.new_zeros(x.shape[0], count, *x.shape[2:]))
        longer = torch.cat((past, x), dim=1)
        self.entries[name] = longer[:, -count:]
        return longer


def taps(weight: Tensor, V: int) -> Tensor:
    """A published filter (D V, [1,] K), feature-major, as ours (K, V, D)."""
    return weight.reshape(-1, V, weight.shape[-1]).permute(2, 1, 0)


def compress_token(case: dict[str, Any], path: Path, work: Path) -> None:
    """The filter over tokens: all at once, token by token, and what is kept for the next one."""
    tensors, settings = load_file(path.with_suffix(".safetensors")), case["settings"]
    V, K = settings["d_v"], settings["kernel"]
    layer = TokenCompressor(DeltaSpec(values=V, compressor="token", kernel=K), settings["d"])
    layer.load_state_dict({"weight": taps(tensors["param.weight"], V), "read": tensors["param.read"]})
    x = tensors["in.x"].clone().requires_grad_()
    y = layer(state(x), None, None, "mixer")
    close(y, tensors["out.y"], **limits(case, "forward"))
    y.backward(tensors["in.cotangent"])
    assert x.grad is not None and layer.weight.grad is not None
    found = {"x": x.grad, "shortconv.weight": layer.weight.grad.permute(2, 1, 0).flatten(0, 1)}
    compare_gradients(case, found, layer, {"read": "read"}, part(tensors, "grad."))
    with torch.no_grad():
        memory, pieces, states = Kept(), [], part(tensors, "out.state_after_")
        for t in range(x.shape[1]):
            pieces.append(layer(state(x[:, t : t + 1]), memory, None, "mixer"))
            if str(t + 1) in states:
                kept = memory.entries["mixer"].permute(0, 3, 2, 1).flatten(1, 2)
                close(kept, states.pop(str(t + 1)), **limits(case, "forward"))
    close(torch.cat(pieces, dim=1), tensors["out.y"], **limits(case, "forward"))
    assert not states


def expand_token(case: dict[str, Any], path: Path, work: Path) -> None:
    """Embeddings to an expanded state: all at once and token by token; a new one copies."""
    tensors, settings = load_file(path.with_suffix(".safetensors")), case["settings"]
    V, K = settings["d_v"], settings["kernel"]
    layer = Expansion(DeltaSpec(values=V, kernel=V, embedding_conv=True, embedding_kernel=K), settings["d"])
    x = tensors["in.x"].clone().requires_grad_()
    assert torch.equal(layer(x, None, None), x[:, :, None].expand(-1, -1, V, -1))
    layer.load_state_dict({"weight": taps(tensors["param.weight"], V)})
    y = state(layer(x, None, None))
    close(y, tensors["out.y"], **limits(case, "forward"))
    y.backward(tensors["in.cotangent"])
    assert x.grad is not None and layer.weight.grad is not None
    shape = tensors["grad.weight"].shape
    found = {"x": x.grad, "weight": layer.weight.grad.permute(2, 1, 0).reshape(shape)}
    compare_gradients(case, found, layer, {}, part(tensors, "grad."))
    with torch.no_grad():
        memory = Kept()
        pieces = [state(layer(x[:, t : t + 1], memory, None)) for t in range(x.shape[1])]
    close(torch.cat(pieces, dim=1), tensors["out.y"], **limits(case, "forward"))


def composition(case: dict[str, Any], path: Path, work: Path) -> None:
    """Updates in a row: states, the operator's product and singular values, coherence, and DeltaNet over time."""
    tensors = load_file(path.with_suffix(".safetensors"))
    near = {"atol": case["tolerance"]["atol"], "rtol": 0.0}
    x0, k, b, v = tensors["in.x0"].mT, tensors["in.k"], tensors["in.beta"], tensors["in.v"]
    D = k.shape[-1]
    found = {
        "trajectory": operators.trajectory(x0, k, b, v).mT,
        "operator_product": operators.product(torch.eye(D, dtype=k.dtype), k, b).mT,
        "coherence": operators.coherence(k),
        "deltanet_state": operators.deltanet(k, b, v, x0)[-1],
    }
    inside = operators.product_singular_values(k, b)
    ones = inside.new_ones(inside.shape[0], D - inside.shape[1])
    found["product_singular_values"] = torch.cat((inside, ones), dim=1).sort(dim=1, descending=True).values
    expected = part(tensors, "out.")
    expected["product_singular_values"] = expected["product_singular_values"].sort(dim=1, descending=True).values
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value, **near, msg=lambda text, name=name: f"{name}: {text}")


def spectrum(case: dict[str, Any], path: Path, work: Path) -> None:
    """Eigenvalues, determinant, trace, singular values, defects and inverse, from k and b alone."""
    atol = case["tolerance"]["atol"]
    for row in case["rows"]:
        k, b = torch.tensor(row["k"], dtype=torch.float64), torch.tensor(row["beta"], dtype=torch.float64)
        operator = operators.Erasure(k, b)
        found = {
            "eigenvalues": operator.eigenvalues(),
            "determinant": operator.determinant,
            "trace": operator.trace,
            "singular_values": operator.singular_values().flip(-1),
            "orthogonality_defect": operator.orthogonality_defect,
            "involution_defect": operator.involution_defect,
            "idempotence_defect": operator.projection_defect,
        }
        assert found.keys() == row.keys() - {"d", "k", "beta", "inverse", "condition"} and row["d"] == len(k)
        for name, value in found.items():
            expected = torch.tensor(row[name], dtype=torch.float64)
            if expected.ndim:
                expected = expected.sort().values
            close(value, expected, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        identity = torch.eye(len(k), dtype=torch.float64)
        if row["inverse"] is None:
            with pytest.raises(OuroborosError, match="condition number"):
                operator.inverse(identity)
            continue
        inverse, condition = operator.inverse(identity)
        close(condition.item(), row["condition"], atol=0, rtol=atol * row["condition"])
        expected = torch.tensor(row["inverse"], dtype=torch.float64)
        close(inverse, expected, atol=atol * row["condition"], rtol=0)


KINDS = {
    "single residual, vector state": residual,
    "single residual, matrix state (B,T,d,d_v)": residual,
    "same residual with every tensor in bfloat16, and the fp32 answer for the same bf16 inputs": in_bfloat16,
    "tiny, zero and huge k_in under the two historical guards": edge_direction,
    "saturated gate logits; context channel 0 is the logit": edge_gate,
    "fused kernel (run through the kernel interpreter on CPU) against the unfused form with a deliberately large guard":
        fused_guard,
    "CC: mixing along the value channels of one token": compress_channel,
    "TC: causal depthwise convolution over tokens on d*d_v channels, then the read vector": compress_token,
    "EC: embeddings to matrix state by a grouped causal convolution over tokens": expand_token,
    "closed form: L rank-1 updates in a row; float64": composition,
    "closed form in float64": spectrum,
}  # fmt: skip
