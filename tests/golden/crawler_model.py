"""Recorded numbers of the crawler, of Helix and of the plain model beside them: whole models and their gradients."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ouroboros.accounting import cost
from ouroboros.model.executor import observe
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.quantize import quantized, straight_through
from ouroboros.systems.crawler.checkpoint import our_tensors, to_model
from ouroboros.systems.crawler.published import Published


def limits(text: str) -> dict[str, float]:
    """``"rtol 1e-4, atol 2e-5"`` as keywords."""
    return {name: float(value) for name, value in re.findall(r"(rtol|atol) ([0-9.e+-]+)", text)}


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below ``prefix``, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def settings_of(case: dict[str, Any]) -> tuple[Published, bool]:
    """The settings of a case, and whether matrices are quantised in its forward pass."""
    settings = {**case["hyperparameters"], **case.get("settings", {})}
    quantised = settings.pop("fake_quant", False)
    return Published.read(settings), quantised


def parameters_of(case: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The published parameters of a case, those of its directory's base where it has none of its own."""
    tensors = load_file(path.with_suffix(".safetensors"))
    own = below(tensors, "param/")
    if not case.get("uses_base_params"):
        return own
    index = json.loads((path.parent / "index.json").read_text(encoding="utf-8"))
    base = load_file(path.parent / index["base"])
    return {name: own.get(name, base.get(name)) for name in below(tensors, "grad/")}


def build(case: dict[str, Any], path: Path, context: int) -> OuroborosForCausalLM:
    """The model of a case for sequences of ``context`` tokens."""
    return to_model(parameters_of(case, path), settings_of(case)[0], context=context)


def whole_model(case: dict[str, Any], path: Path, work: Path) -> None:
    """Logits, which see no later token, loss, streams behind every block and the gradient of every parameter."""
    tensors = load_file(path.with_suffix(".safetensors"))
    settings, quantised = settings_of(case)
    ids, targets = tensors["ids"].long(), tensors["targets"].long()
    model = build(case, path, ids.shape[1])
    within, slopes = limits(case["tolerance"]["logits"]), limits(case["tolerance"]["grads"])
    streams: dict[str, Tensor] = {}

    def keep(block: nn.Module, visit: Any, before: Tensor, after: Tensor) -> None:
        streams[name_of(settings, visit.visit.block, visit.visit.loop)] = after

    with quantised_weights(model) if quantised else contextlib.nullcontext():
        with observe(model, keep):
            hidden = model.model(ids, use_cache=False).last_hidden_state
        logits = model.logits(hidden)
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        torch.testing.assert_close(logits, tensors["logits"], **within)
        torch.testing.assert_close(loss.detach(), torch.tensor(case["loss"]), rtol=1e-5, atol=1e-5)
        recorded = below(tensors, "act/")
        assert {name for name in recorded if name not in ("x0", "final")} <= set(streams)
        for name, expected in recorded.items():
            found = {"final": hidden}.get(name, streams.get(name))
            if found is not None:
                torch.testing.assert_close(found, expected, **within, msg=lambda text, name=name: f"{name}: {text}")
        loss.backward()
        no_logit_sees_a_later_token(model, ids, logits, within)
    unread = set(case["unreached_parameters"])
    published = below(tensors, "grad/")
    assert all(not published[name].any() for name in unread)
    expected = our_tensors(published, settings)
    ours = dict(model.named_parameters())
    for name, gradient in expected.items():
        found = ours[name].grad
        found = torch.zeros_like(ours[name]) if found is None else found
        close = {"rtol": slopes["rtol"], "atol": slopes["atol"]}
        torch.testing.assert_close(found, gradient, **close, msg=lambda text, name=name: f"{name}: {text}")
    assert set(ours) - {"lm_head.weight"} == set(expected) - {"lm_head.weight"}
    assert sum(p.numel() for p in model.parameters()) == cost(model.model.spec).parameters


def no_logit_sees_a_later_token(
    model: OuroborosForCausalLM, ids: Tensor, logits: Tensor, within: dict[str, float]
) -> None:
    """Another last token changes the last logits alone."""
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % model.config.vocab_size
    with torch.no_grad():
        after = model(changed, use_cache=False).logits
    torch.testing.assert_close(after[:, :-1], logits[:, :-1], **within)
    assert not torch.allclose(after[:, -1], logits[:, -1], atol=1e-3)


def name_of(settings: Published, block: int, loop: int) -> str:
    """The recorded name of what a block returned."""
    shared = [settings.shared_block(index) for index in range(settings.shared)]
    if block in shared:
        return f"crawler{shared.index(block)}.call{loop}"
    flats = [settings.flat_block(index) for index in range(settings.flats)]
    return f"flat{flats.index(block)}" if block in flats else f"bridge{block}"


def quantised_weights(model: OuroborosForCausalLM) -> AbstractContextManager[None]:
    """The published rule of fake quantisation in every matrix of a block, and of those that map bigrams and values."""
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    names = [name for name in matrices if re.search(r"(layers|stem)\..*proj", name)]
    rule = functools.partial(quantized, bits=6, clip=0.9995, smallest=1 / 31)
    return straight_through(dict.fromkeys(map(model.get_parameter, names), rule))


def build_from_golden(hyperparameters: dict[str, Any], tensors: dict[str, Tensor]) -> OuroborosForCausalLM:
    """The model of another kind of case, whose sequences are too short for the rotation to be scaled."""
    return to_model(below(tensors, "param/"), Published.read(hyperparameters), context=1)


KINDS = {"model": whole_model}
