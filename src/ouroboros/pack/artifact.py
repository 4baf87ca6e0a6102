"""A packed model in one file, read: see docs/concepts/packed-file.md.

The file begins with 48 bytes: the magic, the version and the length of the header (little-endian, 4 bytes each), and
the sha256 of those 16 bytes and the header. The header (:mod:`ouroboros.pack.header`) is JSON compressed by brotli.
Sections follow, each with its own sha256 in the header: codes by their bits and codec, the steps of all codes, tensors
that are stored as they are, and the files of the tokenizer. Nothing in it is run, and nothing is looked for elsewhere.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ouroboros.config import ModelSpec, from_dict
from ouroboros.errors import OuroborosError, check, first_line
from ouroboros.pack.codec import decode, expand, from_planes
from ouroboros.pack.coded import Coded
from ouroboros.pack.header import LARGEST_HEADER, Header, Section, parse_header
from ouroboros.schedule import parse

MAGIC = b"OUROPACK"
VERSION = 1
PREFIX = struct.Struct("<8sII32s")
T = TypeVar("T")
_VISITS = 10_000
_MEND = "get the file anew, or pack the model again"


def expected_tensors(spec: ModelSpec) -> dict[str, Tensor]:
    """The tensors that a model of ``spec`` is made of, by name, without their content; of tied ones the first."""
    from ouroboros.model.configuration import OuroborosConfig
    from ouroboros.model.modeling import OuroborosForCausalLM

    with torch.device("meta"):
        model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec))
    first = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


class Artifact:
    """A packed file that is whole: header and checksums are right. What sections hold is checked when it is read.

    Args:
        source: the file, or its content.
        where: what errors call it; by default its path.

    Raises:
        OuroborosError: it is no packed file, of another version, cut off, altered, or claims what cannot be.
    """

    def __init__(self, source: Path | bytes, where: str = "") -> None:
        self._source, self.where = source, where or str(source if isinstance(source, Path) else "packed file")
        try:
            self.size = len(source) if isinstance(source, bytes) else source.stat().st_size
            prefix = self._read(0, PREFIX.size)
        except OSError as error:
            raise OuroborosError(f"{self.where}: cannot read: {error.strerror}") from None
        instead = "give a run directory, a transformers directory or a packed model"
        check(prefix[: len(MAGIC)] == MAGIC, f"{self.where} is a file; {instead}, which this is not")
        check(len(prefix) == PREFIX.size, f"{self.where}: cut off after {self.size} bytes; {_MEND}")
        _, version, length, digest = PREFIX.unpack(prefix)
        check(version == VERSION, f"{self.where}: version {version} of the format; this library reads {VERSION}")
        self._begin = PREFIX.size + length
        place = f"{self.where}: header"
        check(
            length <= LARGEST_HEADER and self._begin <= self.size,
            f"{place}: {length:,} bytes are more than a header or this file has; {_MEND}",
        )
        packed = self._read(PREFIX.size, length)
        check(hashlib.sha256(prefix[:16] + packed).digest() == digest, f"{place}: damaged (sha256 differs); {_MEND}")
        self.header: Header = parse_header(_at(place, expand, packed, LARGEST_HEADER), self.size - self._begin, place)
        for section in self.header.sections:
            self._content(section)

    def _read(self, offset: int, length: int) -> bytes:
        if isinstance(self._source, bytes):
            return self._source[offset : offset + length]
        with self._source.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def _content(self, section: Section) -> bytes:
        """The bytes of a section, as they were written."""
        data = self._read(self._begin + section.offset, section.bytes)
        check(
            hashlib.sha256(data).hexdigest() == section.sha256,
            f"{self.where}: section {section.name!r}: damaged (sha256 differs); {_MEND}",
        )
        return data

    @functools.cached_property
    def spec(self) -> ModelSpec:
        """The model's specification.

        Raises:
            OuroborosError: there is no such model, or its size cannot be that of the file's tensors.
        """
        values, entries, place = self.header.spec, self.header.tensors, f"{self.where}: header: spec"
        # The layout comes first: of a million blocks, even the specification would take long to make.
        check(isinstance(values.get("layout"), str), f"{place}: layout: expected text, got {values.get('layout')!r}")
        schedule = _at(f"{place}: layout", parse, values["layout"])
        blocks, visits = schedule.num_blocks, sum(s.num_blocks * s.loops for s in schedule.segments)
        check(blocks <= len(entries), f"{place}: {blocks:,} blocks and {len(entries):,} tensors")
        check(visits <= _VISITS, f"{place}: {visits:,} visits; a packed model has up to {_VISITS:,}")
        spec = _at(place, from_dict, ModelSpec, values)
        table, numbers = spec.vocab_size * spec.hidden_size, sum(entry.numbers for _, entry in entries)
        check(table <= numbers, f"{place}: an embedding of {table:,} numbers where all tensors have {numbers:,}")
        eos = self.header.eos_token_id
        check(eos is None or 0 <= eos < spec.vocab_size, f"{self.where}: header: eos_token_id: no token {eos}")
        return spec

    def tensors(self) -> dict[str, Coded | Tensor]:
        """Every tensor of the model by name, as it is stored.

        Raises:
            OuroborosError: names the section and tensor that are damaged or not of the model.
        """
        expected = _at(f"{self.where}: header: spec", expected_tensors, self.spec)
        entries = {entry.name: entry for _, entry in self.header.tensors}
        for names, problem in ((expected.keys() - entries, "missing"), (entries.keys() - expected, "unknown")):
            check(not names, f"{self.where}: header: tensors {', '.join(sorted(names)[:5])} {problem}; {_MEND}")
        for section, entry in self.header.tensors:
            wanted, place = expected[entry.name], f"{self.where}: section {section.name!r}: tensor {entry.name!r}"
            check(
                entry.shape == tuple(wanted.shape), f"{place}: shape {entry.shape} for {tuple(wanted.shape)}; {_MEND}"
            )
            whole = section.dtype == "int64"
            check(whole != wanted.is_floating_point(), f"{place}: {section.name} for numbers of {wanted.dtype}")
        scales = self._scales()
        found: dict[str, Coded | Tensor] = {}
        for section in self.header.sections:
            if section.bits is not None:
                found |= self._coded(section, scales)
            elif section.dtype is not None:
                found |= self._plain(section, section.dtype)
        return found

    def weights(self) -> dict[str, Tensor]:
        """Every tensor of the model by name, as numbers; codes become float32. Errors as of :meth:`tensors`."""
        return {name: t.dense() if isinstance(t, Coded) else t for name, t in self.tensors().items()}

    def _scales(self) -> Tensor:
        """The steps of all codes, float16, in the order of the codes."""
        count = sum(
            entry.matrix[0] * entry.groups for section, entry in self.header.tensors if section.bits is not None
        )
        section = self.header.section("scales")
        if section is None:
            check(count == 0, f"{self.where}: section 'scales' is missing, which codes need; {_MEND}")
            return torch.empty(0, dtype=torch.float16)
        place = f"{self.where}: section 'scales'"
        raw = _at(place, expand, self._content(section), 2 * count)
        check(len(raw) == 2 * count, f"{place}: holds {len(raw):,} bytes in place of {2 * count:,}; {_MEND}")
        scales = torch.from_numpy(from_planes(raw, np.dtype(np.float16)))
        check(bool(scales.isfinite().all()), f"{place}: holds NaN or infinity; pack the model again")
        return scales

    def _coded(self, section: Section, scales: Tensor) -> dict[str, Coded]:
        """The tensors of a section of codes."""
        place, data, bits = f"{self.where}: section {section.name!r}", self._content(section), section.bits or 0
        matrices = _at(place, decode, section.codec, data, [entry.matrix for entry in section.tensors], bits)
        before = (e.matrix[0] * e.groups for s, e in self.header.tensors if s.offset < section.offset)
        begin, found = sum(before), {}
        for entry, matrix in zip(section.tensors, matrices):
            steps = scales[begin : begin + entry.matrix[0] * entry.groups].reshape(entry.matrix[0], entry.groups)
            begin += steps.numel()
            found[entry.name] = Coded(codes=torch.from_numpy(matrix), scales=steps, bits=bits, shape=entry.shape)
        return found

    def _plain(self, section: Section, dtype: str) -> dict[str, Tensor]:
        """The tensors of a section that are stored as they are."""
        place, kind = f"{self.where}: section {section.name!r}", getattr(torch, dtype)
        size = kind.itemsize
        raw = _at(place, expand, self._content(section), sum(size * entry.numbers for entry in section.tensors))
        found, begin = {}, 0
        for entry in section.tensors:
            part = raw[begin : begin + size * entry.numbers]
            begin += size * entry.numbers
            check(len(raw) >= begin, f"{place}: ends within tensor {entry.name!r}; {_MEND}")
            numbers = torch.from_numpy(from_planes(part, np.dtype(f"i{size}"))).view(kind).reshape(entry.shape)
            check(bool(numbers.isfinite().all()), f"{place}: tensor {entry.name!r} holds NaN or infinity")
            found[entry.name] = numbers
        return found

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of the tokenizer by name, none where the file holds no tokenizer."""
        section = self.header.section("tokenizer")
        if section is None:
            return {}
        size = sum(file.bytes for file in section.files)
        raw = _at(f"{self.where}: section 'tokenizer'", expand, self._content(section), size)
        check(len(raw) == size, f"{self.where}: section 'tokenizer': holds {len(raw):,} bytes in place of {size:,}")
        found, begin = {}, 0
        for file in section.files:
            found[file.name] = bytes(raw[begin : begin + file.bytes])
            begin += file.bytes
        return found


def _at(place: str, call: Callable[..., T], *arguments: Any) -> T:
    """What ``call`` returns for ``arguments``; whatever it raises becomes one line that begins with ``place``."""
    try:
        return call(*arguments)
    except OuroborosError as error:
        raise OuroborosError(f"{place}: {error}") from None
    except Exception as error:  # a hostile specification fails wherever it is first used
        raise OuroborosError(f"{place}: cannot be used: {first_line(error)}; {_MEND}") from error
