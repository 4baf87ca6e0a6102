"""The last phase, in which the weights learn from their average."""

import copy

import pytest
import torch
from torch.nn import functional as F

from ouroboros.optim import learning_rate

PHASE = {"train.ema_decay": 0.5, "train.distill.fraction": 0.34, "train.accumulation": 2}
"""Of six steps the last two."""


def test_the_objective_is_that_of_the_formula(make, trainer_of):
    trainer = trainer_of(make(**PHASE, **{"train.distill.temperature": 2.0, "train.distill.alpha": 0.25}))
    for _ in range(4):
        trainer.step()
    assert trainer.teacher is None
    trainer.teach(trainer.average.module)
    windows = torch.from_numpy(copy.deepcopy(trainer.loader).next_batch())
    inputs, targets = windows[:, :-1], windows[:, 1:].clone()
    targets[:, :5] = -100
    objective, plain = trainer.losses(inputs, targets, 3)
    with torch.no_grad():
        found, wanted = (m(input_ids=inputs, loops=3).logits[:, 5:] for m in (trainer.model, trainer.average.module))
        ce = F.cross_entropy(found.flatten(0, 1), targets[:, 5:].flatten())
        p, q = (wanted / 2).softmax(-1), (found / 2).softmax(-1)
        kl = (p * (p.log() - q.log())).sum(-1).mean()
    assert kl > 0 and plain.item() == pytest.approx(ce.item(), rel=1e-5)
    assert objective.item() == pytest.approx((0.25 * ce + 0.75 * 4 * kl).item(), rel=1e-4)
    objective.backward()
    assert all(p.grad is None for p in trainer.teacher.model.parameters())


def test_the_phase_is_the_end_of_the_run_at_its_own_rate(make, trainer_of):
    recipe = make(**PHASE)
    trainer = trainer_of(recipe)
    results = [trainer.step() for _ in range(4)]
    with trainer.evaluation_weights() as model:
        assert model is trainer.average.module
    average = {name: p.detach().clone() for name, p in trainer.average.module.named_parameters()}
    results += [trainer.step() for _ in range(2)]
    expected = [learning_rate((step + 0.5) / 6 / 0.66, recipe.optim) for step in range(4)]
    assert [result.lr_factor for result in results] == pytest.approx([*expected, 0.02, 0.02])
    with trainer.evaluation_weights() as model:
        assert model is trainer.model
    for name, parameter in trainer.teacher.model.named_parameters():  # frozen, and the average is no more followed
        assert torch.equal(parameter, average[name])
        assert torch.equal(trainer.average.module.get_parameter(name), average[name])


def test_it_pulls_the_weights_towards_what_the_average_says(make, trainer_of):
    """Without the text's own loss the divergence falls."""
    more = {"train.distill.fraction": 0.9, "train.distill.alpha": 0.0, "train.distill.lr": 1.0, "train.steps": 40}
    trainer = trainer_of(make(**{**PHASE, **more, "optim.lr": 0.02, "train.ema_decay": 0.99}))
    windows = torch.from_numpy(copy.deepcopy(trainer.loader).next_batch())
    found = []
    while not trainer.done:
        trainer.step()
        if trainer.teacher is not None:
            with torch.no_grad():
                found.append(trainer.losses(windows[:, :-1], windows[:, 1:])[0].item())
    assert found[-1] < 0.5 * found[0]
