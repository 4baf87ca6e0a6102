"""Decoding loops in place of the one of ``generate``, which still prepares options, processors and stopping criteria.

Shapes: B = 1 sequence, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from ouroboros.errors import check

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.generation import LogitsProcessorList

    from ouroboros.model.modeling import OuroborosForCausalLM

Advance = Callable[[Tensor, Tensor | None], Tensor]
"""From all tokens so far (1, T) and the newest of them (1, 1), None at first, to the logits (1, V) of the next."""


class LoopDecoder(ABC):
    """Writes one sequence, greedy or sampled; a subclass says where the next logits come from."""

    def tokens(self, model: OuroborosForCausalLM, input_ids: Tensor, **options: Any) -> Iterator[Tensor]:
        """New tokens (1, 1), each as soon as it is chosen; ``options`` are those of ``model.generate``."""
        return model.generate(input_ids, custom_generate=self._write, **options)  # pyrefly: ignore

    def generate(self, model: OuroborosForCausalLM, input_ids: Tensor, **options: Any) -> Tensor:
        """Prompt and new tokens, (1, T)."""
        return torch.cat((input_ids, *self.tokens(model, input_ids, **options)), dim=1)

    @abstractmethod
    def begin(
        self, model: OuroborosForCausalLM, input_ids: Tensor, config: GenerationConfig, prepared: dict[str, Any]
    ) -> Advance:
        """What gives the logits of one token after another.

        Raises:
            OuroborosError: something was asked for that this loop does not serve.
        """

    @torch.no_grad()
    def _write(
        self,
        model: OuroborosForCausalLM,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **prepared: Any,
    ) -> Iterator[Tensor]:
        """The loop, as ``generate`` calls it; order and random numbers are those of its own."""
        advance = self.begin(model, input_ids, generation_config, prepared)
        reached, token_B1, done = _end(stopping_criteria), None, False
        text, length = input_ids, input_ids.shape[1]
        while not done:
            # Processors see the whole text, and may change the scores in place.
            scores = advance(input_ids, token_B1).to(torch.float32, copy=bool(logits_processor))
            if logits_processor:
                scores = logits_processor(input_ids, scores)  # pyrefly: ignore
            if generation_config.do_sample:
                token_B1 = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
            else:
                token_B1 = scores.argmax(dim=-1, keepdim=True)
            if length == text.shape[1]:  # the buffer doubles, so that the cost of a token does not grow with the text
                text = torch.cat((text, torch.empty_like(text)), dim=1)
            text[:, length : length + 1] = token_B1
            length += 1
            input_ids = text[:, :length]
            yield token_B1
            done = reached(input_ids, token_B1)


def _end(criteria: StoppingCriteriaList) -> Callable[[Tensor, Tensor], bool]:
    """Whether a token, the last of all ids, was the last one to write; only unusual criteria are called."""
    most, ends, others = math.inf, set[int](), StoppingCriteriaList()
    for criterion in criteria:
        # A length beyond what the model was made for is worth a warning, which the criterion itself gives.
        known = getattr(criterion, "max_position_embeddings", None) or math.inf
        if type(criterion) is MaxLengthCriteria and criterion.max_length <= known:
            most = min(most, criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            ends.update(criterion.eos_token_id.flatten().tolist())
        else:
            others.append(criterion)

    def reached(ids_1T: Tensor, token_11: Tensor) -> bool:
        if ids_1T.shape[1] >= most or (ends and int(token_11) in ends):
            return True
        return bool(others and others(ids_1T, None).all())  # pyrefly: ignore

    return reached


class CachedDecoder(LoopDecoder):
    """Shows the model every token once; the cache that ``generate`` has prepared grows with the text."""

    def begin(
        self, model: OuroborosForCausalLM, input_ids: Tensor, config: GenerationConfig, prepared: dict[str, Any]
    ) -> Advance:
        """Read the prompt with the first call."""
        options: Any = {"past_key_values": prepared["past_key_values"], "use_cache": True, "logits_to_keep": 1}
        return lambda ids, token: model(ids if token is None else token, **options).logits[:, -1]


class WindowDecoder(LoopDecoder):
    """Shows the model only the last ``window`` tokens of a text, from position 0 at every step, without a cache."""

    def __init__(self, window: int) -> None:
        self.window = window

    def begin(
        self, model: OuroborosForCausalLM, input_ids: Tensor, config: GenerationConfig, prepared: dict[str, Any]
    ) -> Advance:
        """Run the window anew for every token.

        Raises:
            OuroborosError: there are several sequences.
        """
        check(len(input_ids) == 1, f"a window serves one sequence at a time, got {len(input_ids)}")
        return lambda ids, token: model(ids[:, -self.window :], use_cache=False, logits_to_keep=1).logits[:, -1]
