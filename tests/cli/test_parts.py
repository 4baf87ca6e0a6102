"""Parts on the command line: chosen, added, changed for some blocks; what is wrong or changes nothing is refused."""

import dataclasses

import pytest

from ouroboros.config import (
    AttentionSpec,
    BlockOverride,
    DataSpec,
    FeedForwardSpec,
    LayerNormSpec,
    LoopTraining,
    ModelSpec,
    NoFeedForwardSpec,
    OptimSpec,
    Recipe,
    RMSNormSpec,
    RopeSpec,
    TrainSpec,
    to_dict,
)
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.loop import (
    ContractiveStepSpec,
    InjectionSpec,
    LoopNormSpec,
    RecurrenceGateSpec,
)
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.config.parts.stem import EmbeddingNormSpec, LearnedPositionsSpec
from ouroboros.errors import OuroborosError, UsageError
from ouroboros.verbs.parts import refuse_idle, take_model

WITH_BIAS = FeedForwardSpec(intermediate_size=48, bias=True)
BASE = ModelSpec(layout="1 wide:(1)x2 1", hidden_size=64).replace(ffn=FeedForwardSpec(intermediate_size=48))


def taken(text: str, model: ModelSpec = BASE) -> ModelSpec:
    """``model`` after the options in ``text``, all of which choose parts."""
    rest, changed = take_model(text.split(), model)
    assert rest == []
    return changed.replace()  # which checks it


def of_blocks(**options) -> ModelSpec:
    return BASE.replace(**options)


def of_loop(*parts) -> ModelSpec:
    return BASE.replace(loop=parts)


def of_some(**changes) -> ModelSpec:
    """Blocks that differ: WHERE -> options."""
    return BASE.replace(overrides=tuple(BlockOverride(where=where, set=s) for where, s in changes.items()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--model.residual delta", of_blocks(residual=DeltaSpec())),
        ("--model.residual=delta", of_blocks(residual=DeltaSpec())),
        ("--model.residual.kind delta", of_blocks(residual=DeltaSpec())),
        ("--model.residual delta --model.residual additive", BASE),
        ("--model.mixer osam", of_blocks(mixer=OsamSpec())),
        ("--model.ffn none", of_blocks(ffn=NoFeedForwardSpec())),
        ("--model.ffn gelu", of_blocks(ffn=FeedForwardSpec(kind="gelu", intermediate_size=48))),
        ("--model.head linear --model.topology chain", BASE),
    ],
)
def test_a_part_is_chosen(text, expected):
    assert taken(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--model.layout 6 --model.hidden-size=32", of_blocks(layout="6", hidden_size=32)),
        ("--model.no-tie-embeddings --model.ffn.bias", of_blocks(tie_embeddings=False, ffn=WITH_BIAS)),
        ("--model.ffn.bias True --model.tie_embeddings=False", of_blocks(tie_embeddings=False, ffn=WITH_BIAS)),
        ("--model.embedding-std 0.5 --model.embedding-std None", BASE),
        ("--model.mixer.rope.base 100", of_blocks(mixer=AttentionSpec(rope=RopeSpec(base=100.0)))),
        ("--model.residual.values 4 --model.residual delta", of_blocks(residual=DeltaSpec(values=4))),
        (
            "--model.mixer.time-scales 2 9 --model.mixer osam --model.mixer.decay",
            of_blocks(mixer=OsamSpec(time_scales=(2.0, 9.0), decay=True)),
        ),
    ],
)
def test_options_are_set_in_any_order(text, expected):
    assert taken(text) == expected


def test_what_the_parts_of_a_family_share_stays():
    model = BASE.replace(norm=RMSNormSpec(placement="sandwich", eps=1e-3))
    assert taken("--model.norm layer", model).block.norm == LayerNormSpec(placement="sandwich", eps=1e-3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--model.loop.gate", of_loop(RecurrenceGateSpec())),
        ("--model.loop.gate.bias -1", of_loop(RecurrenceGateSpec(bias=-1))),
        ("--model.loop.gate.bias=-1e-1", of_loop(RecurrenceGateSpec(bias=-0.1))),
        ("--model.loop.gate -1", of_loop(RecurrenceGateSpec(bias=-1))),
        ("--model.loop.gate --model.loop.gate.bias -1", of_loop(RecurrenceGateSpec(bias=-1))),
        ("--model.loop.gate.bias -1 --model.loop.gate", of_loop(RecurrenceGateSpec(bias=-1))),
        ("--model.loop.inject concat", of_loop(InjectionSpec(mode="concat"))),
        ("--model.loop.inject=concat", of_loop(InjectionSpec(mode="concat"))),
        ("--model.loop.inject.mode concat", of_loop(InjectionSpec(mode="concat"))),
        ("--model.loop.contractive 0.25", of_loop(ContractiveStepSpec(step=0.25))),
        ("--model.loop.norm.rows 3 --model.loop.norm.rows None", of_loop(LoopNormSpec())),
        # in the order of the registry, not of the words
        ("--model.loop.gate --model.loop.inject", of_loop(InjectionSpec(), RecurrenceGateSpec())),
        ("--model.loop.gate --model.loop.norm --model.loop.no-gate", of_loop(LoopNormSpec())),
        ("--model.loop.inject add --model.loop.inject none", BASE),
        ("--model.loop.no-gate", BASE),
        ("--model.stem.positions --model.stem.norm", of_blocks(stem=(EmbeddingNormSpec(), LearnedPositionsSpec()))),
    ],
)
def test_lists(text, expected):
    assert taken(text) == expected


def test_a_list_keeps_its_order():
    model = BASE.replace(loop=(RecurrenceGateSpec(), InjectionSpec()))
    assert taken("--model.loop.gate.bias -1", model).loop == (RecurrenceGateSpec(bias=-1), InjectionSpec())
    kinds = [part.kind for part in taken("--model.loop.embedding --model.loop.contractive", model).loop]
    assert kinds == ["embedding", "gate", "inject", "contractive"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--model.at.wide.ffn.intermediate-size 64", of_some(wide={"ffn.intermediate_size": 64})),
        ("--model.at.0-1.ffn.bias", of_some(**{"0-1": {"ffn.bias": True}})),
        ("--model.at.0.ffn.bias True", of_some(**{"0": {"ffn.bias": True}})),
        ("--model.at.0.ffn.no-bias", of_some(**{"0": {"ffn.bias": False}})),
        ("--model.at.0.mixer.num-kv-heads=1", of_some(**{"0": {"mixer.num_kv_heads": 1}})),
        ("--model.at.0.mixer.num-kv-heads None", of_some(**{"0": {"mixer.num_kv_heads": None}})),
        ("--model.at.0.mixer.rope.base 100", of_some(**{"0": {"mixer.rope.base": 100}})),
        ("--model.at.0.ffn.kind gelu", of_some(**{"0": {"ffn": "gelu"}})),
        (
            "--model.at.0.ffn.bias --model.at.2.dropout 0.5 --model.at.0.ffn gelu",  # a part before its options
            of_some(**{"0": {"ffn": "gelu", "ffn.bias": True}, "2": {"dropout": 0.5}}),
        ),
    ],
)
def test_overrides(text, expected):
    changed = taken(text)
    assert changed == expected and changed.blocks == expected.blocks


def test_overrides_of_the_recipe_come_first():
    model = of_some(wide={"ffn.intermediate_size": 64})
    assert taken("--model.at.wide.ffn none", model).blocks[1].ffn == NoFeedForwardSpec()
    assert taken("--model.at.wide.ffn gelu", model).blocks[1].ffn.intermediate_size == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--model.residual detla", "--model.residual: unknown kind 'detla'; did you mean 'delta'?"),
        ("--model.residual", "--model.residual: expected a value"),
        ("--model.residual --model.loop.gate", "--model.residual: expected a value"),
        ("--model.loop.gat", "--model.loop.gat: unknown part 'gat'; did you mean 'gate'?"),
        ("--model.loop.no-gat", "--model.loop.no-gat: unknown part 'gat'; did you mean 'gate'?"),
        ("--model.loop.gate-bias -1", "--model.loop.gate-bias: unknown part 'gate-bias'; did you mean 'gate'?"),
        ("--model.loop.gate.biass -1", "--model.loop.gate.biass: gate: unknown key 'biass'; did you mean 'bias'?"),
        ("--model.loop.gate.bias", "--model.loop.gate.bias: expected a value"),
        ("--model.loop.inject conat", "--model.loop.inject: inject: mode: Input should be 'add' or 'concat'"),
        ("--model.loop.contractive 2", "loop.contractive must be in (0, 1], got 2"),
        ("--model.loop add", "--model.loop: name a part of the list: "),
        ("--model.at.0 none", "--model.at.0: expected --model.at.WHERE.OPTION, for example --model.at.0-1.ffn.bias"),
        ("--model.at.0.ffn.intermediate-size", "--model.at.0.ffn.intermediate-size: expected a value"),
        ("--model.residual.values 4", "--model.residual.values changes nothing here; it needs --model.residual delta"),
        ("--model.ffn.biass", "unknown option --model.ffn.biass; did you mean '--model.ffn.bias'?"),
        ("--model.ffn.bias.more 1", "unknown option --model.ffn.bias.more"),
        ("--model.mixer.rope.bse 1", "unknown option --model.mixer.rope.bse; did you mean '--model.mixer.rope.base'?"),
        ("--model.hidden-size big", "--model: hidden_size: Input should be a valid integer"),
        ("--model.mixer.no-decay", "--model.mixer.no-decay changes nothing here; it needs --model.mixer osam"),
    ],
)
def test_wrong_words_are_named_with_the_nearest_right_one(text, message):
    with pytest.raises(UsageError) as caught:
        take_model(text.split(), BASE)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.at.wyde.ffn.bias", "has no segment 'wyde' (wide)"),
        ("--model.at.7.ffn.bias", "has blocks 0 to 2, not 7"),
        ("--model.at.0.ffn.intermediate-sise=1", "a block has no option 'ffn.intermediate_sise'; did you mean"),
        ("--model.at.0.mixer=osma", "unknown kind 'osma'; did you mean 'osam'?"),
        (
            "--model.at.0.ffn.intermediate-size=wide",
            "overrides: ffn.intermediate_size: Input should be a valid integer",
        ),
        (
            "--model.at.0.residual=delta --model.at.0.residual.values=4",
            "residuals of all blocks must join to the same form of stream",
        ),
    ],
)
def test_a_wrong_override_is_found_with_the_model(option, message):
    with pytest.raises(OuroborosError) as caught:
        taken(option)
    assert message in str(caught.value)


def test_other_words_stay_in_order():
    words = [
        *("loop", "--model.layout", "1 (1)x2 1", "--model.loop.gate", "--data", "a b.txt=0.5", "--out=x=y", "-h"),
        *("--model.residual", "delta", "--model.residual.values", "4", "--optim.lr", "-1"),
    ]
    rest, model = take_model(words, BASE)
    assert rest == ["loop", "--data", "a b.txt=0.5", "--out=x=y", "-h", "--optim.lr", "-1"]
    assert model == BASE.replace(layout="1 (1)x2 1", loop=(RecurrenceGateSpec(),), residual=DeltaSpec(values=4))


def test_a_word_of_the_verb_is_no_value():
    assert take_model(["--model.loop.gate", "loop"], BASE, ["loop"])[0] == ["loop"]
    assert take_model(["--model.at.0.ffn.bias", "run"], BASE)[0] == ["run"]


@pytest.mark.parametrize(
    "words",
    [
        "loop --model.residual delta --model.loop.gate --model.residual.values 4 --model.loop.inject",
        "--model.residual delta --model.loop.gate --model.residual.values 4 --model.loop.inject loop",
        "--model.loop.inject --model.residual.values=4 loop --model.loop.gate --model.residual=delta",
    ],
)
def test_before_and_after_the_recipe(words, cli):
    found = cli("show", *words.split(), "--json").json["model"]
    assert found["block"]["residual"] == to_dict(DeltaSpec(values=4))
    assert found["loop"] == [to_dict(InjectionSpec()), to_dict(RecurrenceGateSpec())]


def test_the_model_is_checked_when_all_is_known(cli):
    """A part that fits the whole command, but not the recipe alone."""
    fits = cli("show", "gpt", "--model.at.0.mixer.num-heads", "3", "--model.hidden-size", "96", "--json").json
    assert fits["model"]["hidden_size"] == 96
    wrong = cli("show", "gpt", "--model.at.0.mixer.num-heads", "3", "--model.hidden-size", "64").error(2)
    assert "num_heads" in wrong


def checked(text: str, model: ModelSpec = BASE) -> ModelSpec:
    """As :func:`taken`, refusing what changes nothing."""
    changed, before = taken(text, model), Recipe(name="x", model=model)
    refuse_idle(dataclasses.replace(before, model=changed), before, text.split())
    return changed


@pytest.mark.parametrize(
    ("text", "option", "needed"),
    [
        (
            "--model.residual delta --model.residual.kernel 5",
            "--model.residual.kernel",
            "--model.residual.values more than 1",
        ),
        ("--model.mixer osam --model.mixer.time-scales 2 9", "--model.mixer.time-scales", "--model.mixer.decay"),
        ("--model.layout 6 --model.loop.gate", "--model.loop.gate", "a layout with a loop, for example --model.layout"),
        ("--model.layout 6 --model.share-last-kv", "--model.share-last-kv", "a layout with a loop"),
        ("--model.ffn.negative-slope 0.1", "--model.ffn.negative-slope", "--model.ffn leaky_relu2"),
        (
            "--model.at.wide.ffn.negative-slope 0.1",
            "--model.at.wide.ffn.negative-slope",
            "--model.at.wide.ffn leaky_relu2",
        ),
    ],
)
def test_refuses_what_changes_nothing(text, option, needed):
    with pytest.raises(UsageError) as caught:
        checked(text)
    assert f"{option} changes nothing here; it needs {needed}" in str(caught.value)


def test_what_was_idle_before_and_what_has_an_effect_pass():
    own = BASE.replace(mixer=OsamSpec(time_scales=(2.0, 9.0)))
    assert checked("--model.hidden-size 32", own).hidden_size == 32  # the recipe's own
    for text in (
        "--model.residual delta --model.loop.embedding",
        "--model.mixer osam --model.mixer.time-scales 2 9 --model.mixer.decay",
        "--model.at.wide.ffn.negative-slope 0.1 --model.at.wide.ffn leaky_relu2",
    ):
        assert checked(text) != BASE


def test_refuses_what_changes_nothing_in_training():
    def refused(**sections) -> str:
        before = Recipe(name="x", model=BASE)
        try:
            refuse_idle(dataclasses.replace(before, **sections), before, [])
        except UsageError as error:
            return str(error)
        return ""

    assert "changes nothing here" in refused(optim=OptimSpec(matrix_optimizer="adamw", muon_steps=4))
    assert refused(train=TrainSpec(loops=LoopTraining(mean=2.0)))
    assert refused(data=DataSpec(sequence_length=7)) == ""


@pytest.mark.parametrize("verb", [["train", "gpt", "--data", "x", "--out", "y"], ["show", "gpt"]])
def test_a_verb_refuses_them(cli, verb):
    assert "--model.residual.values changes nothing here" in cli(*verb, "--model.residual.values", "4").error(2)
    assert "--model.loop.inject changes nothing here" in cli(*verb, "--model.loop.inject", "add").error(2)
    assert "needs --model.ffn leaky_relu2" in cli(*verb, "--model.ffn.negative-slope", "0.1").error(2)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ("--optim.muon-momentum 0.9 --optim.matrix-optimizer adamw", "--optim.matrix-optimizer muon"),
        ("--train.loops.sampling poisson", "a layout with a loop"),
        ("--train.loops.backprop 1", "a layout with a loop"),
        ("--train.eval-bytes 9 --train.eval-every 0", "--train.eval-every more than 0"),
        ("--data.filters.symbol-rule ascii", "--data.filters.symbol-run a value"),
    ],
)
def test_training_refuses_what_its_recipe_makes_idle(cli, options, needed):
    refused = options.split()[0]
    words = cli("train", "gpt", "--data", "x", "--out", "y", *options.split()).error(2)
    assert f"{refused} changes nothing here; it needs {needed}" in words


def test_resume_knows_the_parts_of_its_run(cli, trained):
    """A changed part is named as every change is, before and after the run."""
    for words in ([trained, "--model.loop.gate"], ["--model.loop.gate", trained]):
        assert "loop.gate" in cli("resume", *words).error(1)
    assert "unknown part 'gat'" in cli("resume", trained, "--model.loop.gat").error(2)
