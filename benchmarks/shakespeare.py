"""tinyshakespeare: bits per byte of ``train loop`` after a few minutes, and of nanoGPT's documented CPU command.

``--text FILE`` is the text; its first nine tenths are for training, the last tenth is scored, every byte once. With
``--peer DIR``, a checkout of nanoGPT, its command for a CPU runs for as long in the same run: characters, AdamW, a
context of 64; its score is the mean over random windows of the same last tenth, as it prints it.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import load, parser, progress, report

TOKENIZER = "bpe:512"
"""The text is short: a larger vocabulary has too little of each entry."""


def main() -> None:
    """Run the comparison."""
    options = parser(__doc__)
    options.add_argument("--text", type=Path, help="tinyshakespeare, 1.1 MB of ASCII")
    options.add_argument("--peer", type=Path, help="a checkout of nanoGPT")
    options.add_argument("--minutes", type=float, default=2.3)
    chosen = options.parse_args()
    started = load()
    with tempfile.TemporaryDirectory() as folder:
        text = chosen.text or _stand_in(Path(folder))
        minutes = 0.05 if chosen.quick else chosen.minutes
        found = {"ouroboros": _ours(Path(folder), text, minutes, chosen.quick)}
        if chosen.peer is not None:
            found["nanogpt"] = _peer(Path(folder), chosen.peer, text, minutes)
        if len(found) == 2:
            found["difference"] = round(found["ouroboros"]["bits_per_byte"] - found["nanogpt"]["bits_per_byte"], 3)
        report("shakespeare", started, minutes=minutes, text_bytes=text.stat().st_size, **found)


def _stand_in(folder: Path) -> Path:
    """A text for a smoke test where none is given: this file."""
    path = folder / "text.txt"
    path.write_text(Path(__file__).read_text(encoding="utf-8") * 8, encoding="utf-8")
    return path


def _split(text: Path) -> tuple[bytes, bytes]:
    content = text.read_bytes()
    cut = int(0.9 * len(content))
    return content[:cut], content[cut:]


def _ours(folder: Path, text: Path, minutes: float, quick: bool) -> dict[str, float]:
    """``train loop`` as a user would call it, then ``eval``."""
    for name, part in zip(("train.txt", "held-out.txt"), _split(text), strict=True):
        (folder / name).write_bytes(part)
    command = [sys.executable, "-m", "ouroboros.cli"]
    made = ["--size", "tiny"] if quick else ["--data.tokenizer", TOKENIZER]
    training = ["train", "loop", "--data", folder / "train.txt", "--out", folder / "run", "--minutes", str(minutes)]
    begun = time.perf_counter()
    _run([*command, *training, *made, "--train.eval-every", "0"])
    seconds = time.perf_counter() - begun
    scored = _run([*command, "eval", folder / "run", "--data", folder / "held-out.txt", "--stride", "64", "--json"])
    return {"bits_per_byte": round(json.loads(scored)["bits_per_byte"], 4), "seconds": round(seconds, 1)}


def _peer(folder: Path, checkout: Path, text: Path, minutes: float) -> dict[str, float]:
    """nanoGPT's command of its README for a CPU, stopped after as many minutes, its schedule made to fit them."""
    work = folder / "peer"
    shutil.copytree(checkout, work, ignore=shutil.ignore_patterns(".git"))
    _prepare_peer(work / "data" / "shakespeare_char", text)
    shape = ["--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0"]
    fixed = ["--device=cpu", "--compile=False", "--log_interval=10", "--always_save_checkpoint=False", *shape]

    def train(steps: int, validations: int) -> str:
        steps_given = [f"--max_iters={steps}", f"--lr_decay_iters={steps}", f"--eval_interval={steps}"]
        script = ["train.py", "config/train_shakespeare_char.py", *fixed, *steps_given, f"--eval_iters={validations}"]
        return _run([sys.executable, *script], cwd=work)

    begun = time.perf_counter()
    train(40, 1)
    start_up = time.perf_counter() - begun
    begun = time.perf_counter()
    train(240, 1)
    step = max(time.perf_counter() - begun - start_up, 0.1) / 200
    steps = max(100, int(60 * minutes / step))
    progress(f"nanoGPT: {step * 1000:.0f} ms a step, {steps} steps")
    begun = time.perf_counter()
    output = train(steps, 200)
    losses = re.findall(r"val loss ([0-9.]+)", output)
    return {
        "bits_per_byte": round(float(losses[-1]) / math.log(2), 4),
        "steps": steps,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def _prepare_peer(folder: Path, text: Path) -> None:
    """What its ``prepare.py`` makes: ids of characters, in two files, and the characters."""
    import numpy as np

    parts = [part.decode("ascii") for part in _split(text)]
    characters = sorted(set("".join(parts)))
    numbers = {character: index for index, character in enumerate(characters)}
    for name, part in zip(("train.bin", "val.bin"), parts, strict=True):
        np.array([numbers[character] for character in part], dtype=np.uint16).tofile(folder / name)
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": numbers}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def _run(command: list, **options: object) -> str:
    done = subprocess.run([os.fspath(word) for word in command], capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"{command[:4]}: {done.stderr[-800:]}")
    return done.stdout


if __name__ == "__main__":
    main()
