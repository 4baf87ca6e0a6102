"""Checks that two ways of computing the same thing agree: cached and uncached, batched and single, saved and loaded.

Each check takes a :class:`Subject` and returns a sentence on what agreed how closely, or raises :class:`Mismatch`.
Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ouroboros.accounting import cached_blocks
from ouroboros.config import LoopPart, ModelSpec, fields_by_path
from ouroboros.config.part import kinds
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.schedule import Schedule

TOLERANCE = 1e-5
"""Largest difference of float32 logits computed in two ways, times the largest logit where that exceeds 1."""
APPROXIMATE = "share_last_kv decodes approximately by design"


class Mismatch(Exception):
    """The two sides of a check differ."""


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
    new_tokens: int = 8

    @property
    def spec(self) -> ModelSpec:
        """The model's specification."""
        return self.model.model.spec

    @property
    def schedule(self) -> Schedule:
        """The visits the model runs."""
        return self.model.schedule

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


def logits_of(model: Callable[..., Any], ids: Tensor, **options: Any) -> Tensor:
    """Logits (B, T, V) without a cache and without a gradient."""
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


def equal(found: Any, expected: Any, what: str) -> None:
    """Two values are the same.

    Raises:
        Mismatch: names both.
    """
    if found != expected:
        raise Mismatch(f"{what}: {found}, expected {expected}")


def close(found: Tensor, expected: Tensor, what: str) -> float:
    """Two computations of the same logits agree; returns the largest difference.

    Raises:
        Mismatch: shapes differ, or logits by more than the tolerance.
    """
    equal(tuple(found.shape), tuple(expected.shape), f"{what}: shape")
    gap = float((found - expected).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise Mismatch(f"{what}: logits differ by {gap:.2g}")
    return gap


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


def check_causal(subject: Subject) -> str:
    """Changing later tokens leaves earlier logits as they were, at every loop count."""
    length = subject.ids.shape[1]
    cuts = sorted({1, length // 2, length - 1} - {0, length})
    for loops, view in subject.views.items():
        expected = logits_of(view, subject.ids)
        for cut in cuts:
            other = subject.ids.clone()
            other[:, cut:] = (other[:, cut:] + 1) % subject.spec.vocab_size
            place = f"tokens from position {cut} on changed" + ("" if loops is None else f", loops {loops}")
            close(logits_of(view, other)[:, :cut], expected[:, :cut], f"{place}: earlier positions")
    counts = ", ".join(str(n) for n in subject.views if n is not None)
    return f"{len(cuts)} cuts of {length} tokens" + (f" at loops {counts}" if counts else "")


def check_cached(subject: Subject) -> str:
    """Feeding tokens one by one through a cache gives the logits of one pass without it."""
    if not subject.spec.share_last_kv:
        return f"one token at a time: largest difference {close(_fed(subject, [1]), subject.logits, 'cached'):.1e}"
    with torch.no_grad():
        output = subject.model(subject.ids, use_cache=True)
    gap = close(output.logits, subject.logits, "prefill with a cache")
    filled = [layer.get_seq_length() for layer in output.past_key_values.layers]
    equal(filled, [subject.ids.shape[1]] * subject.schedule.num_blocks, "tokens in the cache entry of each block")
    return f"{APPROXIMATE}: only prefill == uncached ({gap:.1e}), one cache entry per block ({len(filled)})"


def check_chunked(subject: Subject) -> str:
    """Chunks of odd sizes through a cache give the logits of one pass without it."""
    if subject.spec.share_last_kv:
        return f"skipped: {APPROXIMATE}"
    sizes = ([7, 1, 4, 5], [3])
    gap = max(close(_fed(subject, size), subject.logits, f"chunks of {size}") for size in sizes)
    return f"chunks of 7, 1, 4, 5, .. and of 3: largest difference {gap:.1e}"


def _fed(subject: Subject, sizes: list[int]) -> Tensor:
    """Logits of ``ids`` fed in chunks of ``sizes`` tokens (the last size repeats) through a growing cache."""
    parts: list[Tensor] = []
    store, at = None, 0
    with torch.no_grad():
        while at < subject.ids.shape[1]:
            chunk = subject.ids[:, at : at + sizes[min(len(parts), len(sizes) - 1)]]
            output = subject.model(chunk, past_key_values=store, use_cache=True)
            store = output.past_key_values
            parts.append(output.logits)
            at += chunk.shape[1]
    return torch.cat(parts, dim=1)


def check_static_cache(subject: Subject) -> str:
    """Greedy generation is the same with a growing cache, with a preallocated one and without any."""
    dynamic = subject.generate(subject.ids)
    static = subject.generate(subject.ids, cache_implementation="static")
    gap = same_continuation(static, dynamic, "static and dynamic cache")
    if subject.spec.share_last_kv:
        return f"static == dynamic within {gap:.1e}; not compared with uncached: {APPROXIMATE}"
    uncached = subject.generate(subject.ids, use_cache=False)
    gap = max(gap, same_continuation(dynamic, uncached, "dynamic cache and none"))
    return f"static == dynamic == uncached, {subject.new_tokens} tokens: largest difference of logits {gap:.1e}"


def check_beams(subject: Subject) -> str:
    """Beam search finds what it finds without a cache."""
    cached = subject.generate_output(subject.ids, num_beams=3, output_scores=True)
    if subject.spec.share_last_kv:
        return f"3 beams run; not compared with uncached: {APPROXIMATE}"
    uncached = subject.generate_output(subject.ids, num_beams=3, output_scores=True, use_cache=False)
    gap = float((cached.sequences_scores - uncached.sequences_scores).abs().max())
    # Sequences may part at a tie; their scores then still agree.
    if not gap <= TOLERANCE:
        raise Mismatch(f"3 beams with and without a cache: scores differ by {gap:.2g}")
    same = "same sequences" if torch.equal(cached.sequences, uncached.sequences) else "a tie"
    return f"3 beams == 3 uncached beams ({same}), scores within {gap:.1e}"


def check_left_padding(subject: Subject) -> str:
    """Sequences of different lengths, padded on the left into one batch, give what each gives alone."""
    length = subject.ids.shape[1]
    pads = [0, min(3, length - 1), min(length // 2, length - 1)]
    padded, mask = subject.ids.clone(), torch.ones_like(subject.ids)
    for row, pad in enumerate(pads):
        padded[row, :pad] = 0
        mask[row, :pad] = 0
    gap = 0.0
    for loops, view in subject.views.items():
        batch = logits_of(view, padded, attention_mask=mask)
        for row, pad in enumerate(pads):
            alone = logits_of(view, subject.ids[row : row + 1, pad:])
            place = f"{pad} padded positions" + ("" if loops is None else f", loops {loops}")
            gap = max(gap, close(batch[row : row + 1, pad:], alone, place))
    generated = subject.generate(padded, attention_mask=mask)
    for row, pad in enumerate(pads):
        alone = subject.generate(subject.ids[row : row + 1, pad:])
        gap = max(gap, same_continuation(generated.sequence(row), alone, f"generate, {pad} padded positions"))
    return f"padded by {', '.join(map(str, pads))}, forward and generate: largest difference of logits {gap:.1e}"


def check_batched(subject: Subject) -> str:
    """Each sequence of a batch gives the logits it gives alone."""
    gap = 0.0
    for row in range(len(subject.ids)):
        alone = logits_of(subject.model, subject.ids[row : row + 1])
        gap = max(gap, close(subject.logits[row : row + 1], alone, f"sequence {row} in a batch and alone"))
    return f"{len(subject.ids)} sequences: largest difference {gap:.1e}"


def check_packed(subject: Subject) -> str:
    """Documents packed into one row, told by positions that begin anew, give what each gives alone."""
    length = subject.ids.shape[1]
    sizes = [size for size in (length // 3, 1, length - length // 3 - 1) if size > 0]
    if len(sizes) < 2:
        return "skipped: the context has no room for two documents"
    positions = torch.cat([torch.arange(size, device=subject.ids.device) for size in sizes])[None]
    gap = 0.0
    for loops, view in subject.views.items():
        found = logits_of(view, subject.ids, position_ids=positions)
        alone = torch.cat([logits_of(view, part) for part in subject.ids.split(sizes, dim=1)], dim=1)
        place = "packed and alone" + ("" if loops is None else f", loops {loops}")
        gap = max(gap, close(found, alone, place))
    return f"{', '.join(map(str, sizes))} tokens in one row: largest difference {gap:.1e}"


def check_hidden_states(subject: Subject) -> str:
    """``output_hidden_states`` gives one state before the first visit and one for each, the last of them the model's
    output, and changes nothing; fed in chunks through a cache they are the same."""
    shape = (*subject.ids.shape, subject.spec.hidden_size)
    visits = subject.schedule.num_visits
    with torch.no_grad():
        whole = subject.model.model(subject.ids, use_cache=False, output_hidden_states=True)
        equal([tuple(state.shape) for state in whole.hidden_states], [shape] * (visits + 1), "shapes of hidden states")
        for loops, view in subject.views.items():
            given = view(subject.ids, use_cache=False, output_hidden_states=True)
            place = "hidden states" + ("" if loops is None else f", loops {loops}")
            equal(len(given.hidden_states), view.schedule.num_visits + 1, place)
            equal(torch.equal(given.logits, logits_of(view, subject.ids)), True, f"{place}: logits as without them")
            close(view.logits(given.hidden_states[-1]), given.logits, f"{place}: the head reads the last")
        if subject.spec.share_last_kv:
            return f"{visits + 1} states; not compared with cached ones: {APPROXIMATE}"
        store, parts = None, []
        for chunk in subject.ids.split(3, dim=1):
            output = subject.model(chunk, past_key_values=store, use_cache=True, output_hidden_states=True)
            store = output.past_key_values
            parts.append(output.hidden_states)
    gap = max(
        close(torch.cat(chunks, dim=1), state, f"state {index}, cached")
        for index, (state, chunks) in enumerate(zip(whole.hidden_states, zip(*parts, strict=True), strict=True))
    )
    return f"{visits + 1} states, in chunks through a cache too: largest difference {gap:.1e}"


def check_reload(subject: Subject) -> str:
    """Saved and loaded by transformers' Auto class, without remote code or network, a model is the same."""
    from transformers import AutoModelForCausalLM

    gap = 0.0
    with tempfile.TemporaryDirectory() as directory, _no_progress_bars():
        for loops, view in subject.views.items():
            view.save_pretrained(directory)
            loaded, info = AutoModelForCausalLM.from_pretrained(
                directory,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
            equal({key: names for key, names in info.items() if names}, {}, "loading report")
            equal(type(loaded), OuroborosForCausalLM, "loaded class")
            loaded, place = loaded.eval().to(subject.ids.device), "" if loops is None else f", loops {loops}"
            found, expected = loaded.state_dict(), view.state_dict()
            altered = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
            equal(altered, [], f"weights altered by saving and loading{place}")
            # Not bit for bit: a product adds up in an order that depends on where its factors lie in memory, and where
            # those of the model under check lie is not known.
            logits = logits_of(view, subject.ids)
            gap = max(gap, close(logits_of(loaded, subject.ids), logits, f"after loading{place}"))
            del loaded
    return f"AutoModelForCausalLM.from_pretrained: weights equal bit for bit, logits within {gap:.1e}"


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """No loading bars from transformers inside; its setting is restored."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_loops(subject: Subject) -> str:
    """Other loop counts share the weights, have caches of their own size and refuse each other's."""
    if not subject.schedule.is_looped:
        return "skipped: the layout has no loop"
    own = [p.data_ptr() for p in subject.model.parameters()]
    counts = [n for n in subject.views if n is not None]
    stores = {}
    for loops in counts:
        view = subject.views[loops]
        equal([p.data_ptr() for p in view.parameters()] == own, True, f"loops {loops}: weights are shared")
        close(
            logits_of(subject.model, subject.ids, loops=loops), logits_of(view, subject.ids), f"loops={loops} and view"
        )
        with torch.no_grad():
            stores[loops] = view(subject.ids, use_cache=True).past_key_values
        entries = len(cached_blocks(subject.spec, subject.schedule.with_loops(loops)))
        equal((len(stores[loops].layers), view.config.num_hidden_layers), (entries, entries), f"loops {loops}: entries")
        if not subject.spec.share_last_kv and loops != subject.schedule.loops:
            short = Subject(view, subject.ids, min(2, subject.new_tokens))
            uncached = short.generate(short.ids, use_cache=False)
            same_continuation(short.generate(short.ids), uncached, f"loops {loops}, generate")
    close(logits_of(subject.model, subject.ids), subject.logits, "the model after with_loops()")
    listed = f"loops {', '.join(map(str, counts))} share storage"
    if subject.spec.share_last_kv:
        return f"{listed}; one cache serves all loop counts (share_last_kv)"
    for made_for in counts:
        for loops in counts:
            if loops != made_for:
                _refuses(
                    subject.views[loops], stores[made_for], subject.ids, f"loops {loops}, cache of loops {made_for}"
                )
    return f"{listed}, have their own cache entries and refuse each other's caches"


def _refuses(model: OuroborosForCausalLM, store: Any, ids: Tensor, what: str) -> None:
    try:
        with torch.no_grad():
            model(ids[:, :1], past_key_values=copy.deepcopy(store))
    except OuroborosError:
        return
    except Exception as error:
        raise Mismatch(f"{what}: {type(error).__name__} instead of a clear refusal") from error
    raise Mismatch(f"{what}: accepted")


def check_neutral(subject: Subject) -> str:
    """A loop part at its starting values computes bit for bit what its absence computes, all other weights equal."""
    if not subject.schedule.is_looped:
        return "skipped: the layout has no loop"
    shown = []
    for family in kinds(LoopPart).values():
        for part in family.neutral():
            others = tuple(other for other in subject.spec.loop if other.kind != part.kind)
            absent = _with_loop_parts(subject, others)
            neutral = _with_loop_parts(subject, (*others, part), fresh=part.kind)
            if not torch.equal(logits_of(neutral, subject.ids), logits_of(absent, subject.ids)):
                raise Mismatch(f"loop part {part} at its starting values is not neutral")
            shown.append(part.kind)
    return f"{', '.join(dict.fromkeys(shown))}: bit for bit equal to their absence"


def _with_loop_parts(subject: Subject, parts: tuple[LoopPart, ...], fresh: str | None = None) -> OuroborosForCausalLM:
    """The subject with these loop parts; the one of kind ``fresh`` starts anew, all other weights are the subject's."""
    spec = dataclasses.replace(subject.spec, loop=parts)
    config, loops = OuroborosConfig.from_spec(spec), subject.model.config.loops
    model = OuroborosForCausalLM(config if loops is None else config.at_loops(loops)).eval()
    nn.Module.to(model, subject.ids.device)
    weights = subject.model.state_dict()
    own = {name for name in weights if ".loops." in name and name.split(".loops.")[1].split(".")[1] == fresh}
    model.load_state_dict({name: value for name, value in weights.items() if name not in own}, strict=False)
    return model


def check_dropout(subject: Subject) -> str:
    """Evaluation is deterministic; training is random exactly where the specification has dropout."""
    if not torch.equal(logits_of(subject.model, subject.ids), subject.logits):
        raise Mismatch("two evaluations of the same tokens differ")
    spec = subject.spec
    random = any(value > 0 for path, value in fields_by_path(spec).items() if path.endswith("dropout"))
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
        if _lacks_compiler(error):
            return "skipped: this machine has no C++ compiler for torch.compile"
        raise
    finally:
        torch.compiler.reset()
    return f"one graph: largest difference {close(found, subject.logits, 'compiled and eager'):.1e}"


def _lacks_compiler(error: BaseException | None) -> bool:
    """Whether ``error`` or one of its causes says that no C++ compiler was found."""
    while error is not None:
        if "InvalidCxxCompiler" in type(error).__name__ or "InvalidCxxCompiler" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
