"""One cell of ``controller_hypotheses.py``: a tiny donor made recursive in one form, trained, and measured.

The donor is the recipe ``gpt`` with 8 blocks of width 64 and bytes as tokens. It keeps the first two and the last two
blocks and loops block 4, so blocks 2, 3 and 5 are gone. Shapes: B sequences, T positions.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.config import LoopPart
from ouroboros.config.parts.loop import BridgeSpec, LoopGainSpec, LoopNormSpec, RecurrenceGateSpec
from ouroboros.config.parts.modulated import TARGETS, ControllerSpec, StaticDiagonalsSpec
from ouroboros.convert.bases import mean_residual, truncated
from ouroboros.convert.bridge import fit_bridge
from ouroboros.convert.layers import LAYER
from ouroboros.convert.recursive import recursive
from ouroboros.data.prepared import open_prepared
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.model.reading import load_model
from ouroboros.recipes import recipe
from ouroboros.systems.controller.first import FirstGeneration
from ouroboros.train.run import start

LAYERS, LOOPED = 8, 4
KEPT = ((0,), (1,), (LOOPED,), (6,), (7,))
REMOVED = (2, 3, 5)
CODA = (3, 4)
"""Blocks of the recursive model that are the coda."""
WINDOW, BATCH = 128, 4
STYLE, ALPHA = 32, 16.0
DRAWN = (1, 2, 4)
"""The published training script draws 4, 8 or 16 and ignores the depth that it is given."""
DEPTHS = (1, 2, 4, 8)
TEXTS = ("in", "out")
"""Held-out text of the kind that is trained on, and of another kind."""
CONTROLS = ("other", "zero", "constant")
"""What the Controller sees instead of the state: that of another text, nothing, or the mean over all texts."""
PENALTY, WARMUP = 0.01, 0.1


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is trained; the defaults are the published form with labels that are shifted once, in float32."""

    form: Literal["published", "ours", "refiner"] = "published"
    """``ours`` has a bridge and gains in place of norm and gate; a refiner keeps the whole donor."""
    steering: Literal["controller", "static", "none"] = "controller"
    depth: int = 2
    rank: int = 8
    rate: float = 3e-3
    """Peak learning rate; 0 trains nothing."""
    ahead: Literal[1, 2] = 1
    """How far ahead of a position its label is; the published program shifts labels twice."""
    gate: Literal["trained", "fixed", "none"] = "trained"
    norm: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of all parameters and of the optimiser's state."""
    drawn: bool = False
    """Draw the depth of every update and ignore ``depth``, as the published script does."""
    coda: bool = False
    """Train the coda too."""
    bases: Literal["removed", "own", "random"] = "removed"
    """Made of the removed layers; of the looped layer alone; random directions with the same singular values."""
    start: Literal["b_zero", "saddle"] = "b_zero"
    """Of a refiner: one factor of its additions is zero at the start, or both are, as published."""
    seed: int = 0

    @property
    def name(self) -> str:
        """What differs from the defaults, for a file's name."""
        changed = [f"{f.name}-{getattr(self, f.name)}" for f in dataclasses.fields(self) if self._changed(f)]
        return "_".join(changed)

    def _changed(self, field: dataclasses.Field[Any]) -> bool:
        return field.name == "seed" or getattr(self, field.name) != field.default


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is computed."""

    donor_steps: int
    updates: int
    windows: int
    """Windows of each held-out text that are scored."""
    max_bytes: int
    """Of each text that are read."""


def write_texts(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Python files as two texts: code without its docstrings, and the docstrings."""
    code, prose = [], []
    for path in files:
        source = path.read_text(encoding="utf-8", errors="replace")
        lines, tree = source.splitlines(keepends=True), ast.parse(source)
        for node in ast.walk(tree):
            kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                prose.append(text + "\n\n")
                first = node.body[0]
                for number in range(first.lineno - 1, first.end_lineno or first.lineno):
                    lines[number] = ""
        code.append("".join(lines))
    folder.mkdir(parents=True, exist_ok=True)
    found = [folder / "code.txt", folder / "docstrings.txt"]
    for file, parts in zip(found, (code, prose), strict=True):
        file.write_text("".join(parts), encoding="utf-8")
    return found


class Bench:
    """The donor and its texts, which every cell shares.

    Args:
        out: directory; the donor's run is kept in it.
        texts: the text to heal on, and the other one.
        sizes: how much is computed.
    """

    def __init__(self, out: Path, texts: list[Path], sizes: Sizes) -> None:
        self.sizes, run = sizes, out / "donor"
        if not (run / "model.safetensors").is_file():
            plain = recipe("gpt", "tiny")
            sources = tuple(str(path.absolute()) for path in texts)
            plain = dataclasses.replace(
                plain,
                model=dataclasses.replace(plain.model, layout=str(LAYERS)),
                data=dataclasses.replace(
                    plain.data, sources=sources, sequence_length=WINDOW, max_bytes=sizes.max_bytes
                ),
                train=dataclasses.replace(
                    plain.train, steps=sizes.donor_steps, eval_every=0, checkpoint_every=0, compile="off"
                ),
            )
            start(plain, run)
        self.donor = nn.Module.to(load_model(run), torch.float32).requires_grad_(False).eval()
        self.tensors, self.spec = self.donor.state_dict(), self.donor.config.model_spec
        data = open_prepared(run / "data")
        self.train_ids = data.tokens("train", 0)
        self.held_out = {
            "valid": self._windows(data.tokens("valid", 0)),
            **{text: self._windows(data.tokens("test", number)) for number, text in enumerate(TEXTS)},
        }

    def _windows(self, ids: np.ndarray) -> Tensor:
        """Windows (B, T + 2) spread evenly over a text."""
        starts = np.linspace(0, len(ids) - WINDOW - 2, self.sizes.windows).astype(int)
        return torch.from_numpy(np.stack([ids[at : at + WINDOW + 2] for at in starts]).astype(np.int64))

    def batches(self, seed: int, count: int) -> Iterator[Tensor]:
        """Windows (B, T + 2) of the training text, the same for all cells of a seed."""
        draw = np.random.default_rng(seed)
        for _ in range(count):
            starts = draw.integers(len(self.train_ids) - WINDOW - 2, size=BATCH)
            ids = np.stack([self.train_ids[at : at + WINDOW + 2] for at in starts])
            yield torch.from_numpy(ids.astype(np.int64))

    @torch.no_grad()
    def losses(
        self, model: OuroborosForCausalLM, loops: int | None = None, texts: tuple[str, ...] = ("valid", *TEXTS)
    ) -> dict[str, float]:
        """Mean nats of held-out texts, by ``TEXT next`` (the next token) and ``TEXT two`` (the one behind it)."""
        found = {}
        for text in texts:
            ids_BT = self.held_out[text]
            logits = model(ids_BT[:, :-2], use_cache=False, loops=loops).logits.float()
            for metric, ahead in (("next", 1), ("two", 2)):
                labels = ids_BT[:, ahead : ahead + WINDOW]
                found[f"{text} {metric}"] = float(F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
        return found

    def cut(self, depth: int = 1) -> OuroborosForCausalLM:
        """The kept layers alone, with the looped one applied ``depth`` times."""
        return recursive(self.tensors, self.spec, f"2 loop:(1)x{depth} 2", KEPT)

    def model(self, cell: Cell) -> OuroborosForCausalLM:
        """The model of a cell before it is trained."""
        torch.manual_seed(cell.seed)
        if cell.form == "refiner":
            return self._refiner(cell)
        steering: dict[str, tuple[LoopPart, ...]] = {
            "controller": (
                ControllerSpec(rank=cell.rank, style=STYLE, pooling="all", norm=False)
                if cell.form == "published"
                else ControllerSpec(rank=cell.rank, style=STYLE),
            ),
            "static": (StaticDiagonalsSpec(rank=cell.rank),),
            "none": (),
        }
        parts = steering[cell.steering]
        if cell.form == "ours":
            parts += (LoopGainSpec(form="channel"), BridgeSpec())
        else:
            parts += (LoopNormSpec(eps=1e-6),) if cell.norm else ()
            parts += (RecurrenceGateSpec(),) if cell.gate != "none" else ()
        layout = f"2 loop:(1)x{cell.depth} 2"
        made = recursive(self.tensors, self.spec, layout, KEPT, parts, rank=cell.rank, alpha=ALPHA)
        if cell.bases != "removed":
            self._other_bases(made, cell)
        if cell.form == "ours":
            with torch.no_grad():  # later loops change nothing at first
                made.get_parameter("model.decoder.loops.0.gain.weight")[1:] = 0
            batches = (ids[:, :-2] for ids in self.batches(1000 + cell.seed, max(2, self.sizes.updates // 2)))
            fit_bridge(made, self.donor, batches, KEPT[CODA[0]][0])
        return made

    def _refiner(self, cell: Cell) -> OuroborosForCausalLM:
        sizes: dict[str, Any] = {"rank": 4, "alpha": 8.0, "bases": 2, "divisor": 8, "state": 32, "steps": 16}
        sizes |= {"confidence": 0, "hidden": 32, "style": 16, "rows": cell.depth, "start": cell.start}
        rows = None if cell.gate == "none" else cell.depth
        spec = FirstGeneration(depth=cell.depth, norm_rows=rows, **sizes).refiner(self.spec)
        made = OuroborosForCausalLM(OuroborosConfig.from_spec(spec))
        made.load_state_dict(self.tensors, strict=False)
        return made.eval()

    @torch.no_grad()
    def _other_bases(self, model: OuroborosForCausalLM, cell: Cell) -> None:
        for name, module in model.named_modules():
            if ".bases." in name:
                target = name.rpartition(".")[2]
                place = "self_attn" if "self_attn" in name else "mlp"
                A, B = module.A, module.B  # pyrefly: ignore
                if cell.bases == "own":
                    own = truncated(-self.tensors[f"{LAYER}{LOOPED}.{place}.{target}.weight"], cell.rank)
                    A.copy_(own.A)
                    B.copy_(own.B)
                else:
                    A.copy_(torch.linalg.qr(torch.randn_like(A).T).Q.T)
                    B.copy_(torch.linalg.qr(torch.randn_like(B)).Q * B.norm(dim=0))

    def run(self, cell: Cell) -> dict[str, float]:
        """Train a cell and measure it."""
        model = self.model(cell)
        _freeze(model, cell)
        if cell.precision == "bfloat16":
            nn.Module.to(model, torch.bfloat16)
        found = self._train(model, cell) if cell.rate else {}
        model.eval().requires_grad_(False)
        found |= self.losses(model)
        found |= _traces(model)
        if cell.drawn:
            for depth in DEPTHS:
                found |= {f"depth {depth} {name}": loss for name, loss in self.losses(model, depth, ("in",)).items()}
        elif cell.steering == "controller" and cell.form != "refiner" and cell.rate:
            for how in CONTROLS:
                with misled(model, how):
                    losses = self.losses(model, texts=("in",))
                    found |= {f"{how} {name}": loss for name, loss in losses.items()}
        return found

    def _train(self, model: OuroborosForCausalLM, cell: Cell) -> dict[str, float]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=cell.rate, betas=(0.9, 0.95), weight_decay=PENALTY)
        updates = self.sizes.updates
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, functools.partial(share_of_rate, updates=updates))
        depths = np.random.default_rng(cell.seed)
        model.train()
        for ids_BT in self.batches(cell.seed, updates):
            loops = int(depths.choice(DRAWN)) if cell.drawn else None
            labels = ids_BT[:, cell.ahead : cell.ahead + WINDOW]
            logits = model(ids_BT[:, :-2], use_cache=False, loops=loops).logits.float()
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
        return {"trained": sum(p.numel() for p in parameters), "train": loss.item()}

    def cosines(self) -> dict[str, dict[str, float]]:
        """Of every map the cosine of the mean residual, which bases are made of, with the looped layer's weight times
        -1 and with the mean of the removed weights; and that of the removed weights with one another."""
        found = {}
        for target in TARGETS:
            place = "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            weights = [self.tensors[f"{LAYER}{number}.{place}.{target}.weight"] for number in range(LAYERS)]
            gone = [weights[number] for number in REMOVED]
            residual = mean_residual(gone, weights[LOOPED])
            pairs = [_cosine(a, b) for i, a in enumerate(gone) for b in gone[i + 1 :]]
            found[target] = {
                "with the looped layer, negative": _cosine(residual, -weights[LOOPED]),
                "with the mean of removed layers": _cosine(residual, torch.stack(gone).mean(0)),
                "removed layers with one another": sum(pairs) / len(pairs),
            }
        return found


def share_of_rate(update: int, updates: int) -> float:
    """The share of the peak rate: a linear rise, then half a cosine, counted in updates."""
    warmup = max(1, round(WARMUP * updates))
    if update < warmup:
        return (update + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(1, updates - warmup)))


def _freeze(model: OuroborosForCausalLM, cell: Cell) -> None:
    """Leave what the cell trains with a gradient: loop parts, bases of refiners, the coda where it is asked for."""
    coda = tuple(f"{LAYER}{block}." for block in CODA) if cell.coda else ()
    for name, parameter in model.named_parameters():
        wanted = ".loops." in name and not (cell.gate == "fixed" and ".gate." in name)
        wanted = wanted or (cell.form == "refiner" and ".bases." in name) or name.startswith(coda or ("-",))
        parameter.requires_grad_(wanted)


def _traces(model: OuroborosForCausalLM) -> dict[str, float]:
    """How far parameters are from their start: the norm's gains from 1 and from one another, the gate's bias from -2,
    the Controller's last maps from 0; and how many numbers the gate has."""
    found, named = {}, dict(model.named_parameters())
    steering = {name.partition(".loops.0.")[2]: p.float() for name, p in named.items() if ".loops.0." in name}
    if "norm.weight" in steering:
        gains = steering["norm.weight"]
        found["gain moved"] = float((gains - 1).abs().max())
        found["gain spread"] = float(gains.std(0).mean()) if len(gains) > 1 else 0.0
    if "gate.proj.bias" in steering:
        found["gate moved"] = float((steering["gate.proj.bias"] + 2).abs().max())
        found["gate numbers"] = sum(p.numel() for name, p in steering.items() if name.startswith("gate."))
    heads = [p for name, p in steering.items() if ".heads" in name]
    if heads:
        found["heads moved"] = float(max(p.abs().max() for p in heads))
    return found


@contextlib.contextmanager
def misled(model: OuroborosForCausalLM, how: str) -> Iterator[None]:
    """Within the context the Controller sees something else than the state, see :data:`CONTROLS`."""
    module: Any = model.model.decoder.loops[0]["controller"]  # pyrefly: ignore
    hand = module.hand

    def wrong(x_BTD: Tensor, visit: Any, loop: int) -> Any:
        seen = {"other": x_BTD.roll(1, 0), "zero": torch.zeros_like(x_BTD)}
        seen["constant"] = x_BTD.mean((0, 1)).expand_as(x_BTD)
        return hand(seen[how], visit, loop)

    module.hand = wrong
    try:
        yield
    finally:
        del module.hand


def _cosine(left: Tensor, right: Tensor) -> float:
    return float(F.cosine_similarity(left.flatten(), right.flatten(), dim=0))
