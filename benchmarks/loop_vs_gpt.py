"""The price of looping: step time of ``loop`` against a plain stack with the same visits and parts.

Both do the same arithmetic; the loop reads fewer weights and adds its bookkeeping. Forward, loss and backward, float32,
eager, no optimiser (the loop has fewer parameters to update).
"""

from __future__ import annotations

from common import alternate, build, cross_entropy, load, parser, ratio, report, set_threads, spread, timed


def main() -> None:
    """Run the comparison."""
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=4)
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads)
    import torch

    from ouroboros.recipes import recipe
    from ouroboros.recipes.twin import twin

    looped = recipe("loop", "tiny" if chosen.quick else "small")
    plain = twin(looped, "depth")
    length = looped.data.sequence_length
    windows = torch.randint(0, 256, (chosen.batch, length + 1), generator=torch.Generator().manual_seed(0))

    def seconds(model: torch.nn.Module) -> float:
        def step() -> None:
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits
            cross_entropy(logits, windows[:, 1:]).backward()

        elapsed = timed(step)
        model.zero_grad(set_to_none=False)  # gradients stay allocated, as under a fixed set of parameters
        return elapsed

    models = {"loop": build(looped.model).train(), "gpt": build(plain.model).train()}
    for model in models.values():
        seconds(model)
    times = alternate(
        {name: (lambda model=model: seconds(model)) for name, model in models.items()},
        chosen.rounds or (2 if chosen.quick else 21),
    )
    report(
        "loop_vs_gpt",
        started,
        layouts={"loop": looped.model.layout, "gpt": plain.model.layout},
        batch=[chosen.batch, length],
        step_seconds={name: spread(values) for name, values in times.items()},
        loop_to_gpt=ratio(times["loop"], times["gpt"]),
    )


if __name__ == "__main__":
    main()
