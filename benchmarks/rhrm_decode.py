"""R-HRM decoding at batch size 1, after contexts of 64, 512 and 1,024 tokens: with a cache, and with none.

``cached`` is the model's own ``generate``, the context's pass not counted; ``fast`` the compiled step; ``uncached``
computes the whole context for every token (logits of the last position only, which the published chat does not do).
``--peer DIR`` adds the published chat loop (a checkout of Ouroboros-Recursive-LM), which sees the last 128 tokens only.
Also the bytes per token of every kind of cache, beside full keys and values.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from common import alternate, build, load, parser, progress, ratio, report, set_threads, spread, timed

CONTEXTS = (64, 512, 1024)


def main() -> None:
    """Run the comparison."""
    options = parser(__doc__)
    options.add_argument("--size", default="lite", choices=("tiny", "lite", "pro", "beast"))
    options.add_argument("--recipe", default="rhrm", choices=("rhrm", "rhrm-published"))
    options.add_argument("--vocabulary", type=int, help="by default the recipe's own; 50257 is the published one")
    options.add_argument("--new", type=int, default=64)
    options.add_argument("--peer", help="directory of the published model.py and chat.py")
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads)

    from ouroboros.recipes import recipe

    size, contexts = ("tiny", (16, 64)) if chosen.quick else (chosen.size, CONTEXTS)
    spec = recipe(chosen.recipe, size).model
    spec = dataclasses.replace(spec, vocab_size=chosen.vocabulary or spec.vocab_size)
    model = build(spec)
    new = 4 if chosen.quick else chosen.new
    found: dict[str, Any] = {}
    for context in contexts:
        arms = arms_of(model, context, new, fast=not chosen.quick)
        if chosen.peer:
            arms["published"] = published(chosen.peer, spec, context, new)
        for name, arm in arms.items():
            progress(f"context {context}: first turn of {name}: {timed(arm):.1f} s")
        speed = alternate(arms, chosen.rounds or (2 if chosen.quick else 5))
        ours = speed["cached"]
        found[str(context)] = {
            "tokens_per_second": {name: spread(values) for name, values in speed.items()},
            "cached_against": {name: ratio(ours, values) for name, values in speed.items() if name != "cached"},
        }
    report(
        "rhrm_decode",
        started,
        recipe=f"{chosen.recipe} {size}",
        vocabulary=spec.vocab_size,
        new_tokens=new,
        contexts=found,
        cache_bytes_per_token=cache_bytes(size),
    )


def arms_of(model: Any, context: int, new: int, *, fast: bool) -> dict[str, Callable[[], float]]:
    """Tokens per second of each way to write ``new`` tokens after ``context``."""
    import torch
    from transformers.cache_utils import DynamicCache

    from ouroboros.serve.fast import FastDecoder

    ids = torch.randint(0, model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    greedy = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new, "min_new_tokens": new}

    def seconds(generate: Callable[..., Any]) -> float:
        """Of ``new`` tokens, without the pass over the context: that of the same call with one token is taken off."""
        mask = torch.ones_like(ids)
        whole = timed(lambda: generate(ids, attention_mask=mask, **greedy))
        one = timed(lambda: generate(ids, attention_mask=mask, **greedy | {"max_new_tokens": 1, "min_new_tokens": 1}))
        return max(whole - one, 1e-9)

    def cached() -> float:
        return (new - 1) / seconds(
            lambda *a, **k: model.generate(*a, past_key_values=DynamicCache(config=model.config), **k)
        )

    @torch.no_grad()
    def uncached() -> float:
        turns = min(new, 8)  # every turn costs the same

        def write() -> None:
            seen = ids
            for _ in range(turns):
                logits = model(seen, use_cache=False, logits_to_keep=1).logits
                seen = torch.cat((seen, logits[:, -1].argmax(-1, keepdim=True)), dim=1)

        return turns / timed(write)

    arms = {"cached": cached, "uncached": uncached}
    if fast:
        decoder = FastDecoder()
        arms["fast"] = lambda: (new - 1) / seconds(lambda *a, **k: decoder.generate(model, *a, **k))
    return arms


def published(directory: str, spec: Any, context: int, new: int) -> Callable[[], float]:
    """The published chat's loop on a published model of the same shape."""
    sys.path.insert(0, directory)
    import chat
    import model as published_model
    import torch

    torch.manual_seed(0)
    loops = int(spec.layout.removeprefix("(1)x"))
    model = published_model.HierarchicalReasoningModel(
        spec.vocab_size, spec.hidden_size, spec.block.mixer.num_heads, 4 * spec.hidden_size, loops
    ).eval()
    ids = torch.randint(0, spec.vocab_size - 1, (1, context), generator=torch.Generator().manual_seed(0))

    class Tokens:
        """What the loop asks of a tokenizer."""

        eos_token_id = -1

        def encode(self, text: str, **_: Any) -> Any:
            return ids

        def decode(self, written: Any, **_: Any) -> str:
            return str(len(written))

    turns = min(new, 16)
    return lambda: turns / timed(lambda: chat.generate(model, Tokens(), "", max_new_tokens=turns))


def cache_bytes(size: str) -> dict[str, float]:
    """Float32 bytes per token over all loops: measured on the built model, for every way to keep attention."""
    import torch

    from ouroboros.accounting import cost
    from ouroboros.model.cache import cache_bytes as held
    from ouroboros.recipes import recipe

    published = recipe("rhrm-published", size).model
    latent = published.replace(mixer=dataclasses.replace(published.block.mixer, cache="latent"))
    found = {}
    for name, spec in (
        ("published, keys and values", published),
        ("published, latents", latent),
        ("rhrm", recipe("rhrm", size).model),
    ):
        spec = dataclasses.replace(spec, vocab_size=257)
        with torch.no_grad():
            sizes = [
                held(build(spec)(torch.zeros(1, n, dtype=torch.long), use_cache=True).past_key_values) for n in (8, 9)
            ]
        assert sizes[1] - sizes[0] == cost(spec).cache_bytes_per_token(), name
        found[name] = sizes[1] - sizes[0]
    return found


if __name__ == "__main__":
    main()
