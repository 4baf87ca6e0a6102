"""Runs a healing arm by arm and scores every arm on held-out text; what is scored already is read again."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ouroboros.convert.heal import ARMS, DONOR, Healing
from ouroboros.convert.verdict import CONTROLS, ArmResult, misled
from ouroboros.data.tokenize import TextTokenizer, load_tokenizer
from ouroboros.eval.score import Score, data_hash, score
from ouroboros.files import write_whole
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.model.reading import load_model
from ouroboros.optim import chosen_matrices, left_out_parameters, parameter_roles, untrained_parameters
from ouroboros.train.log import Progress
from ouroboros.train.rundir import RunDirectory

SCORES = "scores"
SAMPLE_TOKENS = 48
SPEED_TOKENS, SPEED_TURNS = 24, 3
DESCRIPTIONS = {
    "donor": "the whole pretrained model",
    "cut": "the layers that are kept, nothing else",
    "bridge": "with an affine map behind the loop, fitted in closed form",
    "healed": "the bridge trained on",
    "low-rank": "the bridge and low-rank additions to all kept layers trained",
    "norms": "the bridge and the norms and biases of all kept layers trained",
    "static": "the bridge and learned diagonals for each loop trained",
    "controller": "the bridge and a Controller of the state trained",
    "controller, shuffled": "the same, but the Controller sees the state of another token",
    "controller, constant": "the same, but the Controller sees the mean of all states",
}


class Judge:
    """Scores the arms of a healing.

    Args:
        healing: the work.
        texts: held-out documents by the name of their text.
        max_bytes: of each text that are scored.
    """

    def __init__(self, healing: Healing, texts: Mapping[str, Sequence[bytes]], max_bytes: int) -> None:
        self.healing, self.texts, self.max_bytes = healing, texts, max_bytes
        self.tokenizer: TextTokenizer = load_tokenizer(healing.out / DONOR)
        self.held_out = {"max_bytes": max_bytes, **{name: data_hash(documents) for name, documents in texts.items()}}
        """What a score belongs to."""

    def run(self, progress: Progress) -> list[ArmResult]:
        """Train and score every arm: donor, cut, bridge, the arms of the plan, and the Controller's controls.

        Raises:
            OuroborosError: training or scoring failed, or a signal stopped it.
        """
        healing = self.healing
        found = [self._scored(arm, lambda arm=arm: self.model_of(arm)) for arm in ("donor", "cut")]
        found.append(self._scored("bridge", lambda: healing.bridged("healed")[0]))
        for arm in healing.plan.arms:
            healing.train(arm, progress)
            if arm == "bridge":  # scored already
                continue
            found.append(self._scored(arm, lambda arm=arm: self.model_of(arm)))
            for how in CONTROLS if arm == "controller" else ():
                found.append(self._scored(f"{arm}, {how}", lambda arm=arm: self.model_of(arm), how))
        return found

    def model_of(self, arm: str) -> OuroborosForCausalLM:
        """The model of an arm as it is compared."""
        if arm == "donor":
            return self.healing.donor
        return self.healing.cut("cut") if arm == "cut" else load_model(self.healing.out / ARMS / arm)

    def _scored(self, arm: str, model_of: Any, how: str | None = None) -> ArmResult:
        """The result of an arm, read if it is there."""
        name = arm.replace(", ", "-")
        path = self.healing.out / SCORES / f"{name}.json"
        if (known := _read(path, self.held_out)) is not None:
            return known
        self.healing.say(f"{arm}: is scored")
        model = model_of().to(next(self.healing.donor.parameters()).device)
        amp = None if self.healing.dtype == torch.float32 else self.healing.dtype
        window = self.healing.plan.recipe.data.sequence_length
        scores: dict[str, Score] = {}
        for text, documents in self.texts.items():
            options: dict[str, Any] = {"window": window, "max_bytes": self.max_bytes, "model_name": arm, "amp": amp}
            if how is None:
                scores[text] = score(model, self.tokenizer, documents, **options)
            else:
                with misled(model, how):
                    scores[text] = score(model, self.tokenizer, documents, **options)
        facts: dict[str, Any] = {} if how else self._speed(model)
        result = ArmResult(
            name=arm,
            description=DESCRIPTIONS[arm],
            parameters=sum(p.numel() for p in model.parameters()),
            scores=scores,
            **facts,
            **self._of_run(arm, model),
        )
        path.parent.mkdir(exist_ok=True)
        write_whole(path, (json.dumps({"held_out": self.held_out, **_to_json(result)}) + "\n").encode())
        return result

    def _of_run(self, arm: str, model: OuroborosForCausalLM) -> dict[str, Any]:
        """What the run of an arm tells; of a bridge alone what was fitted."""
        run = RunDirectory(self.healing.out / ARMS / arm)
        if arm == "bridge":
            return {"trained": {"bridge": sum(p.numel() for n, p in model.named_parameters() if ".bridge." in n)}}
        if not run.is_run:
            return {}
        counters = run.state()["counters"]
        return {
            "trained": trained_numbers(model, run),
            "minutes": counters["seconds"] / 60,
            "valid_bits_per_byte": counters["valid_bits_per_byte"],
        }

    def _speed(self, model: OuroborosForCausalLM) -> dict[str, float]:
        """How fast the model writes greedily: in turns with the donor, because a machine's speed changes by the minute;
        medians after a first turn that does not count."""
        document = next(iter(self.texts.values()))[0]

        def seconds(one: OuroborosForCausalLM) -> float:
            start = time.perf_counter()
            self.continued(one, document, SPEED_TOKENS)
            return time.perf_counter() - start

        turns = [(seconds(self.healing.donor), seconds(model)) for _ in range(SPEED_TURNS + 1)][1:]
        return {
            "tokens_per_second": SPEED_TOKENS / statistics.median(own for _, own in turns),
            "against_donor": statistics.median(donor / own for donor, own in turns),
        }

    @torch.no_grad()
    def continued(self, model: OuroborosForCausalLM, document: bytes, tokens: int = SAMPLE_TOKENS) -> tuple[str, str]:
        """The beginning of a document, and how the model goes on greedily."""
        ids = np.asarray(self.tokenizer.encode(document[:2000]))[:24]
        given = torch.from_numpy(ids.astype(np.int64))[None].to(next(model.parameters()).device)
        whole: Any = model
        made = whole.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        text = [self.tokenizer.decode(part.tolist()) for part in (given[0], made[0, given.shape[1] :])]
        return bytes(text[0]).decode("utf-8", "replace"), bytes(text[1]).decode("utf-8", "replace")


def trained_numbers(model: OuroborosForCausalLM, run: RunDirectory) -> dict[str, int]:
    """How many numbers a run has trained, by what they belong to: a loop part, low-rank additions, norms."""
    recipe = run.read_recipe()
    never = left_out_parameters(model, recipe.optim) | untrained_parameters(model)
    added = recipe.train.low_rank
    low = chosen_matrices(model, added.where, "train.low_rank") if added.rank else []
    found: dict[str, int] = {}
    for name in parameter_roles(model):
        if name in never:
            continue
        parameter = model.get_parameter(name)
        number = parameter.numel()
        owner = name.split(".loops.")[1].split(".")[1] if ".loops." in name else "layers"
        if name in low:
            owner, number = "low-rank additions", added.rank * sum(parameter.shape)
        found[owner] = found.get(owner, 0) + number
    return found


def _to_json(result: ArmResult) -> dict[str, Any]:
    values: dict[str, Any] = dataclasses.asdict(result)
    for text, one in result.scores.items():
        values["scores"][text] |= {"unit_nats": one.unit_nats.tolist(), "unit_bytes": one.unit_bytes.tolist()}
    return values


def _read(path: Path, held_out: Mapping[str, Any]) -> ArmResult | None:
    """What was found before; None where that is nothing, or the score of another text."""
    if not path.is_file():
        return None
    values = json.loads(path.read_bytes())
    if values.pop("held_out", None) != held_out:
        return None
    scores = {}
    for text, one in values.pop("scores").items():
        one["unit_nats"], one["unit_bytes"] = np.asarray(one["unit_nats"]), np.asarray(one["unit_bytes"])
        one["interval"] = None if one["interval"] is None else tuple(one["interval"])
        scores[text] = Score(**one)
    return ArmResult(**values, scores=scores)
