"""Recorded numbers of halting, and of the mixed loss of distillation that the published program defines."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ouroboros.config import DistilledTraining
from ouroboros.nn.halt import Halt, weigh
from ouroboros.nn.head_loss import IGNORED
from ouroboros.systems.controller.checkpoint import our_name, to_model
from ouroboros.systems.controller.published import Published
from ouroboros.train.distill import Teacher


def _beside() -> Any:
    spec = importlib.util.spec_from_file_location("golden_controller", Path(__file__).with_name("controller_model.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shared = _beside()


def ponder(probabilities: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """For states' probabilities (steps, B, T): what the published loss sums of each token, which is p of every step in
    which the token runs, its number of steps, and the sum of weights behind every step."""
    total = torch.zeros_like(probabilities[0])
    summed, steps, totals = torch.zeros_like(total), torch.zeros_like(total), []
    for p in probabilities:
        running = (total < 1).float()
        summed, steps = summed + p * running, steps + running
        _, total = weigh(p, total)
        totals.append(total)
    return summed, steps, totals


def halting_manager(case: dict[str, Any], path: Path, work: Path) -> None:
    """Weights, steps and the mean, of given probabilities and states."""
    tensors = shared.tensors_of(path)
    probabilities, states = tensors["probs"], tensors["states"]
    executed = case["hyper"]["executed_steps"]
    cost, steps, totals = ponder(probabilities)
    carried: dict[str, Tensor] = {}
    total, mean = torch.zeros_like(probabilities[0]), torch.zeros_like(states[0])
    for index in range(executed):
        assert torch.equal((total < 1).float(), tensors["running"][index].float())
        weight, total = weigh(probabilities[index], total)
        shared.same(total, tensors["cumulative"][index], f"sum of weights at step {index}")
        mean = mean + weight[..., None] * states[index]
    carried |= {"halt.mean": mean, "halt.total": total[..., None]}
    assert (totals[executed - 1] == 1).all() or executed == len(probabilities), "nothing runs behind these steps"
    shared.same(Halt.finish(None, states[executed - 1], carried), tensors["output"], "mean of states")  # pyrefly: ignore
    shared.same(steps, tensors["n_steps"].float(), "steps of each token")
    shared.same(cost, tensors["ponder"], "ponder")
    shared.same(cost.mean(), tensors["act_loss"], "mean ponder")
    shared.same(steps.mean(), torch.tensor(case["hyper"]["mean_steps"]), "mean of steps")


def adaptive(case: dict[str, Any], path: Path, work: Path) -> None:
    """The whole system with halting: every loop is computed, and behind the published stop nothing changes."""
    tensors, (donor, spec) = shared.tensors_of(path), shared.donor_of(path)
    hyper = case["hyper"]
    settings = Published(
        prelude=hyper["n_prelude"],
        looped=hyper["recurrent_layer"],
        coda=hyper["n_coda"],
        depth=hyper["max_recurrence"],
        rank=hyper["rank"],
        alpha=hyper["alpha"],
        style=hyper["style_dim"],
        steps=len(tensors["controller.step_embed.weight"]),
        norm_steps=hyper["norm_rows"],
        halt_hidden=len(tensors["halter.0.bias"]),
    )
    model, ids, found = to_model(donor, shared.own_of(tensors), spec, settings), tensors["input_ids"], []
    halt = next(module for module in model.modules() if isinstance(module, Halt))
    leaving: list[Tensor] = []
    halt.last.register_forward_hook(lambda module, given, out: found.append(torch.sigmoid(out[..., 0])))
    coda = model.model.decoder.layers[settings.prelude + 1]
    coda.register_forward_pre_hook(lambda module, given: leaving.append(given[0]))
    output = model(ids, labels=ids, use_cache=False)
    cost, steps, _ = ponder(torch.stack(found))
    for index, expected in enumerate(tensors["halt_probs"]):
        shared.same(found[index], expected, f"probabilities of step {index}")
    shared.same(steps, tensors["n_steps"].float(), "steps of each token")
    shared.same(leaving[0], tensors["accumulated"], "mean of states")
    shared.same(cost, tensors["ponder"], "ponder")
    shared.same(output.logits, tensors["logits"], "logits")
    shared.same(cost.mean(), tensors["act_loss"], "mean ponder")
    loss = output.loss + hyper["act_loss_weight"] * cost.mean()
    shared.same(loss, tensors["loss"], "loss")
    loss.backward()
    ours = dict(model.named_parameters())
    for name in (name for name in tensors if name.startswith("grad.")):
        shared.same_gradient(ours[str(our_name(name.removeprefix("grad.")))].grad, tensors[name], name)


class Given(nn.Module):
    """A teacher whose logits are given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


def distillation(case: dict[str, Any], path: Path, work: Path) -> None:
    """Our loss of distillation, whose share is of the text's own loss, at every recorded setting."""
    tensors = shared.tensors_of(path)
    targets, inputs = tensors["labels"][:, 1:], tensors["labels"][:, :-1]
    assert (targets == IGNORED).any()
    settings = {name: re.fullmatch(r"loss\.a([0-9.]+)_T([0-9.]+)", name) for name in tensors}
    for name, match in ((name, match) for name, match in settings.items() if match):
        share, temperature = float(match[1]), float(match[2])
        spec = DistilledTraining(fraction=0.5, alpha=1 - share, temperature=temperature)
        student = tensors["student"].clone().requires_grad_()
        teacher = Teacher(Given(tensors["teacher"][:, :-1]), spec)
        loss, _ = teacher.losses(student[:, :-1], inputs, targets, loops=None, smoothing=0.0)
        shared.same(loss, tensors[name], name)
        loss.backward()
        for gradient in (g for g in tensors if g.startswith("grad") and g.endswith(name.removeprefix("loss."))):
            shared.same_gradient(student.grad, tensors[gradient], gradient)


KINDS = {"halting_manager": halting_manager, "v2_adaptive": adaptive, "distillation": distillation}
