"""Checkpoints: directories of safetensors and JSON that are either complete or not there.

``ROOT/step-00000123/`` is written as a hidden sibling, flushed to the disk, marked complete by ``COMPLETE.json`` (size
and sha256 of every file, written last) and renamed into place. A process killed at any instant leaves the earlier
checkpoints as they were and at most a hidden directory that :func:`retain` removes. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ouroboros.errors import OuroborosError, check
from ouroboros.files import flush, remove_leftovers, sha256_of, temporary_sibling, whole_directory
from ouroboros.nn.aligned import aligned

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MARKER = "COMPLETE.json"

_CHECKPOINT = re.compile(r"step-(\d{8,})")
_REPLACED = re.compile(r"\.step-(\d{8,})\.old-\d+")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    step: int
    documents: dict[str, Any] = field(repr=False)
    """The JSON documents given to :func:`save`, by file name."""

    def tensors(self, name: str, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
        """Read the tensors of one file, for example ``model.safetensors``, onto ``device``.

        Raises:
            OuroborosError: the checkpoint has no such file.
        """
        from safetensors.torch import load_file

        path = self.path / name
        if not path.is_file():
            raise OuroborosError(f"{self.path}: has no file {name}")
        return {name: aligned(tensor) for name, tensor in load_file(path, device=str(device)).items()}


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is: ``ROOT/step-00000123``."""
    return root / f"step-{step:08d}"


def save(
    root: Path,
    step: int,
    *,
    files: Mapping[str, Mapping[str, torch.Tensor]],
    documents: Mapping[str, Any],
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint completely or not at all. The same content gives the same bytes.

    Args:
        root: the directory of checkpoints, made if missing.
        step: optimiser steps done.
        files: tensors by file name, for example ``{"model.safetensors": {...}}``. Tensors must not share memory.
        documents: JSON values by file name, for example ``{"state.json": {...}}``.
        extra: writes further files (tokenizer) into the directory it is given.

    Returns:
        The checkpoint's directory. One of the same step that was there before is replaced.

    Raises:
        OuroborosError: the disk is full or not writable, a value is not JSON, tensors share memory. Nothing is left
            behind, and earlier checkpoints are untouched.
    """
    target = checkpoint_path(root, step)
    try:
        with whole_directory(target, seal=lambda work: _seal(work, step, sorted(documents))) as work:
            for name in sorted(files):
                _write_tensors(work / name, files[name])
            for name in sorted(documents):
                (work / name).write_bytes(_json_bytes(documents[name], name))
            if extra is not None:
                extra(work)
    except OSError as error:
        raise OuroborosError(
            f"cannot save checkpoint {target}: {error.strerror or error}; earlier checkpoints are untouched"
        ) from error
    return target


def verify(path: Path, *, quick: bool = False) -> list[str]:
    """Everything wrong with the checkpoint at ``path``, one line each, naming the file; empty if it is good.

    A ``quick`` look compares the sizes of files and not their content.
    """
    try:
        return _file_problems(path, _read_marker(path), quick)
    except OuroborosError as error:
        return [str(error)]


def _file_problems(path: Path, marker: dict[str, Any], quick: bool = False) -> list[str]:
    """What differs between the files and the marker."""
    problems = []
    for name, expected in marker["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != expected["size"]:
                problems.append(f"{file}: has {size} bytes instead of {expected['size']}")
            elif not quick and sha256_of(file) != expected["sha256"]:
                problems.append(f"{file}: content was altered (sha256 differs)")
        except OSError as error:
            problems.append(f"{file}: {error.strerror or error}")
    return problems


def load(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, verified.

    Raises:
        OuroborosError: what is wrong with it.
    """
    marker = _read_marker(path)
    problems = _file_problems(path, marker)
    check(not problems, "; ".join(problems))
    documents = {name: json.loads((path / name).read_bytes()) for name in marker["documents"]}
    return Checkpoint(path=path, step=marker["step"], documents=documents)


def load_newest(root: Path) -> Checkpoint:
    """The newest good checkpoint under ``root``; a damaged newer one is skipped with a warning that says why.

    Raises:
        OuroborosError: there is none (the message says what is wrong with each), or the newest was written by a later
            version.
    """
    faults = []
    for path in candidates(root):
        try:
            return load(path)
        except UnsupportedVersion:
            raise
        except OuroborosError as error:
            logger.warning("DAMAGED CHECKPOINT, falling back to the one before it: %s", error)
            faults.append(str(error))
    if faults:
        raise OuroborosError(f"{root}: no good checkpoint: {'; '.join(faults)}")
    raise OuroborosError(f"{root}: no checkpoint there; the run stopped before its first one, so start it again")


def retain(root: Path, keep_last: int, *kept_steps: int | None) -> list[Path]:
    """Remove checkpoints that are neither among the newest ``keep_last`` nor of one of ``kept_steps``.

    Nothing is removed unless one that stays passes :func:`verify`, so the last good one always stays. Damaged ones
    do not count and are left for inspection. Leftovers of interrupted saves are removed; the caller holds the run's
    lock, so no other live process of this run has any.

    Returns:
        The checkpoints removed.
    """
    remove_leftovers(root)
    for path in candidates(root):
        if _REPLACED.fullmatch(path.name) and not verify(checkpoint_path(root, _step(path))):
            shutil.rmtree(path, ignore_errors=True)
    whole = [path for path in candidates(root) if not verify(path, quick=True)]
    kept = whole[: max(keep_last, 1)] + [path for path in whole if _step(path) in kept_steps]
    surplus = [path for path in whole if path not in kept]
    if surplus and all(verify(path) for path in kept):
        logger.warning("%s: every checkpoint to keep is damaged, so no older one is removed", root)
        return []
    for path in surplus:
        # Renamed first: a removal that is interrupted must not leave something that looks like a checkpoint.
        leftover = temporary_sibling(checkpoint_path(root, _step(path)))
        try:
            path.rename(leftover)
            shutil.rmtree(leftover)
        except OSError as error:
            logger.warning("cannot remove old checkpoint %s: %s", path, error.strerror or error)
    return surplus


class UnsupportedVersion(OuroborosError):
    """A checkpoint of a later format than this version reads."""


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    try:
        # One metadata key only: several would be written in random order.
        save_file({name: tensors[name].detach().contiguous() for name in sorted(tensors)}, path, {"format": "pt"})
    except RuntimeError as error:  # tensors that share memory
        reason = " ".join(str(error).split("A potential way")[0].split())
        raise OuroborosError(f"cannot save {path.name}: {reason}") from error


def _json_bytes(value: Any, name: str) -> bytes:
    """Canonical JSON: sorted keys, ASCII, no NaN."""
    try:
        return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")
    except (TypeError, ValueError) as error:
        raise OuroborosError(f"{name} is not JSON: {error}") from None


def _seal(directory: Path, step: int, documents: list[str]) -> None:
    """Write the marker of a directory whose files are on the disk."""
    entries = {
        file.relative_to(directory).as_posix(): {"size": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(p for p in directory.rglob("*") if p.is_file())
    }
    body = {"format_version": FORMAT_VERSION, "step": step, "documents": documents, "files": entries}
    (directory / MARKER).write_bytes(_marker_bytes(body))
    flush(directory / MARKER)


def _marker_bytes(body: dict[str, Any]) -> bytes:
    """The marker of ``body``, with a checksum of itself."""
    own = hashlib.sha256(_json_bytes(body, MARKER)).hexdigest()
    return _json_bytes({**body, "sha256": own}, MARKER)


def _read_marker(path: Path) -> dict[str, Any]:
    """The marker of the checkpoint at ``path``, checked against its own checksum and the directory's name."""
    file = path / MARKER
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise OuroborosError(f"{file}: incomplete checkpoint: {error.strerror or error}") from None
    body: dict[str, Any] = {}
    try:
        body = {key: value for key, value in json.loads(raw).items() if key != "sha256"}
        intact = raw == _marker_bytes(body)
    except (ValueError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise OuroborosError(f"{file}: content was altered (its own checksum differs)")
    if body.get("format_version") != FORMAT_VERSION:
        raise UnsupportedVersion(
            f"{path}: checkpoint format {body.get('format_version')}, this version of ouroboros reads {FORMAT_VERSION};"
            " use the version that wrote it"
        )
    if body["step"] != _step(path):
        raise OuroborosError(f"{path}: the directory's name does not match the step inside, {body['step']}")
    for name in body["files"]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise OuroborosError(f"{file}: file name {name!r} leaves the directory")
    return body


def _step(path: Path) -> int:
    match = _CHECKPOINT.fullmatch(path.name) or _REPLACED.fullmatch(path.name)
    return int(match[1]) if match else -1


def candidates(root: Path) -> list[Path]:
    """Directories that may be checkpoints, newest first; one that was being replaced comes after its replacement."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _step(path) >= 0 and path.is_dir()]
    return sorted(found, key=lambda path: (_step(path), not path.name.startswith(".")), reverse=True)
