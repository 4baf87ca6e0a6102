"""Muon: step time of ``BatchedMuon`` against ``torch.optim.Muon`` on the matrices of ``gpt``."""

from __future__ import annotations

from collections import Counter

from common import alternate, build, load, parser, ratio, report, set_threads, spread, timed


def main() -> None:
    """Run the comparison."""
    options = parser(__doc__)
    options.add_argument("--size", default="small", choices=("tiny", "small", "base"))
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads)
    import torch

    from ouroboros.optim import BatchedMuon, parameter_roles
    from ouroboros.recipes import recipe

    model = build(recipe("gpt", "tiny" if chosen.quick else chosen.size).model)
    roles = parameter_roles(model)
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if roles[name] == "matrix"]
    settings = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95}
    optimizers = {
        "torch.optim.Muon": torch.optim.Muon(_matrices(shapes), adjust_lr_fn="match_rms_adamw", **settings),
        "BatchedMuon": BatchedMuon(_matrices(shapes), **settings),
    }
    for optimizer in optimizers.values():
        optimizer.step()
    seconds = alternate(
        {name: (lambda optimizer=optimizer: timed(optimizer.step)) for name, optimizer in optimizers.items()},
        chosen.rounds or (2 if chosen.quick else 21),
    )
    after = [optimizer.param_groups[0]["params"] for optimizer in optimizers.values()]
    largest = max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(*after, strict=True))
    report(
        "optim_muon",
        started,
        matrices={" x ".join(map(str, shape)): count for shape, count in Counter(shapes).items()},
        step_seconds={name: spread(values) for name, values in seconds.items()},
        speedup=ratio(seconds["torch.optim.Muon"], seconds["BatchedMuon"]),
        largest_difference_of_weights=largest,
    )


def _matrices(shapes: list[tuple[int, ...]]) -> list:
    """Seeded parameters with gradients."""
    import torch

    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


if __name__ == "__main__":
    main()
