"""``ouroboros convert SOURCE --out DIR``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ouroboros.errors import check
from ouroboros.registry import found, load
from ouroboros.verbs.heal import NESTED, HealOptions, heal, refuse_without_heal
from ouroboros.verbs.options import collect, emit_json, log_to_stderr, parse, quiet_transformers, say


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions(HealOptions):
    """Options of every conversion; those of single systems come from their readers."""

    source: tyro.conf.Positional[Path]
    """A pretrained model (Llama, Mistral, Qwen2, Qwen3, Gemma 3): its transformers directory, its GGUF file, or its
    name on the hub. Or a published checkpoint: a .pth, .pt, .bin or .safetensors file of its tensors, or a directory
    with one. With --to it is a run or model directory of this library."""
    out: Path
    """Model directory to write; it must be new or empty. With --to it is the file to write."""
    tokenizer: Path | None = None
    """Directory of the tokenizer that the model was trained with (GPT-2's for the published ones), which is copied to
    the model. A pretrained model's own is copied without."""
    no_tokenizer: tyro.conf.FlagCreatePairsOff[bool] = False
    """Pretrained models: write the model without a tokenizer."""
    layout: str | None = None
    """Pretrained models: how blocks follow each other, for example '2 (1)x2 2'; by default the model's own layers in
    order. With --heal by default one layer that runs twice, between the first and the last quarter of the layers."""
    keep: str | None = None
    """Pretrained models: for each block of the layout in order the layer that it takes, for example 0-1,3,4-5; 2+3 is
    one block, the mean of layers 2 and 3. The others are left out."""
    init: Literal["selected", "stepwise", "averaged"] | None = None
    """Pretrained models, instead of --keep: how the blocks of the layout's loop are made of the layers between its
    prelude and its coda, which are the first and the last layers: those neighbours that lose least on --held-out text,
    evenly spaced ones, or means of equal groups."""
    json: bool = False
    """Print one JSON object."""


def _all_options(nested: bool) -> tuple[type[ConvertOptions], list[str]]:
    """The class of all options, and the names of those that readers bring; systems may share one.

    Args:
        nested: whether the specifications of a healing are among them, which are hundreds of options.
    """
    from ouroboros.convert.readers import readers

    known, own = readers(), {}
    for reader in known:
        for name, option in reader.options.items():
            text = f"{reader.system[0].upper()}{reader.system[1:]}: {option.help}"
            own[name] = (option.type, f"{own[name][1]} {text}" if name in own else text)
    to = "The other way round: write a checkpoint that the program of this published system loads."
    choice: Any = Literal  # a type checker wants its values spelt out, and they are found
    fields: dict[str, tuple[Any, str]] = {**own, "to": (choice[tuple(found("writers"))], to)}
    names = ", ".join(reader.system for reader in known)
    made = dataclasses.make_dataclass(
        "AllOptions",
        [
            *((name, Annotated[kind | None, tyro.conf.arg(help=text)], None) for name, (kind, text) in fields.items()),
            *(_nested() if nested else ()),
        ],
        bases=(ConvertOptions,),
        namespace={
            "__doc__": "Make a model directory of a pretrained model, or of a published checkpoint, told by its"
            f" content: {names}.\n\nWith --heal, the options --optim.*, --train.* and --data.* of `ouroboros train` are"
            " options here too; `ouroboros convert --heal --help` lists them."
        },
        frozen=True,
        kw_only=True,
    )
    return made, list(own)


def _nested() -> Iterator[tuple[str, Any, Any]]:
    """The specifications of a healing as fields."""
    for name, value in NESTED.items():
        kind: Any = type(value)
        kind = Annotated[kind, tyro.conf.arg(name="data")] if name == "text" else kind
        yield name, kind, dataclasses.field(default=value)


def convert(arguments: Sequence[str]) -> int:
    """The verb ``convert``."""
    brief = bool({"-h", "--help"} & {*arguments}) and "--heal" not in arguments
    cls, own = _all_options(nested=not brief)
    options: Any = parse(cls, "convert", collect(collect(arguments, "--data"), "--held-out"))
    log_to_stderr()
    quiet_transformers()
    about_reading = ("tokenizer", "no_tokenizer", "layout", "keep", "init")
    given = {name: getattr(options, name) for name in (*own, *about_reading)}
    given["held_out"] = [Path(name) for name in options.held_out] or None
    if options.to is not None:
        for name, value in given.items():
            option = f"--{name.replace('_', '-')}"
            check(value is None or value is False, f"{option} is about reading a model: leave it out with --to")
        check(not options.heal, "--heal is about reading a model: leave it out with --to")
        refuse_without_heal(options)
        return _export(options)
    if options.heal:
        for name in own:
            check(getattr(options, name) is None, f"--{name} is about published checkpoints: leave it out with --heal")
        return heal(options)
    refuse_without_heal(options)
    held_out = [Path(name) for name in options.held_out]
    check(len(held_out) < 2, "convert: --init selected measures on one --held-out text: give one")
    given["held_out"] = held_out[0] if held_out else None
    from ouroboros.convert import readers

    made = readers.convert(options.source, options.out, **given)
    parameters = sum(p.numel() for p in made.model.parameters())
    if options.json:
        facts = {"out": str(options.out), "parameters": parameters, "tokenizer": made.tokenizer is not None}
        emit_json({"source": str(options.source), "system": made.system, **made.sizes, **facts})
    else:
        say(f"{options.out}: {made.system}, {parameters:,} parameters, {made.summary}")
    return 0


def _export(options: Any) -> int:
    """The way back: a trained model for a published program.

    An entry of the registry's place ``writers`` is a function of the model, its tokenizer and the path. It writes the
    file whole or not at all and returns the facts that ``--json`` prints: the name ``system``, and numbers.
    """
    from ouroboros.api import open_model

    opened = open_model(options.source)
    facts = load(found("writers")[options.to])(opened.model, opened.tokenizer, options.out)
    if options.json:
        emit_json({"source": str(options.source), "out": str(options.out), **facts})
    else:
        counts = ", ".join(f"{value:,} {name}" for name, value in facts.items() if name != "system")
        say(f"{options.out}: a checkpoint of {facts['system']}'s published program, {counts}")
    return 0
