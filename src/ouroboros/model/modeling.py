"""``OuroborosForCausalLM``: a thin transformers envelope around plain modules.

Shapes: B batch, T new tokens, S keys, R registers, D model width, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from ouroboros.accounting import filter_values
from ouroboros.config import BottleneckAttentionSpec, ModelSpec, OsamSpec, RopeSpec
from ouroboros.errors import OuroborosError, check
from ouroboros.model.cache import (
    PeekMemory,
    SlotMemory,
    check_cache_fits,
    prepare_entries,
    register_cache_layers,
    seen_tokens,
)
from ouroboros.model.configuration import CONSTANT_STATE, FILTERED, OuroborosConfig
from ouroboros.model.hidden import HiddenStates
from ouroboros.model.loss import loss_output
from ouroboros.model.packing import find_starts, separately
from ouroboros.model.padding import leading_padding, padding_of
from ouroboros.model.pretrained import OuroborosPreTrainedModel
from ouroboros.model.topology import Chain, MemoryOf, Probe
from ouroboros.nn.block import Block
from ouroboros.nn.delta import build_compressor, build_expansion
from ouroboros.nn.memory import Memory, Prefix, Prefixed, Recorder, Store
from ouroboros.nn.mixer import MixerInput
from ouroboros.nn.norm import build_norm
from ouroboros.nn.rope import Rope
from ouroboros.schedule import Schedule, Visit, parse

_M = TypeVar("_M", bound=nn.Module)
FIRST_VISIT = Visit(slot=0, block=0, loop=0)
"""Its memory also serves what filters tokens outside every visit, under names of its own."""


class OuroborosModel(OuroborosPreTrainedModel):
    """Embedding, topology and final norm."""

    PARAMETER_ROLES = {"registers": "embedding"}

    def __init__(self, config: OuroborosConfig) -> None:
        super().__init__(config)
        register_cache_layers()  # a cache of this configuration asks for them, also where no Auto class was imported
        spec = config.model_spec
        self.spec: ModelSpec = spec
        self.schedule: Schedule = config.schedule
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        if spec.positions == "learned":
            self.embed_positions = nn.Embedding(spec.max_position_embeddings, spec.hidden_size)
        if spec.registers:
            self.registers = nn.Parameter(torch.empty(spec.registers, spec.hidden_size))
        self.expansion = build_expansion(spec)
        self.decoder = Chain(spec)
        self.readout = build_compressor(spec)
        self.norm = build_norm(spec.norm, spec.hidden_size)
        self.rotary = _rotary(spec)
        self.gradient_checkpointing = False
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
        probe: Probe | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids (B, T) to final states (B, T, D).

        Args:
            input_ids: token ids; or give ``inputs_embeds`` (B, T, D).
            attention_mask: (B, past + T) with 0 on padding, a prepared 4-D mask, or a dictionary of such by layer type.
            position_ids: (B, T); by default counted from the mask, else from the cache. Where they begin anew, another
                document begins, and no part lets the two see each other (a compiled program refuses instead).
            past_key_values: a cache, extended in place.
            use_cache: make a growing cache if none is given.
            loops: loop count of this call only (training with random depth); not together with a cache.
            backprop_loops: truncated backpropagation, see :class:`~ouroboros.model.topology.Chain`.
            probe: sees the state after every loop.
            output_hidden_states: also return the states of :class:`~ouroboros.model.hidden.HiddenStates`.
            output_attentions: refused.
        """
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        check(
            not attentions,
            "output_attentions: attention weights are never formed here (the kernels do without them, and a memory of"
            " constant size has none); leave it off",
        )
        if (input_ids is None) == (inputs_embeds is None):
            raise OuroborosError("give exactly one of input_ids and inputs_embeds")
        x_BTD = self._embed(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        options = {"loops": loops, "backprop_loops": backprop_loops, "output_hidden_states": bool(hidden)}
        if position_ids is not None:
            unasked = use_cache is None and torch.compiler.is_compiling() and not self.training
            caching = past_key_values is not None or bool(use_cache) or unasked
            place = {"past": seen_tokens(past_key_values), "caching": caching, "carries": self._carries_tokens}
            starts = find_starts(position_ids, x_BTD, attention_mask, **place)
            if starts is not None:
                check(probe is None, "probe: give one document in each row, not several packed by position_ids")
                run = functools.partial(self._run, past_key_values=None, use_cache=False, probe=None, **options)
                return separately(run, x_BTD, position_ids, attention_mask, starts)
        return self._run(x_BTD, attention_mask, position_ids, past_key_values, use_cache, probe=probe, **options)

    def _run(
        self,
        x_BTD: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool | None,
        *,
        loops: int | None,
        backprop_loops: int | None,
        output_hidden_states: bool,
        probe: Probe | None,
    ) -> BaseModelOutputWithPast:
        """:meth:`forward` of embeddings, one document in each row."""
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None and loops is None:
            past_key_values = DynamicCache(config=self.config)
        schedule = self.schedule if loops is None else self.schedule.with_loops(loops)
        if past_key_values is not None:
            check(loops is None, "loops cannot change under a cache: use model.with_loops(n)")
            self._check_cache(past_key_values, schedule)
        plain = attention_mask is None and position_ids is None and past_key_values is None
        position_ids = self._positions(x_BTD, attention_mask, position_ids, past_key_values)
        if self.spec.positions == "learned":
            x_BTD = x_BTD + self.embed_positions(position_ids).to(x_BTD.dtype)
        call: Callable[..., Tensor] | None = None
        if self.gradient_checkpointing and self.training:
            call = self._checkpointed
        states = HiddenStates(x_BTD, call, expanded=self.expansion is not None) if output_hidden_states else None
        call = call if states is None else states.call
        decode = functools.partial(self.decoder, schedule=schedule, backprop_loops=backprop_loops, call=call)
        if plain and self.training and self.spec.registers:
            x_BTD = self._together(x_BTD, decode, probe)
        else:
            if isinstance(attention_mask, dict):
                attention_mask = attention_mask["full_attention"]
            plain = plain and not self.spec.registers  # else the text does not begin at 0
            prefix = self._register_prefix(schedule, past_key_values)
            given = self._mixer_input(x_BTD, attention_mask, position_ids, past_key_values)
            given = given._replace(positions=None if plain else position_ids + self.spec.registers)
            leading_B = None
            if prefix is not None and self._filters_tokens:
                leading_B = leading_padding(attention_mask, x_BTD.shape[1], seen_tokens(past_key_values))
            memory_of = functools.partial(self._memory, past_key_values, prefix, leading_B)
            x_BTD = self._through(x_BTD, decode, given, memory_of, probe)
        x_BTD = self.norm(x_BTD)
        return BaseModelOutputWithPast(x_BTD, past_key_values, None if states is None else states.ending_with(x_BTD))

    def _check_cache(self, store: Cache, schedule: Schedule) -> None:
        """Refuse a cache of another model or loop count; give a new one entries that hold more than keys and values."""
        # With share_last_kv an entry belongs to a block, whatever the loop count.
        layout = self.spec.layout if self.spec.loop.share_last_kv else schedule.notation
        check_cache_fits(store, self.config.num_hidden_layers, layout)
        for kind in {FILTERED, CONSTANT_STATE} & set(self.config.layer_types or ()):
            prepare_entries(store, self.config.num_hidden_layers, kind)

    def _together(self, x_BTD: Tensor, decode: Callable[..., Tensor], probe: Probe | None) -> Tensor:
        """Registers and text as one sequence under one causal mask: in training this is faster than two passes.

        The registers come first, so they see each other alone, as they do by themselves.
        """
        R = self.spec.registers
        x_BND = torch.cat((self.registers.to(x_BTD.dtype).expand(x_BTD.shape[0], -1, -1), x_BTD), dim=1)
        given = MixerInput(self.rotary(torch.arange(x_BND.shape[1], device=x_BTD.device)[None]), None, None)

        def text(segment: int, loop: int, before_BTD: Tensor, after_BTD: Tensor) -> None:
            assert probe is not None
            probe(segment, loop, before_BTD[:, R:], after_BTD[:, R:])

        seen = None if probe is None else text
        return self._through(x_BND, decode, given, lambda visit, last: None, seen)[:, R:]

    def _through(
        self,
        x_BTD: Tensor,
        decode: Callable[..., Tensor],
        given: MixerInput,
        memory_of: MemoryOf,
        probe: Probe | None = None,
    ) -> Tensor:
        """Embeddings to the state, the decoder, and what the head reads of the state; (B, T, D) to (B, T, D)."""
        outer = memory_of(FIRST_VISIT, True)
        state = x_BTD if self.expansion is None else self.expansion(x_BTD, outer, given.padding)
        state = decode(state, given=given, memory_of=memory_of, probe=probe)
        return state if self.readout is None else self.readout(state, outer, given.padding, "readout")

    def step(self, token_B1: Tensor, position: Tensor, seen: Tensor, memory_of: MemoryOf) -> Tensor:
        """Final states (B, 1, D) of one new token, for a decoding loop that keeps the memories itself.

        Args:
            token_B1: token ids.
            position: how many tokens precede, shape (1,).
            seen: (R + S) boolean, which of the keys the memories return may be attended to.
            memory_of: the memory of each visit, registers included.
        """
        x_BTD = self._embed(token_B1)
        if self.spec.positions == "learned":
            x_BTD = x_BTD + self.embed_positions(position[None]).to(x_BTD.dtype)
        rotary = self.rotary(position[None] + self.spec.registers)
        keys = self.rotary(torch.arange(seen.shape[0], device=seen.device)[None]) if self._rebuilds_keys else None
        at = (position + self.spec.registers)[None]
        given = MixerInput(rotary, seen[None, None, None], None, keys, at)
        decode = functools.partial(self.decoder, schedule=self.schedule)
        return self.norm(self._through(x_BTD, decode, given, memory_of))

    @property
    def _carries_tokens(self) -> bool:
        """Whether a part other than attention brings something from earlier tokens to later ones."""
        return isinstance(self.spec.mixer, OsamSpec) or self._filters_tokens

    @property
    def _filters_tokens(self) -> bool:
        """Whether filters over tokens remember something from call to call."""
        return filter_values(self.spec, self.schedule) > 0

    @property
    def _rebuilds_keys(self) -> bool:
        """Whether cached latents become keys anew at every step, which then needs the positions of all keys."""
        mixer = self.spec.mixer
        return isinstance(mixer, BottleneckAttentionSpec) and mixer.cache == "latent"

    def _embed(self, input_ids: Tensor | None) -> Tensor:
        x_BTD = self.embed_tokens(input_ids)
        if self.spec.embedding_norm:
            x_BTD = nn.functional.rms_norm(x_BTD, x_BTD.shape[-1:], eps=self.spec.norm.eps)
        return x_BTD

    def _positions(
        self, x_BTD: Tensor, mask: Tensor | dict[str, Tensor] | None, positions: Tensor | None, store: Cache | None
    ) -> Tensor:
        """Positions (B or 1, T) of this call's tokens in the text: as given, from a padding mask, or counted on."""
        T, limit = x_BTD.shape[1], self.spec.max_position_embeddings
        check(T > 0, "the text has no tokens: give at least one")
        past = seen_tokens(store)
        if self.spec.positions == "learned" and isinstance(past, int) and past + T > limit:
            raise OuroborosError(
                f"the text has {past + T} tokens but the model's table of positions {limit}; shorten the text"
            )
        if positions is not None:
            return positions
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        return (torch.arange(T, device=x_BTD.device) + past)[None]

    def _mixer_input(self, x_BTD: Tensor, mask: Tensor | None, positions: Tensor, store: Cache | None) -> MixerInput:
        """Rotary tables and masks of this call; register keys come first, so positions start at R."""
        T, R = x_BTD.shape[1], self.spec.registers
        padding = padding_of(mask, T, seen_tokens(store))
        if isinstance(self.spec.mixer, OsamSpec):  # causal by itself
            return MixerInput(self.rotary(positions + R), None, padding)
        attend_to: Any = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BTD,
            attention_mask=mask,
            past_key_values=store,
            position_ids=positions,
            allow_is_causal_skip=R == 0,
        )
        keys = None
        if self._rebuilds_keys:
            past = seen_tokens(store)
            text = attend_to.shape[-1] if attend_to is not None else past + T
            at = positions
            if text != T:
                # A cache is filled without gaps, so the position of the last token tells those of all keys.
                at = positions[:, -1:] - (past + T - 1) + torch.arange(text, device=x_BTD.device)
            before = torch.arange(R, device=x_BTD.device).expand(at.shape[0], R)
            keys = self.rotary(torch.cat((before, at.clamp(min=0) + R), dim=1))
        if R and attend_to is not None:
            see_all = attend_to.new_ones if attend_to.dtype == torch.bool else attend_to.new_zeros
            attend_to = torch.cat((see_all((*attend_to.shape[:-1], R)), attend_to), dim=-1)
        return MixerInput(self.rotary(positions + R), attend_to, padding, keys)

    def _register_prefix(self, schedule: Schedule, store: Cache | None) -> list[Prefix] | None:
        """What every visit remembers of the registers; they never see the text, so a cache keeps them."""
        if not self.spec.registers:
            return None
        made_for, kept = getattr(store, "register_prefix", (None, None))
        if made_for == schedule.notation:
            return kept
        prefix = self._kept_prefix(schedule)
        if store is not None:
            store.register_prefix = (schedule.notation, prefix)  # pyrefly: ignore
        return prefix

    def _kept_prefix(self, schedule: Schedule) -> list[Prefix]:
        """What the registers leave, computed once per checkpoint: again only when a weight has changed."""
        tracked = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if tracked or self.registers.is_inference():  # such tensors do not count their changes
            return self._compute_prefix(schedule)
        device = self.registers.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.registers.dtype
        weights = (schedule.notation, precision, *((p.data_ptr(), p._version) for p in self._prefix_weights()))
        made_for, kept = self.__dict__.get("_prefix_memo", (None, []))
        if made_for != weights:
            kept = self._compute_prefix(schedule)
            self.__dict__["_prefix_memo"] = (weights, kept)
        return kept

    def _prefix_weights(self) -> Iterator[nn.Parameter]:
        """The parameters that the registers meet."""
        yield self.registers
        yield from self.decoder.parameters()
        if self.expansion is not None:
            yield from self.expansion.parameters()

    def _compute_prefix(self, schedule: Schedule) -> list[Prefix]:
        R = self.spec.registers
        recorders = [Recorder() for _ in schedule.visits]
        positions = torch.arange(R, device=self.registers.device)[None]
        given = MixerInput(self.rotary(positions), None, None)
        decode = functools.partial(self.decoder, schedule=schedule)
        self._through(self.registers[None], decode, given, lambda visit, last: recorders[visit.slot])
        return [recorder.recorded() for recorder in recorders]

    def _memory(
        self, store: Cache | None, prefix: list[Prefix] | None, leading_B: Tensor | None, visit: Visit, last: bool
    ) -> Memory | None:
        memory: Store | None = None
        if store is not None:
            if not self.spec.loop.share_last_kv:
                memory = SlotMemory(store, visit.slot)
            else:
                memory = SlotMemory(store, visit.block) if last else PeekMemory(store, visit.block)
        return memory if prefix is None else Prefixed(prefix[visit.slot], memory, leading_B)

    def _checkpointed(self, block: nn.Module, *arguments: Any) -> Tensor:
        return torch.utils.checkpoint.checkpoint(block, *arguments, use_reentrant=False)


class OuroborosForCausalLM(OuroborosPreTrainedModel, GenerationMixin):
    """A causal language model that reuses its weights; ``AutoModelForCausalLM`` loads it after ``import ouroboros``."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: OuroborosConfig) -> None:
        super().__init__(config)
        self.model = OuroborosModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self._start_outputs()

    @torch.no_grad()
    def _start_outputs(self) -> None:
        """Output projections at their start, where that is not the start of every matrix."""
        spec = self.config.model_spec
        if spec.output_init == "normal" and not spec.zero_init_outputs:
            return
        scale = parse(spec.layout).num_visits ** -0.5
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
        probe: Probe | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and the mean next-token loss when ``labels`` (B, T; -100 ignored) are given.

        The labels are shifted inside: pass the input ids. With ``targets`` (B, T; -100 ignored), the tokens that follow
        each position, there is the loss alone, as training wants it: logits are then never in memory all at once, see
        :func:`~ouroboros.nn.head_loss.head_loss`. See :class:`OuroborosModel` for the other arguments.
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
            probe=probe,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        if targets is not None:
            return loss_output(self.model.spec, self.lm_head, outputs.last_hidden_state, targets, label_smoothing)
        logits = self.logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values, outputs.hidden_states)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Final states (..., D) to logits (..., V), with scale and soft cap."""
        spec = self.model.spec
        logits = self.lm_head(x_BTD)
        if spec.logit_scale != 1.0:
            logits = logits * spec.logit_scale
        if spec.logit_softcap is not None:
            logits = spec.logit_softcap * torch.tanh(logits / spec.logit_softcap)
        return logits

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
        if isinstance(config.model_spec.mixer, OsamSpec):  # a mask of all tokens seen would grow
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
        view, inner = _shallow(self), _shallow(self.model)
        view.config = inner.config = config
        view.generation_config = copy.deepcopy(self.generation_config)
        inner.schedule = config.schedule
        view._modules["model"] = inner
        return view


def _rotary(spec: ModelSpec) -> Rope:
    """The rotary tables of all visits; of no channels where positions enter otherwise."""
    if isinstance(spec.mixer, OsamSpec):
        return Rope(RopeSpec(fraction=0.0), 2)
    rope = spec.mixer.rope if spec.positions == "rope" else dataclasses.replace(spec.mixer.rope, fraction=0.0)
    return Rope(rope, spec.mixer.rotary_width(spec.hidden_size))


def _shallow(module: _M) -> _M:
    """A second module object over the same parameters, buffers and children."""
    twin = copy.copy(module)
    twin.__dict__ = {
        key: copy.copy(value) if key in ("_parameters", "_buffers", "_modules") else value
        for key, value in module.__dict__.items()
    }
    return twin
