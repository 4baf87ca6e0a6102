"""Checks that two ways of computing the same thing agree: cached and uncached, padded and single, saved and loaded.

Each check takes a :class:`~ouroboros.eval.subject.Subject`; see :mod:`ouroboros.eval.finding`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ouroboros.accounting import cached_blocks
from ouroboros.config import LoopPart, fields_by_path
from ouroboros.config.part import kinds
from ouroboros.errors import OuroborosError
from ouroboros.eval.finding import Mismatch, equal, require
from ouroboros.eval.subject import TOLERANCE, Subject, close, fed, logits_of, same_continuation
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.model.pretrained import quiet_loading

APPROXIMATE = "share_last_kv decodes approximately by design"


def check_causal(subject: Subject) -> str:
    """Changing later tokens leaves earlier logits as they were, at every loop count."""
    cuts = sorted({1, subject.length // 2, subject.length - 1} - {0, subject.length})
    for place, view in subject.placed_views():
        expected = logits_of(view, subject.ids)
        for cut in cuts:
            other = subject.ids.clone()
            other[:, cut:] = (other[:, cut:] + 1) % subject.spec.vocab_size
            what = f"tokens from position {cut} on changed{place}: earlier positions"
            try:
                close(logits_of(view, other)[:, :cut], expected[:, :cut], what)
            except Mismatch as error:
                declared = "".join(f"; {part.sees_later}" for part in subject.spec.parts if part.sees_later)
                raise Mismatch(f"{error}{declared}") from None
    counts = ", ".join(str(n) for n in subject.views if n is not None)
    return f"{len(cuts)} cuts of {subject.length} tokens" + (f" at loops {counts}" if counts else "")


def check_cached(subject: Subject) -> str:
    """Feeding tokens one by one through a cache gives the logits of one pass without it."""
    if not subject.is_approximate:
        return f"one token at a time: largest difference {_fed_gap(subject, [1]):.1e}"
    (output,) = fed(subject.model, subject.ids, [subject.length])
    gap = close(output.logits, subject.logits, "prefill with a cache")
    filled = [layer.get_seq_length() for layer in output.past_key_values.layers]
    equal(filled, [subject.length] * subject.schedule.num_blocks, "tokens in the cache entry of each block")
    return f"{APPROXIMATE}: only prefill == uncached ({gap:.1e}), one cache entry per block ({len(filled)})"


def check_chunked(subject: Subject) -> str:
    """Chunks of odd sizes through a cache give the logits of one pass without it."""
    if subject.is_approximate:
        return f"skipped: {APPROXIMATE}"
    gap = max(_fed_gap(subject, sizes) for sizes in ([7, 1, 4, 5], [3]))
    return f"chunks of 7, 1, 4, 5, .. and of 3: largest difference {gap:.1e}"


def _fed_gap(subject: Subject, sizes: Sequence[int]) -> float:
    """The largest difference of logits fed in chunks from those of one pass."""
    logits = torch.cat([output.logits for output in fed(subject.model, subject.ids, sizes)], dim=1)
    return close(logits, subject.logits, f"cached, in chunks of {', '.join(map(str, sizes))}")


def check_static_cache(subject: Subject) -> str:
    """Greedy generation is the same with a growing cache, with a preallocated one and without any."""
    dynamic = subject.generate(subject.ids)
    static = subject.generate(subject.ids, cache_implementation="static")
    gap = same_continuation(static, dynamic, "static and dynamic cache")
    if subject.is_approximate:
        return f"static == dynamic within {gap:.1e}; not compared with uncached: {APPROXIMATE}"
    uncached = subject.generate(subject.ids, use_cache=False)
    gap = max(gap, same_continuation(dynamic, uncached, "dynamic cache and none"))
    return f"static == dynamic == uncached, {subject.new_tokens} tokens: largest difference of logits {gap:.1e}"


def check_beams(subject: Subject) -> str:
    """Beam search finds what it finds without a cache."""
    cached = subject.generate_output(subject.ids, num_beams=3, output_scores=True)
    if subject.is_approximate:
        return f"3 beams run; not compared with uncached: {APPROXIMATE}"
    uncached = subject.generate_output(subject.ids, num_beams=3, output_scores=True, use_cache=False)
    gap = float((cached.sequences_scores - uncached.sequences_scores).abs().max())
    # Sequences may part at a tie; their scores then still agree.
    require(gap <= TOLERANCE, f"3 beams with and without a cache: scores differ by {gap:.2g}")
    same = "same sequences" if torch.equal(cached.sequences, uncached.sequences) else "a tie"
    return f"3 beams == 3 uncached beams ({same}), scores within {gap:.1e}"


def check_left_padding(subject: Subject) -> str:
    """Sequences of different lengths, padded on the left into one batch, give what each gives alone."""
    pads = [0, min(3, subject.length - 1), min(subject.length // 2, subject.length - 1)]
    positions = torch.arange(subject.length, device=subject.ids.device)
    mask = (positions >= torch.tensor(pads, device=subject.ids.device)[:, None]).long()
    padded, alone = subject.ids * mask, [subject.ids[row : row + 1, pad:] for row, pad in enumerate(pads)]
    gap = 0.0
    for place, view in subject.placed_views():
        batch = logits_of(view, padded, attention_mask=mask)
        for row, pad in enumerate(pads):
            what = f"{pad} padded positions{place}"
            gap = max(gap, close(batch[row : row + 1, pad:], logits_of(view, alone[row]), what))
    generated = subject.generate(padded, attention_mask=mask)
    for row, pad in enumerate(pads):
        what = f"generate, {pad} padded positions"
        gap = max(gap, same_continuation(generated.sequence(row), subject.generate(alone[row]), what))
    return f"padded by {', '.join(map(str, pads))}, forward and generate: largest difference of logits {gap:.1e}"


def check_packed(subject: Subject) -> str:
    """Documents packed into one row, told by positions that begin anew, give what each gives alone."""
    sizes = [size for size in (subject.length // 3, 1, subject.length - subject.length // 3 - 1) if size > 0]
    if len(sizes) < 2:
        return "skipped: the context has no room for two documents"
    positions = torch.cat([torch.arange(size, device=subject.ids.device) for size in sizes])[None]
    gap = 0.0
    for place, view in subject.placed_views():
        found = logits_of(view, subject.ids, position_ids=positions)
        alone = torch.cat([logits_of(view, part) for part in subject.ids.split(sizes, dim=1)], dim=1)
        gap = max(gap, close(found, alone, f"packed and alone{place}"))
    return f"{', '.join(map(str, sizes))} tokens in one row: largest difference {gap:.1e}"


def check_hidden_states(subject: Subject) -> str:
    """``output_hidden_states`` gives one state before the first visit and one for each, the last of them the model's
    output, and changes nothing; fed in chunks through a cache they are the same."""

    def outputs_of(model: OuroborosForCausalLM) -> Any:
        with torch.no_grad():
            return model(subject.ids, use_cache=False, output_hidden_states=True)

    for place, view in subject.placed_views():
        given = outputs_of(view)
        shapes = [(*subject.ids.shape, subject.spec.hidden_size)] * (view.schedule.num_visits + 1)
        equal([tuple(state.shape) for state in given.hidden_states], shapes, f"hidden states{place}")
        close(given.logits, logits_of(view, subject.ids), f"hidden states{place}: logits with and without them")
        with torch.no_grad():
            last = view.logits(given.hidden_states[-1])
        close(last, given.logits, f"hidden states{place}: the head reads the last")
    states = f"{subject.schedule.num_visits + 1} states"
    if subject.is_approximate:
        return f"{states}; not compared with cached ones: {APPROXIMATE}"
    chunks = [output.hidden_states for output in fed(subject.model, subject.ids, [3], output_hidden_states=True)]
    gap = max(
        close(torch.cat(parts, dim=1), state, f"state {index}, cached")
        for index, (state, *parts) in enumerate(zip(outputs_of(subject.model).hidden_states, *chunks, strict=True))
    )
    return f"{states}, in chunks through a cache too: largest difference {gap:.1e}"


def check_reload(subject: Subject) -> str:
    """Saved and loaded by transformers' Auto class, without remote code or network, a model is the same."""
    from transformers import AutoModelForCausalLM

    local = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    gap = 0.0
    with tempfile.TemporaryDirectory() as directory, quiet_loading():
        for place, view in subject.placed_views():
            view.save_pretrained(directory)
            loaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **local)
            equal({key: names for key, names in info.items() if names}, {}, "loading report")
            equal(type(loaded), OuroborosForCausalLM, "loaded class")
            loaded = loaded.eval().to(subject.ids.device)
            found = loaded.state_dict()
            altered = [name for name, tensor in view.state_dict().items() if not torch.equal(found[name], tensor)]
            equal(altered, [], f"weights altered by saving and loading{place}")
            # Not bit for bit: a product adds up in an order that depends on where its factors lie in memory, and where
            # those of the model under check lie is not known.
            expected = logits_of(view, subject.ids)
            gap = max(gap, close(logits_of(loaded, subject.ids), expected, f"after loading{place}"))
            del loaded, found
    return f"AutoModelForCausalLM.from_pretrained: weights equal bit for bit, logits within {gap:.1e}"


def check_loops(subject: Subject) -> str:
    """Other loop counts share the weights, have caches of their own size and refuse each other's."""
    if not subject.schedule.is_looped:
        return "skipped: the layout has no loop"
    own = [p.data_ptr() for p in subject.model.parameters()]
    views = {loops: view for loops, view in subject.views.items() if loops is not None}
    stores = {}
    for loops, view in views.items():
        require([p.data_ptr() for p in view.parameters()] == own, f"loops {loops}: weights are not shared")
        called = logits_of(subject.model, subject.ids, loops=loops)
        close(called, logits_of(view, subject.ids), f"loops={loops} and view")
        stores[loops] = fed(view, subject.ids, [subject.length])[0].past_key_values
        entries = len(cached_blocks(subject.spec, subject.schedule.with_loops(loops)))
        equal((len(stores[loops].layers), view.config.num_hidden_layers), (entries, entries), f"loops {loops}: entries")
        if not subject.is_approximate and loops != subject.schedule.loops:
            short = Subject(view, subject.ids, min(2, subject.new_tokens))
            uncached = short.generate(short.ids, use_cache=False)
            same_continuation(short.generate(short.ids), uncached, f"loops {loops}, generate")
    close(logits_of(subject.model, subject.ids), subject.logits, "the model after with_loops()")
    listed = f"loops {', '.join(map(str, views))} share storage"
    if subject.is_approximate:
        return f"{listed}; one cache serves all loop counts (share_last_kv)"
    for made_for, loops in itertools.permutations(views, 2):
        outcome = "accepted"
        try:
            with torch.no_grad():
                views[loops](subject.ids[:, :1], past_key_values=copy.deepcopy(stores[made_for]))
        except Exception as error:
            outcome = "" if isinstance(error, OuroborosError) else f"{type(error).__name__} instead of a clear refusal"
        require(not outcome, f"loops {loops}, cache of loops {made_for}: {outcome}")
    return f"{listed}, have their own cache entries and refuse each other's caches"


def check_neutral(subject: Subject) -> str:
    """A loop part at its starting values computes bit for bit what its absence computes, all other weights equal."""
    if not subject.schedule.is_looped:
        return "skipped: the layout has no loop"
    shown = []
    without: dict[tuple[LoopPart, ...], torch.Tensor] = {}
    for kind, member in ((kind, member) for kind, member in kinds(LoopPart).items() if member.neutral()):
        others = tuple(other for other in subject.spec.loop if type(other) is not member)
        if others not in without:
            without[others] = logits_of(_with_loop_parts(subject, others), subject.ids)
        absent = without[others]
        for part in member.neutral():
            try:
                added = _with_loop_parts(subject, (*others, part), fresh=kind)
            except OuroborosError:  # the part does not fit the layout
                continue
            neutral = logits_of(added, subject.ids)
            require(torch.equal(neutral, absent), f"{part} at its starting values is not neutral")
            shown.append(kind)
    return f"{', '.join(dict.fromkeys(shown))}: bit for bit equal to their absence"


def _with_loop_parts(subject: Subject, parts: tuple[LoopPart, ...], fresh: str | None = None) -> OuroborosForCausalLM:
    """The subject with these loop parts; the one of kind ``fresh`` starts anew, all other weights are the subject's."""
    spec = dataclasses.replace(subject.spec, loop=parts)
    config, loops = OuroborosConfig.from_spec(spec), subject.model.config.loops
    model = OuroborosForCausalLM(config if loops is None else config.at_loops(loops)).eval()
    nn.Module.to(model, subject.ids.device)
    of_part = re.compile(rf"\.loops\.\d+\.{fresh}\.")
    kept = {name: value for name, value in subject.model.state_dict().items() if not of_part.search(name)}
    model.load_state_dict(kept, strict=False)
    return model


def check_dropout(subject: Subject) -> str:
    """Evaluation is deterministic; training is random exactly where the specification has dropout."""
    same = torch.equal(logits_of(subject.model, subject.ids), subject.logits)
    require(same, "two evaluations of the same tokens differ")
    settings = [pair for spec in (subject.spec, *subject.spec.blocks) for pair in fields_by_path(spec).items()]
    random = any(value > 0 for path, value in settings if path.rpartition(".")[2] == "dropout")
    subject.model.train()
    try:
        same = torch.equal(logits_of(subject.model, subject.ids), logits_of(subject.model, subject.ids))
    finally:
        subject.model.eval()
    equal(same, not random, "two training passes are the same")
    return "deterministic in evaluation, " + ("random in training" if random else "and in training: no dropout")


def check_compile(subject: Subject) -> str:
    """``torch.compile(fullgraph=True)`` gives the logits of eager mode."""
    try:
        found = logits_of(torch.compile(subject.model, fullgraph=True), subject.ids)
    except Exception as error:
        if "InvalidCxxCompiler" in "".join(traceback.format_exception(error)):  # it, or one of its causes
            return "skipped: this machine has no C++ compiler for torch.compile"
        raise
    finally:
        torch.compiler.reset()
    return f"one graph: largest difference {close(found, subject.logits, 'compiled and eager'):.1e}"
