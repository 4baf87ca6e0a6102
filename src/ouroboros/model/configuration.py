"""``OuroborosConfig``: a thin transformers envelope around :class:`~ouroboros.config.ModelSpec`."""

from __future__ import annotations

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ouroboros.accounting import cached_blocks, outer_values, recent_values
from ouroboros.config import ModelSpec, from_dict, to_dict
from ouroboros.errors import OuroborosError
from ouroboros.schedule import Schedule

FILTERED = "ouroboros_filtered_attention"
"""``layer_types`` entry of a visit that remembers recent entries for filters over tokens beside keys and values."""

CONSTANT_STATE = "ouroboros_constant_state"
"""``layer_types`` entry of a visit whose mixer keeps a state of constant size."""


@strict
class OuroborosConfig(PreTrainedConfig):
    """Configuration of :class:`~ouroboros.model.modeling.OuroborosForCausalLM`.

    ``spec`` is the whole truth, read strictly (unknown keys are errors). The standard fields beside it are derived from
    it for the tools that read them; ``num_hidden_layers`` and ``layer_types`` count cache entries (visits), because
    caches are allocated from them.

    Args:
        spec: a :class:`~ouroboros.config.ModelSpec` as a dictionary.
        loops: another loop count than the layout's, as set by ``with_loops``.
    """

    model_type = "ouroboros"
    keys_to_ignore_at_inference = ["past_key_values"]

    spec: dict | None = None
    loops: int | None = None
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    max_position_embeddings: int = 0
    layer_types: list[str] | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._derive()
        super().__post_init__(**kwargs)

    def _derive(self) -> None:
        """Set the standard fields from ``spec`` and ``loops``."""
        spec = self.model_spec
        schedule = self._schedule_of(spec)
        cached = cached_blocks(spec, schedule)
        self.spec = to_dict(spec)
        self.vocab_size = spec.vocab_size
        self.hidden_size = spec.hidden_size
        self.num_hidden_layers = len(cached)
        heads = spec.block.mixer.heads(spec.hidden_size)
        self.num_attention_heads, self.num_key_value_heads, self.head_dim = heads
        self.intermediate_size = spec.block.ffn.hidden_width
        self.max_position_embeddings = spec.max_position_embeddings
        self.layer_types = [_entry_kind(spec, block, first=slot == 0) for slot, block in enumerate(cached)]
        self.tie_word_embeddings = spec.tie_embeddings

    def at_loops(self, loops: int) -> OuroborosConfig:
        """A copy for another loop count, everything else (also the attention implementation) as it is.

        Raises:
            OuroborosError: the layout has no loop, or ``loops`` < 1.
        """
        twin = copy.deepcopy(self)
        twin.loops = loops
        twin._derive()
        return twin

    def become(self, spec: ModelSpec) -> None:
        """Describe ``spec`` from now on; loop count and everything else stay as they are."""
        self.spec = to_dict(spec)
        self._derive()

    @property
    def model_spec(self) -> ModelSpec:
        """The specification as a value."""
        return ModelSpec() if self.spec is None else from_dict(ModelSpec, self.spec, where="config.json: spec")

    @property
    def schedule(self) -> Schedule:
        """The visits, with ``loops`` applied."""
        return self._schedule_of(self.model_spec)

    def _schedule_of(self, spec: ModelSpec) -> Schedule:
        return spec.schedule if self.loops is None else spec.schedule.with_loops(self.loops)

    def validate_layer_type(self) -> None:
        """One entry per cached visit."""
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise OuroborosError(
                f"layer_types has {len(self.layer_types)} entries, num_hidden_layers is {self.num_hidden_layers}"
            )

    @classmethod
    def from_spec(cls, spec: ModelSpec, *, eos_token_id: int | None = None) -> OuroborosConfig:
        """The configuration of ``spec``; the end-of-text token also begins and pads sequences."""
        return cls(spec=to_dict(spec), bos_token_id=eos_token_id, eos_token_id=eos_token_id, pad_token_id=eos_token_id)


def _entry_kind(spec: ModelSpec, block: int, *, first: bool) -> str:
    """What a cache entry of ``block`` holds; the first one also serves stem and head."""
    parts = spec.blocks[block]
    if parts.mixer.keeps == "state":
        return CONSTANT_STATE
    filters = recent_values(spec, block) or (first and outer_values(spec))
    return FILTERED if filters else "full_attention"
