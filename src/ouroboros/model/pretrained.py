"""What the model with a head and the one without have in common, as transformers asks for it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ouroboros.model.configuration import OuroborosConfig
from ouroboros.nn.aligned import aligned
from ouroboros.nn.part import Init, Started
from ouroboros.optim import untrained_parameters

M = TypeVar("M", bound=nn.Module)

RENAMED = {
    r"embed_positions\.": r"stem.positions.",
    r"(loops\.\d+\.embedding)(?!\.weight)": r"\1.weight",
    r"(loops\.\d+\.norm)(?!\.weight)": r"\1.weight",
    r"(loops\.\d+)\.inject_": r"\1.inject.",
    r"(loops\.\d+)\.gate_proj\.": r"\1.gate.proj.",
}
"""Names of parameters in files of earlier versions, as patterns of one group, and what they are called today."""


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No loading bars and reports from transformers inside; its settings are restored."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def todays_names(saved: Any) -> Any:
    """Names of parameters in what any version saved, as they are today: in text, keys and lists of it."""
    if isinstance(saved, str):
        for pattern, replacement in RENAMED.items():
            saved = re.sub(pattern, replacement, saved)
        return saved
    if isinstance(saved, dict):
        return {todays_names(key): todays_names(value) for key, value in saved.items()}
    return [todays_names(item) for item in saved] if isinstance(saved, list) else saved


def shallow(module: M) -> M:
    """A second module object over the same parameters, buffers and children."""
    twin = copy.copy(module)
    twin.__dict__ = {
        key: copy.copy(value) if key in ("_parameters", "_buffers", "_modules") else value
        for key, value in module.__dict__.items()
    }
    return twin


class OuroborosPreTrainedModel(PreTrainedModel):
    """Shared behaviour: initialisation, loading, another vocabulary, capabilities."""

    config_class = OuroborosConfig
    config: OuroborosConfig  # pyrefly: ignore[bad-override-mutable-attribute]
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers says; what a part never trains stays frozen, which loading alone would undo, and weights lie
        where they would lie without a file, so that products with them are the same to the last bit."""
        kwargs.setdefault("key_mapping", RENAMED)
        loaded: Any = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model._weight_conversions = None  # what is saved again has today's names
        for name in untrained_parameters(model):
            model.get_parameter(name).requires_grad_(False)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = aligned(tensor.data)
        return loaded

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As transformers says. The new size also enters the specification, so that what is saved can be loaded.

        Views made by ``with_loops`` before share the embedding and nothing else of it: make them anew.

        Raises:
            OuroborosError: the model cannot have so few tokens.
        """
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        spec = dataclasses.replace(self.config.model_spec, vocab_size=size)  # a bad size is refused before any change
        table = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.become(dataclasses.replace(spec, vocab_size=table.num_embeddings))
        base: Any = self.base_model
        base.spec = self.config.model_spec
        return table

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        base: Any = self.base_model
        spec = base.spec  # the configuration would read its JSON anew for every module
        if isinstance(module, Started):
            module.reset_parameters(Init(std=spec.init_std))
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            table = isinstance(module, nn.Embedding) or module is getattr(self, "lm_head", None)
            std = spec.init_std if spec.embedding_std is None or not table else spec.embedding_std
            if isinstance(module, nn.Linear) and table and spec.head_std is not None:
                std = spec.head_std
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(registers := getattr(module, "registers", None), nn.Parameter):
            nn.init.normal_(registers, std=spec.init_std if spec.register_std is None else spec.register_std)
