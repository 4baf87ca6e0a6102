"""Golden checks of R-HRM's published chat: processed logits, what the model sees, what is read from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList

from ouroboros.api import build
from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec, Recipe
from ouroboros.serve.decoder import WindowDecoder
from ouroboros.systems.rhrm.recipe import PUBLISHED_SIZES
from ouroboros.systems.rhrm.sampling import ChatSampling

RHRM = ChatSampling()


def processed(before: Tensor, context: list[int], sampling: ChatSampling) -> Tensor:
    """Scores (V,) as ``generate`` would sample from them, by the options given to it."""
    options = sampling.options()
    assert (options["temperature"], options["top_k"], options["top_p"]) == (1.0, None, 1.0)  # nothing is left to it
    chain = LogitsProcessorList(options.get("logits_processor", []))
    return chain(torch.tensor([context]), before[None].clone())[0]


def chat_logits(case: dict[str, Any], path: Path, work: Path) -> None:
    """Every row's logits after each stage, exactly where removed, else to the rounding of float32."""
    tolerance = case.get("tolerance", {})
    rtol, atol = tolerance.get("rtol", 1e-6), tolerance.get("atol", 1e-6)
    for number, row in enumerate(case["rows"]):
        before = torch.tensor([float(value) for value in row["before"]])
        penalised = dataclasses.replace(
            RHRM, temperature=row["temperature"], repetition_penalty=row["penalty"], top_k=0, top_p=1.0
        )
        cut = dataclasses.replace(penalised, top_k=row["top_k"] or 0)
        # A nucleus of 0 keeps one token, and so does any below the largest probability.
        whole = dataclasses.replace(cut, top_p=1.0 if row["top_p"] is None else max(row["top_p"], 1e-9))
        stages = {"after_temperature_ban_and_penalty": penalised, "after_top_k": cut, "after_top_p": whole}
        for name, sampling in stages.items():
            if name in row:
                found = processed(before, row["context"], sampling)
                expected = torch.tensor([float(value) for value in row[name]])
                torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=f"{path}: row {number}, {name}")
        if "probabilities" in row:
            found = processed(before, row["context"], whole).softmax(-1)
            torch.testing.assert_close(found, torch.tensor(row["probabilities"]), rtol=rtol, atol=atol)


def chat_window(case: dict[str, Any], path: Path, work: Path) -> None:
    """The published style shows the model the recorded number of tokens, the last ones, in a single pass."""
    spec = ModelSpec(layout="(1)x1", hidden_size=8, max_position_embeddings=4096).replace(
        mixer=AttentionSpec(num_heads=1), ffn=FeedForwardSpec(intermediate_size=8)
    )
    model = build(Recipe(name="tiny", model=spec)).eval()
    assert RHRM.window is not None
    for row in case["rows"]:
        ids = torch.randint(0, 256, (1, row["context"]), generator=torch.Generator().manual_seed(0))
        seen: list[Tensor] = []
        with pytest.MonkeyPatch.context() as patch:
            forward = type(model.model).forward

            def watched(self, input_ids, *arguments, forward=forward, seen=seen, **options):
                seen.append(input_ids)
                return forward(self, input_ids, *arguments, **options)

            patch.setattr(type(model.model), "forward", watched)
            WindowDecoder(RHRM.window).generate(model, ids, max_new_tokens=1, do_sample=False)
        assert len(seen) == 1 and torch.equal(seen[0], ids[:, -row["model_sees"] :]), f"{path}: {row}"
        assert seen[0].shape[1] == row["model_sees"], f"{path}: {row}"


def checkpoint_sizing(case: dict[str, Any], path: Path, work: Path) -> None:
    """What the published chat takes a checkpoint to be: the preset of its width, or 8 heads and 8 loops."""
    for row in case["rows"]:
        width = row["d_model"]
        heads, loops = PUBLISHED_SIZES.get(width, (8, 8))
        sizes = {"d_model": width, "heads": heads, "loops": loops, "head_dim": width // heads, "d_ff": 4 * width}
        assert row == {**sizes, "d_latent": width // 4, "prefix_tokens": 5, "vocab_size": 50_257}, f"{path}: {row}"


KINDS: dict[str, Callable[[dict[str, Any], Path, Path], None]] = {
    "last-position logits before and after the original chat processing": chat_logits,
    "how many tokens the model is shown for a context length": chat_window,
    "what the original chat infers from a checkpoint (from the embedding width only)": checkpoint_sizing,
}
