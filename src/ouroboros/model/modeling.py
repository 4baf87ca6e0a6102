"""``OuroborosForCausalLM``: a thin transformers envelope around plain modules.

Shapes: B batch, T new tokens, S keys, R registers, D model width, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from ouroboros.accounting import outer_values, recent_values
from ouroboros.config import ModelSpec
from ouroboros.config.part import build, module_of
from ouroboros.errors import OuroborosError, check
from ouroboros.model.cache import (
    SlotMemory,
    check_cache_fits,
    prepare_entries,
    register_cache_layers,
    seen_tokens,
)
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.executor import Decoder, Observer
from ouroboros.model.interface import OtherAttention, attention_calls, other_attention
from ouroboros.model.loss import LogitsOutput, LossOutput, StatesOutput, loss_output, plus
from ouroboros.model.packing import find_starts, separately
from ouroboros.model.padding import leading_padding, padding_of
from ouroboros.model.pretrained import OuroborosPreTrainedModel, shallow
from ouroboros.model.registers import NOWHERE, MemoryOf, Registers
from ouroboros.model.window import key_positions, within
from ouroboros.nn.block import Block
from ouroboros.nn.memory import Memory, Prefix, Prefixed
from ouroboros.nn.rope import Rope, rotary_of
from ouroboros.nn.visit import VisitContext
from ouroboros.schedule import Schedule, Visit

FIRST_VISIT = Visit(slot=0, block=0, loop=0)
"""Its memory also serves what filters tokens outside every visit, under names of its own."""


class OuroborosModel(Registers, OuroborosPreTrainedModel):
    """Embedding, stem, decoder and final norm."""

    PARAMETER_ROLES = {"registers": "embedding"}

    def __init__(self, config: OuroborosConfig) -> None:
        super().__init__(config)
        register_cache_layers()  # a cache of this configuration asks for them, also where no Auto class was imported
        spec = config.model_spec
        width, residual = spec.hidden_size, spec.block.residual
        self.spec: ModelSpec = spec
        self.schedule: Schedule = config.schedule
        self.embed_tokens = nn.Embedding(spec.vocab_size, width)
        self.stem = nn.ModuleDict({part.kind: build(part, spec) for part in spec.stem})
        if spec.registers:
            self.registers = nn.Parameter(torch.empty(spec.registers, width))
        self.expansion = module_of(residual).start(residual, width)
        self.decoder = Decoder(spec)
        self.readout = module_of(residual).reader(residual, width)
        self.norm = build(spec.block.norm.final, width)
        tables = [rotary_of(block, spec) for block in spec.blocks]
        distinct = list(dict.fromkeys(table for uses in tables for table in uses))
        self.rotary = nn.ModuleList(Rope(*table) for table in distinct)
        self.rotary_of_block = [[distinct.index(table) for table in uses] for uses in tables]
        """For each block the rotary tables of its uses; later uses take the last."""
        mixers = [block.mixer for block in spec.blocks]
        self._filters_tokens = bool(outer_values(spec) or any(recent_values(spec, n) for n in range(len(spec.blocks))))
        """Whether filters over tokens remember something from call to call."""
        self._carries_tokens = self._filters_tokens or any(mixer.keeps == "state" for mixer in mixers)
        """Whether a part other than attention brings something from earlier tokens to later ones."""
        self._rebuilds_keys = any(mixer.rebuilds_keys for mixer in mixers)
        """Whether cached latents become keys anew at every step, which then needs the positions of all keys."""
        self._windows = [mixer.looks_back for mixer in mixers]
        """For each block how many tokens it sees; None: all."""
        self._attends = any(mixer.keeps != "state" for mixer in mixers)
        """Whether a mixer needs a mask; states are causal by themselves."""
        self.attention_calls = attention_calls(config)
        self.gradient_checkpointing = False
        # What a part keeps in float32 when the model is cast, transformers has to keep when it reads a file.
        precise = {name for module in self.modules() for name in getattr(type(module), "PRECISE", ())}
        self._keep_in_fp32_modules_strict = precise
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        loops: int | None = None,
        backprop_loops: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> StatesOutput:
        """Token ids (B, T) to final states (B, T, D).

        Args:
            input_ids: token ids; or give ``inputs_embeds`` (B, T, D), rows of the embedding table.
            attention_mask: (B, past + T) with 0 on padding, a prepared 4-D mask, or a dictionary of such by layer type.
            position_ids: (B, T); by default counted from the mask, else from the cache. Where they begin anew, another
                document begins, and no part lets the two see each other (a compiled program refuses instead).
            past_key_values: a cache, extended in place.
            use_cache: make a growing cache if none is given.
            loops: loop count of this call only (training with random depth); not together with a cache.
            backprop_loops: truncated backpropagation, see :class:`~ouroboros.model.executor.Decoder`.
            output_hidden_states: also return a state (B, T, D) for every visit: first what enters the first one, then
                what each block returns, before the loop parts at a boundary; the last is what the head reads, behind
                the final norm. An expanded state counts as the mean of its value channels.
            output_attentions: refused.
            kwargs: go to the implementation of attention, where that is not ours.
        """
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        check(
            not attentions,
            "output_attentions: attention weights are never formed here (the kernels do without them, and a memory of"
            " constant size has none); leave it off",
        )
        if (input_ids is None) == (inputs_embeds is None):
            raise OuroborosError("give exactly one of input_ids and inputs_embeds")
        tokens = input_ids if input_ids is not None else inputs_embeds
        assert tokens is not None
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        options = {"loops": loops, "backprop_loops": backprop_loops, "output_hidden_states": bool(hidden)}
        name = self.config._attn_implementation
        other = other_attention(self.attention_calls, self.spec, name, kwargs, loops)
        run = functools.partial(self._run, other=other, **options)
        if position_ids is not None and (other is None or other.masked):
            unasked = use_cache is None and torch.compiler.is_compiling() and not self.training
            caching = past_key_values is not None or bool(use_cache) or unasked
            place = {"past": seen_tokens(past_key_values), "caching": caching, "carries": self._carries_tokens}
            starts = find_starts(position_ids, tokens, attention_mask, **place)
            if starts is not None:
                watched = self.decoder.observers
                check(not watched, "observe: give one document in each row, not several packed by position_ids")
                run = functools.partial(run, past_key_values=None, use_cache=False)
                return separately(run, tokens, position_ids, attention_mask, starts)
        return run(tokens, attention_mask, position_ids, past_key_values, use_cache)

    def _run(
        self,
        tokens: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool | None,
        *,
        loops: int | None,
        backprop_loops: int | None,
        output_hidden_states: bool,
        other: OtherAttention | None,
    ) -> StatesOutput:
        """:meth:`forward` of ids or embeddings, one document in each row, or what ``other`` tells apart."""
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None and loops is None:
            past_key_values = DynamicCache(config=self.config)
        schedule = self.schedule if loops is None else self.schedule.with_loops(loops)
        if past_key_values is not None:
            self._check_cache(past_key_values, schedule, loops)
        plain = attention_mask is None and position_ids is None and past_key_values is None
        R = self.spec.registers
        position_ids = self._positions(tokens, attention_mask, position_ids, past_key_values)
        watched: list[Observer] = list(self.decoder.observers)
        states: list[Tensor] = []
        losses: list[Tensor] = []
        if output_hidden_states:
            watched = [*watched, Observer(lambda block, visit, before, after: states.append(after))]
        decode = functools.partial(
            self.decoder,
            schedule=schedule,
            backprop_loops=backprop_loops,
            call=_checkpointed if self.gradient_checkpointing and self.training else None,
            observers=watched,
            losses=losses,
        )
        mask = attention_mask["full_attention"] if isinstance(attention_mask, dict) else attention_mask
        padding = padding_of(mask, tokens.shape[1], seen_tokens(past_key_values))
        shared = VisitContext(rotary=NOWHERE, padding=padding, positions=position_ids + R, carried={})
        together = plain and self.training and bool(R)
        memory_of: MemoryOf = _no_memory
        if not together:
            prefix, leading_B = self._register_prefix(schedule, past_key_values), None
            if prefix is not None and self._filters_tokens:
                leading_B = leading_padding(mask, tokens.shape[1], seen_tokens(past_key_values))
            memory_of = functools.partial(self._memory, past_key_values, prefix, leading_B)
        x_BTD = entered = self._embed(tokens, shared, memory_of)
        if together:
            x_BTD = self._together(x_BTD, decode, shared.carried or {}, memory_of)
        else:
            attend_to = self._mask(x_BTD, mask, position_ids, past_key_values)
            keys_at = self._keys_at(attend_to, position_ids, past_key_values)
            # Without a mask, a cache or registers the text begins at 0, which some parts then need not be told.
            shared = shared._replace(mask=attend_to, positions=None if plain and not R else shared.positions)
            x_BTD = self._through(x_BTD, decode, shared, position_ids + R, keys_at, memory_of, other)
        x_BTD = self.norm(x_BTD)
        shown = [state.mean(dim=2) if state.ndim == 4 else state for state in states[:-1]]
        hidden_states = (entered, *shown, x_BTD) if output_hidden_states else None
        added = torch.stack(losses).sum() if losses else None
        return StatesOutput(x_BTD, past_key_values, hidden_states, auxiliary_loss=added)

    def _together(
        self, x_BTD: Tensor, decode: Callable[..., Tensor], carried: dict[str, Tensor], memory_of: MemoryOf
    ) -> Tensor:
        """Registers and text as one sequence under one causal mask: in training this is faster than two passes.

        The registers come first, so they see each other alone, as they do by themselves.
        """
        R = self.spec.registers
        x_BND = torch.cat((self.registers.to(x_BTD.dtype).expand(x_BTD.shape[0], -1, -1), x_BTD), dim=1)
        at = torch.arange(x_BND.shape[1], device=x_BTD.device)[None]
        # What the stem looked up for tokens, it did not for registers.
        carried = {name: nn.functional.pad(x, (0, 0, R, 0)) for name, x in carried.items()}
        shared = VisitContext(rotary=NOWHERE, carried=carried)
        return self._through(x_BND, decode, shared, at, None, memory_of, hidden=R)[:, R:]

    def get_decoder(self) -> OuroborosModel:
        """Itself: what transformers means by a decoder is a model without its head."""
        return self

    def _check_cache(self, store: Cache, schedule: Schedule, loops: int | None) -> None:
        """Refuse a cache of another model or loop count; give a new one entries that hold more than keys and values."""
        check(loops is None, "loops cannot change under a cache: use model.with_loops(n)")
        # With share_last_kv an entry belongs to a block, whatever the loop count.
        layout = self.spec.layout if self.spec.share_last_kv else schedule.notation
        check_cache_fits(store, self.config.num_hidden_layers, layout)
        prepare_entries(store, self.config.layer_types or [])

    def _through(
        self,
        x_BTD: Tensor,
        decode: Callable[..., Tensor],
        shared: VisitContext,
        at: Tensor,
        keys_at: Tensor | None,
        memory_of: MemoryOf,
        other: OtherAttention | None = None,
        **options: Any,
    ) -> Tensor:
        """Embeddings to the stream, the decoder, and what the head reads of the stream; (B, T, D) to (B, T, D).

        ``at`` are the positions of the tokens, registers counted, and ``keys_at`` those of all keys, None for the same.
        """
        tables = self._tables(at)
        key_tables = self._tables(keys_at) if keys_at is not None and self._rebuilds_keys else None
        seen = (at if keys_at is None else keys_at, self.spec.registers)
        masks = {window: within(shared.mask, window, at, *seen) for window in dict.fromkeys(self._windows)}

        def context_of(visit: Visit, last: bool) -> VisitContext:
            uses = self.rotary_of_block[visit.block]
            table = uses[min(visit.loop, len(uses) - 1)]
            return shared._replace(
                rotary=tables[table],
                mask=masks[self._windows[visit.block]],
                key_rotary=None if key_tables is None else key_tables[table],
                memory=memory_of(visit, last),
                visit=visit,
                last=last,
                first=visit.slot == 0,
                attend=None if other is None else other.at(visit),
            )

        outer = memory_of(FIRST_VISIT, True)
        state = x_BTD if self.expansion is None else self.expansion(x_BTD, outer, shared.padding)
        assert shared.carried is not None
        shared.carried["x0"] = state
        state = decode(state, context_of=context_of, **options)
        return state if self.readout is None else self.readout(state, outer, shared.padding, "readout")

    def step(self, token_B1: Tensor, position: Tensor, seen: Tensor, memory_of: MemoryOf) -> Tensor:
        """Final states (B, 1, D) of one new token, for a decoding loop that keeps the memories itself.

        Args:
            token_B1: token ids.
            position: how many tokens precede, shape (1,).
            seen: (R + S) boolean, which of the keys the memories return may be attended to.
            memory_of: the memory of each visit, registers included.
        """
        at = (position + self.spec.registers)[None]
        shared = VisitContext(rotary=NOWHERE, mask=seen[None, None, None], positions=at, carried={})
        keys_at = torch.arange(seen.shape[0], device=seen.device)[None]
        x_BTD = self._embed(token_B1, shared, memory_of)
        decode = functools.partial(self.decoder, schedule=self.schedule)
        return self.norm(self._through(x_BTD, decode, shared, at, keys_at, memory_of))

    def _embed(self, tokens: Tensor, shared: VisitContext, memory_of: MemoryOf) -> Tensor:
        """Ids (B, T) or embeddings (B, T, D) through the stem; (B, T, D)."""
        ids = tokens if tokens.ndim == 2 else None
        x_BTD = tokens if ids is None else self.embed_tokens(ids)
        if self.spec.stem:
            shared = shared._replace(memory=memory_of(FIRST_VISIT, True))
            for part in self.stem.values():
                x_BTD = part(x_BTD, ids, shared)
        return x_BTD

    def _tables(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The rotary tables of every kind of block at ``positions`` (B or 1, T), registers counted."""
        return [rotary(positions) for rotary in self.rotary]

    def _positions(
        self, tokens: Tensor, mask: Tensor | dict[str, Tensor] | None, positions: Tensor | None, store: Cache | None
    ) -> Tensor:
        """Positions (B or 1, T) of this call's tokens in the text: as given, from a padding mask, or counted on."""
        T = tokens.shape[1]
        check(T > 0, "the text has no tokens: give at least one")
        past = seen_tokens(store)
        for limit in (part.longest(self.spec) for part in self.spec.stem):
            if limit is not None and isinstance(past, int) and past + T > limit:
                raise OuroborosError(
                    f"the text has {past + T} tokens but the model's table of positions {limit}; shorten the text"
                )
        if positions is not None:
            return positions
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        return (torch.arange(T, device=tokens.device) + past)[None]

    def _mask(self, x_BTD: Tensor, mask: Tensor | None, positions: Tensor, store: Cache | None) -> Tensor | None:
        """What tokens may attend to, registers first; None: plain causal."""
        R = self.spec.registers
        if not self._attends:
            return None
        attend_to: Any = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BTD,
            attention_mask=mask,
            past_key_values=store,
            position_ids=positions,
            # A window is cut out of a mask of all keys, and tables for rebuilt keys are as long as it: a preallocated
            # cache has more of them than there are tokens.
            allow_is_causal_skip=R == 0 and (store is None or not (any(self._windows) or self._rebuilds_keys)),
        )
        if R and attend_to is not None:
            see_all = attend_to.new_ones if attend_to.dtype == torch.bool else attend_to.new_zeros
            attend_to = torch.cat((see_all((*attend_to.shape[:-1], R)), attend_to), dim=-1)
        return attend_to

    def _keys_at(self, mask: Tensor | None, positions: Tensor, store: Cache | None) -> Tensor | None:
        """Positions of all keys, where keys are built anew from latents or a window ends; else None."""
        if not self._rebuilds_keys and not any(self._windows):
            return None
        R, past = self.spec.registers, seen_tokens(store)
        keys = mask.shape[-1] - R if mask is not None else past + positions.shape[-1]
        return key_positions(positions, keys, past, R)

    def _memory(
        self, store: Cache | None, prefix: list[Prefix] | None, leading_B: Tensor | None, visit: Visit, last: bool
    ) -> Memory | None:
        memory: Memory | None = None
        if store is not None:
            shared = self.spec.share_last_kv
            memory = SlotMemory(store, visit.block if shared else visit.slot, keeps=last or not shared)
        return memory if prefix is None else Prefixed(prefix[visit.slot], memory, leading_B)


class OuroborosForCausalLM(OuroborosPreTrainedModel, GenerationMixin):
    """A causal language model that reuses its weights; ``AutoModelForCausalLM`` loads it after ``import ouroboros``."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: OuroborosConfig) -> None:
        super().__init__(config)
        self.model = OuroborosModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head = build(self.model.spec.head, self.model.spec)
        self.post_init()
        self._start_outputs()

    @torch.no_grad()
    def _start_outputs(self) -> None:
        """Output projections at their start, where that is not the start of every matrix."""
        spec = self.model.spec
        if spec.output_init == "normal" and not spec.zero_init_outputs:
            return
        scale = spec.schedule.num_visits**-0.5
        for block in self.model.decoder.layers:
            assert isinstance(block, Block)
            for projection in block.output_projections():
                if spec.zero_init_outputs:
                    nn.init.zeros_(projection.weight)
                else:
                    projection.weight.mul_(scale)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        label_smoothing: float = 0.0,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        loops: int | None = None,
        backprop_loops: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> LogitsOutput | LossOutput:
        """Logits (B, T, V), and the mean next-token loss when ``labels`` (B, T; -100 ignored) are given.

        The labels are shifted inside: pass the input ids. With ``targets`` (B, T; -100 ignored), the tokens that follow
        each position, there is the loss alone, as training wants it: logits are then never in memory all at once, see
        :func:`~ouroboros.nn.head_loss.head_loss`. In training both include what parts add to the loss. See
        :class:`OuroborosModel` for the other arguments.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            loops=loops,
            backprop_loops=backprop_loops,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        if targets is not None:
            given = (outputs.last_hidden_state, targets, label_smoothing)
            return loss_output(self.head, self.lm_head, *given, outputs.auxiliary_loss)
        logits = self.logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = plus(loss, outputs.auxiliary_loss)
        shown = (outputs.past_key_values, outputs.hidden_states)
        return LogitsOutput(loss, logits, *shown, auxiliary_loss=outputs.auxiliary_loss)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Final states (..., D) to logits (..., V)."""
        return self.head(self.lm_head(x_BTD))

    @staticmethod
    def create_masks_for_generate(
        config: OuroborosConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """One mask for all visits, whatever they keep: ``generate`` asks for it before steps with a preallocated cache,
        where its shape must not grow."""
        if all(block.mixer.keeps == "state" for block in config.model_spec.blocks):  # a mask of all seen would grow
            return {"full_attention": attention_mask}
        mask = create_causal_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids)
        return {"full_attention": mask}

    @property
    def schedule(self) -> Schedule:
        """The visits this model runs."""
        return self.model.schedule

    def with_loops(self, loops: int) -> OuroborosForCausalLM:
        """The same weights (shared, not copied) with another loop count; caches made for it have its size.

        Raises:
            OuroborosError: the layout has no loop, or ``loops`` < 1.
        """
        config = self.config.at_loops(loops)
        view, inner = shallow(self), shallow(self.model)
        view.config = inner.config = config
        view.generation_config = copy.deepcopy(self.generation_config)
        inner.schedule = config.schedule
        inner.attention_calls = attention_calls(config)
        view._modules["model"] = inner
        return view


def _no_memory(visit: Visit, last: bool) -> None:
    """Nothing is remembered."""


def _checkpointed(block: nn.Module, *arguments: Any) -> Tensor:
    return torch.utils.checkpoint.checkpoint(block, *arguments, use_reentrant=False)
