"""Checkpoint files of published systems: where they lie, and how they are read without running code."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.errors import OuroborosError, check, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.data.tokenize import TextTokenizer
    from ouroboros.model.modeling import OuroborosForCausalLM

PICKLES = (".pth", ".pt", ".bin")
SUFFIXES = (*PICKLES, ".safetensors")
"""Files that :func:`read` reads."""
IN_DIRECTORY = ("model.safetensors", "pytorch_model.bin")
"""Files of weights that transformers writes into a model directory; the first one present is read."""
SUPPORTED = (
    f"give a published checkpoint: a file of weights ({', '.join(SUFFIXES)}) or a directory with"
    f" {' or '.join(IN_DIRECTORY)}"
)


def published_name(name: str) -> str:
    """``name`` without the prefix that saving a compiled model adds, to the whole of it or to a part."""
    return name.replace("_orig_mod.", "")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint file holds."""

    path: Path
    """The file of weights."""
    content: Mapping[str, Any]
    """Its dictionary: tensors and plain containers, nothing that runs."""

    @property
    def names(self) -> list[str]:
        """The published names of its tensors, in alphabetical order; they may stand in an entry ``state_dict``."""
        tensors = self.content.get("state_dict", self.content)
        return sorted(published_name(str(name)) for name in tensors) if isinstance(tensors, Mapping) else []

    def has(self, beginning: str) -> bool:
        """Whether a tensor's name begins so, which tells one system's checkpoints from another's."""
        return any(name.startswith(beginning) for name in self.names)

    def tensors(self) -> dict[str, Tensor]:
        """The content as tensors under their :func:`published_name`; an entry that is something else is refused."""
        from torch import Tensor

        for name, value in self.content.items():
            check(
                isinstance(value, Tensor),
                f"entry {name!r} is a {type(value).__name__}, not a tensor: save the tensors alone",
            )
        return {published_name(name): value for name, value in self.content.items()}

    def settings(self, file: Path | None, missing: str) -> tuple[Path, dict[str, Any]]:
        """Where the settings of the model lie, in ``file`` or in ``config.json`` beside the weights, and what they say.

        ``missing`` ends the message that there is no such file; one that holds no JSON object is refused too.
        """
        path = self.path.with_name("config.json") if file is None else file
        check(path.is_file(), f"{path} is missing{missing}")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OuroborosError(f"settings {path}: cannot be read: {first_line(error)}") from None
        check(isinstance(found, dict), f"settings {path}: holds a {type(found).__name__}, not an object of settings")
        return path, found


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published checkpoint as a model of this library."""

    model: OuroborosForCausalLM
    sizes: dict[str, Any]
    """Sizes and settings under their published names."""
    summary: str
    """The most important of them as text."""
    tokenizer: TextTokenizer | None = None
    """The checkpoint's own tokenizer, if it has one; once it is written, the one that stands beside the model."""
    system: str = ""
    """The system's name, for people, once it is written."""


def read(path: Path) -> Checkpoint:
    """The dictionary in a published checkpoint, a file of weights or a directory with one; tensors on the CPU.

    ``.safetensors`` holds numbers only. A ``.pth`` file is a pickle, which in general runs code when it is read; here
    torch's restricted reader (``weights_only=True``) admits tensors and plain containers and refuses everything else,
    and nothing else in this library reads a pickle. Large files are mapped into memory, not copied. What is no such
    file, is damaged or holds anything but a dictionary with names is an error.
    """
    import torch
    from safetensors.torch import load_file

    if path.is_dir():
        found = [path / name for name in IN_DIRECTORY if (path / name).is_file()]
        parts = "".join(f" ({part.name}): save them as one" for part in sorted(path.glob("*.index.json")))
        check(bool(found), f"{path}: its weights are not in one file{parts}; {SUPPORTED}")
        path = found[0]
    check(path.is_file() and path.suffix in SUFFIXES, f"{path}: no such file of weights; {SUPPORTED}")
    try:
        if path.suffix in PICKLES:
            mapped = zipfile.is_zipfile(path)  # files of the old format cannot be
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)  # noqa: TID251
        else:
            content = load_file(path)
    except Exception as error:  # reading a damaged or foreign file can fail in any way; the user needs one line
        reason = "it holds more than tensors, and reading it could run code" if "weights_only" in str(error) else ""
        raise OuroborosError(f"{path}: cannot be read: {reason or first_line(error)}") from None
    named = isinstance(content, Mapping) and bool(content) and all(isinstance(name, str) for name in content)
    check(named, f"{path}: holds no dictionary of tensors; {SUPPORTED}")
    return Checkpoint(path=path, content=content)
