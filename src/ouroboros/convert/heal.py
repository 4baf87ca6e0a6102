"""Healing: a donor that has lost layers is brought back towards what it was, and what that was worth is measured.

What stands in the directory afterwards: ``donor/``, the whole donor; ``arms/NAME/``, a run for every arm that is
trained; ``verdict.json``; and the arm that validation likes best as the model itself. Whatever interrupts a healing,
the same command goes on where it stopped.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ouroboros.config import Recipe, to_dict
from ouroboros.convert.arms import BRIDGE_TOKENS, TRAINED, Steering, trained
from ouroboros.convert.bridge import BridgeFit, fit_bridge
from ouroboros.convert.layers import Layers, listed, split
from ouroboros.convert.recursive import recursive
from ouroboros.data.masks import shown
from ouroboros.data.shards import prepare
from ouroboros.data.stream import open_loader
from ouroboros.errors import OuroborosError, check, first_line
from ouroboros.files import replacing, whole_directory, write_whole
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.model.reading import load_model
from ouroboros.schedule import parse
from ouroboros.train.begin import Source
from ouroboros.train.log import Progress
from ouroboros.train.precision import choose_device, choose_dtype
from ouroboros.train.run import resume, start
from ouroboros.train.rundir import CONFIG, WEIGHTS, RunDirectory

BRIDGE = "bridge.safetensors"
"""In the directory: the bridge that all arms begin with."""
PLAN, DONOR, ARMS, STATES = "heal.json", "donor", "arms", "states"
"""In the directory: what is being done, the whole donor, the runs, and the teacher's states while they are needed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a healing does. Two healings with the same plan do the same."""

    source: str
    """The donor as the user named it."""
    layout: str
    kept: Layers
    recipe: Recipe
    """Data, optimiser and training of every arm; its model is of no account."""
    arms: tuple[str, ...] = TRAINED
    steering: Steering = field(default_factory=Steering)
    bridge_tokens: int = BRIDGE_TOKENS
    """Tokens that the bridge is fitted to."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        values = {name: getattr(self, name) for name in ("source", "layout", "arms", "bridge_tokens")}
        recipe = {name: to_dict(getattr(self.recipe, name)) for name in ("data", "optim", "train")}
        kept = listed(self.kept)
        return json.loads(json.dumps({**values, "kept": kept, "steering": vars(self.steering), **recipe}))


class Interrupted(OuroborosError):
    """A signal stopped a run; the same command goes on."""

    def __init__(self, arm: str, reason: str | None) -> None:
        super().__init__(f"stopped by {reason} in arm {arm!r}; the same command goes on from there")
        self.reason = reason


class Healing:
    """The work of one plan in one directory. Every step that is done already is passed over.

    Args:
        plan: what to do.
        out: the directory; ``out/donor`` holds the whole donor.
        say: is given a line about every step.

    Raises:
        OuroborosError: the directory belongs to another plan, or the donor's layers do not fit it.
    """

    def __init__(self, plan: Plan, out: Path, say: Callable[[str], None]) -> None:
        self.plan, self.out, self.say = plan, out, say
        self.donor = load_model(out / DONOR).requires_grad_(False)
        nn.Module.to(self.donor, choose_device())
        self.dtype = choose_dtype(plan.recipe.train, choose_device())
        found = split(parse(plan.layout), self.donor.schedule.num_blocks)
        check(
            found.prelude > 0 and found.coda > 0,
            f"layout {plan.layout!r}: healing compares states behind the loop with the donor's, and needs blocks before"
            " it and behind it, as in '8 loop:(1)x4 8'",
        )
        self.coda = found.prelude + found.looped
        """The first block behind the loop."""
        self.layer = plan.kept[self.coda][0]
        """The donor's layer that this block is."""
        adopt(plan.to_dict(), out)

    def cut(self, arm: str) -> OuroborosForCausalLM:
        """The model of an arm before its bridge is fitted; ``cut`` is the donor's layers alone, the loop run once."""
        layout, plan = self.plan.layout, self.plan
        steering = plan.steering
        spec = self.donor.config.model_spec
        make = functools.partial(
            recursive, self.donor.state_dict(), spec, rank=steering.rank, alpha=steering.alpha, bases=steering.bases
        )
        if arm == "cut":
            return make(layout, plan.kept).with_loops(1)
        model = make(layout, plan.kept, steering.parts(arm, parse(layout).loops))
        for module in model.model.decoder.loops:
            if "gain" in module:  # pyrefly: ignore
                nn.init.zeros_(module["gain"].weight[1:])  # pyrefly: ignore  # later loops change nothing at first
        return model

    def bridged(self, arm: str) -> tuple[OuroborosForCausalLM, BridgeFit]:
        """The model of an arm with its bridge fitted: what training begins from. What steers the loop is neutral then,
        so that all arms have the same bridge, which is fitted once."""
        model = self.cut(arm)
        nn.Module.to(model, choose_device())
        path = self.out / BRIDGE
        bridge: Any = model.model.decoder.loops[0]["bridge"]  # pyrefly: ignore
        if path.is_file():
            with safe_open(path, "pt") as file:
                fit = BridgeFit(**json.loads(file.metadata()["fit"]))
                bridge.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            return model, fit
        fit = fit_bridge(model, self.donor, self._batches(), self.layer, self.dtype)
        with replacing(path) as temporary:
            save_file(bridge.state_dict(), temporary, {"fit": json.dumps(dataclasses.asdict(fit))})
        return model, fit

    def _batches(self) -> Iterator[Tensor]:
        """Windows of the training text, as many as the bridge is fitted to."""
        recipe = self.plan.recipe
        windows = training_windows(recipe, self.out, batch_size=recipe.train.batch_size, seed=recipe.train.seed)
        count = -(-self.plan.bridge_tokens // (recipe.train.batch_size * recipe.data.sequence_length))
        for ids_BT in itertools.islice(windows, max(2, count)):
            yield ids_BT[:, :-1].to(choose_device())

    def recipe(self, arm: str, model: OuroborosForCausalLM) -> Recipe:
        """How an arm is trained."""
        recipe = trained(self.plan.recipe, arm, self.plan.steering, model)
        teach = recipe.train.teach
        where: dict[str, Any] = {"model": None, "states": 0.0, "blocks": None}
        if teach.weight or teach.states:
            where = {"model": str(self.out / DONOR), "blocks": (self.coda, self.layer) if teach.states else None}
            where["keep"] = teach.keep or str(self.out / STATES)
        return dataclasses.replace(
            recipe, train=dataclasses.replace(recipe.train, teach=dataclasses.replace(teach, **where))
        )

    def train(self, arm: str, progress: Progress) -> Path:
        """Train an arm, or go on with it; returns its directory.

        Raises:
            Interrupted: a signal stopped it.
        """
        run = RunDirectory(self.out / ARMS / arm)
        if run.weights_file.is_file():
            return run.path
        if arm == "bridge":  # there is nothing to train
            with whole_directory(run.path) as work:
                self.bridged(arm)[0].save_pretrained(work)
            return run.path
        if run.is_run:
            self.say(f"{arm}: goes on")
            result = resume(run.path, progress=progress)
        else:
            model, fit = self.bridged(arm)
            self.say(
                f"{arm}: bridge fitted to {fit.tokens:,} tokens, distance to the donor's state"
                f" {fit.before:.3f} -> {fit.after:.3f}"
            )
            result = start(self.recipe(arm, model), run.path, source=Source(self.plan.source, model), progress=progress)
        if not result.finished:
            raise Interrupted(arm, result.reason)
        return run.path

    def adopt_best(self, arm: str) -> None:
        """Make the model of an arm that of the directory, its weights last, and drop what is no longer needed."""
        place = self.out / ARMS / arm
        for file in sorted((self.out / DONOR).iterdir()):  # its tokenizer, chat template and special tokens
            if file.name not in (CONFIG, WEIGHTS):
                write_whole(self.out / file.name, file.read_bytes())
        write_whole(self.out / CONFIG, (place / CONFIG).read_bytes())
        write_whole(self.out / WEIGHTS, (place / WEIGHTS).read_bytes())
        shutil.rmtree(self.out / STATES, ignore_errors=True)


def training_windows(recipe: Recipe, out: Path, *, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Windows of the training text in the order of a seed, without end, token ids (B, T + 1)."""
    data = prepare(recipe.data, out / "data")
    length = recipe.data.sequence_length
    loader = open_loader(data, batch_size=batch_size, sequence_length=length, seed=seed, rank=0, world_size=1)
    while True:
        yield torch.from_numpy(shown(loader.next_batch())[0]).long()


def adopt(settings: Mapping[str, Any], out: Path) -> None:
    """Write settings of a healing into its directory, or make sure that none of them stands there otherwise.

    Args:
        settings: :meth:`Plan.to_dict`, or what is known of it so far.
        out: the directory.

    Raises:
        OuroborosError: others stand there; names them.
    """
    path, present = out / PLAN, {}
    if path.is_file():
        try:
            present = dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise OuroborosError(f"{path}: cannot be read: {first_line(error)}") from None
    here, wanted = _flat(present), _flat(settings)
    other = [f"{name} {here[name]}, not {value}" for name, value in wanted.items() if here.get(name, value) != value]
    check(not other, f"{out} holds a healing with other settings ({'; '.join(other)}): choose another --out")
    if settings.keys() - present.keys():
        write_whole(path, (json.dumps({**present, **settings}, indent=2) + "\n").encode())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
