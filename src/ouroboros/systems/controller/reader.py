"""Published checkpoints of all generations as models of this library.

A checkpoint holds what was trained, by its published names; the pretrained model that it stands on is the *donor*.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.convert.checkpoint import Checkpoint, Published
from ouroboros.convert.readers import Option, Reader
from ouroboros.convert.tensors import shape_of
from ouroboros.errors import check, nearest
from ouroboros.systems.controller import SYSTEM
from ouroboros.systems.controller.first import FirstGeneration
from ouroboros.systems.controller.published import Published as Settings

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.convert.donors import Donor
    from ouroboros.data.tokenize import TextTokenizer

SETTINGS = {"n_prelude": int, "recurrent_layer": int, "n_coda": int, "depth": int, "alpha": float, "adaptive": bool}
"""What ``config.json`` may say and tensors do not, by published names."""
MOST_STEPS = 64
"""That tokens take in the published program, where they halt."""
SIZES = {"rank": "rank", "style_dim": "style"}
"""What it may say besides and must agree with the tensors; ours by the published name."""
STATIC, HEADS, BASES = "static_diags", "controller.target_heads.", "controller.heads."
"""What names begin with in checkpoints of static diagonals, of the published Controller and of the first generation."""
OF_SPLIT = ("n_prelude", "recurrent_layer", "n_coda")


def convert(
    checkpoint: Checkpoint,
    *,
    donor: Path | None = None,
    config: Path | None = None,
    depth: int | None = None,
    eos_token_id: int | None = None,
) -> Published:
    """What the reader does (:class:`~ouroboros.convert.readers.Reader`), with the donor's tokenizer.

    Raises:
        OuroborosError: no donor, or one that is not read; settings that are unknown or do not fit; tensors that do not
            belong together or not to the donor.
    """
    from ouroboros.convert import donors
    from ouroboros.systems.controller.checkpoint import SHARED, first_to_model, to_model

    check(donor is not None, "a checkpoint holds what was trained alone: give the pretrained model with --donor DIR")
    found = donors.find(Path(donor))  # pyrefly: ignore
    check(found is not None, f"--donor {donor}: is no pretrained model of another library")
    assert found is not None
    own = _tensors(checkpoint)
    values = _settings(checkpoint, config)
    if depth is not None:
        values["depth"] = depth
    halts = bool(values.get("adaptive"))
    values.setdefault("depth", MOST_STEPS if halts else Settings.depth)
    first = any(name.startswith(BASES) for name in own)
    settings = _first(own, values) if first else _second(own, values)
    check(not halts or settings.halt_hidden is not None, "config: adaptive is true, and there is no halting network")
    settings = settings if halts else dataclasses.replace(settings, halt_hidden=None)
    for theirs, ours in SIZES.items():
        asked, actual = values.get(theirs), getattr(settings, ours)
        check(asked in (None, actual), f"config: {theirs} is {asked}, and the tensors have {actual}")
    whole = donors.read(found).model
    state = {name.replace("model.decoder.", "model."): tensor for name, tensor in whole.state_dict().items()}
    spec, end = whole.config.model_spec, whole.config.eos_token_id if eos_token_id is None else eos_token_id
    make: Any = first_to_model if first else to_model
    model = make(state, own, spec, settings, eos_token_id=end)
    shared = any(name.startswith(SHARED) for name in own)
    form = "shared block" if shared else "refiner" if first else "static diagonals" if STATIC in own else "Controller"
    layout = model.model.spec.layout
    return Published(
        model=model,
        sizes={"form": form, "layout": layout, "rank": settings.rank, "alpha": settings.alpha},
        summary=f"{form}, layout {layout!r}, rank {settings.rank}, on {found.source}",
        tokenizer=None if eos_token_id is not None else _tokenizer(found, spec.vocab_size),
    )


def _tokenizer(donor: Donor, entries: int) -> TextTokenizer | None:
    """The donor's tokenizer, if its directory has one."""
    from ouroboros.data.tokenize import TOKENIZER_FILES

    present = donor.gguf is not None or any((donor.directory / name).is_file() for name in TOKENIZER_FILES)
    return donor.tokenizer().padded(entries) if present else None


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of the file, of its entry ``state_dict`` if it has one; not finite ones are refused."""
    inner = checkpoint.content.get("state_dict")
    held = dataclasses.replace(checkpoint, content=inner) if isinstance(inner, Mapping) else checkpoint
    own = held.tensors()
    for name, tensor in own.items():
        check(bool(tensor.isfinite().all()), f"tensor {name!r} holds NaN or infinity")
    return own


def _settings(checkpoint: Checkpoint, config: Path | None) -> dict[str, Any]:
    """What ``config.json`` beside the weights, or the file that was given, says; nothing if there is none."""
    if config is None and not checkpoint.path.with_name("config.json").is_file():
        return {}
    path, values = checkpoint.settings(config, ": give another with --config")
    known = {**SETTINGS, **dict.fromkeys(SIZES, int)}
    for name, value in values.items():
        check(name in known, f"settings {path}: unknown {name!r}{nearest(name, known)}")
        kinds = {bool: "true or false", int: "a whole number", float: "a number"}
        fits = type(value) is known[name] or (known[name] is float and type(value) is int)
        check(fits, f"settings {path}: {name} must be {kinds[known[name]]}, got {value!r}")
    return values


def _first(own: Mapping[str, Tensor], values: Mapping[str, Any]) -> FirstGeneration:
    """Sizes of the first generation; the prelude and coda are all that stands before the last layer, or nothing."""
    for name in OF_SPLIT:
        check(name not in values, f"config: {name} is for checkpoints with prelude and coda, and this one has none")
    return FirstGeneration.of(own, **{name: values[name] for name in ("depth", "alpha") if name in values})


def _second(own: Mapping[str, Tensor], values: Mapping[str, Any]) -> Settings:
    """Sizes of the published system."""
    given = dict(zip(OF_SPLIT, ("prelude", "looped", "coda"), strict=True)) | {"depth": "depth", "alpha": "alpha"}
    settings: dict[str, Any] = {ours: values[name] for name, ours in given.items() if name in values}
    settings["norm_steps"] = shape_of(own, "step_norm.weights", 2)[0]
    if STATIC in own:
        settings["static_rows"], _, settings["rank"] = shape_of(own, STATIC, 3)
    else:
        settings["steps"], settings["style"] = shape_of(own, "controller.step_embed.weight", 2)
        settings["rank"], _ = shape_of(own, f"{HEADS}q_proj.weight", 2)
    for name in ("halter.0.bias", "halter.net.0.bias"):
        if name in own:
            settings["halt_hidden"] = shape_of(own, name, 1)[0]
    return Settings(**settings)


READER = Reader(
    system=SYSTEM.title,
    recognises=lambda checkpoint: any(checkpoint.has(beginning) for beginning in (STATIC, HEADS, BASES)),
    convert=convert,
    options={
        "donor": Option(
            Path,
            "the pretrained model that the checkpoint stands on: a transformers directory or a GGUF file. Its layers"
            " and its tokenizer are taken.",
        ),
        "config": Option(
            Path,
            "a JSON file with n_prelude, recurrent_layer, n_coda, depth and alpha, where they are others than published"
            " (8, 18, 8, 8 and 16), and adaptive, true where tokens halt; by default config.json beside the weights, if"
            " it is there.",
        ),
        "depth": Option(int, "how often the layer is applied, in place of that of the settings."),
    },
)
