"""OSAM decoding of one sequence, greedy: ours, a plain step loop and the published program; and what a long text costs.

All arms have the same weights and read the memory at every token, as the published program does when it generates. The
clock runs over the new tokens: the time of the same call with one new token is taken off. ``fast`` is the compiled
step, ``generate`` transformers' loop over the growing text, ``step loop`` keeps the whole state of 2 m + 2 d m numbers.
``--peer DIR`` (a checkout of osam) adds the published program.

``--long`` instead writes one text of ``--tokens`` tokens with the compiled step and then goes back and forth between
its state after 1,000 tokens and the one after all of them: time per token, of the compiled step and of the model with
its cache, bytes of the state, memory of the process.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
from collections.abc import Callable
from typing import Any

from common import alternate, build, load, parser, progress, ratio, report, set_threads, spread, timed

PROMPT = 8
EARLY = 256, 1_000
"""Tokens after which the state's bytes, and the process's memory, are looked at first."""
WINDOW = 64
"""Tokens of one turn of the comparison of an early with a late state."""


def main() -> None:
    """Run what was chosen."""
    options = parser(__doc__)
    options.add_argument("--recipe", default="osam-published", choices=("osam-published", "osam"), help="of --long")
    sizes = ("default", "quick-start", "tiny", "small", "base")
    options.add_argument("--size", choices=sizes, help="quick-start is the default; small and base are of recipe osam")
    options.add_argument("--new", type=int, default=256, help="tokens of one turn")
    options.add_argument("--peer", help="directory of the published osam_minidemo.py")
    options.add_argument("--long", action="store_true", help="the cost of a long text instead")
    options.add_argument("--tokens", type=int, default=100_000, help="of --long")
    options.add_argument("--plain", action="store_true", help="--long without the compiler")
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads)
    (long if chosen.long else compare)(chosen, started)


def compare(chosen: Any, started: float) -> None:
    """Tokens per second of every arm; the long text's measures in a few tokens with ``--quick``."""
    import torch
    from common_osam import clocked, open_gates, ratios, spec_of

    size, new = ("tiny", 32) if chosen.quick else (chosen.size or "quick-start", chosen.new)
    model = open_gates(build(spec_of(size, kupdate=1))).eval()
    ids = torch.arange(PROMPT)[None]
    calls = calls_of(model, ids, compiled=not chosen.quick)
    same = {name: bool(torch.equal(call(new), calls["generate"](new))) for name, call in calls.items()}
    if chosen.peer:
        calls["published"] = published(chosen.peer, model, size)
        calls["published"](2)
    tokens_of = dict.fromkeys(calls, new) | dict.fromkeys(("step loop", "published"), new // 4)  # they take long
    processor: dict[str, list[float]] = {name: [] for name in calls}

    def speed_of(name: str) -> float:
        whole, one = (clocked(lambda n=n: calls[name](n)) for n in (tokens_of[name], 1))
        speed, of_processor = ((tokens_of[name] - 1) / max(a - b, 1e-9) for a, b in zip(whole, one))
        processor[name].append(of_processor)
        return speed

    arms = {name: (lambda name=name: speed_of(name)) for name in calls}
    speed = alternate(arms, chosen.rounds or (2 if chosen.quick else 9))
    mine = [name for name in calls if name not in ("step loop", "published")]
    report(
        "osam_decode",
        started,
        size=size,
        new_tokens=new,
        tokens_per_second={name: spread(values) for name, values in speed.items()},
        tokens_per_second_of_processor_time={name: spread(values) for name, values in processor.items()},
        ratio=ratios(mine, speed),
        ratio_by_processor_time=ratios(mine, processor),
        same_tokens_as_generate=same,
        state_bytes=state_bytes(model),
        long=measured(model, 300, (64, 100), compiled=False, turns=4) if chosen.quick else None,
    )


def calls_of(model: Any, ids: Any, *, compiled: bool) -> dict[str, Callable[[int], Any]]:
    """What writes so many tokens after the prompt ``ids`` and returns them all."""
    import torch
    from common_osam import StepLoop

    from ouroboros.serve.fast import FastDecoder

    def options(new: int) -> dict[str, Any]:
        lengths = {"max_new_tokens": new, "min_new_tokens": new}
        return {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, **lengths}

    fast, loop = FastDecoder(compile=compiled), StepLoop(model).eval()
    calls: dict[str, Callable[[int], Any]] = {
        "fast": lambda new: fast.generate(model, ids, **options(new)),
        "generate": lambda new: model.generate(ids, **options(new)),
        "step loop": lambda new: loop.generate(ids, new),
    }
    progress(f"first call of fast: {timed(lambda: calls['fast'](2)):.1f} s")
    return calls


def published(directory: str, model: Any, size: str) -> Callable[[int], str]:
    """The published program's loop, which also writes every character to (here: a stand-in for) standard output."""
    from common_osam import published_model, published_program

    program = published_program(directory)
    theirs = published_model(program, model, size).eval()
    characters = [chr(ord("a") + index) for index in range(theirs.vocab_size)]
    ranks = {character: index for index, character in enumerate(characters)}
    prompt = "".join(characters[:PROMPT])

    def write(new: int) -> str:
        with contextlib.redirect_stdout(io.StringIO()):
            return program.generate_stream(
                theirs, ranks, dict(enumerate(characters)), prompt, max_new_tokens=new, greedy=True
            )

    return write


def state_bytes(model: Any) -> dict[str, int]:
    """Bytes per sequence: held, as predicted, and of the whole state; the same after few and after more tokens."""
    import torch

    from ouroboros.accounting import cost
    from ouroboros.model.cache import cache_bytes

    with torch.no_grad():
        few, more = (
            cache_bytes(model(torch.zeros(1, count, dtype=torch.long), use_cache=True).past_key_values)
            for count in (PROMPT, 8 * PROMPT)
        )
    spec = model.model.spec
    whole = 4 * (2 * spec.block.mixer.buckets + 2 * spec.hidden_size * spec.block.mixer.buckets)
    return {"few tokens": few, "more tokens": more, "predicted": cost(spec).state_bytes(), "step loop": whole}


def long(chosen: Any, started: float) -> None:
    """One long text."""
    from common_osam import open_gates, spec_of

    from ouroboros.recipes import recipe

    if chosen.recipe == "osam":
        size = chosen.size or "small"
        spec = recipe("osam", size).model
    else:
        size = chosen.size or "quick-start"
        spec = spec_of(size, kupdate=1)
    model = open_gates(build(spec)).eval()
    report(
        "osam_decode",
        started,
        recipe=f"{chosen.recipe} {size}",
        long=measured(model, chosen.tokens, EARLY, compiled=not chosen.plain, turns=chosen.rounds or 40),
    )


@dataclasses.dataclass
class Text:
    """A text that is being written: its state is all that is kept of it."""

    model: Any
    step: Callable[..., Any]
    store: Any
    at: Any
    """Tokens read, (1,)."""
    token: Any
    """The next one to read, (1, 1)."""

    def write(self, count: int) -> None:
        """So many tokens with the step of the fast decoder."""
        from ouroboros.serve.fast import STATE

        held = [{STATE: layer.read()} for layer in self.store.layers]
        recent: list[dict[str, Any]] = [{} for _ in held]
        for _ in range(count):
            logits = self.step(self.model, self.token, self.at, held, recent, None)
            self.token = logits.argmax(-1, keepdim=True)

    def write_with_cache(self, count: int) -> None:
        """So many tokens with the model and its cache."""
        for layer in self.store.layers:
            layer.seen = int(self.at)
        for _ in range(count):
            logits = self.model(self.token, past_key_values=self.store, use_cache=True).logits[:, -1]
            self.token = logits.argmax(-1, keepdim=True)
            self.at += 1

    def copy(self) -> Text:
        """The same text, with a state of its own."""
        return Text(self.model, self.step, copy.deepcopy(self.store), self.at.clone(), self.token.clone())


def measured(model: Any, tokens: int, early: tuple[int, int], *, compiled: bool, turns: int) -> dict[str, Any]:
    """Write ``tokens`` tokens; bytes and memory on the way, then time per token after ``early[1]`` and after all."""
    import torch

    from ouroboros.model.cache import cache_bytes

    with torch.no_grad():
        text = first = begun(model, compiled=compiled)
        size, memory, whole = {}, {}, 0.0
        for count in sorted({*early, *(tokens * part // 10 for part in range(1, 11))} - set(range(early[0]))):
            whole += timed(lambda count=count: text.write(count - int(text.at)))
            size[count], memory[count] = cache_bytes(text.store), resident()
            progress(f"{count} tokens: {whole:.1f} s, {memory[count]:.1f} MB")
            first = text.copy() if count == early[1] else first
        texts = {f"after {early[1]}": first, f"after {tokens}": text}
        ways = {"step of fast": "write", "model with cache": "write_with_cache"}
        seconds, processor = {}, {}
        for way, method in ways.items():
            processor[way] = {name: [] for name in texts}
            arms = {name: turn_of(one, method, processor[way][name]) for name, one in texts.items()}
            seconds[way] = alternate(arms, turns)
        finite = all(bool(layer.read().isfinite().all()) for layer in text.store.layers)
    before, after = texts
    return {
        "tokens": tokens,
        "compiled": compiled,
        "seconds": round(whole, 1),
        "state_bytes": size,
        "state_is_finite": finite,
        "resident_megabytes": {count: round(value, 1) for count, value in memory.items()},
        "microseconds_per_token": {
            way: {name: spread([1e6 * value for value in values]) for name, values in found.items()}
            for way, found in seconds.items()
        },
        "late_to_early": {way: ratio(found[after], found[before]) for way, found in seconds.items()},
        "late_to_early_by_processor_time": {
            way: ratio(found[after], found[before]) for way, found in processor.items()
        },
    }


def begun(model: Any, *, compiled: bool) -> Text:
    """A text whose prompt has been read; the step is compiled."""
    import torch
    from transformers.cache_utils import DynamicCache

    from ouroboros.serve.fast import compiled_step, next_logits

    store = DynamicCache(config=model.config)
    logits = model(torch.arange(PROMPT)[None], past_key_values=store, use_cache=True).logits[:, -1]
    step = compiled_step() if compiled else next_logits
    text = Text(model, step, store, torch.tensor([PROMPT]), logits.argmax(-1, keepdim=True))
    progress(f"first step: {timed(lambda: text.copy().write(1)):.1f} s")
    return text


def turn_of(text: Text, method: str, processor: list[float]) -> Callable[[], float]:
    """Seconds per token of the next ``WINDOW`` tokens of ``text``, the same ones every time."""
    from common_osam import clocked

    def turn() -> float:
        again = text.copy()
        getattr(again, method)(2)  # where the copy lies is no longer news to the processor
        took, used = clocked(lambda: getattr(again, method)(WINDOW))
        processor.append(used / WINDOW)
        return took / WINDOW

    return turn


def resident() -> float:
    """Megabytes of the process in memory, now; 0 where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            lines = [line for line in file if line.startswith("VmRSS:")]
        return int(lines[0].split()[1]) / 1024
    except (OSError, IndexError):
        return 0.0


if __name__ == "__main__":
    main()
