"""The price of the delta residual: time of a training step against the additive twin of the same shape.

Every arm takes the same step on the same batches (forward, mean cross-entropy, backward, AdamW's fused step). The arms
of a mode take turns: ``eager`` is float32, ``default`` what ``ouroboros train`` does on this machine (precision by
measurement, compiled blocks and loss). ``--peer DIR`` (the folder ``model`` of a checkout of deep-delta-learning) adds
the published code in float32, eager, against its own additive twin.
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import alternate, build, load, parser, progress, ratio, report, set_threads, spread, timed

ARMS: dict[str, dict[str, Any] | None] = {
    "additive": None,
    "1 value": {},
    "4 values, CC": {"values": 4},
    "4 values, CC, EC": {"values": 4, "embedding_conv": True},
    "4 values, TC": {"values": 4, "compressor": "token"},
}
"""Fields of ``delta`` by arm; None is the additive residual. CC reads the value channels, TC the last tokens too."""

Step = Callable[[], None]
"""One training step on the next batch."""


def main() -> None:
    """Run the comparison."""
    options = parser(__doc__)
    options.add_argument("--peer", help="directory of the published model files")
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads)
    import torch

    shape = (2, 2, 32) if chosen.quick else (4, 2, 256)  # blocks, sequences of a step, positions
    layers, batch, length = shape
    twin = additive(layers, 64 if chosen.quick else 256)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, twin.vocab_size, (batch, length + 1), generator=generator) for _ in range(4)]
    modes: dict[str, Callable[[], dict[str, Step]]] = {"eager": lambda: our_arms(twin, batches, compiled=False)}
    if not chosen.quick:
        modes["default"] = lambda: our_arms(twin, batches, compiled=True)
    if chosen.peer:
        modes["published"] = lambda: peer_arms(chosen.peer, twin, batches)
    rounds = chosen.rounds or (2 if chosen.quick else 21)
    seconds = {name: turns(name, arms(), rounds) for name, arms in modes.items()}
    report(
        "delta_step",
        started,
        shape={"blocks": layers, "batch": [batch, length], "width": twin.hidden_size},
        parameters={name: count(spec_of(twin, fields)) for name, fields in ARMS.items()},
        seconds_per_step={
            mode: {name: spread(values) for name, values in arms.items()} for mode, arms in seconds.items()
        },
        ratio_to_additive={
            mode: {name: ratio(values, arms["additive"]) for name, values in arms.items() if name != "additive"}
            for mode, arms in seconds.items()
        },
    )


def turns(mode: str, arms: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of every arm's steps, after two to warm up."""
    for name, step in arms.items():
        progress(f"{mode}, first step of {name}: {timed(step):.2f} s")
        step()
    return alternate({name: (lambda step=step: timed(step)) for name, step in arms.items()}, rounds)


def additive(layers: int, width: int) -> Any:
    """The additive twin: the published backbone with heads of half the width."""
    from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec, RMSNormSpec

    return ModelSpec(layout=str(layers), vocab_size=2048, hidden_size=width, max_position_embeddings=256).replace(
        mixer=AttentionSpec(num_heads=2, head_dim=width // 2, qk_norm="after_rope"),
        ffn=FeedForwardSpec(intermediate_size=math.floor(8 / 3 * width)),
        norm=RMSNormSpec(eps=1e-5),
    )


def spec_of(twin: Any, fields: dict[str, Any] | None) -> Any:
    """The twin with the arm's residual."""
    from ouroboros.config.parts.delta import DeltaSpec

    return twin if fields is None else twin.replace(residual=DeltaSpec(**fields))


def count(spec: Any) -> int:
    """Parameters."""
    from ouroboros.accounting import cost

    return cost(spec).parameters


def our_arms(twin: Any, batches: Sequence[Any], *, compiled: bool) -> dict[str, Step]:
    """Our model with every residual; ``compiled`` is the default of ``ouroboros train`` instead of eager float32."""
    import torch

    from ouroboros.config import TrainSpec
    from ouroboros.train.losses import cross_entropy
    from ouroboros.train.precision import autocast, choose_dtype, compile_blocks

    device, train = torch.device("cpu"), TrainSpec()
    dtype = choose_dtype(train, device) if compiled else torch.float32
    loss_of = torch.compile(cross_entropy, dynamic=False) if compiled else cross_entropy

    def arm(fields: dict[str, Any] | None) -> Step:
        model = build(spec_of(twin, fields))
        if compiled:
            compile_blocks(model.model.decoder.layers, train, device, None)

        def loss(windows: Any) -> Any:
            with autocast(device, dtype):
                logits = model(input_ids=windows[:, :-1], use_cache=False).logits
            return loss_of(logits, windows[:, 1:])

        return step_of(model, loss, batches)

    return {name: arm(fields) for name, fields in ARMS.items()}


def peer_arms(directory: str, twin: Any, batches: Sequence[Any]) -> dict[str, Step]:
    """The published models that need no CUDA, and their additive twin."""
    import torch
    import transformers.configuration_utils

    transformers.configuration_utils.torch = torch  # pyrefly: ignore  # its annotations name it, and are evaluated here
    package = types.ModuleType("published")
    package.__path__ = [str(Path(directory).resolve())]
    sys.modules["published"] = package

    class Additive(torch.nn.Module):
        def forward(self, x: Any, *, k_in: Any, context: Any) -> Any:
            return x + k_in

    def arm(file: str, *, plain: bool = False) -> Step:
        module = importlib.import_module(f"published.{file}")
        torch.manual_seed(0)
        config = module.GPTConfig(
            vocab_size=twin.vocab_size,
            hidden_size=twin.hidden_size,
            num_hidden_layers=int(twin.layout),
            num_attention_heads=twin.block.mixer.num_heads,
            head_dim=twin.block.mixer.head_dim,
        )
        model = module.GPT(config)
        for block in model.transformer.h if plain else ():
            block.ddl_attn, block.ddl_mlp = Additive(), Additive()
        return step_of(model, lambda windows: model(windows[:, :-1], targets=windows[:, 1:])[1], batches)

    return {
        "additive": arm("DDL-vdim1-gpt-mha-rope", plain=True),
        "1 value": arm("DDL-vdim1-gpt-mha-rope"),
        "4 values, CC": arm("DDL-gpt-mha-rope-CC"),
        "4 values, CC, EC": arm("DDL-gpt-mha-rope-CC-EC"),
    }


def step_of(model: Any, loss_of: Callable[[Any], Any], batches: Sequence[Any]) -> Step:
    """Forward, backward and optimiser on the next batch."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    windows = itertools.cycle(batches)

    def step() -> None:
        loss_of(next(windows)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
