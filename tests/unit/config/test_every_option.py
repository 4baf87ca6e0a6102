"""Every option acts or is refused.

Options of parts change the function, the cost or the training of a model; those of data change what training reads;
those of the optimiser and of training change what is trained or what a run keeps. The few that change neither stand in
a table with the reason.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ouroboros.config import (
    AttentionSpec,
    BlockOverride,
    DataSpec,
    DistilledTraining,
    FilterSpec,
    LoopTraining,
    LowRankTraining,
    ModelSpec,
    OptimSpec,
    QuantizedTraining,
    Recipe,
    RopeSpec,
    TaughtTraining,
    TrainSpec,
)
from ouroboros.config.codec import to_dict, type_hints
from ouroboros.config.needs import idle
from ouroboros.config.part import (
    FeedForwardPart,
    HeadPart,
    LoopPart,
    MixerPart,
    NormPart,
    ResidualPart,
    StemPart,
    TopologyPart,
    kinds,
)
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.feed_forward import FeedForwardSpec
from ouroboros.config.parts.halt import HaltSpec
from ouroboros.config.parts.helix import HelixSpec
from ouroboros.config.parts.loop import RecurrenceGateSpec
from ouroboros.config.parts.modulated import (
    ControllerSpec,
    ModulatedAttentionSpec,
    ModulatedFeedForwardSpec,
)
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.config.parts.tap import TapSpec
from ouroboros.config.parts.values import ValueEmbeddingSpec
from ouroboros.data.prepared import PreparedData
from ouroboros.data.shards import prepare
from ouroboros.data.stream import open_loader
from ouroboros.errors import OuroborosError
from ouroboros.eval.switches import behaviour, effect, options
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.pack.calibrate import quantize_model
from ouroboros.pack.plan import Plan, Rule
from ouroboros.pack.write import pack
from ouroboros.systems.controller.parts import GeneratedAttentionSpec, GeneratedFeedForwardSpec, MatrixControllerSpec
from ouroboros.train.distributed import Workers
from ouroboros.train.log import read_metrics
from ouroboros.train.run import start
from ouroboros.train.switches import OTHERS
from ouroboros.train.trainer import Trainer

BASE = ModelSpec(layout="1 (1)x3", vocab_size=19, hidden_size=16, max_position_embeddings=40).replace(
    ffn=FeedForwardSpec(intermediate_size=24)
)
IN_BLOCK = {MixerPart: "mixer", FeedForwardPart: "ffn", NormPart: "norm", ResidualPart: "residual"}
LISTED = {StemPart: "stem", LoopPart: "loop"}
TWO_STREAMS = "1 up:1 down:1 second:1 1 up down second third:1 1"
"""A layout for two streams, of which the segment ``third`` may be the second one as well."""


def two_streams(part: HelixSpec, second: Any = None, **changes: Any) -> ModelSpec:
    """A model of two streams; ``second`` is the mixer of the second one's block."""
    bridge = {"mixer": "cross", "ffn": "none", "residual": "none"} if part.bridges == "attention" else {}
    options = {"up": bridge, "down": bridge, "second": {} if second is None else {"mixer": to_dict(second)}}
    overrides = tuple(BlockOverride(where=where, set=chosen) for where, chosen in options.items() if chosen)
    return BASE.replace(layout=TWO_STREAMS, topology=part, overrides=overrides, **changes)


def modulated(part: Any) -> ModelSpec:
    """A model whose loop is modulated, with this part in it."""
    own: Any = {"rank": part.rank, "core": getattr(part, "core", None) or part.makes}
    mixer: Any = ModulatedAttentionSpec(**own)
    ffn: Any = ModulatedFeedForwardSpec(**own, intermediate_size=24)
    steering: Any = ControllerSpec(**own, style=8)
    stem: Any = ()
    if isinstance(part, ModulatedAttentionSpec):
        mixer = part
        stem = (ValueEmbeddingSpec(width=4),) if part.value_embedding else ()
    elif isinstance(part, ModulatedFeedForwardSpec):
        ffn = part
    else:
        steering = part
    return BASE.replace(layout="(1)x3", mixer=mixer, ffn=ffn, loop=(steering,), stem=stem)


def generated(part: Any) -> ModelSpec:
    """A model whose loop generates additions to its maps, with this part in it; the block is visited once before."""
    sizes: Any = {"bases": part.bases, "rank": 3, "divisor": 4}
    mixer: Any = part if isinstance(part, GeneratedAttentionSpec) else GeneratedAttentionSpec(**sizes)
    ffn: Any = GeneratedFeedForwardSpec(intermediate_size=24, **sizes)
    ffn = part if isinstance(part, GeneratedFeedForwardSpec) else ffn
    steering: Any = MatrixControllerSpec(bases=part.bases, state=8, steps=8, hidden=8, style=8)
    steering = part if isinstance(part, MatrixControllerSpec) else steering
    halting = (HaltSpec(hidden=4),) if isinstance(part, MatrixControllerSpec) and part.confidence else ()
    stem = (ValueEmbeddingSpec(width=4),) if isinstance(part, AttentionSpec) and part.value_embedding else ()
    return BASE.replace(layout="a:1 (a)x2", mixer=mixer, ffn=ffn, loop=(steering, *halting), stem=stem)


def placed(part: Any) -> ModelSpec:
    """The base with this part in it, and with what the part cannot do without."""
    if isinstance(part, GeneratedAttentionSpec | GeneratedFeedForwardSpec | MatrixControllerSpec):
        return generated(part)
    if isinstance(part, HelixSpec):
        return two_streams(part)
    if isinstance(part, TopologyPart):
        return BASE.replace(layout="2 (1)x2 2", topology=part)
    if isinstance(part, ModulatedAttentionSpec | ModulatedFeedForwardSpec) or getattr(part, "hands", ""):
        return modulated(part)
    if isinstance(part, TapSpec):
        return BASE.replace(layout="2 (1)x3", loop=(part,))
    if isinstance(part, StemPart) and part.provides:
        return BASE.replace(stem=(part,), mixer=AttentionSpec(value_embedding=True))
    stem = (ValueEmbeddingSpec(width=4),) if isinstance(part, AttentionSpec) and part.value_embedding else ()
    if isinstance(part, MixerPart) and part.reads_other:
        first = part.value_residual if isinstance(part, AttentionSpec) else None
        return two_streams(HelixSpec(), part, stem=stem, mixer=AttentionSpec(value_residual=first))
    if isinstance(part, MixerPart):
        return BASE.replace(mixer=part, stem=stem)
    for family, name in IN_BLOCK.items():
        if isinstance(part, family):
            return BASE.replace(**{name: part})
    for family, name in LISTED.items():
        if isinstance(part, family):
            return BASE.replace(**{name: (part,)})
    return BASE.replace(head=part)


def open_questions(
    changes: Iterator[tuple[str, Any]], refused: set[str], acts: dict[str, bool]
) -> Iterator[tuple[str, Any]]:
    """Of ``changes`` one for each option that is refused here, and those of options that have not acted yet."""
    tried: set[str] = set()
    for name, changed in changes:
        if isinstance(changed, OuroborosError):
            continue
        if (name in refused and name not in tried) or (name not in refused and not acts.get(name)):
            tried.add(name)
            yield name, changed


SLOWED = RopeSpec(slowing=3.0, slowing_context=20)
SWITCHED: dict[str, list[dict[str, Any]]] = {
    "AttentionSpec": [{"num_heads": 2, "num_kv_heads": 1}, {"qk_norm": "before_rope", "rope": SLOWED}],
    "ModulatedAttentionSpec": [{"num_heads": 2, "num_kv_heads": 1}, {"qk_norm": "before_rope", "rope": SLOWED}],
    "HaltSpec": [{"bias": -0.2, "cost": "geometric"}],
    "ControllerSpec": [{"pooling": "prompt", "prompt": 4}],
    "GeneratedAttentionSpec": [
        {"num_heads": 2, "num_kv_heads": 1, "divisor": 4},
        {"qk_norm": "before_rope", "rope": SLOWED},
    ],
    "MatrixControllerSpec": [{"pooling": "prompt", "prompt": 4}],
    "SplitAttentionSpec": [{"num_heads": 2}, {"qk_norm": "before_rope", "rope": SLOWED}],
    "ChokeSpec": [{"shape": "grouped"}, {"activation": "leaky_relu2"}],
    "RMSNormSpec": [{"depth_scale": True}],
    "LayerNormSpec": [{"depth_scale": True}],
    "UNetSpec": [{"skips": 1}],
    "HelixSpec": [{"merge": "sigmoid"}],
    "LatentAttentionSpec": [{"rope_dim": 4, "rope": SLOWED}],
    "BottleneckAttentionSpec": [{"num_heads": 2, "rope": SLOWED}],
    "OsamSpec": [{"decay": True, "buckets": 40, "frequencies": 4, "detach_state": False}],
    "DeltaSpec": [
        {"eps": 0.5, "value": "constant", "gate": "two_layer"},
        {"values": 2, "embedding_conv": True},
        {"values": 2, "compressor": "token"},
    ],
}
"""Settings in which options act that do nothing by default."""
FAMILIES = (*IN_BLOCK, *LISTED, HeadPart, TopologyPart)
MEMBERS = [member for family in FAMILIES for member in dict.fromkeys(kinds(family).values())]
OTHER_VALUES = {"loop_scales": ((9.0, 1.0),), "blocks": ((1,),), "stream": ("third",), "merge_cap": (0.3,)}
"""Values of options for which none is guessed."""


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.__name__)
def test_every_option_of_a_part_acts_or_is_refused(member: Any) -> None:
    starts = [member(kind=kind) for kind in typing.get_args(type_hints(member)["kind"])]
    starts += [member(**settings) for settings in SWITCHED.get(member.__name__, ())]
    acts: dict[str, bool] = {}
    for given in starts:
        before = behaviour(placed(given))
        refused = {path for path, _ in idle(given)}
        for name, changed in open_questions(options(given, OTHER_VALUES), refused, acts):
            try:
                model = placed(changed)
            except OuroborosError:
                continue
            here = effect(before, behaviour(model, before)) is not None
            assert not (name in refused and here), f"{name} acts, but is refused in {given}"
            acts[name] = acts.get(name, False) or here
    assert [name for name, some in acts.items() if not some] == []
    assert acts.keys() | {"kind"} >= {field.name for field in dataclasses.fields(member) if field.name != "rope"}


def test_what_is_refused_is_named_with_what_it_needs() -> None:
    model = BASE.replace(residual=DeltaSpec(values=1), layout="2", loop=(RecurrenceGateSpec(),), register_std=0.5)
    found = dict(idle(model))
    assert found["block.residual.kernel"] == "block.residual.values = more than 1"
    assert found["block.ffn.negative_slope"] == "block.ffn.kind = leaky_relu2"
    assert found["loop"].startswith("a layout with a loop") and found["register_std"] == "registers = more than 0"


TRAINED = Recipe(
    name="tiny",
    model=ModelSpec(layout="(1)x2 1", vocab_size=257, hidden_size=8, max_position_embeddings=16).replace(
        mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=8)
    ),
    data=DataSpec(sequence_length=16),
    optim=OptimSpec(muon_precision="fp32"),
    train=TrainSpec(steps=8, batch_size=4, precision="fp32", compile="off", threads=1, eval_every=0, log_every=2),
)


def with_(section: str, **options: Any) -> Recipe:
    """:data:`TRAINED` with other options in a section."""
    return dataclasses.replace(TRAINED, **{section: dataclasses.replace(getattr(TRAINED, section), **options)})


POISSON = with_("train", loops=LoopTraining(sampling="poisson", mean=2.0))
UNIFORM = with_("train", loops=LoopTraining(sampling="uniform"))
VALIDATED = dataclasses.replace(
    with_("train", steps=4, eval_every=1, eval_bytes=200, checkpoint_every=1),
    optim=dataclasses.replace(TRAINED.optim, lr=1e-30),
)
"""At this rate no weight moves, and no validation is better than the first."""
TAUGHT = with_("train", teach=TaughtTraining(model="teacher", states=0.5, blocks=(1, 1), share=0.5))
"""The fixture ``teacher`` writes that model."""
STARTS = {
    "optim": [
        TRAINED,
        with_("optim", matrix_optimizer="adamw"),
        with_("optim", muon_momentum_warmup=4),
        with_("optim", schedule="one_cycle", warmup_fraction=0.4),
        with_("optim", schedule="constant"),
        with_("optim", weight_decay=0.0),
        dataclasses.replace(TRAINED, model=TRAINED.model.replace(mixer=OsamSpec(buckets=40, readout_hidden=4))),
    ],
    "train": [
        TRAINED,
        *(VALIDATED, POISSON, UNIFORM),
        with_("train", average_every=2, average_start=0.2),
        with_("train", quantize=QuantizedTraining(mode="round")),
        with_("train", quantize=QuantizedTraining(mode="round", clip=0.9)),
        with_("train", low_rank=LowRankTraining(rank=2)),
        with_("train", ema_decay=0.5, distill=DistilledTraining(fraction=0.5)),
        with_("train", steps=None, tokens=512),
        with_("train", steps=None, minutes=0.1),
        TAUGHT,
    ],
}
SAME_NUMBERS = ("accumulation", "activation_checkpointing", "compile", "sharding", "threads")
"""Options that change what training costs; its numbers stay, up to rounding."""
WHEN_IT_FAILS = {
    "guard.lr_factor": "lowers the rate of a run that went back (tests/unit/train/test_guard.py)",
    "guard.rollbacks": "ends a run that went back too often (tests/unit/train/test_guard.py)",
    "max_bad_steps": "ends a run whose losses are no numbers any more (tests/unit/train/test_trainer.py)",
    "max_bad_validations": "ends a run that cannot be validated (tests/unit/train/test_session.py)",
}
"""Options of which nothing is seen as long as nothing goes wrong."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} times {n % 7} is {n * (n % 7)}"}) + "\n" for n in range(400)))
    return path


@pytest.fixture(scope="module")
def data(text: Path) -> PreparedData:
    return prepare(dataclasses.replace(TRAINED.data, sources=(str(text),)), text.parent / "data")


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model to learn from, in the current directory, where its packed file lies too."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(TRAINED.model))
    model.save_pretrained("teacher")
    coded = quantize_model(model, Plan((Rule(bits=3),)), [], mode="rounding")
    Path("teacher.pack").write_bytes(pack(TRAINED.model, coded.tensors))
    return "teacher"


def trained(recipe: Recipe, data: PreparedData, steps: int = 6) -> tuple[list[float], Any]:
    """The losses of some steps; with them all else that they measured, and the weights that would be exported.

    The clock goes on by a second whenever it is looked at, so that a budget of time is the same in every run.
    """
    torch.manual_seed(recipe.train.seed)
    trainer = Trainer(recipe, OuroborosForCausalLM(OuroborosConfig.from_spec(recipe.model)), data, Workers())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ouroboros.train.trainer.time", SimpleNamespace(perf_counter=itertools.count().__next__))
        results = [trainer.step() for _ in range(steps)]
    with trainer.evaluation_weights() as model:
        return [result.loss for result in results], (results, [p.tolist() for p in model.parameters()])


def kept(recipe: Recipe, text: Path, out: Path) -> Any:
    """What a whole run writes down, without its times, and how it ends."""
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sources=(str(text),)))
    result = start(recipe, out)
    timed = ("seconds", "tokens_per_second", "peak_share")
    records = [{k: v for k, v in record.items() if k not in timed} for record in read_metrics(out / "metrics.jsonl")]
    checkpoints = sorted(path.name for path in (out / "checkpoints").iterdir())
    return records, checkpoints, result.reason, result.exported_step, (out / "model.safetensors").read_bytes()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("section", STARTS)
def test_every_option_of_training_acts_or_is_refused(
    section: str, data: PreparedData, text: Path, tmp_path: Path, teacher: str
) -> None:
    def written(recipe: Recipe) -> Any:
        return kept(recipe, text, tmp_path / str(len(list(tmp_path.iterdir()))))

    acts: dict[str, bool] = {}
    others = {**OTHERS, "model": (teacher,), "blocks": ((0, 1),), "keep": ("kept",), "like": (f"{teacher}.pack",)}
    for recipe in STARTS[section]:
        given = getattr(recipe, section)
        before, run_before = trained(recipe, data), written(recipe) if recipe is VALIDATED else None
        refused = {path.removeprefix(f"{section}.") for path, _ in idle(recipe)}
        for name, changed in open_questions(options(given, others), refused, acts):
            if name in SAME_NUMBERS:
                continue
            other = dataclasses.replace(recipe, **{section: changed})
            here = trained(other, data) != before or (run_before is not None and written(other) != run_before)
            assert not (name in refused and here), f"{name} acts, but is refused in {given}"
            acts[name] = acts.get(name, False) or here
    assert {name for name, some in acts.items() if not some} == (WHEN_IT_FAILS.keys() if section == "train" else set())
    fields = dataclasses.fields(getattr(TRAINED, section))
    groups = {field.name: getattr(getattr(TRAINED, section), field.name) for field in fields}
    groups = {name: value for name, value in groups.items() if dataclasses.is_dataclass(value)}
    nested = {f"{name}.{field.name}" for name, value in groups.items() for field in dataclasses.fields(value)}
    every = {field.name for field in fields} - groups.keys() | nested
    assert acts.keys() == every - set(SAME_NUMBERS)


@pytest.mark.parametrize("name", SAME_NUMBERS)
def test_options_that_save_memory_or_time_change_no_loss(name: str, data: PreparedData) -> None:
    changed = [spec for option, spec in options(TRAINED.train, OTHERS) if option == name]
    assert changed
    losses, _ = trained(TRAINED, data)
    assert trained(dataclasses.replace(TRAINED, train=changed[0]), data)[0] == pytest.approx(losses, rel=1e-4)


def test_how_loops_are_trained_is_refused_without_loops(data: PreparedData) -> None:
    recipe = dataclasses.replace(TRAINED, model=dataclasses.replace(TRAINED.model, layout="2"))
    before = trained(recipe, data, steps=2)
    refused = {path for path, _ in idle(recipe) if path.startswith("train.loops.")}
    assert refused == {f"train.loops.{field.name}" for field in dataclasses.fields(LoopTraining)}
    for loops in (
        UNIFORM.train.loops,
        POISSON.train.loops,
        LoopTraining(backprop=1),
        LoopTraining(curriculum=((0.0, 2),)),
    ):
        other = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, loops=loops))
        assert trained(other, data, steps=2) == before


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records with everything that a filter looks for, conversations, and a record that cannot be read."""
    monkeypatch.chdir(tmp_path)
    odd = ["short", "long " * 80, "a rule ?!?! here", "1 ==== 2", "--- ,, .. ;; --- ,, x", "the same line\n" * 9]
    rows = [{"text": f"record number {n} of {n * n}", "body": f"another text {n}"} for n in range(40)]
    rows += [{"text": words, "body": "a body"} for words in odd]
    lines = [json.dumps(row) for row in rows]
    Path("rows.jsonl").write_text("\n".join(lines) + "\n")
    Path("broken.jsonl").write_text("\n".join([*lines, '{"text": "cut']) + "\n")
    turns = [[{"role": role, "content": f"{role} {n}"} for role in ("user", "assistant")] for n in range(40)]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return tmp_path


def read(spec: DataSpec, out: Path) -> Any:
    """What is prepared and held out, and the first windows of training; or why nothing is."""
    try:
        found = prepare(spec, out)
    except OuroborosError as error:
        return str(error)
    files = {name: entry["sha256"] for name, entry in found.manifest["files"].items()}
    sources = [(entry["splits"], entry.get("dropped")) for entry in found.manifest["sources"]]
    loader = open_loader(found, batch_size=4, sequence_length=spec.sequence_length, seed=0)
    return files, sources, [loader.next_batch().tolist() for _ in range(3)]


DATA_OTHERS: dict[str, tuple[Any, ...]] = {
    "sources": (("chats.jsonl@messages",),),
    "tokenizer": ("chars",),
    "text_field": ("body",),
    "max_bytes": (600,),
    "min_characters": (20,),
    "max_characters": (100,),
    "symbol_run": (4,),
}
BASE_DATA = DataSpec(sources=("rows.jsonl",), sequence_length=16, valid_fraction=0.2, test_fraction=0.2)
DATA_STARTS = [
    BASE_DATA,
    dataclasses.replace(BASE_DATA, sources=("broken.jsonl",)),
    dataclasses.replace(BASE_DATA, sources=("chats.jsonl@messages",)),
    dataclasses.replace(BASE_DATA, filters=FilterSpec(symbol_run=4)),
]


def test_every_option_of_data_acts_or_is_refused(texts: Path) -> None:
    acts: dict[str, bool] = {}
    places = (texts / f"data-{number}" for number in range(1000))
    for given in DATA_STARTS:
        before, refused = read(given, next(places)), {path for path, _ in idle(given)}
        for name, changed in open_questions(options(given, DATA_OTHERS), refused, acts):
            here = read(changed, next(places)) != before
            assert not (name in refused and here), f"{name} acts, but is refused in {given}"
            acts[name] = acts.get(name, False) or here
    assert [name for name, some in acts.items() if not some] == []
    nested = {f"filters.{field.name}" for field in dataclasses.fields(FilterSpec)}
    assert acts.keys() == {field.name for field in dataclasses.fields(DataSpec)} - {"filters"} | nested
