"""What halting saves: operations and time of reading a prompt and of writing, against the mean number of steps.

One model of random weights, whose halting network is set so that tokens halt sooner or later and at different times.
With ``loop.halt.freeze`` tokens that have halted are not computed; without, as published, every loop is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common import alternate, build, load, parser, ratio, report, set_threads, spread, timed

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.config import ModelSpec
    from ouroboros.model.modeling import OuroborosForCausalLM


def main() -> None:
    """Measure some mean numbers of steps."""
    options = parser(__doc__)
    options.add_argument("--layout", default="1 (2)x8 1")
    options.add_argument("--width", type=int, default=256)
    options.add_argument("--prompt", type=int, default=256)
    options.add_argument("--new", type=int, default=32)
    options.add_argument("--biases", type=float, nargs="+", default=[5.0, -3.0, -8.0, -12.0, -20.0])
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads)
    quick = chosen.quick
    biases, prompt, new = (chosen.biases[:2], 32, 2) if quick else (chosen.biases, chosen.prompt, chosen.new)
    rounds = chosen.rounds or (2 if quick else 7)
    spec = model_of(chosen.layout, 64 if quick else chosen.width)
    found = {f"bias {bias:g}": measure(spec, bias, prompt, new, rounds) for bias in biases}
    report("halting", started, layout=chosen.layout, prompt=prompt, new=new, halting=found)


def model_of(layout: str, width: int) -> ModelSpec:
    """A looped model that halts."""
    from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
    from ouroboros.config.parts.halt import HaltSpec

    spec = ModelSpec(layout=layout, hidden_size=width, max_position_embeddings=2048, loop=(HaltSpec(hidden=64),))
    return spec.replace(mixer=AttentionSpec(num_heads=4), ffn=FeedForwardSpec(intermediate_size=3 * width))


def measure(spec: ModelSpec, bias: float, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """Steps, operations and times at one bias of the halting network."""
    import torch

    from ouroboros.eval.depth import depths

    ids = torch.randint(0, 256, (1, prompt), generator=torch.Generator().manual_seed(0))
    arms = {"frozen": halting(spec, bias), "computed": halting(published(spec), bias)}
    (depth,) = depths(arms["frozen"], ids)
    operations = {name: operations_of(model, ids) for name, model in arms.items()}
    greedy = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new, "min_new_tokens": new}

    def read(model: OuroborosForCausalLM) -> float:
        with torch.no_grad():
            return timed(lambda: model(ids, use_cache=True, logits_to_keep=1))

    reading = alternate({name: (lambda m=model: read(m)) for name, model in arms.items()}, rounds)
    writing = alternate(
        {
            name: (lambda m=model: timed(lambda: m.generate(ids, **greedy, pad_token_id=0)))
            for name, model in arms.items()
        },
        rounds,
    )
    return {
        "mean_steps": round(depth.mean, 2),
        "steps_from_to": [min(depth.steps), max(depth.steps)],
        "operations_of_the_prompt": round(operations["frozen"] / operations["computed"], 3),
        "seconds_of_the_prompt": spread(reading["frozen"]),
        "time_of_the_prompt": ratio(reading["frozen"], reading["computed"]),
        "time_of_prompt_and_writing": ratio(writing["frozen"], writing["computed"]),
    }


def published(spec: ModelSpec) -> ModelSpec:
    """The same, with every loop computed."""
    return spec.replace(loop=tuple(part.replace(freeze=False) for part in spec.loop))


def halting(spec: ModelSpec, bias: float) -> OuroborosForCausalLM:
    """A model whose tokens halt with probabilities around the sigmoid of ``bias``."""
    import torch

    model = build(spec)
    halt: Any = model.model.decoder.loops[0]["halt"]
    with torch.no_grad():
        for layer, std in ((halt.first, 50.0), (halt.second, 2.0), (halt.last, 2.0)):
            layer.weight.normal_(std=std / layer.in_features**0.5, generator=torch.Generator().manual_seed(1))
        halt.last.bias.fill_(bias)
    return model


def operations_of(model: OuroborosForCausalLM, ids: Tensor) -> int:
    """Counted operations of one pass."""
    import copy

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counted = copy.deepcopy(model).requires_grad_(False)  # the counter's hooks fail on parameters passed as inputs
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted(ids, use_cache=False, logits_to_keep=1)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
