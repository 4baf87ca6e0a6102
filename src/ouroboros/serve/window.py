"""Decoding through a window: the model sees the last tokens of the text only, counted from position 0 at every step.

Every position changes with every token past the window, so nothing can be cached: each step runs the whole window.

Shapes: B = 1 sequence, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ouroboros.errors import check

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.generation import LogitsProcessorList, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    from ouroboros.model.modeling import OuroborosForCausalLM


class WindowDecoder:
    """A decoding loop in place of the one of ``generate``: one sequence of any length.

    Args:
        window: tokens that the model sees.
    """

    def __init__(self, window: int) -> None:
        self.window = window

    def generate(
        self, model: OuroborosForCausalLM, input_ids: Tensor, *, streamer: BaseStreamer | None = None, **options: Any
    ) -> Tensor:
        """Prompt and new tokens, (1, T); ``options`` are those of ``model.generate``.

        Raises:
            OuroborosError: several sequences, or a window longer than the model's context.
        """
        self.check_fits(model)
        check(len(input_ids) == 1, f"a window serves one sequence at a time, got {len(input_ids)}")
        # generate() prepares processors and criteria; it shows the prompt to the streamer but does not hand it on.
        return model.generate(  # pyrefly: ignore
            input_ids, custom_generate=self._write, streamer=streamer, token_streamer=streamer, **options
        )

    def check_fits(self, model: OuroborosForCausalLM) -> None:
        """Refuse a window longer than the model's context."""
        limit = model.config.max_position_embeddings
        check(self.window <= limit, f"the window is {self.window} tokens but the model's context holds {limit}")

    def _write(
        self,
        model: OuroborosForCausalLM,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        token_streamer: BaseStreamer | None = None,
        **prepared: Any,
    ) -> Tensor:
        done = False
        while not done:
            logits = model(input_ids[:, -self.window :], use_cache=False, logits_to_keep=1).logits[:, -1]
            # A copy in float32: processors may change it in place; they see the whole text.
            scores = logits_processor(input_ids, logits.to(torch.float32, copy=True))  # pyrefly: ignore
            if generation_config.do_sample:
                token_B1 = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
            else:
                token_B1 = scores.argmax(dim=-1, keepdim=True)
            input_ids = torch.cat((input_ids, token_B1), dim=1)
            done = bool(stopping_criteria(input_ids, None).all())  # pyrefly: ignore
            if token_streamer is not None:
                token_streamer.put(token_B1[0].cpu())
        if token_streamer is not None:
            token_streamer.end()
        return input_ids
