"""Training with quantised weights."""

import copy

import pytest
import torch

from ouroboros.errors import OuroborosError
from ouroboros.nn.quantize import quantized
from ouroboros.optim import parameter_roles
from ouroboros.pack.calibrate import quantize_model
from ouroboros.pack.coded import Coded
from ouroboros.pack.plan import Plan, Rule
from ouroboros.pack.quantize import quantize
from ouroboros.pack.write import pack
from ouroboros.train.run import resume, start

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
        assert not torch.equal(weight, quantize(weight, 3).dense())


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
        values[name] = quantize(parameter, 3).dense().requires_grad_() if chosen else parameter
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


def inside(trainer):
    """The chosen weights as the loss of the first step sees them."""
    with trainer.quantizer.acting(0, 1.0):
        return {name: trainer.model.get_parameter(name).detach().clone() for name in trainer.quantizer.names}


def test_bits_of_single_tensors_with_the_rounding_of_packing(make, trainer_of):
    """What the loss sees is bit for bit what `pack --mode rounding` writes."""
    trainer = trainer_of(make(**ROUND, **{"train.quantize.bits_of": ["*.mlp.*=5", "looped=8"]}))
    coded = Plan((Rule(role="matrix", bits=3), Rule(keep="float32")))
    plan = coded.mixed(trainer.model, ["*.mlp.*=5", "looped=8"], "--bits-of")
    packed = quantize_model(trainer.model, plan, [], mode="rounding")
    found = inside(trainer)
    for name, weight in found.items():
        assert torch.equal(weight, packed.tensors[name].dense()), name
    assert {packed.report[name].bits for name in found} == {3, 5, 8}


def test_noise_has_the_size_of_each_tensors_bits(make, trainer_of):
    trainer = trainer_of(make(**NOISE, **{"train.quantize.bits_of": ["looped=8"]}))
    for name, weight in inside(trainer).items():
        before = trainer.model.get_parameter(name).detach()
        share = ((weight - before).abs().amax() / before.abs().amax()).item()
        assert (share < 0.01) == (".layers.1." in name), name


@pytest.mark.parametrize("quantile", [1.0, 0.9])
def test_a_clip_takes_the_place_of_the_steps_of_packing(quantile, make, trainer_of):
    trainer = trainer_of(make(**ROUND, **{"train.quantize.clip": quantile}))
    for name, weight in inside(trainer).items():
        assert torch.equal(weight, quantized(trainer.model.get_parameter(name).detach(), 3, clip=quantile))


class Crash(Exception):
    """Stands for a process that ends without a word."""


def write(path, model, *rules):
    """A packed file of a model, and what of it has codes."""
    made = quantize_model(model, Plan((*rules, Rule(keep="float32"))), [], mode="rounding")
    path.write_bytes(pack(model.config.model_spec, made.tensors))
    return {name: tensor for name, tensor in made.tensors.items() if isinstance(tensor, Coded)}


TWO = Rule(where="*embed*", bits=4), Rule(where="*.mlp.*", bits=5)
"""Two widths for tensors that are not the ones chosen by default."""


def test_like_a_packed_file(make, trainer_of, tmp_path):
    """Its tensors, its bits and its steps: a weight that it holds is left as it is."""
    path = tmp_path / "like.pack"
    stored = write(path, trainer_of(make(**{"train.seed": 5})).model, *TWO)
    options = {"train.quantize.mode": "round", "train.quantize.like": str(path)}
    trainer = trainer_of(make(**options))
    found = inside(trainer)
    assert found.keys() == stored.keys() and any("embed" in name for name in found)
    for name, weight in found.items():
        codes = weight / stored[name].steps().reshape(weight.shape)
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert codes.abs().max() <= 2 ** (stored[name].bits - 1)
        assert not torch.equal(weight, trainer.model.get_parameter(name))
        with torch.no_grad():
            trainer.model.get_parameter(name).copy_(stored[name].dense())
    for name, weight in inside(trainer).items():
        assert torch.equal(weight, stored[name].dense()), name
    noise = trainer_of(make(**options | {"train.quantize.mode": "noise"}))
    for name, weight in inside(noise).items():
        half = stored[name].steps().reshape(weight.shape) / 2
        error = (weight - noise.model.get_parameter(name)).abs()
        assert (error <= 1.001 * half).all() and (error > 0.9 * half).any(), name


def test_a_run_like_a_file_resumes_with_that_file_alone(make, trainer_of, stop_at, sha, tmp_path):
    path, whole, parts = tmp_path / "like.pack", tmp_path / "whole", tmp_path / "parts"
    stages = {"train.quantize.start": 0.5, "train.checkpoint_every": 2}
    recipe = make(**{"train.quantize.mode": "round", "train.quantize.like": str(path)}, **stages)
    model = trainer_of(make()).model
    write(path, model, *TWO)
    start(recipe, whole)
    with pytest.raises(Crash):
        start(recipe, parts, progress=stop_at(5, Crash))
    write(path, model, *TWO[1:])
    with pytest.raises(OuroborosError, match=r"^resume: train\.quantize\.like: .*like\.pack has changed since"):
        resume(parts)
    write(path, model, *TWO)
    resume(parts)
    assert sha(parts) == sha(whole)


def test_files_that_are_of_no_use_are_refused(make, trainer_of, tmp_path):
    path = tmp_path / "like.pack"
    recipe = make(**{"train.quantize.mode": "round", "train.quantize.like": str(path)})
    with pytest.raises(OuroborosError, match=r"^train\.quantize\.like: .*like\.pack: cannot read: No such file"):
        trainer_of(recipe)
    other = trainer_of(make(**{"model.hidden_size": 32})).model
    for rules, message in (TWO, "is of another model: it has model"), ((), "holds no codes"):
        write(path, other, *rules)
        with pytest.raises(OuroborosError, match=message):
            trainer_of(recipe)


def test_bits_for_what_is_not_chosen_are_refused(make, trainer_of):
    with pytest.raises(OuroborosError, match=r"train\.quantize\.bits_of: 'outside=8' decides for no tensor"):
        trainer_of(make(**ROUND, **{"train.quantize.bits_of": ["outside=8"]}))


def test_a_pattern_without_a_matrix_is_refused(make, trainer_of):
    with pytest.raises(
        OuroborosError, match=r"train\.quantize\.where: '\*norm\*' is the name of no such parameter; a name is"
    ):
        trainer_of(make(**ROUND, **{"train.quantize.where": ["*norm*"]}))
