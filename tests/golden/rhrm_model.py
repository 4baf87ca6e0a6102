"""Recorded R-HRM numbers: layers and models."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ouroboros.config import FeedForwardSpec, RopeSpec
from ouroboros.config.parts.latent import BottleneckAttentionSpec
from ouroboros.model.executor import observe
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.ffn import FeedForward
from ouroboros.nn.latent import BottleneckAttention
from ouroboros.nn.memory import Recorder
from ouroboros.nn.norm import RMSNorm
from ouroboros.nn.rope import Rope, rotate
from ouroboros.nn.visit import VisitContext
from ouroboros.systems.rhrm.checkpoint import NAMES, to_model

close = functools.partial(torch.testing.assert_close, check_dtype=False)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below ``prefix``, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def build(config: dict[str, Any], parameters: dict[str, Tensor]) -> OuroborosForCausalLM:
    """The model of a case's ``config`` with its published parameters."""
    return to_model(parameters, loops=config["loops"], heads=config["num_heads"]).eval()


def compare_gradients(
    model: nn.Module, names: dict[str, str], expected: dict[str, Tensor], tolerance: dict[str, float]
):
    """Gradients of ``model`` against published ones; ``names``: published name to ours."""
    ours = dict(model.named_parameters())
    limits = {"atol": tolerance["grad_atol"], "rtol": tolerance["grad_rtol"]}
    for name, gradient in expected.items():
        if not gradient.numel():
            continue
        found = ours[names[name]].grad
        assert found is not None, name
        close(found.reshape(gradient.shape), gradient, **limits, msg=lambda text, name=name: f"{name}: {text}")
    assert expected


def latent_attention(case: dict[str, Any], path: Path, work: Path) -> None:
    """One layer: latents, rotated queries and keys, values, probabilities, output and gradients."""
    tensors, settings, tolerance = load_file(path.with_suffix(".safetensors")), case["settings"], case["tolerance"]
    assert settings["causal"] and settings["rope_pairing"] == "first half with second half"
    rope = RopeSpec(base=settings["rope_base"])
    spec = BottleneckAttentionSpec(
        num_heads=settings["heads"], head_dim=settings["head_dim"], latent_rank=settings["d_latent"], rope=rope
    )
    layer = BottleneckAttention(spec, settings["d_model"], settings["norm_eps"])
    block = "shared_block.attn."
    names = {published.removeprefix(block): ours.rpartition("self_attn.")[2] for published, ours in NAMES.items()}
    layer.load_state_dict({names[name]: tensor for name, tensor in part(tensors, "param.").items()})
    x = tensors["in.x"].clone().requires_grad_()
    T = x.shape[1]
    seen = Recorder()  # keys as the scores meet them
    given = VisitContext(Rope(rope, settings["head_dim"])(torch.arange(T)[None]), memory=seen)
    limits = {"atol": tolerance["forward_atol"], "rtol": tolerance["forward_rtol"]}

    y = layer(x, given)
    k, v, *_ = seen.recorded()
    assert k is not None and v is not None
    q = layer._heads(layer.q_b_proj(layer.q_a_proj(x)))
    q = rotate(layer.q_norm(q), *given.rotary)
    scores = (q @ k.mT / settings["head_dim"] ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    found = {
        "act.latent_q": layer.q_a_proj(x),
        "act.latent_kv": layer.kv_a_proj(x),
        "act.q_rotated": q.transpose(1, 2),
        "act.k_rotated": k.transpose(1, 2),
        "act.v": v.transpose(1, 2),
        "act.probabilities": scores.softmax(-1),
        "out.y": y,
    }
    assert found.keys() == {name for name in tensors if name.startswith(("act.", "out."))}
    for name, value in found.items():
        close(value, tensors[name], **limits, msg=lambda text, name=name: f"{name}: {text}")
    y.backward(tensors["in.cotangent"])
    gradients = part(tensors, "grad.")
    close(x.grad, gradients.pop("x"), atol=tolerance["grad_atol"], rtol=tolerance["grad_rtol"])
    compare_gradients(layer, names, gradients, tolerance)


def norm_and_feed_forward(case: dict[str, Any], path: Path, work: Path) -> None:
    """The norm with its small eps, then the gated feed-forward network with biases."""
    tensors, settings, tolerance = load_file(path.with_suffix(".safetensors")), case["settings"], case["tolerance"]
    spec = FeedForwardSpec(kind="swiglu", intermediate_size=settings["d_ff"], bias=True)
    layer = nn.ModuleDict(
        {"norm": RMSNorm(settings["d_model"], settings["norm_eps"]), "mlp": FeedForward(spec, settings["d_model"])}
    )
    names = {
        name.removeprefix("shared_block.ffn."): "mlp." + ours.rpartition("mlp.")[2] for name, ours in NAMES.items()
    }
    names["norm.scale"] = "norm.weight"
    layer.load_state_dict({names[name]: tensor for name, tensor in part(tensors, "param.").items()})
    x = tensors["in.x"].clone().requires_grad_()
    normed = layer["norm"](x)
    y = layer["mlp"](normed)
    limits = {"atol": tolerance["forward_atol"], "rtol": tolerance["forward_rtol"]}
    close(normed, tensors["act.normed"], **limits)
    close(y, tensors["out.y"], **limits)
    y.backward(tensors["in.cotangent"])
    gradients = part(tensors, "grad.")
    close(x.grad, gradients.pop("x"), atol=tolerance["grad_atol"], rtol=tolerance["grad_rtol"])
    compare_gradients(layer, names, gradients, tolerance)


def whole_model(case: dict[str, Any], path: Path, work: Path) -> None:
    """Logits, the shifted loss, the text's state after every loop, and gradients; then decoding with a cache."""
    tensors, tolerance = load_file(path.with_suffix(".safetensors")), case["tolerance"]
    model = build(case["config"], part(tensors, "param."))
    assert sum(parameter.numel() for parameter in model.parameters()) == case["parameters"]
    ids, states = tensors["in.ids"].long(), []

    def keep(segment: int, loop: int, before: Tensor, after: Tensor) -> None:
        states.append(after)

    with observe(model, on_loop=keep):
        outputs = model(ids, labels=ids, use_cache=False)
    close(outputs.logits, tensors["out.logits"], atol=tolerance["logits_atol"], rtol=0)
    close(outputs.loss, tensors["out.loss"], atol=tolerance["loss_atol"], rtol=0)
    assert abs(outputs.loss.item() - case["loss"]) <= tolerance["loss_atol"]
    prefix, T = case["config"]["prefix_tokens"], ids.shape[1]
    recorded = part(tensors, "act.loop")
    for loop, state in enumerate(states):
        assert state.shape[1] == T
        close(state, recorded.pop(str(loop))[:, prefix:], atol=tolerance["logits_atol"], rtol=1e-5)
    assert not recorded
    outputs.loss.backward()
    compare_gradients(model, NAMES, part(tensors, "grad."), tolerance)
    with torch.no_grad():
        cache, pieces = None, []
        for step in range(T):
            one = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            cache = one.past_key_values
            pieces.append(one.logits)
    close(torch.cat(pieces, dim=1), tensors["out.logits"], atol=tolerance["logits_atol"], rtol=0)


KINDS = {
    "latent attention alone, evaluation mode": latent_attention,
    "RMS norm (eps 1e-8) then gated feed-forward with biases": norm_and_feed_forward,
    "full model, evaluation mode (no dropout), loss shifted inside the model": whole_model,
    "the first published revision: learned absolute positions on the text only, no rotary embedding, no query/key norm;"
    " evaluation mode": whole_model,
}
