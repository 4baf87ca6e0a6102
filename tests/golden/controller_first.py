"""Recorded numbers of the first generation: the shared block in its three phases, and refiners of an intact model."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.config.parts.halt import HaltSpec
from ouroboros.config.parts.modulated import FFN_TARGETS
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.halt import Halt
from ouroboros.nn.visit import VisitContext
from ouroboros.systems.controller.checkpoint import first_to_model
from ouroboros.systems.controller.first import FirstGeneration, baseline, halves, our_name, renamed
from ouroboros.systems.controller.generated import MatrixController


def _beside(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"golden_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shared, halting = _beside("controller_model"), _beside("controller_halting")
PREFIX = "param."
PUBLISHED_WEIGHT = 0.01
"""Of the cost of halting in the loss, for cases that leave it out."""


def with_ponder(model: OuroborosForCausalLM, ids: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, the loss with the published cost of halting, and that cost."""
    found: list[Tensor] = []
    halt = next(module for module in model.modules() if isinstance(module, Halt))
    halt.last.register_forward_hook(lambda module, given, out: found.append(torch.sigmoid(out[..., 0])))
    output = model(ids, labels=ids, use_cache=False)
    cost = halting.ponder(torch.stack(found))[0].mean()
    return output.logits, output.loss + weight * cost, cost


def published_name(short: str) -> str:
    """The name of a parameter that cases shorten."""
    if (match := re.fullmatch(r"coeff([AB])_(\w+)", short)) is not None:
        return f"controller.heads.{match[2]}_proj.coeff_proj_{match[1]}.weight"
    layer = "ffn" if f"{short}_proj" in FFN_TARGETS else "attention"
    whole = {"embed": "embed_tokens.weight", "halter_last": "halter.net.4.weight"}
    return whole.get(short, f"core_block.{layer}.{short}_proj.base_linear.weight")


def gradient(model: OuroborosForCausalLM, short: str, block: int) -> Tensor | None:
    """That of the parameter which a case calls ``short``."""
    return model.get_parameter(str(our_name(published_name(short), block))).grad


def v1_model(case: dict[str, Any], path: Path, work: Path) -> None:
    """The Controller's matrices, and logits, losses and gradients of the three phases."""
    tensors, hyper = shared.tensors_of(path), case["hyper"]
    own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    donor = ModelSpec(layout="1", vocab_size=hyper["vocab"], hidden_size=hyper["d"]).replace(
        mixer=AttentionSpec(num_heads=hyper["heads"], num_kv_heads=hyper["kv"], qkv_bias=hyper["bias"]),
        ffn=FeedForwardSpec(intermediate_size=hyper["ffn"]),
    )
    sizes = {"state": "sp", "steps": "se", "confidence": "hp", "hidden": "sh", "style": "style", "rows": "ms"}
    sizes |= {"rank": "rank", "alpha": "alpha", "bases": "nb", "divisor": "bd"}
    settings = FirstGeneration(**{ours: hyper[name] for ours, name in sizes.items()})
    phases = {
        "phase1": dataclasses.replace(settings, depth=hyper["phase1_depth"]).uncontrolled(donor),
        "phase2": dataclasses.replace(settings, depth=hyper["phase2_depth"]).shared(donor),
        "phase3": dataclasses.replace(settings, depth=hyper["phase3_max_steps"], halt_hidden=hyper["hh"]).shared(donor),
    }
    ids, heads = tensors["input_ids"], {"q": hyper["heads"], "k": hyper["kv"]}
    for phase, spec in phases.items():
        model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec))
        named = renamed(own, spec, 0, adjacent=True)
        missing = model.load_state_dict(named, strict=False).missing_keys
        assert not missing, missing
        halts = any(isinstance(part, HaltSpec) for part in spec.loop)
        if halts:
            logits, loss, cost = with_ponder(model, ids, hyper["act_loss_weight"])
        else:
            output = model(ids, labels=ids, use_cache=False)
            logits, loss, cost = output.logits, output.loss, torch.zeros(())
        shared.same(logits, tensors[f"{phase}.logits"], f"logits of {phase}")
        shared.same(loss, tensors[f"{phase}.loss"], f"loss of {phase}")
        shared.same(cost, tensors[f"{phase}.act_loss"], f"ponder of {phase}")
        loss.backward()
        for name in (name for name in tensors if name.startswith(f"{phase}.grad.")):
            short, expected = name.rpartition(".")[2], tensors[name]
            # Rows stand in our order; those of a gradient as those of the weight.
            expected = halves(expected, heads[short]) if short in heads else expected
            shared.same_gradient(gradient(model, short, 0), expected, name)
    probes(tensors, OuroborosForCausalLM(OuroborosConfig.from_spec(phases["phase3"])), named, heads, case)


def probes(
    tensors: dict[str, Tensor],
    model: OuroborosForCausalLM,
    named: dict[str, Tensor],
    heads: dict[str, int],
    case: dict[str, Any],
) -> None:
    """Whole matrices of recorded maps, at the step and the probability of halting that the case names."""
    model.load_state_dict(named)
    controller = next(module for module in model.modules() if isinstance(module, MatrixController))
    about = case["tensors"]["probe.q_A"]["about"]
    step = int(about.partition("at step ")[2].partition(",")[0])
    halted = float(about.partition("halt confidence ")[2].partition(",")[0])
    states = model.model.embed_tokens(tensors["input_ids"])
    empty = torch.empty(0)
    visit = VisitContext(rotary=(empty, empty), looped={"halt.total": states.new_full((*states.shape[:2], 1), halted)})
    handed = controller.hand(states, visit, step)
    (block,) = model.model.decoder.layers
    for name in (name for name in tensors if name.startswith("probe.")):
        short, _, which = name.removeprefix("probe.").partition("_")
        target = f"{short}_proj"
        layer: Any = block.self_attn if hasattr(block.self_attn, target) else block.mlp
        bases, weights = layer.bases[target], handed[target][:, 0].chunk(2, dim=-1)[which == "B"]
        first, second = getattr(bases, f"{which}1"), getattr(bases, f"{which}2")
        found = torch.einsum("bn,nik,nkj->bij", weights, first, second)
        expected = tensors[name]
        turned = which == "B" and short in heads
        shared.same(found, halves(expected, heads[short], axis=1) if turned else expected, name)


def refiner(case: dict[str, Any], path: Path, work: Path) -> None:
    """Logits, losses and gradients at fixed and adaptive depth, and the baseline with one final norm and with two."""
    tensors, (donor, spec), hyper = shared.tensors_of(path), shared.donor_of(path), case["hyper"]
    ids, last = tensors["input_ids"], spec.schedule.num_blocks - 1
    own = {name: tensor for name, tensor in tensors.items() if our_name(name, last) is not None}
    divisor = hyper["bottleneck_divisor"]
    settings = FirstGeneration.of(own, depth=hyper["phase3_max_steps"], alpha=hyper["alpha"], divisor=divisor)
    assert (settings.rank, settings.bases) == (hyper["rank"], hyper["n_basis"])
    fixed = first_to_model(donor, own, spec, dataclasses.replace(settings, depth=hyper["depth"], halt_hidden=None))
    output = fixed(ids, labels=ids, use_cache=False)
    shared.same(output.logits, tensors["logits"], "logits")
    shared.same(output.loss, tensors["loss"], "loss")
    output.loss.backward()
    for name in (name for name in tensors if name.startswith("grad.")):
        shared.same_gradient(gradient(fixed, name.removeprefix("grad."), last), tensors[name], name)
    adaptive = first_to_model(donor, own, spec, settings)
    with torch.no_grad():
        logits, loss, cost = with_ponder(adaptive, ids, hyper.get("act_loss_weight", PUBLISHED_WEIGHT))
    shared.same(logits, tensors["adaptive_logits"], "logits at adaptive depth")
    shared.same(loss, tensors["adaptive_loss"], "loss at adaptive depth")
    shared.same(cost, tensors["adaptive_act_loss"], "ponder")
    intact = shared.plain(donor, spec, list(range(spec.schedule.num_blocks)))
    with torch.no_grad():
        once, twice = baseline(intact, ids), baseline(intact, ids, twice=True)
    shared.same(twice, tensors["base_only_logits_as_published"], "logits of the published baseline")
    for logits, name in ((once, "base_only_loss_correct"), (twice, "base_only_loss_as_published")):
        loss = intact.loss_function(logits=logits, labels=ids, vocab_size=spec.vocab_size)
        shared.same(loss, tensors[name], name)


KINDS = {"v1_model": v1_model, "refiner_plain": refiner, "refiner_gated": refiner}
