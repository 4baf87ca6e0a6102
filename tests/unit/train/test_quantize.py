"""Training with quantised weights."""

import copy

import pytest
import torch

from ouroboros.errors import OuroborosError
from ouroboros.nn.quantize import quantized
from ouroboros.optim import parameter_roles

ROUND = {"train.quantize.mode": "round", "train.quantize.bits": 3}
NOISE = {"train.quantize.mode": "noise", "train.quantize.bits": 3}


@pytest.mark.parametrize("options", [ROUND, NOISE], ids=["round", "noise"])
def test_the_loss_is_of_other_weights_and_moves_the_weights_themselves(options, make, trainer_of):
    plain, trainer = trainer_of(make()), trainer_of(make(**options))
    matrices = {name for name, role in parameter_roles(trainer.model).items() if role == "matrix"}
    assert set(trainer.quantizer.names) == matrices
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    losses = [one.step().loss for one in (plain, trainer)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before)
    for name in matrices:  # the weights are no multiples of a step: what is kept, averaged and exported is plain
        weight = trainer.model.get_parameter(name).detach()
        assert not torch.equal(weight, quantized(weight, 3))


def test_the_gradient_is_the_straight_through_estimate(make, trainer_of):
    trainer = trainer_of(make(**ROUND, **{"train.quantize.where": ["*mlp*", "*embed_tokens.weight"]}))
    assert len(trainer.quantizer.names) == 1 + 3 * 3
    batch = copy.deepcopy(trainer.loader).next_batch()
    with trainer.quantizer.acting(0, 0.0):
        trainer._gradients(batch, None, None)
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    values = {}
    for name, parameter in trainer.model.named_parameters():
        chosen = name in trainer.quantizer.names
        values[name] = quantized(parameter, 3, clip=0.9995).requires_grad_() if chosen else parameter
    windows = torch.from_numpy(batch)
    given = {"input_ids": windows[:, :-1], "targets": windows[:, 1:], "use_cache": False}
    torch.func.functional_call(trainer.model, values, (), given, tie_weights=True).loss.backward()
    for name, value in values.items():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [ROUND, NOISE], ids=["round", "noise"])
def test_it_begins_at_its_share_of_the_run(options, make, trainer_of):
    late = {"train.quantize.start": 0.5, "optim.lr": 1e-30, "train.accumulation": 2}
    plain, trainer = trainer_of(make(**{"optim.lr": 1e-30})), trainer_of(make(**options, **late))
    same = [plain.step().loss == pytest.approx(trainer.step().loss, rel=1e-6) for _ in range(6)]
    assert same == [True, True, True, False, False, False]


def test_noise_depends_on_seed_and_step_alone(make, trainer_of):
    trainer = trainer_of(make(**NOISE))

    def drawn(step: int) -> torch.Tensor:
        with trainer.quantizer.acting(step, 0.0):
            return trainer.quantizer.parameters[0].detach().clone()

    first = drawn(3)
    torch.rand(5)
    assert torch.equal(drawn(3), first) and not torch.equal(drawn(4), first)
    other = trainer_of(make(**NOISE, **{"train.seed": 1}))
    other.model.load_state_dict(trainer.model.state_dict())
    with other.quantizer.acting(3, 0.0):
        assert not torch.equal(other.quantizer.parameters[0], first)


def test_a_pattern_without_a_matrix_is_refused(make, trainer_of):
    with pytest.raises(
        OuroborosError, match=r"train\.quantize\.where: '\*norm\*' is the name of no such parameter; a name is"
    ):
        trainer_of(make(**ROUND, **{"train.quantize.where": ["*norm*"]}))
