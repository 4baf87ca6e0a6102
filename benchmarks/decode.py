"""Decoding at batch size 1: tokens per second of ``gpt`` and of its fast path against transformers' Llama.

All arms continue the same prompt greedily in float32; the clock runs over the whole call, prompt included.
Also the bytes a cache gains per token, measured, beside the schedule's prediction.
"""

from __future__ import annotations

from typing import Any

from common import alternate, build, llama_of, load, parser, progress, ratio, report, set_threads, spread, timed


def main() -> None:
    """Run the comparison."""
    options = parser(__doc__)
    options.add_argument("--size", default="small", choices=("tiny", "small", "base"))
    options.add_argument("--prompt", type=int, default=64)
    options.add_argument("--new", type=int, default=128)
    options.add_argument("--bf16", action="store_true", help="also the fast path with bfloat16 weights")
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads)
    import torch

    from ouroboros.recipes import recipe
    from ouroboros.serve.fast import FastDecoder

    spec = recipe("gpt", "tiny" if chosen.quick else chosen.size).model
    new = 16 if chosen.quick else chosen.new
    ids = torch.randint(0, 256, (1, chosen.prompt), generator=torch.Generator().manual_seed(0))
    greedy = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "max_new_tokens": new,
        "min_new_tokens": new,
        "pad_token_id": 0,
    }
    ours, llama = build(spec), llama_of(spec)
    calls: dict[str, Any] = {
        "llama": lambda: llama.generate(ids, **greedy),
        "gpt": lambda: ours.generate(ids, **greedy),
        "fast_uncompiled": lambda: FastDecoder(compile=False).generate(ours, ids, **greedy),
    }
    if not chosen.quick:
        fast = FastDecoder()
        calls["fast"] = lambda: fast.generate(ours, ids, **greedy)
        if chosen.bf16:
            half = build(spec).bfloat16()
            calls["fast_bf16"] = lambda: fast.generate(half, ids, **greedy)
    first = {name: timed(call) for name, call in calls.items()}
    progress(", ".join(f"first call of {name} {seconds:.1f} s" for name, seconds in first.items()))
    same = {name: bool(torch.equal(calls[name](), calls["gpt"]())) for name in calls if name.startswith("fast")}
    arms = {name: (lambda call=call: new / timed(call)) for name, call in calls.items()}
    speed = alternate(arms, chosen.rounds or (2 if chosen.quick else 11))
    report(
        "decode",
        started,
        context=[chosen.prompt, chosen.prompt + new],
        tokens_per_second={name: spread(values) for name, values in speed.items()},
        ratio_to_llama={name: ratio(values, speed["llama"]) for name, values in speed.items() if name != "llama"},
        first_call_seconds={name: round(seconds, 2) for name, seconds in first.items()},
        same_tokens_as_generate=same,
        cache_bytes_per_token=cache_bytes_per_token(),
    )


def cache_bytes_per_token() -> dict[str, dict[str, float]]:
    """What a cache grows by with each token, and what the schedule predicts."""
    import torch
    from transformers.cache_utils import DynamicCache

    from ouroboros.accounting import cost
    from ouroboros.model.cache import cache_bytes
    from ouroboros.recipes import recipe

    found = {}
    loop = recipe("loop").model
    shared = loop.replace(share_last_kv=True)
    for name, spec in {"gpt": recipe("gpt").model, "loop": loop, "loop, share_last_kv": shared}.items():
        model = build(spec)
        store = DynamicCache(config=model.config)
        sizes = []
        for length in (10, 90):
            with torch.no_grad():
                model(torch.zeros(1, length, dtype=torch.long), past_key_values=store)
            sizes.append(cache_bytes(store))
        found[name] = {"measured": (sizes[1] - sizes[0]) / 90, "predicted": cost(spec).cache_bytes_per_token()}
    return found


if __name__ == "__main__":
    main()
