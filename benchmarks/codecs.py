"""Bits per code of the codecs of packed files beside general compressors and the entropy of single codes.

The matrices are those of a model directory (``--model``), or else of a seeded fresh model with rows and columns of
several sizes, rounded as ``ouroboros pack --bits`` does (``squares``), and with steps from each row's root mean square
(``sigma``), as a budget has them.
"""

from __future__ import annotations

import lzma
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import brotli
import numpy as np
import torch
from common import load, parser, progress, report, set_threads, timed

from ouroboros.pack.codec import decode, encode, encode_best
from ouroboros.pack.quantize import SQUARES, Clip, quantize


def entropy(codes: np.ndarray) -> float:
    """Bits of all codes, each by its frequency in this matrix."""
    counts = np.bincount(codes.reshape(-1).astype(int) + 128)
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())


def by_magnitude(codes: np.ndarray, axis: int) -> np.ndarray:
    """Rows (axis 0) or columns (1) in the order of their magnitude; columns become rows."""
    lines = codes if axis == 0 else codes.T
    return np.ascontiguousarray(lines[np.argsort(np.abs(lines.astype(int)).sum(1), kind="stable")])


def measure(matrices: list[np.ndarray], bits: int) -> dict[str, float]:
    """Bits per code by each way, and seconds per million codes of ours."""
    count = sum(m.size for m in matrices)
    raw = b"".join(m.tobytes() for m in matrices)

    def brotli_of(change: Callable[[np.ndarray], np.ndarray]) -> float:
        return 8 * len(brotli.compress(b"".join(change(m).tobytes() for m in matrices), lgwin=24)) / count

    def orders(axis: int) -> float:  # which order it was has to be told
        return sum(math.lgamma(m.shape[axis] + 1) for m in matrices) / math.log(2) / count

    seconds = timed(lambda: encode("range", matrices, bits))
    data, _ = encode("range", matrices, bits)
    shapes = [m.shape for m in matrices]
    back = timed(lambda: decode("range", data, shapes, bits))
    found = {
        "entropy": sum(map(entropy, matrices)) / count,
        "chosen": 8 * sum(len(part.data) for part in encode_best(matrices, bits)) / count,
        "range": 8 * len(data) / count,
        "brotli": brotli_of(lambda m: m),
        "brotli-columns": brotli_of(lambda m: np.ascontiguousarray(m.T)),
        "brotli, rows sorted": brotli_of(lambda m: by_magnitude(m, 0)) + orders(0),
        "brotli, columns sorted": brotli_of(lambda m: by_magnitude(m, 1)) + orders(1),
        "xz": 8 * len(lzma.compress(raw, preset=9)) / count,
    }
    if shutil.which("zstd"):
        command = ["zstd", "-19", "--quiet", "--stdout"]
        found["zstd"] = 8 * len(subprocess.run(command, input=raw, capture_output=True, check=True).stdout) / count
    rates = {"encode_seconds_per_million": seconds / count * 1e6, "decode_seconds_per_million": back / count * 1e6}
    return {name: round(value, 4) for name, value in {**found, **rates}.items()}


def main() -> None:
    """Measure every width and way to choose steps."""
    options = parser(__doc__)
    options.add_argument("--model", type=Path, help="a model directory whose matrices are rounded")
    options.add_argument("--most", type=int, default=4_000_000, help="numbers of the model that are taken")
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads or 1)
    if chosen.model is not None:
        from ouroboros.api import open_model

        found = [t.detach() for t in open_model(chosen.model).model.parameters() if t.ndim == 2]
    else:
        torch.manual_seed(0)
        side = 96 if chosen.quick else 768
        found = [torch.randn(side, side) * torch.rand(side, 1).add(0.5) * torch.rand(side).add(0.5) for _ in range(4)]
    matrices, count = [], 0
    for matrix in found:
        if count < chosen.most:
            matrices.append(matrix)
            count += matrix.numel()
    results = {}
    sigma = Clip(by="sigma", value=2.9)
    for bits, clip in ((8, SQUARES), (6, SQUARES), (6, sigma), (4, SQUARES)):
        name = f"{bits} bits, {clip.by}"
        results[name] = measure([quantize(m, bits, clip=clip).codes.numpy() for m in matrices], bits)
        progress(f"{name}: {results[name]}")
    report("codecs", started, codes=count, bits_per_code=results)


if __name__ == "__main__":
    main()
