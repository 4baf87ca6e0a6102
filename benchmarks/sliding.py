"""Sliding windows: targets per second of ours against one window at a time, and with the cache kept.

``naive`` reads one window at a time and computes all logits of each; ``windows`` is what ``eval --stride`` does, and
``rolling`` what it does with ``--rolling``. All score the same random ids with random weights. The first two compute
the same function; ``rolling`` reads each token once, and is another function, whose nats stand beside.
"""

from __future__ import annotations

from collections.abc import Callable

from common import alternate, build, load, parser, ratio, report, set_threads, spread, timed


def main() -> None:
    """Run the comparison."""
    options = parser(__doc__)
    options.add_argument("--recipe", default="loop")
    options.add_argument("--size", default="small", choices=("tiny", "small", "base"))
    options.add_argument("--window", type=int, default=512)
    options.add_argument("--stride", type=int, default=64)
    options.add_argument("--targets", type=int, default=16384)
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads)
    import torch

    from ouroboros.eval.windows import Procedure, Rolling, Windows, evaluating, spans, target_nats
    from ouroboros.recipes import recipe

    model = build(recipe(chosen.recipe, "tiny" if chosen.quick else chosen.size).model)
    window, stride, targets = (32, 4, 160) if chosen.quick else (chosen.window, chosen.stride, chosen.targets)
    ids = torch.randint(0, 256, (targets + 1,), generator=torch.Generator().manual_seed(0))

    def naive() -> float:
        total = 0.0
        with evaluating(model):
            for _, start, end, first in spans(targets, window, stride):
                logits = model(input_ids=ids[None, start:end], use_cache=False).logits[0].float()
                losses = torch.nn.functional.cross_entropy(logits, ids[start + 1 : end + 1], reduction="none")
                total += float(losses[first - start :].double().sum())
        return total / targets

    def scored(procedure: Procedure) -> Callable[[], float]:
        def call() -> float:
            with evaluating(model):
                return sum(float(target_nats(found, [ids]).sum()) for found in procedure(model, [ids])) / targets

        return call

    calls = {"naive": naive, "windows": scored(Windows(window, stride)), "rolling": scored(Rolling(window, stride))}
    nats = {name: call() for name, call in calls.items()}
    arms = {name: (lambda call=call: targets / timed(call)) for name, call in calls.items()}
    speed = alternate(arms, chosen.rounds or (2 if chosen.quick else 5))
    report(
        "sliding",
        started,
        window=window,
        stride=stride,
        targets=targets,
        targets_per_second={name: spread(values) for name, values in speed.items()},
        ratio_to_naive={name: ratio(values, speed["naive"]) for name, values in speed.items() if name != "naive"},
        nats_per_token=nats,
    )


if __name__ == "__main__":
    main()
