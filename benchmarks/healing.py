"""Healing: tokens per second of a step of ``convert --heal`` against a plain transformers loop on the same cut model.

The donor has the shapes of SmolLM2-135M and random weights; 17 of its 30 layers are kept, and a bridge is trained.
``plain`` is what one writes at first: transformers' classes, the donor run at every step, the loss on the text and the
divergence from the donor at every position, products in bfloat16 where that is faster here. ``first`` and ``kept`` are
steps of the command, which learn at a quarter of the positions: with the donor's states computed and written, and with
them read from the disk, as every arm but the first has them. ``kept_all`` learns at every position.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import alternate, autocast, load, parser, progress, ratio, report, set_threads, spread, timed

QUICK = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
FULL = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def main() -> None:
    """Run the comparison."""
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=8, help="windows of a step")
    options.add_argument("--length", type=int, default=256, help="tokens of a window")
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads)
    batch, length = (2, 32) if chosen.quick else (chosen.batch, chosen.length)
    with tempfile.TemporaryDirectory() as place:
        dtype, steps = _steps(Path(place), chosen.quick, batch, length)
        for name, step in steps.items():
            progress(f"first step of {name}: {timed(step):.1f} s")
        rounds = chosen.rounds or (2 if chosen.quick else 7)
        speed = alternate(
            {name: (lambda step=step: batch * length / timed(step)) for name, step in steps.items()}, rounds
        )
    report(
        "healing",
        started,
        batch=[batch, length],
        precision=str(dtype).removeprefix("torch."),
        tokens_per_second={name: spread(values) for name, values in speed.items()},
        ratio_to_plain={name: ratio(values, speed["plain"]) for name, values in speed.items() if name != "plain"},
    )


def _steps(place: Path, quick: bool, batch: int, length: int) -> tuple[Any, dict[str, Callable[[], None]]]:
    """The arms, and the precision that the command chooses."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ouroboros.convert import readers
    from ouroboros.data.tokenize import byte_tokenizer

    sizes, vocabulary = (QUICK, 512) if quick else (FULL, 49_152)
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, vocab_size=vocabulary, num_hidden_layers=30, tie_word_embeddings=True)
    donor = LlamaForCausalLM(config).eval().requires_grad_(False)
    donor.save_pretrained(place / "source")
    byte_tokenizer().save(place / "source")
    lines = range(3_000 if quick else 60_000)
    (place / "text.txt").write_text("".join(f"{n} times {n % 7} is {n * (n % 7)}\n" for n in lines))
    readers.convert(place / "source", place / "out" / "donor")
    trainers = {
        "first": _trainer(place, "first", batch, length, 0.25),
        "kept": _trainer(place, "kept", batch, length, 0.25),
        "kept_all": _trainer(place, "kept", batch, length, 1.0),
    }
    dtype = trainers["kept"].dtype
    steps: dict[str, Callable[[], None]] = {"plain": _plain(donor, batch, length, vocabulary, dtype)}
    for name, trainer in trainers.items():
        again = trainer.loader.next_batch()
        trainer.loader.next_batch = lambda again=again: again

        def step(trainer: Any = trainer, forget: bool = name == "first") -> None:
            if forget:
                for path in trainer.lessons.folder.iterdir():
                    path.unlink()
            trainer.step()

        steps[name] = step
    return dtype, steps


def _trainer(place: Path, keep: str, batch: int, length: int, share: float) -> Any:
    from ouroboros.config import DataSpec, OptimSpec, Recipe, TaughtTraining, TrainSpec
    from ouroboros.convert.heal import Healing, Plan
    from ouroboros.data.shards import prepare
    from ouroboros.train.distributed import Workers
    from ouroboros.train.run import resolve
    from ouroboros.train.trainer import Trainer

    out = place / "out"
    teach = TaughtTraining(model=".", weight=0.5, states=1.0, blocks=(0, 0), share=share)
    recipe = Recipe(
        name="heal",
        data=DataSpec(sources=(str(place / "text.txt"),), sequence_length=length, tokenizer=str(out / "donor")),
        optim=OptimSpec(matrix_optimizer="adamw", lr=1e-3),
        train=TrainSpec(steps=150, batch_size=batch, teach=teach, compile="off"),
    )
    kept = tuple((layer,) for layer in (*range(8), 15, *range(22, 30)))
    (out / "heal.json").unlink(missing_ok=True)
    healing = Healing(Plan(source="x", layout="8 loop:(1)x1 8", kept=kept, recipe=recipe), out, progress)
    model = healing.cut("healed")
    made = healing.recipe("healed", model)
    folder = str(place / keep)
    teach = dataclasses.replace(made.train.teach, keep=folder)
    made = dataclasses.replace(made, train=dataclasses.replace(made.train, teach=teach))
    shutil.rmtree(out / "run", ignore_errors=True)
    data = prepare(made.data, out / "data")
    return Trainer(resolve(made, data), model, data, Workers())


def _plain(donor: Any, batch: int, length: int, vocabulary: int, dtype: Any) -> Callable[[], None]:
    import copy

    import torch
    from torch import nn
    from torch.nn import functional as F

    cut = copy.deepcopy(donor)
    layers = cut.model.layers
    cut.model.layers = nn.ModuleList([layers[n] for n in (*range(8), 15, *range(22, 30))])
    cut.config.num_hidden_layers = 17
    width = donor.config.hidden_size
    bridge = nn.Linear(2 * width, width)
    nn.init.zeros_(bridge.weight)
    before: list[Any] = []
    cut.model.layers[8].register_forward_pre_hook(lambda module, args: before.append(args[0]))

    def behind(module: Any, args: Any, output: Any) -> Any:
        z = output[0] if isinstance(output, tuple) else output
        return z + bridge(torch.cat((z, before.pop()), dim=-1))

    cut.model.layers[8].register_forward_hook(behind)
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, length + 1), generator=generator)
    inputs, targets = ids[:, :-1], ids[:, 1:]

    def step() -> None:
        with autocast(ids.device, dtype):
            with torch.no_grad():
                wanted = donor(inputs, use_cache=False).logits.float().flatten(0, 1)
            found = cut(inputs, use_cache=False).logits.float().flatten(0, 1)
        text = F.cross_entropy(found, targets.flatten())
        apart = F.kl_div(F.log_softmax(found, -1), F.log_softmax(wanted, -1), reduction="batchmean", log_target=True)
        (0.5 * text + 0.5 * apart).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
