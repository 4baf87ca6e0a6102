"""Study: what each switch and each option of OSAM is worth on the bundled text. Paired seeds, equal steps.

Parts, each with arms of its own; arms of a seed see the same text in the same order:

- ``rates``: peak learning rates of the better form and of attention; on a seed and a split of their own.
- ``starts``: starting values of the better form's gates and decays; seeds and split as above.
- ``ablations``: the published model and its switches, on characters.
- ``options``: the better form in a stack of blocks: every option left out by itself, or added by itself to the
  published form, other starting values, and two controls: no memory, and attention with as many parameters.
- ``subword``: bytes against byte-level BPE, with equal parameters, bytes seen and bytes of context.
- ``depth``: stacks of 1, 2 and 4 blocks with equal parameters.

Finished runs are kept in ``--out`` and not repeated. Each part prints one line of JSON; `docs/systems/osam.md`
tells what came out.

    python runs/osam_study.py --part options --seeds 3 --out work
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ouroboros.config.parts.osam import OsamSpec

NEVER = 256
"""``kupdate`` of no window's reach: no token but the first reads the memory, the model is the same otherwise."""
PIECE = 4096
"""Bytes that are scored of each held-out file, from its middle."""
BETTER: dict[str, Any] = {
    "detach_state": False,
    "independent_hashes": True,
    "sketch_values": False,
    "frequencies": 8,
    "decay": True,
    "normalisation": "rms",
    "gate_cap": 2.0,
    "gate_start": 0.0,
}
"""The options, with the values of the better form; the published ones are the defaults."""
TIME_SCALES = (1.25, 64.0)
"""Of the better form at the start; the published one has no decay that would use them."""
RATES = {"osam": {"lr": 1e-2}, "attention": {"lr": 1e-2}}
"""Peak rates that part ``rates`` chose."""


@dataclass(frozen=True)
class Arm:
    """A recipe, and what is done with it besides training."""

    recipe: Any
    also: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Names and mixer options with which the trained weights are scored once more."""


def main() -> None:
    """Train and score the arms of one part, and compare them seed by seed."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--part", choices=sorted(PARTS), required=True)
    options.add_argument("--steps", type=int, help="instead of the part's own")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--arms", nargs="*", help="only these")
    options.add_argument("--out", type=Path, required=True, help="working directory; finished runs in it are kept")
    chosen = options.parse_args()
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    make, steps, references = PARTS[chosen.part]
    arms = {
        name: dataclasses.replace(arm, recipe=with_train(arm.recipe, steps=chosen.steps or steps))
        for name, arm in make().items()
        if not chosen.arms or name in chosen.arms
    }
    first, split = (100, "valid") if chosen.part in ("rates", "starts") else (0, "test")
    chosen.out.mkdir(parents=True, exist_ok=True)
    done: dict[str, dict[int, dict[str, Any]]] = {}
    for seed in range(first, first + chosen.seeds):
        for name, arm in arms.items():
            for key, record in measured(chosen.part, name, arm, seed, split, chosen.out):
                done.setdefault(key, {})[seed] = record
    print(json.dumps(summary(chosen.part, done, references) | facts(chosen.out)))


def measured(part: str, name: str, arm: Arm, seed: int, split: str, out: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of one run: found in ``out``, or made now and added to it."""
    from ouroboros.config import to_json

    text = json.dumps([to_json(arm.recipe), arm.also, split], sort_keys=True)
    setting = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = out / f"{part}.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [r for r in map(json.loads, lines) if (r["run"], r["seed"], r["setting"]) == (name, seed, setting)]
    if not found:
        found = [{"run": name, "seed": seed, "setting": setting} | r for r in run(name, arm, seed, split, out)]
        with path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in found)
    for record in found:
        shown = f"{record['bits_per_byte']:.4f} bits/byte, {record['cpu_seconds']:.0f} s"
        print(part, record["arm"], seed, shown, file=sys.stderr, flush=True)
        yield record["arm"], record


def run(name: str, arm: Arm, seed: int, split: str, out: Path) -> list[dict[str, Any]]:
    """Train one arm and score it: one record, and one more for each of ``arm.also``."""
    from ouroboros.nn.osam import Osam

    start = time.process_time()
    trainer = trained(arm, seed, out)
    took = {"cpu_seconds": time.process_time() - start}
    mixers = [module for module in trainer.model.modules() if isinstance(module, Osam)]
    records = [{"arm": name} | scored(trainer, split) | took | {"memories": [describe(mixer) for mixer in mixers]}]
    for other, changes in arm.also.items():
        for mixer in mixers:
            mixer.spec = dataclasses.replace(mixer.spec, **changes)
        records.append(records[0] | {"arm": other} | scored(trainer, split))
    return records


def trained(arm: Arm, seed: int, out: Path) -> Any:
    """The trainer of one run, after its last step."""
    import torch

    from ouroboros.data.shards import prepare
    from ouroboros.model.configuration import OuroborosConfig
    from ouroboros.model.modeling import OuroborosForCausalLM
    from ouroboros.train.distributed import Workers
    from ouroboros.train.run import resolve
    from ouroboros.train.trainer import Trainer

    data = prepare(arm.recipe.data, out / f"data-{arm.recipe.data.tokenizer.replace(':', '-')}")
    recipe = resolve(with_train(arm.recipe, seed=seed), data)
    torch.manual_seed(seed)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(recipe.model, eos_token_id=data.tokenizer.eos_id))
    trainer = Trainer(recipe, model, data, Workers())
    while not trainer.done:
        trainer.step()
    return trainer


def scored(trainer: Any, split: str) -> dict[str, Any]:
    """The score on pieces of the held-out files, and what the run took."""
    from ouroboros.eval.score import score

    pieces = [middle(document) for document in trainer.data.documents(split)]
    found = score(trainer.model, trainer.data.tokenizer, pieces, window=trainer.recipe.data.sequence_length)
    c, characters = trainer.counters, sum(len(piece.decode()) for piece in pieces)
    return {
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "bits_per_byte": found.bits_per_byte,
        "nats_per_token": found.nats_per_token,
        "perplexity": math.exp(found.nats_per_token),
        "bits_per_character": found.nats / math.log(2) / characters,
        "text": found.data_sha256,
        "steps": c.step,
        "tokens": c.tokens,
        "bytes": round(c.tokens * trainer.bytes_per_token),
        "skipped": c.skipped,
        "tokens_per_second": c.tokens / c.seconds,
    }


def middle(document: bytes) -> bytes:
    """At most :data:`PIECE` bytes of whole lines from the middle of a document."""
    start = document.rfind(b"\n", 0, max(len(document) - PIECE, 0) // 2) + 1
    piece = document[start : start + PIECE]
    return piece[: piece.rfind(b"\n") + 1] or piece


def describe(mixer: Any) -> dict[str, Any]:
    """Gates, phases, frequencies and decays at the end."""
    gates = [gate.item() for gate in mixer.gates() if gate is not None]
    phases = [phase.item() for phase in mixer.phases()]
    step = mixer.q_proj.in_features // mixer.spec.frequencies
    decay, frequency = mixer.turn()
    every = {"frequency": frequency, "decay": decay}
    spread = {key: [round(x, 5) for x in v[::step].tolist()] for key, v in every.items() if v is not None}
    return {"gates": gates, "phases": phases} | spread


def summary(part: str, done: dict[str, dict[int, dict[str, Any]]], references: tuple[str, ...]) -> dict[str, Any]:
    """Means of every arm, and its differences from the arms it is compared with."""
    from ouroboros.eval.stats import mean_interval

    arms = {}
    for name, records in done.items():
        bits = {seed: record["bits_per_byte"] for seed, record in records.items()}
        arms[name] = {
            "bits_per_byte": list(bits.values()),
            "mean": {key: mean(record[key] for record in records.values()) for key in MEANS},
            "parameters": next(iter(records.values()))["parameters"],
            "steps": next(iter(records.values()))["steps"],
            "minus": {
                other: dataclasses.asdict(
                    mean_interval([bits[seed] - done[other][seed]["bits_per_byte"] for seed in bits])
                )
                for other in references
                if other in done and other != name and bits.keys() <= done[other].keys()
            },
        }
    return {"study": "osam", "part": part, "arms": arms}


MEANS = ("bits_per_byte", "nats_per_token", "perplexity", "bits_per_character", "bytes", "tokens_per_second")
"""What is shown of every arm; the last is no clean timing, for nothing else was kept off the machine."""


def mean(values: Iterator[float]) -> float:
    """The arithmetic mean."""
    found = list(values)
    return sum(found) / len(found)


def facts(out: Path) -> dict[str, Any]:
    """What was measured on: the text's hash, and the version of Python it is from."""
    from ouroboros.data.prepared import open_prepared

    data = [open_prepared(path) for path in sorted(out.glob("data-*"))]
    return {"text": data[0].manifest["sources"][0]["fingerprint"], "python": sys.version.split()[0]}


def with_mixer(recipe: Any, **changes: Any) -> Any:
    """``recipe`` with other options of its mixer."""
    model = recipe.model.replace(mixer=recipe.model.block.mixer.replace(**changes))
    return dataclasses.replace(recipe, model=model)


def with_model(recipe: Any, **changes: Any) -> Any:
    """``recipe`` with another model."""
    return dataclasses.replace(recipe, model=recipe.model.replace(**changes))


def with_train(recipe: Any, **changes: Any) -> Any:
    """``recipe`` with other training."""
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **changes))


def with_optim(recipe: Any, **changes: Any) -> Any:
    """``recipe`` with other rates."""
    return dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, **changes))


def ablations() -> dict[str, Arm]:
    """The published model on real text, one character a token, and its switches one by one."""
    from ouroboros.recipes import recipe

    base = with_mixer(recipe("osam-published"), buckets=512)
    data = dataclasses.replace(base.data, sources=("python:",), sequence_length=96)
    base = dataclasses.replace(base, data=data)
    base = with_train(base, batch_size=16, eval_every=0, compile="off", precision="fp32")
    arms = {
        "base": Arm(base),
        "no memory": Arm(with_mixer(base, kupdate=NEVER)),
        "gradients through keys and values": Arm(with_mixer(base, detach_state=False)),
        "no value path": Arm(with_mixer(base, value_path=False)),
        "phases frozen": Arm(with_mixer(base, freeze_phase=True)),
        "phases and gates at the same rate as the rest": Arm(with_optim(base, scalar_lr=base.optim.lr)),
        "corruption 0.1": Arm(with_train(base, corruption=0.1)),
        "label smoothing 0.05": Arm(with_train(base, label_smoothing=0.05)),
        "dropout 0.1": Arm(with_mixer(base, dropout=0.1)),
    }
    for every in (2, 4):
        name = f"kupdate {every}"
        arms[name] = Arm(with_mixer(base, kupdate=every), also={f"{name}, scored at 1": {"kupdate": 1}})
    return arms


def stack(mixer: str, *, blocks: int = 2, hidden: int = 64, sequence: int = 128, tokenizer: str = "bytes") -> Any:
    """A stack of blocks with feed-forward networks around the better form, or around attention of equal size."""
    from ouroboros.config import AttentionSpec, FeedForwardSpec
    from ouroboros.recipes import recipe
    from ouroboros.recipes.twin import equal_size

    plain = recipe("osam", "tiny")
    better = OsamSpec(buckets=4 * hidden, readout_hidden=hidden, time_scales=TIME_SCALES, **BETTER)
    model = plain.model.replace(
        layout=str(blocks),
        hidden_size=hidden,
        mixer=better,
        ffn=FeedForwardSpec(intermediate_size=3 * hidden),
    )
    if mixer == "attention":
        attention = AttentionSpec(num_heads=max(hidden // 32, 1))
        model = equal_size(model.replace(mixer=attention), model)
    data = dataclasses.replace(plain.data, tokenizer=tokenizer, sequence_length=sequence)
    made = dataclasses.replace(plain, model=model, data=data)
    rates = RATES[mixer]
    made = with_optim(made, embedding_lr=2 * rates["lr"], **rates)
    return with_train(made, batch_size=8, eval_every=0, compile="off", precision="fp32")


def rates() -> dict[str, Arm]:
    """Peak rates: of everything, then of the single numbers."""
    arms = {}
    for mixer in ("osam", "attention"):
        for rate in (5e-3, 1e-2, 2e-2):
            recipe = with_optim(stack(mixer), lr=rate, embedding_lr=2 * rate, scalar_lr=None)
            arms[f"{mixer}, {rate:g}"] = Arm(recipe)
    for rate in (3e-3, 5e-2, 1e-1, 2e-1):
        recipe = with_optim(stack("osam"), lr=1e-2, embedding_lr=2e-2, scalar_lr=rate)
        arms[f"osam, 0.01, scalars {rate:g}"] = Arm(recipe)
    return arms


def starts() -> dict[str, Arm]:
    """Starting values of gates and of decays; the longest time scale for windows four times as long, too."""
    arms = {}
    for sequence in (128, 512):
        recipe = stack("osam", sequence=sequence)
        recipe = with_train(recipe, batch_size=1024 // sequence)
        closed = OsamSpec().gate_start
        tried = [(closed, 4, 4096), (0.0, 4, 4096), (closed, 1.25, 64)] if sequence == 128 else []
        for gate, *scales in (*tried, (0.0, 1.25, 64), (0.0, 1.25, 256), (0.0, 1.25, 1024)):
            name = f"{sequence} bytes, gates {gate:g}, {scales[0]:g} to {scales[1]:g} tokens"
            arms[name] = Arm(with_mixer(recipe, gate_start=gate, time_scales=tuple(map(float, scales))))
    return arms


def options() -> dict[str, Arm]:
    """The better form, its options, other starting values and controls."""
    full = stack("osam")
    published = {name: getattr(OsamSpec(), name) for name in BETTER}
    arms = {
        "better": Arm(full),
        "published": Arm(with_mixer(full, **published)),
        "attention": Arm(stack("attention")),
        "no memory": Arm(with_mixer(full, kupdate=NEVER)),
    }
    for name, value in published.items():
        arms[f"better, {name} {value}"] = Arm(with_mixer(full, **{name: value}))
    arms["better, time scales 4 to 4096"] = Arm(with_mixer(full, time_scales=OsamSpec().time_scales))
    arms["better, no value path"] = Arm(with_mixer(full, value_path=False))
    for name, value in BETTER.items():
        arms[f"published, {name} {value}"] = Arm(with_mixer(full, **published | {name: value}))
    return arms


def subword() -> dict[str, Arm]:
    """Vocabularies at equal parameters; a step sees as many bytes, and a window spans as many."""
    from ouroboros.recipes.twin import equal_size

    largest, window, arms = stack("osam", tokenizer="bpe:4096"), 192, {}
    for mixer in ("osam", "attention"):
        for tokenizer, size, ratio in (("bytes", 257, 1.0), ("bpe:1024", 1024, 2.9), ("bpe:4096", 4096, 3.8)):
            recipe = stack(mixer, sequence=round(window / ratio), tokenizer=tokenizer)
            model = equal_size(dataclasses.replace(recipe.model, vocab_size=size), largest.model)
            arms[f"{mixer}, {tokenizer}"] = Arm(dataclasses.replace(recipe, model=model))
    return arms


def depth() -> dict[str, Arm]:
    """Stacks of equal parameters: fewer blocks have wider feed-forward networks."""
    from ouroboros.recipes.twin import equal_size

    arms, largest = {}, stack("osam", blocks=4)
    for mixer in ("osam", "attention"):
        for blocks in (1, 2, 4):
            recipe = stack(mixer, blocks=blocks)
            model = equal_size(recipe.model, largest.model)
            arms[f"{mixer}, {blocks} blocks"] = Arm(dataclasses.replace(recipe, model=model))
    return arms


PARTS: dict[str, tuple[Callable[[], dict[str, Arm]], int, tuple[str, ...]]] = {
    "rates": (rates, 300, ()),
    "starts": (starts, 300, ()),
    "ablations": (ablations, 200, ("base", "no memory")),
    "options": (options, 200, ("better", "published", "attention", "no memory")),
    "subword": (subword, 200, ("osam, bytes", *(f"attention, {name}" for name in ("bytes", "bpe:1024", "bpe:4096")))),
    "depth": (depth, 200, ("osam, 2 blocks", *(f"attention, {blocks} blocks" for blocks in (1, 2, 4)))),
}
"""Arms, steps, and the arms that others are compared with."""


if __name__ == "__main__":
    main()
