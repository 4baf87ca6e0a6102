"""Study: of a pretrained model, is the whole or what was cut out of it better in the same number of packed bytes?

Every model is coded by GPTQ with as many bits for each weight as the number of bytes leaves it (steps are chosen for
the entropy of the codes, which the packed file follows within 1 %), and scored on held-out text. A model with half of
the weights gets twice the bits.

    python runs/packing_pretrained.py --out rows.jsonl --models whole=DONOR healed=work/seed-0/arms/healed \
        --sizes 40MB,60MB --calibration text.txt --held-out test.txt

Rows are kept in OUT, and a second call makes only those that are missing. Prints one line of JSON.
`docs/packing.md` tells what came out.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Code and score what is missing."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="file of rows")
    options.add_argument("--models", nargs="+", required=True, help="NAME=DIRECTORY of each model")
    options.add_argument("--sizes", default="40MB,60MB", help="packed sizes, separated by commas")
    options.add_argument("--calibration", type=Path, required=True, help="text that GPTQ is shown")
    options.add_argument("--held-out", type=Path, required=True, help="text to score")
    options.add_argument("--max-bytes", type=int, default=30_000, help="held-out bytes scored")
    options.add_argument("--tokens", type=int, default=8192, help="of calibration text")
    chosen = options.parse_args()
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in chosen.out.read_text().splitlines()] if chosen.out.is_file() else []
    for given in chosen.models:
        name, _, directory = given.partition("=")
        wanted = [size for size in ("whole", *chosen.sizes.split(",")) if not _has(rows, name, size)]
        for row in measured(chosen, name, directory, wanted) if wanted else ():
            rows.append(row)
            with chosen.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)
    print(json.dumps({"study": "packing_pretrained", "rows": rows}))


def _has(rows: list[dict[str, Any]], name: str, size: str) -> bool:
    return any((row["model"], row["size"]) == (name, size) for row in rows)


def measured(chosen: argparse.Namespace, name: str, directory: str, sizes: list[str]) -> Any:
    """The rows of one model: as it is (``whole``), and in each size."""
    from ouroboros.api import open_model
    from ouroboros.eval.score import score
    from ouroboros.pack.budget import parse_size
    from ouroboros.pack.calibrate import apply, quantize_model
    from ouroboros.pack.ids import text_ids
    from ouroboros.pack.plan import uniform
    from ouroboros.pack.quantize import Clip

    opened = open_model(directory)
    ids = text_ids([chosen.calibration.read_bytes()], opened.tokenizer, rows=chosen.tokens // 512, length=512)
    text = [chosen.held_out.read_bytes()]
    count = sum(parameter.numel() for parameter in opened.model.parameters())

    def bits_per_byte(model: Any) -> float:
        return score(model, opened.tokenizer, text, window=512, max_bytes=chosen.max_bytes).bits_per_byte

    for size in sizes:
        row = {"model": name, "size": size, "parameters": count}
        if size == "whole":
            yield row | {"bits_per_byte": bits_per_byte(opened.model)}
            continue
        spent = 8 * parse_size(size) / count
        if spent > 7:
            continue  # it fits with eight bits, which cost next to nothing
        # One bit more than the entropy holds what lies far out.
        plan = uniform(min(8, int(spent) + 2), clip=Clip(by="size", value=spent))
        made = quantize_model(opened.model, plan, ids, mode="per-call", allow_fallbacks=True)
        coded = [(line.entropy, made.tensors[line.name].codes.numel()) for line in made.report.values() if line.bits]
        numbers = sum(number for _, number in coded)
        model = copy.deepcopy(opened.model)
        apply(model, made.tensors)
        used = sum(bits * number for bits, number in coded) / 8 + 2 * (count - numbers)
        found = bits_per_byte(model)
        yield row | {"bits_per_byte": found, "bits_per_weight": spent, "bytes": round(used), "noted": made.exceptions}


if __name__ == "__main__":
    main()
