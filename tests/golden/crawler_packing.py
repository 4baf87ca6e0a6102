"""Recorded numbers of the crawler's published packing: codes, GPTQ in one phase and in two, pruning, and the plan."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ouroboros.nn.quantize import quantized
from ouroboros.pack.coded import Coded
from ouroboros.pack.gptq import objective
from ouroboros.systems.crawler import packing
from ouroboros.systems.crawler.checkpoint import to_model
from ouroboros.systems.crawler.published import Published

Tensors = dict[str, Tensor]


def below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors below ``prefix``, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def number(text: str, pattern: str) -> float:
    """The number that a case says in words."""
    found = re.search(pattern, text)
    assert found, f"{text!r} does not say {pattern!r}"
    return float(found[1])


def same(found: Coded, codes: Tensor, scale: Tensor, *, share: float = 0.0) -> None:
    """Equal scales, and codes of which a share may be one off."""
    off = (found.codes.reshape(codes.shape).int() - codes.int()).abs()
    assert int(off.max()) <= (1 if share else 0)
    assert int((off > 0).sum()) <= share * codes.numel()
    # A vector's step is recorded before it is stored.
    assert torch.equal(found.scales.flatten(), scale.half().flatten())


def quantiser(case: dict[str, Any], path: Path, work: Path) -> None:
    """Rounding to 6 and 8 bits, the steps of GPTQ, fake quantisation, and the order of bytes."""
    tensors = load_file(path.with_suffix(".safetensors"))
    assert tuple(case["clip_percentiles"]) == packing.PERCENTILES
    assert case["int8_percentile"] == packing.INT8_PERCENTILE
    stream = 0
    for row in case["matrices"]:
        name = f"W{row['index']}"
        w = tensors[name]
        for scheme, code in (("int6", packing.int6), ("int8", packing.int8)):
            found, recorded = code(w), below(tensors, f"{name}.{scheme}.")
            same(found, recorded["q"], recorded["scale"])
            assert torch.equal(found.dense(), recorded["deq"])
            relative = float((found.dense() - w).square().mean() / w.square().mean())
            assert relative == pytest.approx(row[f"{scheme}_rel_mse"], rel=1e-4)
        coded = packing.int6(w)
        stream += coded.codes.numel()
        assert int(coded.codes.int().abs().max()) == row["int6_max_code"]
        floor = torch.tensor(1 / 31).half()
        assert int((coded.scales == floor).sum()) == row["rows_at_scale_floor"]
        assert torch.equal(packing.row_scales(w)[:, 0], tensors[f"{name}.row_scales"])
    assert stream == case["bytes"]["int6_code_stream"]
    for name in sorted({name.split(".")[0] for name in tensors} - {f"W{row['index']}" for row in case["matrices"]}):
        for scheme, code in (("int6", packing.int6), ("int8", packing.int8)):
            if f"{name}.{scheme}.q" in tensors:
                recorded = below(tensors, f"{name}.{scheme}.")
                same(code(tensors[name]), recorded["q"], recorded["scale"])
    plain = bytes(tensors["shuffle.in"].tolist())
    for name, shuffled in below(tensors, "shuffle.out").items():
        assert packing.shuffled(plain, int(name)) == bytes(shuffled.tolist())
    fake_quantisation(case, below(tensors, "qat."))


def fake_quantisation(case: dict[str, Any], tensors: Tensors) -> None:
    """A product with quantised weights, and the gradient, which passes them as if they were not."""
    within = {"rtol": number(case["tolerance"], r"qat rtol (\S+)"), "atol": 1e-6}
    weight = tensors["weight"].clone().requires_grad_()
    value = weight + (quantized(weight.detach(), 6, clip=0.9995, smallest=1 / 31) - weight).detach()
    y = F.linear(tensors["x"], value)
    torch.testing.assert_close(y.detach(), tensors["y"], **within)
    y.square().sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, tensors["grad_weight"], **within)


def gptq(case: dict[str, Any], path: Path, work: Path) -> None:
    """The shipped procedure on several kinds of second moments, and what it is worth beside rounding."""
    tensors = load_file(path.with_suffix(".safetensors"))
    share = number(case["tolerance"], r"<=([0-9.]+)%") / 100
    for row in case["results"]:
        kind, block = row["hessian"], row["block"]
        w, h = tensors[f"{kind}.W"], tensors[f"{kind}.H"]
        found = packing.gptq(w, h, most=case["clip"], damping=case["percdamp"], block=block)
        same(found, tensors[f"{kind}.q.block{block}"], tensors[f"{kind}.scale.block{block}"], share=share)
        assert objective(w, found.dense(), h) == pytest.approx(row["objective"], rel=2e-2)
        steps = packing.row_scales(w, case["clip"])
        nearest = (w / steps).round().clamp(-case["clip"], case["clip"]) * steps
        assert objective(w, nearest, h) == pytest.approx(row["objective_round_to_nearest"], rel=2e-2)


EXPORTS = {
    "loop_aware": {"loop_aware": True},
    "standard": {},
    "loop_aware_crawler_int8": {"loop_aware": True, "int8_shared": True},
    "standard_crawler_int8": {"int8_shared": True},
    "naive": {"naive": True},
}


def loop_aware(case: dict[str, Any], path: Path, work: Path) -> None:
    """Second moments in two phases, the codes made with them, and the logits of the coded model."""
    tensors = load_file(path.with_suffix(".safetensors"))
    weights, settings = below(tensors, "param/"), Published.read(case["hyperparameters"])
    small, length = int(number(case["note"], r"is (\d+) elements")), case["seq_len"]
    stream = tensors["tokens"].long()
    starts = [number * (length + 1) for number in range(case["n_samples"])]
    rows = [stream[start : start + length] for start in starts]
    first, merged = packing.moments(weights, settings, rows, loop_aware=True, small=small, context=1)
    within = {"rtol": number(case["tolerance"], r"Hessians rtol ([0-9.e-]+)"), "atol": 1e-6}
    again = below(tensors, "H_merged/")
    assert sorted(again) == sorted(case["hessians_changed_by_phase2"])
    recorded = below(tensors, "H_phase1/")
    assert recorded.keys() == first.keys()
    for name, h in recorded.items():
        torch.testing.assert_close(first[name].float(), h, **within, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(merged[name].float(), again.get(name, h), **within)
    assert EXPORTS.keys() == case["meta"].keys()
    exported = {}
    for mode, options in EXPORTS.items():
        settled = {name: value for name, value in options.items() if name != "loop_aware"}
        hessians = merged if options.get("loop_aware") else first
        exported[mode] = stored = packing.export(weights, hessians, small=small, **settled)
        for name, scheme in case["meta"][mode].items():
            assert packing.scheme_of(name, weights[name], small=small, **settled) == scheme, (mode, name)
        for name, codes in below(tensors, f"{mode}/").items():
            if name.endswith(".q"):
                name = name.removesuffix(".q")
                value, scale = stored[name], tensors[f"{mode}/{name}.scale"]
                assert isinstance(value, Coded)
                same(value, codes, scale, share=1.5 / codes.numel())
        logits_of(case, {**tensors}, mode, stored, settings)
    equal = all(
        torch.equal(_dense(exported["loop_aware_crawler_int8"][name]), _dense(value))
        for name, value in exported["standard_crawler_int8"].items()
    )
    assert equal == case["loop_aware_equals_standard_when_crawler_is_int8"]


def logits_of(case: dict[str, Any], tensors: Tensors, mode: str, stored: dict[str, Any], settings: Published) -> None:
    """Logits of the model that is made of what is stored, where the case has them."""
    if f"{mode}/logits" not in tensors:
        return
    wanted = tensors[f"{mode}/logits"]
    ids = tensors["tokens"].long()[: wanted.shape[0] * wanted.shape[1]].view(wanted.shape[:2])
    model = to_model({name: _dense(value) for name, value in stored.items()}, settings, context=1)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, wanted, rtol=0, atol=number(case["tolerance"], r"logits atol ([0-9.e-]+)"))


def _dense(value: Coded | Tensor) -> Tensor:
    return value.dense() if isinstance(value, Coded) else value


def prune(case: dict[str, Any], path: Path, work: Path) -> None:
    """Which codes are made zero."""
    tensors = load_file(path.with_suffix(".safetensors"))
    before, after = below(tensors, "before/"), below(tensors, "after/")
    coded = {
        name.removesuffix(".q"): Coded(
            codes=codes, scales=before[f"{name.removesuffix('.q')}.scale"][:, None], bits=6, shape=tuple(codes.shape)
        )
        for name, codes in before.items()
        if name.endswith(".q")
    }
    found = packing.prune(coded, case["requested"])
    changed = 0
    for name, value in found.items():
        assert torch.equal(value.codes, after[f"{name}.q"])
        changed += int((value.codes != coded[name].codes).sum())
    assert changed == case["pruned"]


PATHS = {
    "gptq_path_int6_crawler": {},
    "gptq_path_int8_crawler": {"int8_shared": True},
    "naive_path": {"naive": True, "int8_shared": True},
}
STORED = {"int6": "int8", "int8": "int8", "passthrough": "float16", "passthrough_ctrl": "float32"}


def classification(case: dict[str, Any], path: Path, work: Path) -> None:
    """What becomes of tensors of real names and shapes."""
    for row in case["rows"]:
        scheme = packing.scheme_of(row["name"], torch.empty(row["shape"], device="meta"), **PATHS[row["mode"]])
        assert (scheme, STORED[scheme]) == (row["scheme"], row["stored_dtype"]), row


KINDS: dict[str, Callable[[dict[str, Any], Path, Path], None]] = {
    "quantiser": quantiser,
    "gptq": gptq,
    "loop_aware_gptq": loop_aware,
    "prune": prune,
    "classification": classification,
}
