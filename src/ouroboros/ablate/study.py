"""A study as a Python value: the question, a control, arms that change one thing each, seeds, and stages with gates."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ouroboros.ablate.changes import changed, covered, differences, fingerprint, is_field
from ouroboros.config import Recipe, fields_by_path
from ouroboros.errors import OuroborosError, check, nearest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]{0,63}")


def _check_name(what: str, name: str) -> None:
    check(
        bool(_NAME.fullmatch(name)),
        f"{what} {name!r}: a name has up to 64 letters, digits and any of _ . + = - and begins with one of the former,"
        " because a directory is called by it",
    )


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One recipe of a study."""

    name: str
    recipe: Recipe
    """Its seed is the study's, and so is its budget where a stage has one."""
    changes: tuple[str, ...] = ()
    """Dotted paths of the fields, or of groups of fields, that this arm changes, such as ``optim.lr`` or ``model``. An
    arm that changes a single field, or a single part, need not declare it; one that changes several has to."""
    late: bool = False
    """Whether the change acts only later in a run than the first steps, in which an arm that computes the same as the
    control is otherwise found and left out."""
    processes: int = 1
    """Processes that train together, started by ``torchrun``."""
    repeat: bool = False
    """Whether this is the control once more, which shows how far equal runs differ on this machine."""

    def __post_init__(self) -> None:
        _check_name("arm", self.name)
        check(self.processes >= 1, f"arm {self.name!r}: processes must be >= 1, got {self.processes}")

    @classmethod
    def changing(cls, control: Arm, name: str, changes: Mapping[str, Any]) -> Arm:
        """The control with some fields changed, all of them declared; see :func:`ouroboros.ablate.changes.changed`."""
        return cls(name=name, recipe=changed(control.recipe, changes, where=f"arm {name!r}"), changes=tuple(changes))


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The rule by which arms are promoted to the next stage, stated before the stage begins. Differences are means
    over the seeds, arm minus control in bits per byte, so that below zero is better than the control."""

    at_most: float | None = None
    """Promote arms whose difference is at most this."""
    best: int | None = None
    """Promote at most so many, those with the smallest differences."""

    def __post_init__(self) -> None:
        check(
            self.at_most is not None or self.best is not None,
            "gate: says nothing; give at_most, a difference in bits per byte, or best, a number of arms",
        )
        check(self.best is None or self.best >= 1, f"gate.best must be >= 1, got {self.best}")

    def passing(self, differences: Mapping[str, float]) -> list[str]:
        """The names that pass, in the order given.

        Args:
            differences: mean difference to the control, by the name of an arm.
        """
        ranked = sorted(differences, key=lambda name: (differences[name], name))[: self.best]
        return [n for n in differences if n in ranked and (self.at_most is None or differences[n] <= self.at_most)]

    def describe(self) -> str:
        """The rule in words."""
        words = [] if self.best is None else [f"the best {self.best}"]
        if self.at_most is not None:
            words.append(f"a difference of at most {self.at_most:+g} bits per byte")
        return f"promoted: {' with '.join(words)}"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One round of runs of equal length. At most one of ``steps``, ``tokens`` and ``minutes`` is given; without, each
    recipe has a budget of its own. Rates follow the share of the run that is done, so a short run decays its rate too.
    """

    name: str
    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    seeds: tuple[int, ...] | None = None
    """Seeds of this stage; by default the study's. Arms are chosen more honestly with other seeds than those that
    report."""
    split: Literal["valid", "test"] = "test"
    """The held-out part that scores this stage."""
    gate: Gate | None = None
    """Which arms go on to the next stage; None means all."""

    def __post_init__(self) -> None:
        _check_name("stage", self.name)
        given = self.budget
        check(len(given) <= 1, f"stage {self.name!r}: give one of steps, tokens and minutes, not {' and '.join(given)}")
        for name, value in given.items():
            check(value > 0, f"stage {self.name!r}: {name} must be > 0, got {value}")
        _check_seeds(f"stage {self.name!r}", self.seeds or (0,))
        check(self.split in ("valid", "test"), f"stage {self.name!r}: split is valid or test, not {self.split!r}")

    @property
    def budget(self) -> dict[str, Any]:
        """The length of a run as a field of ``train``; empty if each recipe has its own."""
        values = {name: getattr(self, name) for name in ("steps", "tokens", "minutes")}
        return {name: value for name, value in values.items() if value is not None}

    def recipe(self, recipe: Recipe, seed: int) -> Recipe:
        """What a run of this stage trains."""
        none: dict[str, Any] = {"steps": None, "tokens": None, "minutes": None}
        budget = none | self.budget if self.budget else {}
        return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=seed, **budget))


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How each trained model is packed, to be scored a second time. One of ``bits`` and ``budget`` is given."""

    bits: int | None = None
    """Of every matrix, 2 to 8."""
    budget: int | None = None
    """Bytes of the file."""
    mode: Literal["loop-aware", "per-call", "rounding"] = "loop-aware"
    """How codes are chosen, as of ``ouroboros pack``."""
    calibration_tokens: int = 16384
    """Tokens of the training text that the quantiser is shown."""

    def __post_init__(self) -> None:
        check((self.bits is None) != (self.budget is None), "packing: give one of bits and budget")
        check(self.bits is None or 2 <= self.bits <= 8, f"packing.bits must be 2 to 8, got {self.bits}")
        check(self.budget is None or self.budget >= 1, f"packing.budget must be >= 1, got {self.budget}")
        check(self.calibration_tokens >= 1, f"packing.calibration_tokens must be >= 1, got {self.calibration_tokens}")


def _check_seeds(what: str, seeds: tuple[int, ...]) -> None:
    check(bool(seeds), f"{what}: no seeds; give at least one, and two or more for an interval")
    odd = [seed for seed in seeds if type(seed) is not int or seed < 0]
    check(not odd, f"{what}: seeds are whole numbers from 0 on, not {odd[:1]}")
    twice = [seed for seed, count in Counter(seeds).items() if count > 1]
    check(not twice, f"{what}: seed {twice[0] if twice else ''} is there twice; equal seeds give equal runs")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, and the runs that answer it.

    Raises:
        OuroborosError: two arms or stages of one name, an arm that equals the control or another arm, an arm that
            changes several things and does not declare them, a declared field that there is not or that the arm leaves
            as it is, no budget.
    """

    name: str
    question: str
    control: Arm
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    stages: tuple[Stage, ...]
    packing: Packing | None = None
    repeats: int = 0
    """How many times the control is run again in the first stage, with the same seeds."""
    score_bytes: int | None = None
    """Score at most so many held-out bytes; None scores all."""

    def __post_init__(self) -> None:
        _check_name("study", self.name)
        check(bool(self.arms), f"study {self.name!r}: has no arms besides the control")
        check(bool(self.stages), f"study {self.name!r}: has no stages; give at least one, with its budget")
        check(self.repeats >= 0, f"study {self.name!r}: repeats must be >= 0, got {self.repeats}")
        check(self.score_bytes is None or self.score_bytes >= 1, f"study {self.name!r}: score_bytes must be >= 1")
        _check_seeds(f"study {self.name!r}", self.seeds)
        for what, names in (("arms", [a.name for a in self.every_arm]), ("stages", [s.name for s in self.stages])):
            twice = [name for name, count in Counter(names).items() if count > 1]
            check(not twice, f"study {self.name!r}: two {what} are called {twice[0] if twice else ''!r}; rename one")
        for arm in self.arms:
            self._check_changes(arm)
        for one, other in itertools.combinations(self.arms, 2):
            same = fingerprint(one.recipe) == fingerprint(other.recipe) and not (one.repeat or other.repeat)
            check(not same, f"study {self.name!r}: arms {one.name!r} and {other.name!r} are the same; leave one out")
        for stage, arm in itertools.product(self.stages, self.every_arm):
            own = [n for n in ("steps", "tokens", "minutes") if getattr(arm.recipe.train, n) is not None]
            check(
                bool(stage.budget or own),
                f"stage {stage.name!r}: no budget; give it steps, tokens or minutes (arm {arm.name!r} has none either)",
            )

    @property
    def every_arm(self) -> tuple[Arm, ...]:
        """The control, the arms, and the control's repeats."""
        again = (
            dataclasses.replace(self.control, name=f"{self.control.name}-again-{number + 1}", repeat=True)
            for number in range(self.repeats)
        )
        return (self.control, *self.arms, *again)

    def seeds_of(self, stage: Stage) -> tuple[int, ...]:
        """The seeds of a stage."""
        return self.seeds if stage.seeds is None else stage.seeds

    def _check_changes(self, arm: Arm) -> None:
        """Refuse an arm that changes nothing, or other things than it says."""
        control = self.control.recipe
        found = differences(control, arm.recipe)
        found = {p: both for p, both in found.items() if p != "train.seed" and not self._is_budget(p)}
        if arm.repeat:
            check(not found, f"arm {arm.name!r}: a repeat of the control changes {', '.join(found)}; undo that")
            return
        check(
            bool(found),
            f"arm {arm.name!r}: equals the control {self.control.name!r}, so it would answer nothing; change a field or"
            " leave it out (the control's own repeats are the study's repeats)",
        )
        for path in arm.changes:
            if not is_field(path, control, arm.recipe):
                known = fields_by_path(control)
                raise OuroborosError(f"arm {arm.name!r}: declares the unknown field {path!r}{nearest(path, known)}")
            check(
                any(covered(p, [path]) or covered(path, [p]) for p in found),
                f"arm {arm.name!r}: declares {path}, which it leaves as the control has it",
            )
        more = [path for path in found if not covered(path, arm.changes) and not _below(path, arm.changes)]
        check(
            not more or (len(found) == 1 and not arm.changes),
            f"arm {arm.name!r}: changes {', '.join(more)}"
            f"{' beside what it declares' if arm.changes else ', which are several things'}; change one thing, or"
            f" declare each in changes",
        )

    def _is_budget(self, path: str) -> bool:
        """Whether a field says how long a run is where each stage says that itself."""
        return path in ("train.steps", "train.tokens", "train.minutes") and all(stage.budget for stage in self.stages)


def _below(path: str, declared: tuple[str, ...]) -> bool:
    """Whether a declared path lies below ``path``: an option of a part whose coming or going is one difference."""
    return any(covered(other, [path]) for other in declared)
