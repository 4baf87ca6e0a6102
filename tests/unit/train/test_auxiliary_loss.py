"""What parts add to the loss of training, in every way of computing it."""

import copy

import pytest
import torch

from ouroboros.eval.depth import depths
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.loss import logits_loss
from ouroboros.model.modeling import OuroborosForCausalLM

HALTING = {"kind": "halt", "hidden": 4, "bias": -1.0, "cost": "steps", "cost_weight": 0.5}


@pytest.mark.parametrize("way", ["chunks", "compiled criterion", "teacher", "another model"])
def test_what_parts_add_to_the_loss_is_minimised_and_not_reported(way, make, trainer_of, tmp_path):
    if way == "another model":
        spec = make().model
        config = OuroborosConfig.from_spec(spec, eos_token_id=spec.vocab_size - 1)
        OuroborosForCausalLM(config).save_pretrained(tmp_path / "other")
        more = {"train.teach.model": str(tmp_path / "other"), "train.teach.weight": 0.0}
    else:
        more = {"train.distill.fraction": 0.5, "train.ema_decay": 0.5}
    trainer = trainer_of(make(**{"model.loop": [HALTING], **more}))
    if way == "teacher":
        trainer.teach(trainer.model)
    elif way == "compiled criterion":
        trainer._criterion = logits_loss
    windows = torch.from_numpy(copy.deepcopy(trainer.loader).next_batch())
    parts = windows[:, :-1], windows[:, 1:]
    trainer.model.train()
    objective, loss = trainer.losses(*parts)
    added = trainer.model(parts[0], use_cache=False).auxiliary_loss
    # Of 2 loops, each token takes two: 2 and the weight of the second state. The teacher says what the student does.
    assert added.item() == pytest.approx(0.5 * (3 - torch.sigmoid(torch.tensor(-1.0))).item(), abs=1e-4)
    share = trainer.recipe.train.distill.alpha if way == "teacher" else 1.0
    assert objective.item() == pytest.approx(share * loss.item() + added.item(), rel=1e-5)
    plain = trainer_of(make(**{"model.loop": [{**HALTING, "cost": "none"}]}))
    assert loss.item() == pytest.approx(plain.losses(*parts)[1].item(), rel=1e-6)


def test_what_parts_add_is_the_same_however_the_batch_is_divided(make, trainer_of):
    found = {}
    for divided in (1, 4):
        trainer = trainer_of(make(**{"train.accumulation": divided, "model.loop": [HALTING]}))
        loss = trainer._gradients(trainer.loader.next_batch(), None, None)
        found[divided] = loss, {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    assert found[4][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[1][1]["model.decoder.loops.0.halt.last.bias"].item() < -0.05
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(found[4][1][name], gradient, rtol=1e-4, atol=1e-7)


def test_a_cost_of_steps_makes_tokens_halt_earlier(make, trainer_of):
    """And without one they do not."""
    found = {}
    for cost in ("steps", "none"):
        halting = {**HALTING, "cost": cost, "bias": -1.5}
        changes = {"model.loop": [halting], "model.layout": "(1)x6", "train.steps": 30, "optim.lr": 0.05}
        trainer = trainer_of(make(**changes))
        ids = torch.from_numpy(copy.deepcopy(trainer.loader).next_batch())[0, :-1]
        (before,) = depths(trainer.model.eval(), ids)
        while not trainer.done:
            trainer.step()
        (after,) = depths(trainer.model.eval(), ids)
        found[cost] = before.mean, after.mean
    assert found["steps"][0] == found["none"][0] == 6
    assert found["steps"][1] < 4 < found["none"][1]
