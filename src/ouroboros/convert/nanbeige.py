"""The form of Nanbeige: a Llama whose whole stack of layers runs several times, in transformers' files and in GGUF.

A file of it says how often (``num_loops``), and whether the norm before the head is left out between the runs
(``skip_loop_final_norm``). transformers has no such class. It is given a copy that says Llama, so that it reads
configuration, weights and tokenizer of the layers, and the loops are added to what it has read.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.convert import gguf_form
from ouroboros.convert.gguf_file import finish, writer_of
from ouroboros.errors import OuroborosError, check, first_line

if TYPE_CHECKING:
    from torch import Tensor

LLAMA, NANBEIGE = gguf_form.LLAMA.name, gguf_form.NANBEIGE.name
"""The ``model_type`` of each, and the name of its architecture in GGUF."""
LOOPS, SKIPS_NORM = "num_loops", "skip_loop_final_norm"
"""What both kinds of files call the number of runs, and whether nothing is normalised between them."""
_LACKED = (
    *("qk_layernorm", "emb_neighbor_num", "ngram_insert_all_layers", "insert_ngram_layer_idx", "loop_middle_layers"),
    *("enable_double_loop_split", "loop_share_kv", "enable_depth_attention", "enable_hyper_connection", "enable_mhc"),
)
"""Settings of other models of the kind, which ask for more than a stack that is repeated."""
_BEGINNING = 1 << 16
_ARCHITECTURE = "general.architecture"
_IS_NANBEIGE = _ARCHITECTURE.encode() + struct.pack("<IQ", 8, len(NANBEIGE)) + NANBEIGE.encode()
"""How a GGUF file says so: the key, the number of the type of texts, a length and the text."""


class Place:
    """A temporary directory, which is there for as long as this value is."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="ouroboros-"))
        weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)


@dataclass(frozen=True)
class Repeated:
    """A model of this form under the name of Llama."""

    place: Place
    """Where transformers reads it."""
    loops: int
    skips_norm: bool


def is_nanbeige_gguf(path: Path) -> bool:
    """Whether the beginning of a GGUF file says that it is of this form."""
    with path.open("rb") as file:
        return _IS_NANBEIGE in file.read(_BEGINNING)


def of_directory(directory: Path, settings: Mapping[str, Any]) -> Repeated:
    """A directory of transformers whose ``config.json`` holds ``settings``.

    Raises:
        OuroborosError: they ask for what a repeated stack lacks.
    """
    for name in _LACKED:
        check(
            not settings.get(name), f"{name}: {settings.get(name)!r} is not supported; only models without it are read"
        )
    place = Place()
    for path in directory.iterdir():
        if path.name != "config.json":
            (place.directory / path.name).symlink_to(path.resolve())
    kept = {name: value for name, value in settings.items() if name not in ("auto_map", "architectures")}
    (place.directory / "config.json").write_text(json.dumps({**kept, "model_type": LLAMA}))
    return _repeated(place, settings, str(directory))


def of_gguf(path: Path) -> Repeated:
    """A GGUF file; its copy has the same name.

    Raises:
        OuroborosError: it is damaged, or does not say how often the stack runs.
    """
    import gguf

    place = Place()
    found: dict[str, Any] = {}
    try:
        reader = gguf.GGUFReader(path)
        writer = writer_of(place.directory / path.name, LLAMA)
        for name, field in reader.fields.items():
            if name.startswith("GGUF.") or name in (_ARCHITECTURE, "general.alignment"):
                continue
            value = field.contents()
            if name.startswith(f"{NANBEIGE}."):
                name = name.removeprefix(f"{NANBEIGE}.")
                found[name] = value
                name = f"{LLAMA}.{name}"
            is_list = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, value, field.types[0], field.types[-1] if is_list else None)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        finish(writer)
    except OSError as error:
        raise OuroborosError(f"{path}: cannot be copied to {place.directory}: {error.strerror or error}") from None
    except Exception as error:  # each kind of damage fails in its own way; the user needs one line
        raise OuroborosError(f"{path}: cannot be read: it is damaged or cut short ({first_line(error)})") from None
    check(LOOPS in found, f"{path}: has no {NANBEIGE}.{LOOPS}, which says how often its layers run")
    return _repeated(place, found, str(path))


def _repeated(place: Place, found: Mapping[str, Any], source: str) -> Repeated:
    loops = found.get(LOOPS, 1)
    whole = isinstance(loops, int) and not isinstance(loops, bool) and 1 <= loops <= 1000
    check(whole, f"{source}: {LOOPS} must be a whole number from 1 to 1000, and is {loops!r}")
    return Repeated(place, loops, bool(found.get(SKIPS_NORM, False)))


def repeat(theirs: Any, loops: int, *, skips_norm: bool) -> Any:
    """The Llama ``theirs`` of transformers with its stack of layers as often as ``loops`` says, which a model that was
    read in this form is compared with. Its layers are shared, so that it has no cache."""
    from torch import nn

    class Between(nn.Module):
        """The norm before the head as a layer of its own."""

        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
            """Map (B, T, D) to (B, T, D)."""
            return self.norm(hidden_states)

    inner = theirs.model
    layers = [*inner.layers]
    between = [] if skips_norm else [Between(inner.norm)]
    inner.layers = nn.ModuleList([*layers, *([*between, *layers] * (loops - 1))])
    theirs.config.num_hidden_layers = len(inner.layers)
    return theirs


def loop_state(state: Mapping[str, Tensor], loops: int) -> dict[str, Tensor]:
    """The gains of the loop part ``norm`` that normalises between runs as before the head. Behind the last run they are
    one, since the norm before the head follows, and a norm of what is normalised already changes its last digits at
    most."""
    import torch

    gain = state["model.norm.weight"]
    return {"model.decoder.loops.0.norm.weight": torch.stack([*([gain] * (loops - 1)), torch.ones_like(gain)])}
