"""Crawler training: tokens per second of our model against that of the published program, on the same batches.

The form is the submission's (9 flat blocks around 1 shared block that runs twice, heads of 64 channels), made narrow
enough for a few cores. The published model starts as its program starts it, and ours begins with its weights. First,
with noise on every weight so that no path is closed, the losses of both are compared in float32. Then every arm takes
training steps: forward and backward pass, clipping and the optimisers.

``ours`` runs as ``ouroboros train`` does on this machine (precision by measurement, compiled blocks and loss), ``ours,
float32`` without that. ``published`` is the program's model and its optimisers in float32, eager; ``--all`` adds what
the program does on its accelerators: bfloat16 and a compiled model, which takes minutes to compile. ``--published
PATH`` is its ``train_gpt.py``, a directory that holds it, or a git repository that has the commit.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import alternate, autocast, load, parser, progress, ratio, report, set_threads, spread

COMMIT = "979f7907d5d159fcb315f136e05eee1c3e5a1ac4"
FILE = "records/track_non_record_16mb/2026-04-03_Ouroboros_Crawler_Research_8xH100/train_gpt.py"
WHERE = (
    f"give --published PATH: {FILE} of github.com/openai/parameter-golf at commit {COMMIT[:7]}, the head of pull"
    " request 1308 (git fetch https://github.com/openai/parameter-golf refs/pull/1308/head), or the repository itself"
)
NOT_NEEDED = ("flash_attn_interface", "sentencepiece", "brotli")
"""Imported by the program, and not by its model on a processor: attention has a form without the kernel."""
SUBMISSION: dict[str, Any] = {
    "use_crawler": True,
    "num_flat_layers": 9,
    "num_crawler_layers": 1,
    "crawler_loops": 2,
    "crawler_mlp_mult": 6.0,
    "crawler_loop_rope_scales": (9, 1, 1),
    "qk_gain_init": 4.0,
    "matrix_lr": 0.03,
}
"""What the submission's launch script changes of the program's defaults, as far as the model and its step go."""
HEAD = 64
"""Channels of a head, as published; queries have twice the heads of keys."""
TOLERANCE = 1e-4


class Arm(NamedTuple):
    """One way to train."""

    loss: Callable[[Any], Any]
    """The mean loss of windows (B, T + 1), with a graph."""
    update: Callable[[], None]
    """Clipping, the optimisers' steps, and clearing of the gradients."""


def main() -> None:
    """Run the comparison."""
    options = parser(__doc__)
    options.add_argument("--published", help="the published train_gpt.py, or a directory or git repository with it")
    options.add_argument("--width", type=int, default=256, help=f"of the model, a multiple of {2 * HEAD}")
    options.add_argument("--length", type=int, default=256, help="positions of a sequence")
    options.add_argument("--batch", type=int, default=8, help="sequences of a step")
    options.add_argument("--all", action="store_true", help="the program's bfloat16 and compiled form too")
    chosen = options.parse_args()
    started = load()
    if not chosen.published:
        report("crawler_vs_published", started, published=WHERE)
        return
    if chosen.width % (2 * HEAD):
        options.error(f"--width must be a multiple of {2 * HEAD}, got {chosen.width}")
    set_threads(chosen.threads)

    source = source_of(chosen.published)
    width, length, batch = (2 * HEAD, 32, 2) if chosen.quick else (chosen.width, chosen.length, chosen.batch)
    program = program_of(source)
    settings = settings_of(program, width)
    model = published_model(program, settings)
    batches = batches_of(settings.vocab_size, batch, length)
    difference = losses_differ(program, settings, model, batches)
    progress(f"losses differ by {difference:.2g} at most")
    if not difference <= TOLERANCE:
        raise SystemExit(f"the losses differ by {difference:.2g}, more than {TOLERANCE}: not the same model")
    arms = arms_of(program, settings, model, compiled=not chosen.quick)
    if chosen.all:
        arms["published, as it trains"] = as_it_trains(source, width)
    rounds = chosen.rounds or (2 if chosen.quick else 9)
    steps, passes = turns(arms, batches, rounds, tokens=batch * length)
    report(
        "crawler_vs_published",
        started,
        published=f"sha256 {hashlib.sha256(source.encode()).hexdigest()}",
        shape={"width": width, "batch": [batch, length], "parameters": count(model)},
        largest_difference_of_losses=float(f"{difference:.2g}"),
        tokens_per_second={name: spread(values) for name, values in steps.items()},
        tokens_per_second_without_optimiser={name: spread(values) for name, values in passes.items()},
        ratio=ratios(steps),
        ratio_without_optimiser=ratios(passes),
    )


def turns(
    arms: dict[str, Arm], batches: Sequence[Any], rounds: int, tokens: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Tokens per second of every arm's steps after two to warm up, and of their forward and backward passes alone."""
    passes: dict[str, list[float]] = {name: [] for name in arms}

    windows = {name: itertools.cycle(batches) for name in arms}

    def turn(name: str, arm: Arm) -> float:
        start = time.perf_counter()
        arm.loss(next(windows[name])).backward()
        passed = time.perf_counter()
        arm.update()
        passes[name].append(tokens / (passed - start))
        return tokens / (time.perf_counter() - start)

    steps = {name: (lambda name=name, arm=arm: turn(name, arm)) for name, arm in arms.items()}
    for name, step in steps.items():
        progress(f"{name}, first step: {tokens / step():.2f} s")
        step()
    speed = alternate(steps, rounds)
    return speed, {name: values[2:] for name, values in passes.items()}


def ratios(speed: dict[str, list[float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Every arm of ours against every published one."""
    mine = [name for name in speed if name.startswith("ours")]
    return {name: {other: ratio(speed[name], speed[other]) for other in speed if other not in mine} for name in mine}


def batches_of(vocabulary: int, batch: int, length: int) -> list[Any]:
    """Windows (batch, length + 1) of random tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (batch, length + 1), generator=generator) for _ in range(4)]


def count(model: Any) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def source_of(place: str) -> str:
    """The published program's text."""
    for path in (Path(place), Path(place) / "train_gpt.py", Path(place) / FILE):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    shown = subprocess.run(["git", "-C", place, "show", f"{COMMIT}:{FILE}"], capture_output=True, text=True)
    if shown.returncode:
        raise SystemExit(f"{place}: no published program there; {WHERE}")
    return shown.stdout


def program_of(source: str) -> Any:
    """The program as a module. It starts nothing when it is imported; what only its training needs is left out."""
    before = {name: sys.modules.get(name) for name in NOT_NEEDED}
    sys.modules.update({name: types.ModuleType(name) for name in NOT_NEEDED})  # without what is imported from them
    program = types.ModuleType("published_crawler")
    try:
        exec(compile(source, FILE, "exec", dont_inherit=True), vars(program))  # noqa: S102
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return program


def settings_of(program: Any, width: int) -> Any:
    """The program's settings for the submission at another width."""
    settings = program.Hyperparameters()
    heads = {"model_dim": width, "num_heads": width // HEAD, "num_kv_heads": width // (2 * HEAD)}
    for name, value in (SUBMISSION | heads).items():
        setattr(settings, name, value)
    return settings


def published_model(program: Any, settings: Any) -> Any:
    """The published model with seeded weights, in float32."""
    import torch

    torch.manual_seed(0)
    return program.build_model(settings, torch.device("cpu")).float().train()


def ours_of(program: Any, settings: Any, model: Any) -> Any:
    """Our model with the published one's weights."""
    from ouroboros.systems.crawler.checkpoint import to_model
    from ouroboros.systems.crawler.published import Published

    names = inspect.signature(program.CrawlerGPT).parameters
    given = {name: getattr(settings, name) for name in names}
    # The rotation is not scaled: sequences are shorter than the length from which the program scales it.
    return to_model(model.state_dict(), Published.read(given | {"keep_unconnected": True}), context=1).train()


def losses_differ(program: Any, settings: Any, model: Any, batches: Sequence[Any]) -> float:
    """How far the losses of both models are apart at most, with noise on every weight: many of them start at zero."""
    import copy

    import torch

    theirs = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        ours = ours_of(program, settings, theirs)
        return max(abs(float(our_loss(ours)(windows) - published_loss(theirs)(windows))) for windows in batches)


def our_loss(model: Any, dtype: Any = None) -> Callable[[Any], Any]:
    """Our loss of windows; without ``dtype`` in float32."""
    import torch

    def loss(windows: Any) -> Any:
        with autocast(torch.device("cpu"), dtype or torch.float32):
            return model(input_ids=windows[:, :-1], use_cache=False, targets=windows[:, 1:]).loss

    return loss


def published_loss(model: Any, dtype: Any = None) -> Callable[[Any], Any]:
    """The published loss of windows; without ``dtype`` in float32."""
    import torch

    def loss(windows: Any) -> Any:
        with autocast(torch.device("cpu"), dtype or torch.float32):
            return model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    return loss


def arms_of(program: Any, settings: Any, model: Any, *, compiled: bool) -> dict[str, Arm]:
    """Ours as it is trained here, ours in float32, and the published model in float32."""
    arms = {"ours": our_arm(program, settings, model, compiled=True)} if compiled else {}
    arms["ours, float32"] = our_arm(program, settings, model, compiled=False)
    optimizers = published_optimizers(program, settings, model)
    arms["published"] = Arm(published_loss(model), update_of(model, optimizers, settings.grad_clip_norm))
    return arms


def our_arm(program: Any, settings: Any, model: Any, *, compiled: bool) -> Arm:
    """Our model and optimisers; ``compiled`` is what ``ouroboros train`` does, precision included."""
    import torch

    from ouroboros.optim import build_optimizers
    from ouroboros.recipes import recipe
    from ouroboros.train.precision import choose_dtype, compile_blocks

    made, ours, device = recipe("crawler-published"), ours_of(program, settings, model), torch.device("cpu")
    loss = our_loss(ours)
    if compiled:
        compile_blocks(ours.model.decoder.layers, made.train, device, float("inf"))
        loss = our_loss(ours, choose_dtype(made.train, device))
    return Arm(loss, update_of(ours, build_optimizers(ours, made.optim), settings.grad_clip_norm))


def as_it_trains(source: str, width: int) -> Arm:
    """The published model as its program prepares it: masters in float32, tables and the rest in bfloat16, bfloat16
    arithmetic, a compiled model and a compiled orthogonalisation."""
    import torch

    program = program_of(source)  # of its own, because a function in it is replaced
    settings = settings_of(program, width)
    torch.manual_seed(0)
    model = program.build_model(settings, torch.device("cpu")).train()
    for module in model.modules():
        if isinstance(module, program.CastedLinear):
            module.float()
    program.restore_low_dim_params_to_fp32(model)
    program.zeropower_via_newtonschulz5 = torch.compile(program.zeropower_via_newtonschulz5)
    update = update_of(model, published_optimizers(program, settings, model), settings.grad_clip_norm)
    return Arm(published_loss(program.maybe_torch_compile(model, settings), torch.bfloat16), update)


def published_optimizers(program: Any, settings: Any, model: Any) -> list[Any]:
    """The program's three optimisers by its rule, which leaves the instructions of the loops in none."""
    import torch

    tables, matrices, scalars = [], [], []
    for name, parameter in model.named_parameters():
        control = any(pattern in name for pattern in program.CONTROL_TENSOR_NAME_PATTERNS)
        if name.startswith("loop_inst"):
            continue
        is_table = name.endswith(("emb.weight", "embed.weight"))
        group = tables if is_table else scalars if control or parameter.ndim < 2 else matrices
        group.append(parameter)

    def adam(parameters: list[Any], rate: float) -> Any:
        return torch.optim.AdamW(
            parameters,
            lr=rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.adam_eps,
            weight_decay=settings.adam_wd,
            fused=True,
        )

    muon = program.Muon(
        matrices,
        lr=settings.matrix_lr,
        momentum=settings.muon_momentum,
        backend_steps=settings.muon_backend_steps,
        weight_decay=settings.muon_wd,
    )
    return [adam(tables, settings.tied_embed_lr), muon, adam(scalars, settings.scalar_lr)]


def update_of(model: Any, optimizers: Sequence[Any], clip_norm: float) -> Callable[[], None]:
    """Clip, step and clear, as both programs do."""
    import torch

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return update


if __name__ == "__main__":
    main()
