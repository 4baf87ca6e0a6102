"""A packed model in one file, written. The same model gives the same bytes, on every machine and for every number of
threads, as long as the version of brotli is the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ouroboros.config import ModelSpec, to_dict
from ouroboros.errors import check
from ouroboros.files import write_whole
from ouroboros.pack.artifact import MAGIC, PREFIX, VERSION, Artifact, expected_tensors
from ouroboros.pack.codec import encode_best, planes, squeeze
from ouroboros.pack.coded import Coded
from ouroboros.pack.header import DTYPES, Facts, FileEntry, Header, Section, TensorEntry, kind_of, matrix_shape

if TYPE_CHECKING:
    from ouroboros.data.tokenize import TextTokenizer


def end_of_text(model: Any) -> int | None:
    """The id that ends a text, for :func:`pack`; None where a model has none, or several."""
    found = model.config.eos_token_id
    return found if isinstance(found, int) else None


def write_artifact(
    path: Path,
    spec: ModelSpec,
    tensors: Mapping[str, Coded | Tensor],
    tokenizer: TextTokenizer | None = None,
    facts: Facts | None = None,
    *,
    eos_token_id: int | None = None,
) -> int:
    """Write what :func:`pack` makes; the file is there whole or not at all. Returns its size in bytes."""
    data = pack(spec, tensors, tokenizer, facts, eos_token_id=eos_token_id)
    write_whole(path, data)
    return len(data)


def pack(
    spec: ModelSpec,
    tensors: Mapping[str, Coded | Tensor],
    tokenizer: TextTokenizer | None = None,
    facts: Facts | None = None,
    *,
    eos_token_id: int | None = None,
) -> bytes:
    """A packed model.

    Args:
        spec: the model's specification.
        tensors: by the names in the model's ``state_dict``; the second of two tied ones may be left out, and is not
            stored.
        tokenizer: the one that the model was trained with.
        facts: what else the file tells.
        eos_token_id: as of :meth:`~ouroboros.model.configuration.OuroborosConfig.from_spec`.

    Raises:
        OuroborosError: tensors that are missing, unknown, misshapen or not finite, or a tokenizer of another size.
    """
    stored = _stored(spec, tensors)
    sections = [*_code_sections(stored), *_plain_sections(stored)]
    if tokenizer is not None:
        sections.append(_tokenizer_section(tokenizer, spec))
    placed, offset = [], 0
    for section, data in sections:
        digest = hashlib.sha256(data).hexdigest()
        placed.append(dataclasses.replace(section, offset=offset, bytes=len(data), sha256=digest))
        offset += len(data)
    header = Header(spec=to_dict(spec), eos_token_id=eos_token_id, sections=tuple(placed), facts=facts or Facts())
    text = json.dumps(to_dict(header), separators=(",", ":"), sort_keys=True, allow_nan=False)
    packed = assembled(squeeze([text.encode()])[0], b"".join(data for _, data in sections))
    Artifact(packed, "pack").tensors()  # what could not be read is not written
    return packed


def assembled(header: bytes, content: bytes) -> bytes:
    """The file of a compressed header and the sections behind it."""
    start = PREFIX.pack(MAGIC, VERSION, len(header), b"")[:16]
    return start + hashlib.sha256(start + header).digest() + header + content


def _stored(spec: ModelSpec, tensors: Mapping[str, Coded | Tensor]) -> dict[str, Coded | Tensor]:
    """The tensors that go into the file, in the model's order."""
    expected = expected_tensors(spec)
    missing = sorted(expected.keys() - tensors.keys())
    check(not missing, f"pack: tensors {', '.join(missing[:5])} are missing")
    unknown = sorted(tensors.keys() - expected.keys())
    check(len(unknown) <= spec.tie_embeddings, f"pack: the model has no tensors {', '.join(unknown[:5])}")
    for name, wanted in expected.items():
        tensor = tensors[name]
        shape = tuple(tensor.shape)
        check(shape == tuple(wanted.shape), f"pack: {name} has shape {shape}, the model's has {tuple(wanted.shape)}")
        if isinstance(tensor, Coded):
            rows, columns = matrix_shape(shape)
            check(tuple(tensor.codes.shape) == (rows, columns), f"pack: codes of {name} must be {rows} x {columns}")
        else:
            known = str(tensor.dtype).removeprefix("torch.") in DTYPES
            check(known, f"pack: {name} is {tensor.dtype}; give codes or one of {', '.join(DTYPES)}")
    return {name: tensors[name] for name in expected}


def _code_sections(tensors: Mapping[str, Coded | Tensor]) -> Iterator[tuple[Section, bytes]]:
    """Codes of one width and codec in one section, and behind them the steps of all codes."""
    scales = []
    for bits in range(2, 9):
        found = [(name, t) for name, t in tensors.items() if isinstance(t, Coded) and t.bits == bits]
        for made in encode_best([tensor.codes.cpu().numpy() for _, tensor in found], bits):
            entries = []
            for number, size in zip(made.chosen, made.sizes):
                name, tensor = found[number]
                entries.append(TensorEntry(name=name, shape=tensor.shape, groups=tensor.scales.shape[1], bytes=size))
                scales.append(tensor.scales.cpu().numpy().reshape(-1))
            yield _section(made.data, codec=made.codec, bits=bits, tensors=tuple(entries))
    if scales:
        yield _section(squeeze([planes(np.concatenate(scales))])[0])


def _plain_sections(tensors: Mapping[str, Coded | Tensor]) -> Iterator[tuple[Section, bytes]]:
    """Tensors that are stored as they are, those of one number format in one section."""
    for dtype in DTYPES:
        found = {n: t for n, t in tensors.items() if not isinstance(t, Coded) and str(t.dtype) == f"torch.{dtype}"}
        if found:
            data, sizes = squeeze([planes(_integers(tensor)) for tensor in found.values()])
            shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
            entries = [TensorEntry(name=n, shape=shape, bytes=size) for (n, shape), size in zip(shapes.items(), sizes)]
            yield _section(data, dtype=dtype, tensors=tuple(entries))


def _integers(tensor: Tensor) -> np.ndarray:
    """The numbers' bits as whole numbers of the same size, because numpy has no bfloat16."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().reshape(-1).view(kinds[tensor.itemsize]).numpy()


def _tokenizer_section(tokenizer: TextTokenizer, spec: ModelSpec) -> tuple[Section, bytes]:
    """The files that the tokenizer saves."""
    entries, model = tokenizer.vocab_size, spec.vocab_size
    check(entries == model, f"pack: the tokenizer has {entries} entries and the model a vocabulary of {model}")
    with tempfile.TemporaryDirectory(prefix="ouroboros-") as directory:
        tokenizer.save(directory)
        files = {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}
    listed = tuple(FileEntry(name=name, bytes=len(content)) for name, content in files.items())
    return _section(squeeze([b"".join(files.values())])[0], files=listed)


def _section(data: bytes, *, codec: str = "brotli", **fields: Any) -> tuple[Section, bytes]:
    """A section whose place is not known yet, and its bytes."""
    section = Section(name="", codec=codec, offset=0, bytes=len(data), sha256="", **fields)
    return dataclasses.replace(section, name=kind_of(section)), data
