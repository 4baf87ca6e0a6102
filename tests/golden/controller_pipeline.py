"""Recorded numbers of the published program beside its models: order of texts, rate, reward, and averaged layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ouroboros.systems.controller.checkpoint import averaged_layer
from ouroboros.systems.controller.pipeline import interleaved, rate, reward, windows


def pipeline(case: dict[str, Any], path: Path, work: Path) -> None:
    """Windows of texts, windows of several streams, the rate of some updates, and rewards of answers."""
    packing, order, trace = case["packing"], case["interleave"], case["lr_trace"]
    offset = int(re.fullmatch(r"ord\(c\)-(\d+)", packing["token_of_char"])[1])  # pyrefly: ignore
    texts = [[ord(character) - offset for character in text] for text in packing["texts"]]
    found = [{"input_ids": w[:-1], "labels": w[1:]} for w in windows(texts, packing["seq"])]
    assert found == packing["rows"]
    assert order["streams"] == ["texts in order", "texts reversed"]
    streams = [windows(texts, packing["seq"]), windows(texts[::-1], packing["seq"])]
    drawn = interleaved(streams, order["weights"], order["python_random_seed"])
    assert [window[:-1] for window in drawn] == order["rows_input_ids"]
    settings = {"peak": trace["base_lr"], "least": trace["min_lr"], "warmup": trace["warmup_micro_steps"]}
    settings |= {"total": trace["micro_steps"], "accumulation": trace["accumulation"]}
    for update, expected in trace["lr_used_at_update"].items():
        assert rate(int(update), **settings) == pytest.approx(expected, rel=1e-9), update
    for answer in case["reward"]:
        assert reward(answer["completion"], answer["reference"]) == answer["reward"], answer


def layer_average(case: dict[str, Any], path: Path, work: Path) -> None:
    """The mean of all layers of the pretrained model, tensor by tensor."""
    tensors = load_file(path.with_suffix(".safetensors"))
    donor = load_file(path.with_name("base_model.safetensors"))
    found = averaged_layer(donor, range(case["hyper"]["layers"]))
    renamed = {"self_attn.": "attention.", "mlp.": "ffn."}
    renamed |= {"input_layernorm.": "attn_norm.", "post_attention_layernorm.": "ffn_norm."}
    for theirs, published in renamed.items():
        found = {name.replace(theirs, published): tensor for name, tensor in found.items()}
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert (tensor - tensors[name]).abs().max() <= 1e-6, name


KINDS = {"pipeline": pipeline, "v1_layer_average": layer_average}
