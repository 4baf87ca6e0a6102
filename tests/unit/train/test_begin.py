"""Runs that begin from another model's weights."""

import dataclasses
import re

import pytest
import torch
from transformers import Qwen2Config

from ouroboros.api import open_model
from ouroboros.config import ModelSpec, to_dict
from ouroboros.config.parts.loop import InjectionSpec, LoopEmbeddingSpec, LoopNormSpec, RecurrenceGateSpec
from ouroboros.convert.families import spec_of
from ouroboros.convert.layers import cut
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.schedule import blocks_of
from ouroboros.train.begin import Source, take
from ouroboros.train.log import read_metrics
from ouroboros.train.run import resume, start
from ouroboros.train.rundir import RunDirectory

NEUTRAL = [InjectionSpec(mode="add"), LoopEmbeddingSpec()]


def model_of(spec: ModelSpec, seed: int) -> OuroborosForCausalLM:
    """A model whose weights are all random, as after training."""
    torch.manual_seed(seed)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def fresh(spec: ModelSpec, seed: int = 9) -> OuroborosForCausalLM:
    torch.manual_seed(seed)
    return OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()


@pytest.fixture
def spec(make) -> ModelSpec:
    return dataclasses.replace(make().model, vocab_size=19)


def logits(model: OuroborosForCausalLM) -> torch.Tensor:
    ids = torch.randint(0, 19, (2, 11), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def test_neutral_parts_over_a_trained_model_change_no_logit(spec):
    old, new = model_of(spec, 1), fresh(dataclasses.replace(spec, loop=tuple(NEUTRAL)))
    assert not torch.equal(logits(new), logits(old))
    begun = take(new, Source("old", old))
    assert torch.equal(logits(new), logits(old))
    assert begun.taken == len(list(old.parameters())) and begun.left == ()
    assert sorted(begun.anew) == sorted(name for name, _ in new.named_parameters() if ".loops." in name)
    assert len(begun.anew) == 2 and "2 begin anew (model." in begun.describe()


@torch.no_grad()
def test_a_loop_is_put_around_blocks_that_are_there(spec):
    """``4`` and ``1 (2)x1 1`` are the same visits; with more loops they are not."""
    flat = model_of(dataclasses.replace(spec, layout="4"), 1)
    for layout, same in (("1 (2)x1 1", True), ("1 (2)x2 1", False)):
        looped = fresh(dataclasses.replace(spec, layout=layout))
        assert take(looped, Source("flat", flat)).anew == ()
        assert torch.equal(logits(looped), logits(flat)) == same
        for name, parameter in flat.named_parameters():
            assert torch.equal(looped.get_parameter(name), parameter)


@torch.no_grad()
def test_a_block_that_adds_nothing_is_inserted_in_the_middle(spec):
    spec = spec.replace(norm=dataclasses.replace(spec.block.norm, placement="pre"))
    flat = model_of(dataclasses.replace(spec, layout="4"), 1)
    looped = fresh(dataclasses.replace(spec, layout="2 (1)x2 2"))
    begun = take(looped, Source("flat", flat, blocks="0-1, new, 2-3"))
    assert begun.left == () and all(".layers.2." in name for name in begun.anew)
    inserted = looped.model.decoder.layers[2]
    assert torch.equal(
        looped.model.decoder.layers[3].mlp.up_proj.weight, flat.model.decoder.layers[2].mlp.up_proj.weight
    )
    for projection in (inserted.self_attn.o_proj, inserted.mlp.down_proj):
        projection.weight.zero_()
    torch.testing.assert_close(logits(looped), logits(flat), atol=1e-5, rtol=1e-5)


def test_what_has_no_place_is_refused_by_name_and_left_on_request(spec):
    old = model_of(dataclasses.replace(spec, loop=(RecurrenceGateSpec(),)), 1)
    new = fresh(dataclasses.replace(spec, loop=(LoopNormSpec(),)))
    before = {name: p.detach().clone() for name, p in new.named_parameters()}
    with pytest.raises(OuroborosError) as caught:
        take(new, Source("old", old))
    said = str(caught.value)
    assert "loops.0.gate.proj.weight" in said and "loops.0.norm.weight" in said and "--from-partly" in said
    assert "\n" not in said and all(torch.equal(p, before[name]) for name, p in new.named_parameters())
    begun = take(new, Source("old", old, partly=True))
    assert [name.rpartition("loops.")[2] for name in begun.left] == ["0.gate.proj.weight", "0.gate.proj.bias"]
    assert torch.equal(new.model.embed_tokens.weight, old.model.embed_tokens.weight)


def test_another_width_is_refused_with_both_shapes(spec):
    wide = spec.replace(ffn=dataclasses.replace(spec.block.ffn, intermediate_size=32))
    with pytest.raises(OuroborosError, match=r"gate_proj\.weight, of shape \(24, 16\) there and \(32, 16\) here"):
        take(fresh(wide), Source("old", model_of(spec, 1)))
    other = dataclasses.replace(spec, hidden_size=8)
    with pytest.raises(OuroborosError, match="no weight in common"):
        take(fresh(other), Source("old", model_of(spec, 1), partly=True))


@pytest.mark.parametrize(
    ("there", "here", "example"),
    [("3", "4", "0-1,new,2"), ("3", "2", "0-1"), ("1", "3", "0,new,new"), ("2", "1", "0")],
)
def test_other_numbers_of_blocks_ask_which_is_which(there, here, example, spec):
    old, new = model_of(dataclasses.replace(spec, layout=there), 1), fresh(dataclasses.replace(spec, layout=here))
    with pytest.raises(OuroborosError, match=rf"{there} blocks .*has {here} .*--from-blocks {re.escape(example)}$"):
        take(new, Source("old", old))
    assert take(new, Source("old", old, blocks=example, partly=True)).taken


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,x,2", "'x' is no number of a block"),
        ("0,1,new-2", "'new-2' is no number"),
        ("0-3", "'0-3' is not within 0-2"),
        ("2-1,0", "'2-1' is not within"),
        ("0-2,new", "lists 4 blocks, the model has 3"),
        ("", "'' is no number"),
    ],
)
def test_a_list_of_blocks_that_is_none(text, message):
    with pytest.raises(OuroborosError, match=message):
        blocks_of(text, 3, 3, "--from-blocks", new=True)
    assert blocks_of("new, 2,0-1", 3, 4, "--from-blocks", new=True) == [None, 2, 0, 1]


class Crash(Exception):
    """Stands for a process that ends without a word."""


def test_a_run_from_a_model_says_what_it_took_and_resumes_without_it(make, stop_at, sha, tmp_path):
    first = make(**{"train.steps": 3})
    start(first, tmp_path / "first")
    recipe = make(**{"model.loop": [to_dict(part) for part in NEUTRAL], "train.ema_decay": 0.9})
    source = Source("first", open_model(tmp_path / "first").model)
    start(recipe, tmp_path / "whole", source=source)
    (record,) = [r for r in read_metrics(tmp_path / "whole" / "metrics.jsonl") if r["kind"] == "begin"]
    assert record["from"] == "first" and len(record["anew"]) == 2 and record["left"] == []
    start(recipe, tmp_path / "cold")
    assert sha(tmp_path / "cold") != sha(tmp_path / "whole")
    # Killed before any checkpoint of its own, and the other model is not asked again.
    with pytest.raises(Crash):
        start(recipe, tmp_path / "parts", source=source, progress=stop_at(2, Crash))
    assert RunDirectory(tmp_path / "parts").newest().step == 0
    resume(tmp_path / "parts")
    assert sha(tmp_path / "parts") == sha(tmp_path / "whole")
    records = read_metrics(tmp_path / "parts" / "metrics.jsonl")
    assert [r["from"] for r in records if r["kind"] == "begin"] == ["first"]


def test_a_source_that_does_not_fit_leaves_no_run(make, tmp_path):
    start(make(**{"train.steps": 1}), tmp_path / "first")
    source = Source("first", open_model(tmp_path / "first").model)
    with pytest.raises(OuroborosError, match="--from-blocks"):
        start(make(**{"model.layout": "3 (1)x2 1"}), tmp_path / "run", source=source)
    assert not (tmp_path / "run").exists()


def test_files_beside_the_source_go_with_it(make, tmp_path):
    start(make(**{"train.steps": 1}), tmp_path / "first")
    source = Source("first", open_model(tmp_path / "first").model, beside={"made-of.json": b"{}"})
    start(make(), tmp_path / "run", source=source)
    assert (tmp_path / "run" / "made-of.json").read_bytes() == b"{}"


@pytest.mark.parametrize("tied", [True, False])
def test_norms_and_biases_alone_of_a_converted_model(tied, make, trainer_of):
    """The patterns of docs/how-to/convert.md."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=257, num_key_value_heads=1, tie_word_embeddings=tied, **sizes)
    patterns = ["*_proj.weight", "*embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    recipe = dataclasses.replace(
        make(**{"optim.left_out": patterns}), model=cut(spec_of(config), "1 (1)x2 1", ((0,), (1,), (3,)))
    )
    trainer = trainer_of(recipe)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for _ in range(2):
        trainer.step()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "norm" in name or name.endswith("bias")}
    assert len(moved) == 3 * (2 + 3) + 1
