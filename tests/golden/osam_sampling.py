"""Golden checks of OSAM's published sampler: the distributions that it draws from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.generation import LogitsProcessorList

from ouroboros.systems.osam.sampling import NucleusWithin, ProgramSampling

SMALLEST = 1e-6
"""The published program divides by no smaller temperature."""


def published_cut(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    """What ``generate`` is given for these published settings."""
    sampling = ProgramSampling(
        temperature=max(temperature, SMALLEST), top_k=top_k, top_p=top_p if 0 < top_p < 1 else 1.0
    )
    options = sampling.options()
    assert (options["temperature"], options["top_k"], options["top_p"]) == (1.0, None, 1.0)  # nothing is left to it
    chain = LogitsProcessorList(options.get("logits_processor", []))
    if top_p >= 1:  # ours is then off, while the published rule drops what rounding puts beyond 1
        chain = LogitsProcessorList([p for p in chain if not isinstance(p, NucleusWithin)])
        chain.append(NucleusWithin(top_k, top_p))
    return chain


def sampling_filter(case: dict[str, Any], path: Path, work: Path) -> None:
    """The probabilities under every setting."""
    tensors = load_file(path.with_suffix(".safetensors"))
    logits, tolerance = tensors["logits"], case["suggested_tolerance"]["probs_abs"]
    for setting in case["settings"]:
        chain = published_cut(setting["temperature"], setting["top_k"], setting["top_p"])
        found = chain(torch.zeros(len(logits), 1, dtype=torch.long), logits.clone()).softmax(-1)
        expected = tensors[setting["tensor"]]
        gap = (found - expected).abs().max().item()
        assert found.shape == expected.shape and gap <= tolerance, f"{path}: {setting}: differs by {gap}"


KINDS: dict[str, Callable[[dict[str, Any], Path, Path], None]] = {"sampling_filter": sampling_filter}
