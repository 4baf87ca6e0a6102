"""Recorded numbers of OSAM: whole models with their gradients and states, training, decoding, hash tables."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from ouroboros.config import OptimSpec
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.linear_memory import turn_rows
from ouroboros.nn.osam import Osam
from ouroboros.nn.sketch import apply_sketch, draw_sketch
from ouroboros.nn.visit import VisitContext
from ouroboros.optim import build_optimizers, untrained_parameters
from ouroboros.systems.osam.checkpoint import NAMES, SCALARS, VALUE_PATH, to_model
from ouroboros.systems.osam.export import from_model
from ouroboros.systems.osam.measure import telemetry
from ouroboros.systems.osam.sampling import repeat_last

close = functools.partial(torch.testing.assert_close, rtol=0)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below ``prefix``, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def build(settings: dict[str, Any], parameters: dict[str, Tensor], **changes: Any) -> OuroborosForCausalLM:
    """The model of a case's ``hyperparameters`` with its published tensors, which must have its sizes."""
    settings = {**settings, **changes}
    names = {"vocab": "vocab_size", "d_model": "d_model", "m": "m", "readout_hidden": "readout_hidden"}
    names |= {"enable_val": "enable_val", "freq_cache": "use_freq_cache"}
    cfg = {theirs: settings[name] for name, theirs in names.items() if name in settings}
    train_cfg = {name: settings[name] for name in ("kupdate", "freeze_phase", "dropout") if name in settings}
    cap = settings.get("gate_cap_feat", 0.25)
    assert settings.get("gate_cap_val", 0.25) == cap, "one end for both gates"
    return to_model(parameters, cfg, train_cfg, gate_cap=cap)


def mixer_of(model: OuroborosForCausalLM) -> Osam:
    return model.model.decoder.layers[0].self_attn


def forward_backward(case: dict[str, Any], path: Path, work: Path) -> None:
    """Logits, loss, what both memories return, gradients of exactly the parameters that have one; then the state."""
    tensors, settings = load_file(path.with_suffix(".safetensors")), case["hyperparameters"]
    tolerance = case["suggested_tolerance"]
    model = build(settings, part(tensors, "param."))
    ids, targets = tensors["input_ids"], tensors["target_ids"]
    assert list(ids.shape) == [settings["batch"], settings["seq"]]
    hidden = model.model(ids, use_cache=False).last_hidden_state
    logits = model.logits(hidden)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), label_smoothing=settings["label_smoothing"]
    )
    close(logits, tensors["logits"], atol=tolerance["logits_abs"])
    close(hidden, tensors["hidden"], atol=tolerance["logits_abs"])
    close(loss, tensors["loss"], atol=tolerance["loss_abs"])
    assert abs(loss.item() - case["loss"]) <= tolerance["loss_abs"]
    loss.backward()
    compare_gradients(model, part(tensors, "grad."), case)
    compare_features(model, ids, tensors, settings, tolerance["logits_abs"])
    compare_state(case, tensors)
    assert mixer_of(model).key_sketch.bucket_D.unique().numel() == case["distinct_buckets"]
    compare_telemetry(case, tensors)
    compare_export(model, part(tensors, "param."))


def compare_gradients(model: OuroborosForCausalLM, expected: dict[str, Tensor], case: dict[str, Any]) -> None:
    """Gradients under published names; those that the case says have none have none here, or no parameter."""
    ours = dict(model.named_parameters())
    found = {theirs: ours[name].grad for theirs, name in NAMES.items() if name in ours}
    without = {theirs for theirs in NAMES if found.get(theirs) is None and "osam.cs." not in theirs}
    assert without == set(case["no_gradient"])
    assert found.keys() - without == expected.keys()
    trained = {name for name in NAMES.values() if name in ours} - untrained_parameters(model)
    assert trained == {NAMES[theirs] for theirs in expected}
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    rule = re.search(
        r"<= (\S+) \* max\|reference gradient of that parameter\| \+ (\S+) \* max\|reference gradient over all",
        case["suggested_tolerance"]["grad"],
    )
    assert rule is not None
    own, common = float(rule[1]), float(rule[2])
    for name, gradient in expected.items():
        limit = own * gradient.abs().max().item() + common * largest
        close(found[name].reshape(gradient.shape), gradient, atol=limit, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def compare_features(
    model: OuroborosForCausalLM, ids: Tensor, tensors: dict[str, Tensor], settings: dict[str, Any], limit: float
) -> None:
    """The cross feature and the value path's output; both are 0 where nothing is read."""
    mixer = mixer_of(model)
    every = mixer.spec.kupdate
    x_BTD = model.model.embed_tokens(ids)
    given = VisitContext((x_BTD, x_BTD))
    factors = mixer.factors(x_BTD, given, x_BTD.dtype)
    sums, read = mixer.remembered(factors, given)
    count_BR1 = torch.arange(1, ids.shape[1] + 1, every)[None, :, None].float()
    found = {"psi": mixer.feature(factors.query, sums, count_BR1)}
    assert (read is not None) == settings["enable_val"]
    if read is not None:
        found["vread"] = mixer.value(read, count_BR1)
    for name in ("psi", "vread"):
        expected = torch.zeros_like(tensors[name])
        if name in found:
            expected[:, ::every] = found[name]
        close(expected, tensors[name], atol=limit * max(1.0, tensors[name].abs().max().item()))


def state_after(model: OuroborosForCausalLM, ids: Tensor, cache: Cache | None = None) -> Cache:
    """The cache behind ``ids``."""
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).past_key_values


def published_state(mixer: Osam, state: Tensor, position: int) -> dict[str, Tensor]:
    """A mixer's state (B, 2 D, E + 1) behind ``position`` tokens in its published form, which is 32 times as large.

    Our memory turns by a frequency at each token, the published one stands still and its tokens turn: the frames agree
    at position 0. K (B, 2, m) is the sketched sum of keys, real and imaginary; H (B, 2, D, m) the sum of values times
    sketched keys; FK (B, m), complex, the unitary spectrum of K.
    """
    steps = torch.as_tensor(position, dtype=state.dtype)
    still = turn_rows(state, mixer.turn(state.dtype), -steps).unflatten(1, (2, -1))
    sketched = apply_sketch(still.mT, mixer.key_sketch, mixer.spec.buckets)  # (B, 2, E + 1, m)
    found = {"K": sketched[:, :, -1]}
    if mixer.spec.value_path:
        found["H"] = sketched[:, :, :-1]
    return found | {"FK": torch.fft.fft(torch.complex(found["K"][:, 0], found["K"][:, 1]), norm="ortho")}


def compare_published(cache: Cache, model: OuroborosForCausalLM, expected: dict[str, Tensor], relative: float) -> None:
    """The state of ``cache`` in its published form; ``expected`` by its published names."""
    state = cache.layers[0].read()
    assert state is not None
    found = published_state(mixer_of(model), state, cache.get_seq_length())
    for name, value in expected.items():
        own = torch.view_as_real(found[name]) if found[name].is_complex() else found[name]
        close(own, value, atol=relative * value.abs().max().item(), msg=lambda text, name=name: f"{name}: {text}")
    assert expected


def compare_state(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The state behind the whole text, read at once and in pieces.

    The published program keeps the memory of values without its path too. In one block the state depends on tokens
    alone, so that a twin with the path has it.
    """
    model = build(case["hyperparameters"], part(tensors, "param."), enable_val=True)
    ids, relative = tensors["input_ids"], case["suggested_tolerance"]["state_rel_to_max"]
    expected = part(tensors, "state.")
    compare_published(state_after(model, ids), model, expected, relative)
    middle = max(ids.shape[1] // 2, 1)
    cache = state_after(model, ids[:, :middle])
    for step in range(middle, ids.shape[1]):
        cache = state_after(model, ids[:, step : step + 1], cache)
    compare_published(cache, model, expected, relative)
    if not case["hyperparameters"]["enable_val"]:
        model = build(case["hyperparameters"], part(tensors, "param."))
        sums = {name: value for name, value in expected.items() if name != "H"}
        compare_published(state_after(model, ids), model, sums, relative)


def compare_telemetry(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The published numbers of a forward pass, from the state as it is kept here."""
    model = build(case["hyperparameters"], part(tensors, "param."), enable_val=True)
    (found,) = telemetry(
        model, tensors["input_ids"], stride=case["hyperparameters"].get("telemetry_stride", 1), rows=None
    )
    names = {"gate_feat": "gate_feature", "gate_val": "gate_value"}
    relative = case["suggested_tolerance"]["state_rel_to_max"]
    for theirs, expected in case["telemetry"].items():
        value = getattr(found, names.get(theirs, theirs))
        value = value[0] if isinstance(value, list) else value
        if theirs == "gate_val" and not case["hyperparameters"]["enable_val"]:
            assert expected == 0.0
            continue
        assert abs(value - expected) <= relative * max(1.0, abs(expected)), (theirs, value, expected)


def compare_export(model: OuroborosForCausalLM, expected: dict[str, Tensor]) -> None:
    """What came in goes out, but for what a model without the value path does not keep."""
    found = from_model(model)
    assert found.keys() == expected.keys()
    kept = [name for name in expected if mixer_of(model).spec.value_path or name not in VALUE_PATH]
    for name in expected:
        assert (found[name].shape, found[name].dtype) == (expected[name].shape, expected[name].dtype), name
        assert name not in kept or torch.equal(found[name], expected[name]), name


def training_trajectory(case: dict[str, Any], path: Path, work: Path) -> None:
    """Losses, gradient norms before and after clipping, the scalars after every step, and all parameters at the end."""
    tensors, settings = load_file(path.with_suffix(".safetensors")), case["hyperparameters"]
    tolerance = case["suggested_tolerance"]
    model = build(settings, part(tensors, "init.")).train()
    spec = OptimSpec(
        matrix_optimizer="adamw",
        lr=settings["lr"],
        scalar_lr=settings["lr_scalars"],
        weight_decay=settings["weight_decay"],
        decay="all",
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
    )
    (optimizer,) = build_optimizers(model, spec)
    own, loss_abs, final_abs = dict(model.named_parameters()), tolerance["loss_abs"], tolerance["final_params_abs"]
    assert len(tensors["tokens"]) == settings["steps"] == len(case["losses"])
    for step, tokens in enumerate(tensors["tokens"]):
        optimizer.zero_grad()
        logits = model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), label_smoothing=settings["label_smoothing"]
        )
        loss.backward()
        close(loss, tensors["loss"][step], atol=loss_abs)
        assert abs(loss.item() - case["losses"][step]) <= loss_abs
        parameters = [p for p in model.parameters() if p.grad is not None]
        before = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if settings["clip"] > 0:
            torch.nn.utils.clip_grad_norm_(parameters, settings["clip"])
        after = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        # Both are functions of losses and parameters that are compared as loosely.
        for name, found in (("before", before), ("after", after)):
            expected = tensors[f"grad_norm_{name}_clip"][step]
            close(found, expected, atol=final_abs * max(1.0, expected.item()))
        optimizer.step()
        present = [own.get(NAMES[f"osam.{name}"]) for name in SCALARS]
        for index, parameter in enumerate(present):
            if parameter is not None:
                close(parameter[0], tensors["scalars"][step, index], atol=final_abs)
    for theirs, expected in part(tensors, "final.").items():
        name = NAMES[theirs]
        if name in model.state_dict():
            found = model.state_dict()[name].reshape(expected.shape)
            close(found, expected, atol=final_abs, msg=lambda text, name=name: f"{name}: {text}")


def greedy_generation(case: dict[str, Any], path: Path, work: Path) -> None:
    """Ids, the logits they were chosen from, and the state behind the last token that was fed, in both orders."""
    tensors, settings = load_file(path.with_suffix(".safetensors")), case["hyperparameters"]
    limit = case["suggested_tolerance"]["logits_abs"]
    # The published program reads at every position when it generates, whatever kupdate was in training.
    model = build(settings, part(tensors, "param."), kupdate=1)
    twin = build(settings, part(tensors, "param."), kupdate=1, enable_val=True)
    prompt = tensors["prompt_ids"].tolist()
    assert len(prompt) == settings["prompt_len"]
    for order, fed in (("clean", prompt), ("repeat_last", repeat_last(prompt))):
        expected = part(tensors, f"{order}.")
        cache = DynamicCache(config=model.config)
        made = model.generate(
            torch.tensor([fed]),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=settings["max_new_tokens"],
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = made.sequences[0, len(fed) :]
        assert torch.equal(new, expected.pop("ids")), order
        close(torch.cat(made.logits), expected.pop("logits"), atol=limit)
        assert cache.get_seq_length() == len(fed) + len(new) - 1
        states = {name: value for name, value in expected.items() if settings["enable_val"] or name != "H"}
        compare_published(cache, model, states, limit)
        compare_published(state_after(twin, made.sequences[:, :-1]), twin, expected, limit)


def hash_tables(case: dict[str, Any], path: Path, work: Path) -> None:
    """Tables from a seed, equal to the last number."""
    tensors = load_file(path.with_suffix(".safetensors"))
    assert case["tables"]
    for table in case["tables"]:
        sketch = draw_sketch(table["d"], table["m"], table["seed"])
        h, sign = (tensors[f"{table['prefix']}.{name}"] for name in ("h", "sign"))
        assert torch.equal(sketch.bucket_D, h) and torch.equal(sketch.sign_D, sign), table
        assert h.unique().numel() == table["distinct_buckets"], table


KINDS: dict[str, Callable[[dict[str, Any], Path, Path], None]] = {
    "forward_backward": forward_backward,
    "training_trajectory": training_trajectory,
    "greedy_generation": greedy_generation,
    "hash_tables": hash_tables,
}
"""Checker of each kind of case."""
