"""Recorded numbers of the Controller: the model it stands on, its parts, and the whole published system.

The cases name no tolerance: logits of the published program agree with float64 within a few 1e-6, and another order of
summation adds as much, so values are compared within 1e-5 and gradients within 1e-4, both relative to the largest.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec, RMSNormSpec, RopeSpec
from ouroboros.config.parts.loop import LoopNormSpec, RecurrenceGateSpec
from ouroboros.config.parts.modulated import TARGETS, ControllerSpec
from ouroboros.convert.bases import mean_residual, truncated
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.executor import observe
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.loop import LoopNorm, RecurrenceGate
from ouroboros.nn.modulated import Controller, LowRank
from ouroboros.nn.visit import VisitContext
from ouroboros.optim import untrained_parameters
from ouroboros.systems.controller.checkpoint import bases_of, donor_tensors, our_name, to_model
from ouroboros.systems.controller.published import Published

VALUES, SLOPES = 1e-5, 1e-4
NOWHERE = VisitContext(rotary=(torch.empty(0), torch.empty(0)))


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a case."""
    return load_file(path.with_suffix(".safetensors"))


def same(found: Tensor, expected: Tensor, what: str, within: float = VALUES) -> None:
    """Two tensors agree, relative to the largest number if that is above 1."""
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
    limit = within * max(1.0, float(expected.abs().max()))
    gap = float((found.detach() - expected).abs().max())
    assert gap <= limit, f"{what} differs by {gap:.2g}, more than {limit:.2g}"


def same_gradient(found: Tensor | None, expected: Tensor, what: str) -> None:
    """Two gradients agree, relative to the largest number."""
    found = torch.zeros_like(expected) if found is None else found
    assert found.shape == expected.shape, what
    gap, limit = float((found - expected).abs().max()), SLOPES * float(expected.abs().max()) + 1e-9
    assert gap <= limit, f"{what} differs by {gap:.2g}, more than {limit:.2g}"


def spec_of(hyper: dict[str, Any]) -> ModelSpec:
    """The pretrained model of the cases."""
    rope = RopeSpec(base=hyper["rope_theta"])
    return ModelSpec(
        layout=str(hyper["layers"]),
        vocab_size=hyper["vocab"],
        hidden_size=hyper["hidden"],
        tie_embeddings=hyper["tied_embeddings"],
    ).replace(
        mixer=AttentionSpec(
            num_heads=hyper["heads"],
            num_kv_heads=hyper["kv_heads"],
            head_dim=hyper["head_dim"],
            qkv_bias=True,
            rope=rope,
        ),
        ffn=FeedForwardSpec(intermediate_size=hyper["ffn"]),
        norm=RMSNormSpec(eps=hyper["rms_norm_eps"]),
    )


def donor_of(path: Path) -> tuple[dict[str, Tensor], ModelSpec]:
    """Weights and specification of the model that the cases beside ``path`` stand on."""
    base = path.with_name("base_model.json")
    tensors = {name: tensor for name, tensor in tensors_of(base).items() if name.startswith("model.")}
    return tensors, spec_of(json.loads(base.read_text(encoding="utf-8"))["hyper"])


def settings_of(case: dict[str, Any], tensors: dict[str, Tensor]) -> Published:
    """Sizes of a whole system, from the case and the shapes of its tensors."""
    hyper = case["hyper"]
    static = tensors.get("static_diags")
    return Published(
        prelude=hyper["n_prelude"],
        looped=hyper["recurrent_layer"],
        coda=hyper["n_coda"],
        depth=hyper.get("depth", 1),
        rank=hyper["rank"],
        alpha=hyper["alpha"],
        style=hyper.get("style_dim", 1),
        steps=len(tensors.get("controller.step_embed.weight", "x")),
        norm_steps=len(tensors["step_norm.weights"]),
        static_rows=None if static is None else len(static),
    )


def own_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a case that a published checkpoint holds."""
    return {name: tensor for name, tensor in tensors.items() if our_name(name) is not None}


def plain(donor: dict[str, Tensor], spec: ModelSpec, sources: list[int]) -> OuroborosForCausalLM:
    """The layers ``sources`` of the pretrained model, one after the other."""
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(dataclasses.replace(spec, layout=str(len(sources)))))
    missing, unknown = model.load_state_dict(donor_tensors(donor, sources), strict=False)
    assert (missing, unknown) in ((["lm_head.weight"], []), ([], []))
    return model


def two_ahead(logits: Tensor, ids: Tensor) -> Tensor:
    """The mean loss of position i against token i + 2."""
    return F.cross_entropy(logits[:, :-2].flatten(0, 1), ids[:, 2:].flatten())


def base_model(case: dict[str, Any], path: Path, work: Path) -> None:
    """Logits, first state and both losses of the intact model."""
    tensors, (donor, spec) = tensors_of(path), donor_of(path)
    ids = tensors["input_ids"]
    model = plain(donor, spec, list(range(case["hyper"]["layers"])))
    states: list[Tensor] = []
    with torch.no_grad(), observe(model, lambda block, visit, before, after: states.append(after)):
        output = model(ids, labels=ids, use_cache=False)
    same(output.logits, tensors["full_logits"], "logits")
    same(states[0], tensors["full_hidden_first"], "state after the first layer")
    same(output.loss, tensors["full_loss_next"], "loss")
    same(two_ahead(output.logits, ids), tensors["full_loss_two_ahead"], "loss two ahead")


def svd_bases(case: dict[str, Any], path: Path, work: Path) -> None:
    """Mean residuals, singular values, and products that do not depend on the sign of a singular pair."""
    tensors, (donor, spec) = tensors_of(path), donor_of(path)
    hyper = case["hyper"]
    settings = Published(
        prelude=hyper["n_prelude"], looped=hyper["recurrent_layer"], coda=hyper["n_coda"], rank=hyper["rank"]
    )
    assert settings.removed(spec) == hyper["removed_layers"]
    assert hyper["alpha"] / hyper["rank"] == pytest.approx(hyper["scaling"])
    bases = bases_of(donor, settings, spec)
    for target in sorted({name.partition(".")[0] for name in tensors}):
        prefix = next(name.removesuffix(".A") for name in bases if name.endswith(f".{target}.A"))
        A, B = bases[f"{prefix}.A"], bases[f"{prefix}.B"]
        layer = prefix.split(".")[-3]
        weight = [donor[f"model.layers.{n}.{layer}.{target}.weight"] for n in range(spec.schedule.num_blocks)]
        residual = mean_residual([weight[n] for n in hyper["removed_layers"]], weight[hyper["recurrent_layer"]])
        diagonal = torch.linspace(-1, 1, hyper["rank"])
        found = {
            "mean_residual": residual,
            "singular_values": torch.linalg.svdvals(residual),
            "BA": B @ A,
            "AAt": A @ A.T,
            "B_colnorm": B.norm(dim=0),
            "BdA": B @ (diagonal[:, None] * A),
        }
        for name, value in found.items():
            same(value, tensors[f"{target}.{name}"], f"{target}.{name}")


def modulated_linear(case: dict[str, Any], path: Path, work: Path) -> None:
    """The sum of a map and its modulated addition, and gradients by input and diagonal."""
    tensors, hyper = tensors_of(path), case["hyper"]
    linear = nn.Linear(*reversed(tensors["weight"].shape))
    linear.load_state_dict({name: tensors[name] for name in ("weight", "bias")})
    addition = LowRank(linear, hyper["rank"], hyper["alpha"] / hyper["rank"], frozen=True)
    assert addition.factor == pytest.approx(hyper["scaling"])
    addition.load_state_dict({name: tensors[name] for name in ("A", "B")})
    own = truncated(tensors["residual"], hyper["rank"])
    same(own.B @ own.A, tensors["B"] @ tensors["A"], "B A")
    x, diagonal = (tensors[name].requires_grad_() for name in ("x", "diag"))
    same(linear(x), tensors["out_plain"], "without an addition")
    out = linear(x) + addition(x, diagonal[:, None])
    same(out, tensors["out"], "out")
    (out.square().sum() / 2).backward()
    same_gradient(x.grad, tensors["grad_x"], "gradient by x")
    same_gradient(diagonal.grad, tensors["grad_diag"], "gradient by the diagonal")
    assert addition.A.grad is None and addition.B.grad is None


def compact_controller(case: dict[str, Any], path: Path, work: Path) -> None:
    """The diagonals of several steps, and all gradients of a weighted sum of them."""
    tensors, hyper = tensors_of(path), case["hyper"]
    assert tuple(hyper["targets"]) == TARGETS
    spec = ControllerSpec(
        rank=hyper["rank"], style=hyper["style_dim"], rows=hyper["max_steps"], pooling="all", norm=False
    )
    controller = Controller(spec, hyper["d_model"], 1, 1e-6)
    hidden = tensors["hidden"].requires_grad_()
    fresh = controller.hand(hidden, NOWHERE, 0)
    assert hyper["zero_init_outputs_are_zero"] == (not any(diagonal.any() for diagonal in fresh.values()))
    prefix = "param."
    published = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    names = {name: str(our_name(f"controller.{name}")).partition(".controller.")[2] for name in published}
    controller.load_state_dict({names[name]: tensor for name, tensor in published.items()})
    weights, total = torch.linspace(-1, 1, hyper["rank"]), torch.zeros(())
    for index, step in enumerate(hyper["steps"]):
        for target, diagonal in controller.hand(hidden, NOWHERE, step).items():
            same(diagonal[:, 0], tensors[f"diag.step{step}.{target}"], f"step {step}, {target}")
            total = total + (diagonal * weights).sum() * (index + 1)
    same(total, tensors["scalar"], "sum")
    total.backward()
    same_gradient(hidden.grad, tensors["grad.hidden"], "gradient by the state")
    ours = dict(controller.named_parameters())
    assert set(names.values()) == set(ours)
    for name, our in names.items():
        same_gradient(ours[our].grad, tensors[f"grad.{name}"], name)


def gate_and_step_norm(case: dict[str, Any], path: Path, work: Path) -> None:
    """The gate at its start and with given weights, and the norm of each step."""
    tensors, hyper = tensors_of(path), case["hyper"]
    width = hyper["d_model"]
    gate = RecurrenceGate(RecurrenceGateSpec(bias=hyper["gate_bias_init"]), width, 1, hyper["eps"])
    new, old = (tensors[name].requires_grad_() for name in ("h_new", "h_old"))
    same(gate.leave(old, new, {}, 0), tensors["gate_default_out"], "gate at its start")
    gate.load_state_dict({f"proj.{name}": tensors[f"gate.gate_proj.{name}"] for name in ("weight", "bias")})
    out = gate.leave(old, new, {}, 0)
    same(out, tensors["gate_out"], "gate")
    (out.square().sum() / 2).backward()
    same_gradient(new.grad, tensors["gate_grad_h_new"], "gradient by the new state")
    same_gradient(old.grad, tensors["gate_grad_h_old"], "gradient by the old state")
    for name, parameter in gate.proj.named_parameters():
        same_gradient(parameter.grad, tensors[f"gate_grad.gate_proj.{name}"], name)
    norm = LoopNorm(LoopNormSpec(rows=hyper["norm_steps"]), width, 1, hyper["eps"])
    assert (norm.weight == 1).all()
    norm.load_state_dict({"weight": tensors["norm.weights"]})
    for name in (name for name in tensors if name.startswith("norm_out.step")):
        step = int(name.removeprefix("norm_out.step"))
        same(norm.leave(old, old, {}, step), tensors[name], name)


def whole_system(case: dict[str, Any], path: Path, work: Path) -> None:
    """Every state and diagonal, logits, losses, gradients, the truncated baseline, and how much later tokens leak."""
    tensors, (donor, spec) = tensors_of(path), donor_of(path)
    settings, ids = settings_of(case, tensors), tensors["input_ids"]
    model = to_model(donor, own_of(tensors), spec, settings)
    found: dict[str, Tensor] = {}

    def see_block(block: nn.Module, visit: VisitContext, before: Tensor, after: Tensor) -> None:
        assert visit.visit is not None
        if visit.visit.block == settings.prelude:
            found.setdefault("h_prelude", before)
            found[f"layer_out.{visit.visit.loop}"] = after
            for target, diagonal in visit.handed.items():
                found[f"diag.{visit.visit.loop}.{target}"] = diagonal[:, 0] if diagonal.ndim == 3 else diagonal

    def see_loop(segment: int, loop: int, before: Tensor, after: Tensor) -> None:
        found[f"h_out.{loop}"] = after

    with observe(model, see_block, see_loop):
        output = model(ids, labels=ids, use_cache=False)
    for name in (n for n in tensors if n == "h_prelude" or n.startswith(("diag.", "layer_out.", "h_out."))):
        same(found[name], tensors[name], name)
    same(output.logits, tensors["logits"], "logits")
    same(output.loss, tensors["loss"], "loss")
    output.loss.backward()
    ours, compared = dict(model.named_parameters()), set()
    for name in (name for name in tensors if name.startswith("grad.")):
        our = our_name(name.removeprefix("grad."))
        assert our is not None, name
        same_gradient(ours[our].grad, tensors[name], name)
        compared.add(our)
    assert compared <= {name for name in ours if ".loops." in name} - untrained_parameters(model)
    counts_agree(case, ours)
    if "base_only_logits" in tensors:
        with torch.no_grad():
            baseline = plain(donor, spec, settings.sources(spec))(ids, labels=ids, use_cache=False)
        same(baseline.logits, tensors["base_only_logits"], "truncated baseline")
        same(baseline.loss, tensors["base_only_loss"], "its loss")
    if "chunk" in tensors:
        inputs, labels = tensors["chunk"][:, :-1], tensors["chunk"][:, 1:]
        with torch.no_grad():
            loss = model(inputs, labels=labels, use_cache=False).loss
        same(loss, tensors["loss_preshifted_labels"], "loss of labels that are shifted twice")
    if "future_leak" in tensors:
        leaks(model, ids, output.logits, tensors["future_leak"])


def counts_agree(case: dict[str, Any], ours: dict[str, nn.Parameter]) -> None:
    """As many numbers are trained as the case says, part by part."""
    place = {"controller": ".controller.", "gate": ".gate.", "step_norm": ".norm."}
    counts = case["hyper"].get("trainable_count", {})
    for name in place.keys() & counts.keys():
        found = sum(p.numel() for our, p in ours.items() if ".loops." in our and place[name] in our)
        assert found == counts[name], name


def leaks(model: OuroborosForCausalLM, ids: Tensor, logits: Tensor, recorded: Tensor) -> None:
    """Another last token changes earlier logits, at each position by about what was recorded for one such token."""
    assert recorded.min() > 0
    gaps = []
    for shift in range(1, model.config.vocab_size):
        other = ids.clone()
        other[:, -1] = (ids[:, -1] + shift) % model.config.vocab_size
        with torch.no_grad():
            changed = model(other, use_cache=False).logits
        gaps.append((changed - logits.detach()).abs().amax((0, 2))[:-1])
    closest = (torch.stack(gaps) - recorded).abs().amax(1).min()
    assert closest <= VALUES, f"no other last token leaks as recorded; the closest differs by {closest:.2g}"


KINDS = {
    "base_model": base_model,
    "svd_bases": svd_bases,
    "modulated_linear": modulated_linear,
    "compact_controller": compact_controller,
    "gate_and_step_norm": gate_and_step_norm,
    "v2": whole_system,
    "v2_static": whole_system,
}
