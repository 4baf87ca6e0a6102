"""Tiny random pretrained models of every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from ouroboros.config import DataSpec, OptimSpec, Recipe, TaughtTraining, TrainSpec
from ouroboros.convert import readers
from ouroboros.convert.heal import Healing, Plan
from ouroboros.data.tokenize import byte_tokenizer

CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"head_dim": 6}),
    "llama3": (
        LlamaConfig,
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 300.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": (MistralConfig, {"sliding_window": 7}),
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "qwen3": (
        Qwen3Config,
        {"head_dim": 10, "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}},
    ),
    "gemma3_text": (
        Gemma3TextConfig,
        {"head_dim": 10, "sliding_window": 8, "sliding_window_pattern": 3, "final_logit_softcapping": 9.0},
    ),
}
SIZES = {
    "vocab_size": 257,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a donor with a tokenizer of bytes, and options of its configuration; attention is far from uniform."""

    def made(name: str, *, dtype: torch.dtype = torch.float32, tokenizer: bool = True, **options: Any) -> Path:
        cls, more = CONFIGS[name]
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(cls(**{**SIZES, **more, **options})).eval().float()
        for key, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else 0.4)
            if parameter.ndim == 1 and "norm" in key and name != "gemma3_text":
                parameter.data.add_(1.0)
        model.to(dtype).save_pretrained(tmp_path / name)
        if tokenizer:
            byte_tokenizer().save(tmp_path / name)
        return tmp_path / name

    return made


@pytest.fixture
def healing(make: Make, tmp_path: Path) -> Callable[..., Healing]:
    """Makes a healing of a donor of six layers, of which one between the first and the last two is kept."""

    def made(
        name: str = "llama",
        layout: str = "2 loop:(1)x2 2",
        *,
        out: Path = tmp_path / "out",
        train: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Healing:
        if not (out / "donor").exists():
            readers.convert(make(name, num_hidden_layers=6), out / "donor")
        text = tmp_path / "text.txt"
        text.write_text("".join(f"{n} times {n % 7} is {n * (n % 7)}\n" for n in range(400)))
        given: dict[str, Any] = {"weight": 0.5, "states": 1.0, "blocks": (0, 0), "share": 0.5, **(train or {})}
        recipe = Recipe(
            name="heal",
            data=DataSpec(sources=(str(text),), sequence_length=16, tokenizer=str(out / "donor")),
            optim=OptimSpec(matrix_optimizer="adamw", lr=1e-2, weight_decay=0.0),
            train=TrainSpec(
                steps=4,
                batch_size=2,
                precision="fp32",
                compile="off",
                threads=1,
                eval_bytes=256,
                teach=TaughtTraining(model=".", **given),
            ),
        )
        plan: dict[str, Any] = {"kept": ((0,), (1,), (3,), (4,), (5,)), "bridge_tokens": 200, **settings}
        return Healing(Plan(source="donor", layout=layout, recipe=recipe, **plan), out, lambda line: None)

    return made
