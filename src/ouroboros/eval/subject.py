"""What the harness checks: a model with the inputs of the checks, and how two ways of computing logits are compared.

Shapes: B sequences, T tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ouroboros.config import ModelSpec
from ouroboros.eval.finding import equal, require
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.schedule import Schedule

TOKENS = 17
"""Prompt length of the checks, where the context allows it."""
NEW_TOKENS = 8
NOISE = 0.05
"""Standard deviation of the noise that moves parts away from a neutral start."""
TOLERANCE = 1e-5
"""Largest difference of float32 logits computed in two ways, times the largest logit where that exceeds 1."""


class Continuation(NamedTuple):
    """New tokens (B, N) and the logits (B, N, V) they were chosen from."""

    tokens: Tensor
    logits: Tensor

    def sequence(self, row: int) -> Continuation:
        """One sequence of the batch."""
        return Continuation(self.tokens[row : row + 1], self.logits[row : row + 1])


@dataclass(frozen=True)
class Subject:
    """The model under check and the inputs of the checks."""

    model: OuroborosForCausalLM
    """In evaluation mode and float32; checks leave it as it is."""
    ids: Tensor
    """Random token ids, (3, T)."""
    new_tokens: int = NEW_TOKENS

    @property
    def spec(self) -> ModelSpec:
        """The model's specification."""
        return self.model.model.spec

    @property
    def schedule(self) -> Schedule:
        """The visits the model runs."""
        return self.model.schedule

    @property
    def length(self) -> int:
        """T."""
        return self.ids.shape[1]

    @property
    def is_approximate(self) -> bool:
        """Whether decoding with a cache differs from one pass by design."""
        return self.spec.share_last_kv

    @functools.cached_property
    def views(self) -> dict[int | None, OuroborosForCausalLM]:
        """The model as it is (None) and, where the layout has a loop, at 1, its own and two more loops."""
        views: dict[int | None, OuroborosForCausalLM] = {None: self.model}
        if self.schedule.is_looped:
            loops = self.schedule.loops
            views |= {n: self.model.with_loops(n) for n in sorted({1, loops, loops + 2})}
            if views[loops].schedule == self.schedule:
                del views[None]
        return views

    def placed_views(self) -> Iterator[tuple[str, OuroborosForCausalLM]]:
        """Every view, and how messages say at which loop count it is: nothing for the model as it is."""
        for loops, view in self.views.items():
            yield "" if loops is None else f", loops {loops}", view

    @functools.cached_property
    def logits(self) -> Tensor:
        """Logits of ``ids`` without a cache, (3, T, V)."""
        return logits_of(self.model, self.ids)

    def generate(self, ids: Tensor, **options: Any) -> Continuation:
        """Exactly ``new_tokens`` more tokens by greedy ``generate``, and the logits they were chosen from."""
        output = self.generate_output(ids, output_logits=True, **options)
        return Continuation(output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1))

    def generate_output(self, ids: Tensor, **options: Any) -> Any:
        """What transformers' ``generate`` returns for exactly ``new_tokens`` more tokens without sampling."""
        given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        given |= {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens, "return_dict_in_generate": True}
        return self.model.generate(ids, **given | options)  # pyrefly: ignore


@torch.no_grad()
def perturb(model: nn.Module, noise: float = NOISE) -> None:
    """Add normal noise to every parameter, so that parts that start neutral do something."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * noise)


def build_perturbed(spec: ModelSpec) -> OuroborosForCausalLM:
    """A fresh model of ``spec`` with noise on every parameter, in evaluation mode."""
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec, eos_token_id=spec.vocab_size - 1)).eval()
    perturb(model)
    return model


def prepare(model: OuroborosForCausalLM, seed: int = 0) -> Subject:
    """The subject of the checks: the model in evaluation mode and float32 (a copy if it is not), and random tokens."""
    model = (model if model.dtype == torch.float32 else copy.deepcopy(model).float()).eval()
    spec = model.model.spec
    length = max(1, min(TOKENS, spec.max_position_embeddings - NEW_TOKENS))
    new_tokens = max(1, min(NEW_TOKENS, spec.max_position_embeddings - length))
    ids = torch.randint(0, spec.vocab_size, (3, length), generator=torch.Generator().manual_seed(seed))
    return Subject(model, ids.to(model.device), new_tokens)


def logits_of(model: Callable[..., Any], ids: Tensor, **options: Any) -> Tensor:
    """Logits (B, T, V) without a cache and without a gradient."""
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


def fed(model: Callable[..., Any], ids: Tensor, sizes: Sequence[int], **options: Any) -> list[Any]:
    """Outputs for ``ids`` fed in chunks of ``sizes`` tokens (the last size repeats) through a growing cache."""
    outputs: list[Any] = []
    store, at = None, 0
    with torch.no_grad():
        while at < ids.shape[1]:
            chunk = ids[:, at : at + sizes[min(len(outputs), len(sizes) - 1)]]
            outputs.append(model(chunk, past_key_values=store, use_cache=True, **options))
            store = outputs[-1].past_key_values
            at += chunk.shape[1]
    return outputs


def close(found: Tensor, expected: Tensor, what: str) -> float:
    """Two computations of the same logits agree; returns the largest difference.

    Raises:
        Mismatch: shapes differ, or logits by more than the tolerance.
    """
    equal(tuple(found.shape), tuple(expected.shape), f"{what}: shape")
    gap = float((found - expected).abs().max())
    require(gap <= TOLERANCE * max(1.0, float(expected.abs().max())), f"{what}: logits differ by {gap:.2g}")
    return gap


def changed_beyond(values: Tensor, *repeats: Tensor) -> Callable[[Tensor], bool]:
    """What tells whether others differ from ``values`` by more than ``repeats`` of the same computation do.

    What is no number any more differs too.
    """
    rounding = max(float((again - values).abs().max()) for again in repeats)
    limit = max(10 * rounding, TOLERANCE * float(values.abs().max()))
    return lambda other: not float((other - values).abs().max()) <= limit


def same_continuation(found: Continuation, expected: Continuation, what: str) -> float:
    """Two greedy continuations agree in logits and tokens; returns the largest difference of logits.

    Where logits agree but tokens do not, two tokens tie within the tolerance; what follows is then another text.

    Raises:
        Mismatch: names the first logits that differ.
    """
    equal(tuple(found.logits.shape), tuple(expected.logits.shape), f"{what}: shape")
    gap = 0.0
    for row in range(len(found.tokens)):
        for step in range(found.tokens.shape[1]):
            place = f"{what}, sequence {row}, new token {step}"
            gap = max(gap, close(found.logits[row, step], expected.logits[row, step], place))
            if found.tokens[row, step] != expected.tokens[row, step]:
                break
    return gap
