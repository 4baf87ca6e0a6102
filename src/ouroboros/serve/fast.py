"""Fast decoding of one sequence: memories at fixed addresses, and a step for one token compiled into one program.

``FastDecoder().generate(model, ids, ...)`` writes the tokens that ``model.generate(ids, ...)`` writes, greedy or
sampled with the same seed. At batch size one a step is bound by reading every weight once; what is saved is all that
surrounds it. Keys and values have room for more tokens than there are; a state of constant size is written whole.

Shapes: B = 1 sequence, K key/value heads, S preallocated positions, R registers, C channels per head, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import DynamicCache

from ouroboros.errors import check, first_line
from ouroboros.nn.memory import Memory, Prefix, Prefixed
from ouroboros.schedule import Visit
from ouroboros.serve.decoder import Advance, LoopDecoder
from ouroboros.train.precision import from_compiler, missing_compiler

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from ouroboros.model.modeling import OuroborosForCausalLM

logger = logging.getLogger(__name__)

SMALLEST = 256
"""Positions preallocated at first; doubled when they are used up: a step attends to at most twice the need."""

KEYS, VALUES, STATE = "keys", "values", "state"
Held = dict[str, Tensor]
"""What one cache entry holds for a mixer: keys and values (1, K, S, C), or a state (1, ...)."""
Recent = dict[str, Tensor]
"""What it holds for filters over tokens, by their names."""
Step = Callable[..., Tensor]


class BufferMemory(Memory):
    """One visit's memory at fixed addresses: keys and values, written at position ``at``, or a state; and what its
    filters over tokens remember. Without ``keeps`` nothing is written."""

    def __init__(self, held: Held, entries: Recent, at: Tensor, keeps: bool) -> None:
        self.held, self.entries, self.at, self.keeps = held, entries, at, keeps

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """All S positions with the new one filled in: in place, or in a copy when the entry is only read."""
        keys, values = self.held[KEYS], self.held[VALUES]
        if self.keeps:
            return keys.index_copy_(2, self.at, k_BKTC), values.index_copy_(2, self.at, v_BKTC)
        return keys.index_copy(2, self.at, k_BKTC), values.index_copy(2, self.at, v_BKTC)

    def state(self) -> Tensor:
        return self.held[STATE]

    def carry(self, state: Tensor, new_tokens: int) -> None:
        if self.keeps:
            self.held[STATE].copy_(state)

    def last(self, name: str) -> Tensor | None:
        return self.entries.get(name)

    def remember(self, name: str, x: Tensor) -> None:
        if self.keeps:
            self.entries[name].copy_(x)


def next_logits(
    model: OuroborosForCausalLM,
    token_B1: Tensor,
    at: Tensor,
    held: list[Held],
    recent: list[Recent],
    prefix: list[Prefix] | None,
) -> Tensor:
    """Logits (1, V) after one more token, at position ``at``, shape (1,); ``held`` and ``recent`` then include it, and
    ``at`` is one more, so that nothing is left to do between calls of the compiled program."""
    inner = model.model
    share = inner.spec.share_last_kv

    def memory_of(visit: Visit, last: bool) -> Memory:
        entry = visit.block if share else visit.slot
        memory = BufferMemory(held[entry], recent[entry], at, keeps=last or not share)
        return memory if prefix is None else Prefixed(prefix[visit.slot], memory)

    # Registers come first and every position sees them.
    registers = inner.spec.registers
    room = next((entry[KEYS].shape[2] for entry in held if KEYS in entry), 1)  # states are all that is seen
    seen = torch.arange(registers + room, device=at.device) <= at + registers
    logits = model.logits(inner.step(token_B1, at, seen, memory_of))[:, -1]
    at.add_(1)
    return logits


def compiled_step() -> Step:
    """:func:`next_logits` as a program for one architecture; the model's weights and the length S may change."""

    def step(*arguments: Any) -> Tensor:
        # The plain formula, unlike a call of a ready kernel, is compiled together with what surrounds it.
        with sdpa_kernel(SDPBackend.MATH):
            return next_logits(*arguments)

    options = {
        # Products with one row become sums that are compiled together with their neighbours.
        "post_grad_fusion_options": {"decompose_mm_pass": {}},
        # FastDecoder keeps one program for each architecture; checking it anew takes a tenth of a step, and so does
        # allocating its hundred intermediate results from Python.
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
        "size_asserts": False,
        "cpp_wrapper": True,
    }
    return torch.compile(step, fullgraph=True, isolate_recompiles=True, options=options)  # pyrefly: ignore


class FastDecoder(LoopDecoder):
    """Decodes one sequence, greedy or sampled, with a step compiled for each loop count on its first use.

    Args:
        compile: compile the step (10 to 40 seconds on two cores). Without it, or without a compiler on the machine, the
            same loop runs uncompiled.
    """

    def __init__(self, *, compile: bool = True) -> None:
        self.compile = compile
        self._steps: dict[Any, Step] = {}

    def begin(
        self, model: OuroborosForCausalLM, input_ids: Tensor, config: GenerationConfig, prepared: dict[str, Any]
    ) -> Advance:
        """Read the prompt now, then one token at each call.

        Raises:
            OuroborosError: several sequences, beams, padding, a cache that holds tokens, or scores asked for.
        """
        past = prepared.get("past_key_values")
        refused = {
            "several sequences": len(input_ids) > 1,
            "beams": config.num_beams != 1,
            "padding": prepared.get("attention_mask") is not None,  # generate() drops a mask of ones
            "a cache that holds tokens": past is not None and past.get_seq_length() > 0,
            "use_cache=False": not config.use_cache,
            "return_dict_in_generate": config.return_dict_in_generate,
        }
        found = ", ".join(what for what, is_so in refused.items() if is_so)
        check(not found, f"fast decoding does not serve {found}: use model.generate()")
        store = DynamicCache(config=model.config)
        logits = model(input_ids, past_key_values=store, use_cache=True, logits_to_keep=1).logits[:, -1]
        prefix: list[Prefix] | None = getattr(store, "register_prefix", (None, None))[1]
        held: list[Held] = [
            {STATE: layer.read()} if layer.keys is None else {KEYS: layer.keys, VALUES: layer.values}  # pyrefly: ignore
            for layer in store.layers
        ]
        recent: list[Recent] = [getattr(layer, "recent", {}) for layer in store.layers]
        at = torch.tensor([input_ids.shape[1]], device=input_ids.device)
        step = self._step(model)

        def advance(ids: Tensor, token_B1: Tensor | None) -> Tensor:
            if token_B1 is None:
                return logits
            _make_room(held, ids.shape[1])
            return step(model, token_B1, at, held, recent, prefix)

        return advance

    def _step(self, model: OuroborosForCausalLM) -> Step:
        """The step for ``model``, compiled if wanted and possible."""
        if self.compile and (reason := missing_compiler(model.device)) is not None:
            self._give_up(reason)
        if not self.compile:
            return next_logits
        key = (model.model.spec, model.schedule, model.dtype, model.device, model.training)
        if key not in self._steps:
            self._steps[key] = compiled_step()
        program = self._steps[key]

        def step(*arguments: Any) -> Tensor:
            if self.compile:
                try:
                    return program(*arguments)
                except Exception as error:
                    if not from_compiler(error):
                        raise
                    self._give_up(f"failed: {first_line(error)}")
            return next_logits(*arguments)

        return step

    def _give_up(self, reason: str) -> None:
        logger.warning("compile: %s; decoding runs uncompiled", reason)
        self.compile = False


def _make_room(held: list[Held], positions: int) -> None:
    """Move keys and values (1, K, S, C) to larger buffers where S is less than ``positions``."""
    for entry in held:
        for name, buffer in entry.items():
            if name != STATE and buffer.shape[2] < positions:
                room = max(SMALLEST, 2 ** (positions - 1).bit_length())
                entry[name] = larger = buffer.new_zeros(*buffer.shape[:2], room, buffer.shape[3])
                larger[:, :, : buffer.shape[2]] = buffer
                torch._dynamo.mark_dynamic(larger, 2)  # one program for every S
