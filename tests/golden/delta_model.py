"""Recorded numbers of the delta residual: whole models, the mixing of keys and values, fresh models."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ouroboros.accounting import cost
from ouroboros.config import ModelSpec
from ouroboros.config.codec import from_dict
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.residual import AdditiveResidualSpec
from ouroboros.model.configuration import OuroborosConfig as ModelConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.delta import DeltaResidual, gate_bias
from ouroboros.nn.shift import TokenShift
from ouroboros.systems.delta import OuroborosConfig, OuroborosModel
from ouroboros.systems.delta.checkpoint import TABLE, our_layout, read_config, to_model

close = functools.partial(torch.testing.assert_close, check_dtype=False)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below ``prefix``, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def listen(model: OuroborosForCausalLM, recorded: set[str]) -> dict[str, Tensor]:
    """A dictionary that a forward pass fills with the ``recorded`` activations, in the published axes."""
    found: dict[str, Tensor] = {}

    def keep_state(name: str, block: nn.Module, given: Any, state: Tensor) -> None:
        found[name] = state.mT if state.ndim == 4 else state

    def keep_terms(name: str, residual: DeltaResidual, given: tuple[Tensor, ...], output: Tensor) -> None:
        x, update, context, read = given
        k, beta, value = residual.terms(update, context, read)
        product = (x * (k[..., None, :] if x.ndim == 4 else k)).sum(-1, keepdim=x.ndim == 3)
        found.update({f"{name}.k": k, f"{name}.beta": beta, f"{name}.v": value, f"{name}.proj": product})

    for index, block in enumerate(model.model.decoder.layers):
        block.register_forward_hook(functools.partial(keep_state, f"block{index}"))
        for name, residual in (("attn", block.mixer_residual), ("mlp", block.mlp_residual)):
            if isinstance(residual, DeltaResidual):
                residual.register_forward_hook(functools.partial(keep_terms, f"block{index}.{name}"))
    assert recorded
    return found


def whole_model(case: dict[str, Any], path: Path, work: Path) -> None:
    """Logits, the loss of shifted targets, states, the terms of every residual, gradients; then decoding."""
    tensors, tolerance = load_file(path.with_suffix(".safetensors")), case["tolerance"]
    parameters = part(tensors, "param.")
    model = to_model(parameters, read_config(parameters, case["config"]))
    spec, derived = model.model.spec, case["derived"]
    assert spec.block.ffn.intermediate_size == derived["mlp_hidden"]
    assert (spec.block.norm.eps, spec.block.mixer.rope.base) == (derived["norm_eps"], derived["rope_base"])
    assert sum(p.numel() for p in model.parameters()) == cost(spec).parameters == case["parameters"]
    ids, targets = tensors["in.ids"].long(), tensors["in.targets"].long()
    recorded = part(tensors, "act.")
    found = listen(model, set(recorded))
    logits = model(ids, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    close(logits, tensors["out.logits"], atol=tolerance["logits_atol"], rtol=0)
    close(loss, tensors["out.loss"], atol=tolerance["loss_atol"], rtol=0)
    assert abs(loss.item() - case["loss"]) <= tolerance["loss_atol"]
    assert recorded.keys() <= found.keys()
    for name, value in recorded.items():
        limits = {"atol": tolerance["logits_atol"], "rtol": 1e-5}
        close(found[name], value, **limits, msg=lambda text, name=name: f"{name}: {text}")
    loss.backward()
    compare_gradients(model, part(tensors, "grad."), tolerance, spec.block.residual.channels)
    compare_envelope(case, model, ids, targets, logits, loss)
    decode(model, ids, tensors["out.logits"], tolerance["logits_atol"])


def compare_gradients(model: nn.Module, expected: dict[str, Tensor], tolerance: dict[str, float], values: int) -> None:
    """Gradients against published ones, given under their names."""
    assert expected
    ours = dict(model.named_parameters())
    limits = {"atol": tolerance["grad_atol"], "rtol": tolerance["grad_rtol"]}
    for name, gradient in expected.items():
        found = ours[TABLE.ours(name)].grad
        assert found is not None, name
        wanted = our_layout(name, gradient, values).reshape(found.shape)
        close(found, wanted, **limits, msg=lambda text, name=name: f"{name}: {text}")


def compare_envelope(
    case: dict[str, Any], model: OuroborosForCausalLM, ids: Tensor, targets: Tensor, logits: Tensor, loss: Tensor
) -> None:
    """The published interface is the same computation; it has no additive twin."""
    spec = model.model.spec
    residual = spec.block.residual
    if not isinstance(residual, DeltaSpec):
        return
    chosen = {"ouroboros_compressor": residual.compressor, "ouroboros_embedding_conv": residual.embedding_conv}
    envelope = OuroborosModel(from_dict(OuroborosConfig, {**case["config"], **(chosen if residual.expanded else {})}))
    envelope.model.load_state_dict(model.state_dict())
    found, value = envelope.eval()(ids, targets=targets)
    assert torch.equal(found, logits) and torch.equal(value, loss)
    assert envelope.get_num_params() == case["parameters"]


def decode(model: OuroborosForCausalLM, ids: Tensor, expected: Tensor, tolerance: float) -> None:
    """One token at a time through a cache, after prompts of one token and of several, is the whole pass."""
    for prompt in (1, 3):
        with torch.no_grad():
            first = model(ids[:, :prompt], use_cache=True)
            pieces = [first.logits]
            for step in range(prompt, ids.shape[1]):
                one = model(ids[:, step : step + 1], past_key_values=first.past_key_values, use_cache=True)
                pieces.append(one.logits)
        close(torch.cat(pieces, dim=1), expected, atol=tolerance, rtol=0)


def shift(case: dict[str, Any], path: Path, work: Path) -> None:
    """Mixing with the previous token; the published code leaves a single token as it is, ours never does."""
    tensors, settings, tolerance = load_file(path.with_suffix(".safetensors")), case["settings"], case["tolerance"]
    d, heads, width = settings["d"], settings["heads"], settings["head_dim"]
    linear = nn.Linear(d, heads * width, bias=False)
    layer = TokenShift(d, heads)
    layer.proj.load_state_dict({"weight": tensors["param.shift_proj.weight"]})
    linear.load_state_dict({"weight": tensors["param.linear.weight"]})

    def run(x: Tensor) -> Tensor:
        u = linear(x).view(*x.shape[:2], heads, width)
        return layer(u, x, None, None, "shift").flatten(2)

    x = tensors["in.x"].clone().requires_grad_()
    y = run(x)
    limits = {"atol": tolerance["forward_atol"], "rtol": tolerance["forward_rtol"]}
    close(y, tensors["out.y"], **limits)
    y.backward(tensors["in.cotangent"])
    found = {"x": x.grad, "linear.weight": linear.weight.grad, "shift_proj.weight": layer.proj.weight.grad}
    for name, gradient in part(tensors, "grad.").items():
        close(found[name], gradient, atol=tolerance["grad_atol"], rtol=tolerance["grad_rtol"])
    first = tensors["in.x"][:, :1]
    close(linear(first), tensors["out.single_token"], **limits)  # unmixed, as published
    close(run(first), tensors["out.y"][:, :1], **limits)  # as the first token of any text


def fresh_models(case: dict[str, Any], path: Path, work: Path) -> None:
    """Starting values of every variant, exact parameter counts, and the table of gate biases."""
    for beta, bias in case["beta_bias_table"].items():
        assert math.isclose(gate_bias(float(beta)), bias, rel_tol=1e-9, abs_tol=1e-9), beta
    for name, variant in case["variants"].items():
        sizes = variant["config"]
        config = OuroborosConfig(
            vocab_size=sizes["vocab"],
            hidden_size=sizes["hidden_size"],
            num_hidden_layers=sizes["num_hidden_layers"],
            num_attention_heads=sizes["heads"],
            head_dim=sizes["head_dim"],
            **state_fields(name, variant["parameters"]),
        )
        torch.manual_seed(0)
        model = OuroborosForCausalLM(ModelConfig.from_spec(config.spec))
        ours = dict(model.named_parameters())
        for theirs, recorded in variant["parameters"].items():
            compare_statistics(f"{name}: {theirs}", ours[TABLE.ours(theirs)].detach(), recorded, sizes["hidden_size"])
    shapes = {"small": {}, "medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8}}
    for name, counts in case["parameter_counts"].items():
        for size, count in counts.items():
            assert cost(variant_spec(name, shapes[size])).parameters == count, (name, size)


def state_fields(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The fields of a variant (its name says which), with the sizes of its recorded parameters."""
    if name == "dv1":
        return {}
    kind = "shortconv.weight" if name.startswith("token") else "weight"
    return {
        "ouroboros_value_channels": parameters["readout.read"]["shape"][0],
        "ouroboros_compressor": name.removesuffix("-expand"),
        "ouroboros_state_shortconv_kernel_size": parameters[f"readout.{kind}"]["shape"][-1],
        "ouroboros_embedding_conv": name.endswith("-expand"),
    }


def variant_spec(name: str, shape: dict[str, int]) -> ModelSpec:
    """A variant with the published number of value channels."""
    if name in ("plain", "dv1"):
        spec = OuroborosConfig(**shape).spec
        return spec if name == "dv1" else spec.replace(residual=AdditiveResidualSpec())
    fields = {"ouroboros_value_channels": 4, "ouroboros_compressor": name.removesuffix("-expand")}
    return OuroborosConfig(**shape, **fields, ouroboros_embedding_conv=name.endswith("-expand")).spec


def compare_statistics(name: str, tensor: Tensor, recorded: dict[str, Any], width: int) -> None:
    """A fresh parameter against one recorded draw: constants exactly, else moments within 6 standard errors of both."""
    n = math.prod(recorded["shape"])
    assert tensor.numel() == n, name
    if name.endswith("v_proj.bias"):  # uniform, and so few numbers that the bound is all there is to compare
        found, drawn = tensor.abs().max().item(), max(abs(recorded["min"]), abs(recorded["max"]))
        assert 0 < found <= width**-0.5 and 0 < drawn <= width**-0.5, name
        return
    if recorded["std"] == 0 or recorded["min"] == 0:  # constants, or the taps of an identity
        found = (tensor.mean().item(), tensor.min().item(), tensor.max().item())
        wanted = (recorded["mean"], recorded["min"], recorded["max"])
        assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(found, wanted)), name
        return
    error = recorded["std"] * math.sqrt(2 / n)
    assert abs(tensor.mean().item() - recorded["mean"]) <= 6 * error, name
    assert abs(tensor.std().item() - recorded["std"]) <= 6 * error / math.sqrt(2) + 1e-6, name


KINDS = {
    "full model, vector state, defaults (guard 1e-6)": whole_model,
    "shifted keys and values, output gate, half RoPE, activations, two-layer gate": whole_model,
    "per-head output norm, no query/key norm, width-scaled logits": whole_model,
    "full model, matrix state, channel compressor, repeated embeddings": whole_model,
    "full model, matrix state, channel compressor, convolved embeddings": whole_model,
    "full model, matrix state, token compressor, repeated embeddings": whole_model,
    "full model, matrix state, token compressor, convolved embeddings": whole_model,
    "the additive twin: same attention, MLP and norms, ordinary residual addition": whole_model,
    "per-head mixing of a projection with the previous token": shift,
    "statistics of freshly initialised originals (one draw) and exact parameter counts": fresh_models,
}
