"""Runs: begun, interrupted, resumed to the same bits, and refused when something does not fit."""

import json
import logging
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ouroboros
from ouroboros.config import Recipe, from_json, to_json
from ouroboros.errors import OuroborosError
from ouroboros.model.reading import load_model
from ouroboros.train import session
from ouroboros.train.lock import run_lock
from ouroboros.train.log import Progress, read_metrics
from ouroboros.train.run import recipe_changes, resume, start
from ouroboros.train.rundir import RunDirectory


class Crash(Exception):
    """Stands for a process that ends without a word."""


def tree(path: Path) -> dict[str, bytes]:
    """Every file below ``path`` with its content."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_run_leaves_a_model_that_loads_and_generates(make, tmp_path):
    result = start(make(**{"train.eval_every": 3}), tmp_path / "run")
    assert result.finished and result.reason is None and result.is_main
    assert (result.counters.step, result.counters.tokens) == (6, 6 * 4 * 32)
    assert result.counters.best_bits_per_byte is not None and result.counters.best_step in (3, 6)
    assert 0 < result.counters.seconds < 60
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"recipe.json", "data", "checkpoints", "metrics.jsonl", "config.json", "model.safetensors"}
    assert not [name for name in names if "tmp" in name]
    model, tokenizer = ouroboros.load(tmp_path / "run")
    assert not model.training and model.schedule.notation == "1 (1)x2 1"
    ids = tokenizer("ab", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)
    assert RunDirectory(tmp_path / "run").read_recipe().model.vocab_size == 257


def test_training_learns(make, tmp_path):
    result = start(make(**{"train.steps": 60, "train.log_every": 1, "optim.lr": 0.01}), tmp_path / "run")
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[0] > 5.3 and sum(losses[-5:]) / 5 < 3.0 and result.loss == losses[-1]


@pytest.mark.parametrize(
    ("what", "checkpoint_every"), [(signal.SIGTERM, 0), (signal.SIGINT, 3), (Crash, 2)], ids=["TERM", "INT", "crash"]
)
def test_resumed_weights_are_equal_bit_for_bit(what, checkpoint_every, everything, stop_at, sha, tmp_path):
    """With random loops, dropout, corruption, accumulation, averaged weights, mixed sources, epochs, two optimisers."""
    recipe = everything(**{"train.checkpoint_every": checkpoint_every})
    whole = start(recipe, tmp_path / "whole")
    run = tmp_path / "parts"
    if what is Crash:
        with pytest.raises(Crash):
            start(recipe, run, progress=stop_at(5, what))
        second = resume(run)
    else:
        first = start(recipe, run, progress=stop_at(5, what))
        assert (first.finished, first.reason, first.counters.step) == (False, what.name, 5)
        assert not (run / "model.safetensors").exists()
        stopped = resume(run, progress=stop_at(8, what))
        assert (stopped.reason, stopped.counters.step) == (what.name, 8)
        second = resume(run)
    assert second.finished and second.counters.step == 12
    assert sha(run) == sha(tmp_path / "whole")
    assert second.loss == whole.loss and second.counters.best_step == whole.counters.best_step

    def measured(path: Path) -> list[dict]:
        clock = ("seconds", "tokens_per_second", "peak_share")
        return [{k: v for k, v in record.items() if k not in clock} for record in read_metrics(path / "metrics.jsonl")]

    assert measured(run) == measured(tmp_path / "whole")


STAGES = {
    "optim.muon_momentum_warmup": 8,
    "optim.muon_coefficients": "polar_express",
    "optim.muon_rows": True,
    "optim.muon_form": "original",
    "optim.left_out": ["*norm*"],
    "optim.decay_steps": 5,
    "train.ema_decay": 0.0,
    "train.average_every": 2,
    "train.average_start": 0.25,
    "train.quantize.start": 0.3,
    "train.quantize.bits": 4,
    "train.quantize.bits_of": ["looped=3"],
    "train.distill.fraction": 0.3,
    "train.checkpoint_every": 2,
}
"""Options that act by the step or from a share of the run on; the last phase has steps 9 to 12."""


@pytest.mark.parametrize(("mode", "stops"), [("noise", (3, 7)), ("round", (10, 11))])
def test_stages_of_a_run_resume_bit_for_bit(mode, stops, everything, stop_at, sha, tmp_path):
    recipe = everything(**STAGES, **{"train.quantize.mode": mode})
    start(recipe, tmp_path / "whole")
    run = tmp_path / "parts"
    with pytest.raises(Crash):
        start(recipe, run, progress=stop_at(stops[0], Crash))
    with pytest.raises(Crash):
        resume(run, progress=stop_at(stops[1], Crash))
    assert (RunDirectory(run).newest().path / "teacher.safetensors").is_file() == (stops[1] > 9)
    resume(run)
    assert sha(run) == sha(tmp_path / "whole")


def test_the_bit_exactness_test_uses_what_it_claims(everything, tmp_path):
    """Otherwise equality above would say little."""
    recipe = everything()
    start(recipe, tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len({record["loops"] for record in records if record["kind"] == "train"}) > 1
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000012" / "state.json").read_text())
    counts = state["loader"]["counts"]
    manifest = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    windows = [(source["splits"]["train"]["tokens"] - 1) // 32 for source in manifest["sources"]]
    assert counts[0] > 1.5 * windows[0] and counts[1] > 0 and state["ema_updates"] == 12
    optimizers = json.loads((tmp_path / "run" / "checkpoints" / "step-00000012" / "optimizer.json").read_text())
    assert [document["class"] for document in optimizers] == ["BatchedMuon", "AdamW"]
    from safetensors.torch import load_file

    raw = load_file(tmp_path / "run" / "checkpoints" / "step-00000012" / "model.safetensors")
    exported = load_model(tmp_path / "run").state_dict()
    assert not torch.equal(exported["model.norm.weight"], raw["model.norm.weight"])  # the average is exported


def test_corruption_and_smoothing_change_what_is_learnt_and_off_is_absent(everything, sha, tmp_path):
    short = {"train.steps": 3, "train.eval_every": 0}
    off = {"train.corruption": 0.0, "train.label_smoothing": 0.0}
    shas = {}
    for name, changes in {"both": {}, "neither": off, "one": {**off, "train.corruption": 0.1}}.items():
        start(everything(**short, **changes), tmp_path / name)
        shas[name] = sha(tmp_path / name)
    assert len(set(shas.values())) == 3
    recipe = json.loads(to_json(everything(**short, **off)))
    del recipe["train"]["corruption"], recipe["train"]["label_smoothing"]
    start(from_json(Recipe, json.dumps(recipe)), tmp_path / "absent")
    assert sha(tmp_path / "absent") == shas["neither"]


def test_evaluation_logging_and_telemetry_change_no_weight(everything, sha, tmp_path):
    often = {"train.eval_every": 1, "train.log_every": 1, "train.telemetry_every": 1, "train.checkpoint_every": 3}
    never = {"train.eval_every": 0, "train.log_every": 99, "train.telemetry_every": 0, "train.checkpoint_every": 0}
    for name, changes in (("often", often), ("never", never)):
        start(everything(**changes), tmp_path / name)
    assert sha(tmp_path / "often") == sha(tmp_path / "never")
    assert sum(r["kind"] == "telemetry" for r in read_metrics(tmp_path / "often" / "metrics.jsonl")) == 12


def test_the_seed_decides_everything(everything, sha, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6), ("huge", 2**62), ("negative", -3)):
        start(everything(**{"train.seed": seed, "train.steps": 2}), tmp_path / name)
    shas = {name: sha(tmp_path / name) for name in ("a", "b", "c", "huge", "negative")}
    assert shas["a"] == shas["b"] and len(set(shas.values())) == 4
    with pytest.raises(OuroborosError, match=r"train\.seed must be within 63 bits"):
        start(everything(**{"train.seed": 2**63}), tmp_path / "d")


def test_a_changed_recipe_is_refused_by_field_and_allowed_on_request(make, stop_at, tmp_path, caplog):
    run = tmp_path / "run"
    start(make(), run, progress=stop_at(2, signal.SIGTERM))
    recipe = RunDirectory(run).read_recipe()
    other = replace(recipe, optim=replace(recipe.optim, lr=0.5), train=replace(recipe.train, steps=7))
    before = tree(run)
    with pytest.raises(OuroborosError, match=r"\(optim\.lr: 0\.003 -> 0\.5; train\.steps: 6 -> 7\); .*--allow-changes"):
        resume(run, recipe=other)
    (run / "recipe.json").write_text((run / "recipe.json").read_text().replace('"lr": 0.003', '"lr": 0.25'))
    with pytest.raises(OuroborosError, match=r"optim\.lr: 0\.003 -> 0\.25"):
        resume(run)  # the file was edited by hand
    (run / "recipe.json").write_bytes(before["recipe.json"])
    assert tree(run) == before
    assert resume(run, recipe=other, allow_changes=True).counters.step == 7
    assert "changed recipe: optim.lr: 0.003 -> 0.5" in caplog.text
    assert RunDirectory(run).read_recipe() == other


def test_recipe_changes_are_named_by_path(make):
    old, new = make(), make(**{"train.loops.curriculum": [[0.0, 1], [0.5, 2]], "model.block.mixer.qkv_bias": True})
    assert recipe_changes(old, old) == []
    assert recipe_changes(old, new) == [
        "model.block.mixer.qkv_bias: False -> True",
        "train.loops.curriculum: [] -> [[0.0, 1], [0.5, 2]]",
    ]
    parts = [{"kind": "inject"}, {"kind": "gate"}]
    one, other = make(**{"model.loop": parts}), make(**{"model.loop": parts[::-1]})
    assert recipe_changes(one, other) == ["the order of parts: inject, gate -> gate, inject"]


def test_another_model_does_not_fit_the_checkpoint(make, stop_at, tmp_path):
    run = tmp_path / "run"
    start(make(), run, progress=stop_at(2, signal.SIGTERM))
    recipe = RunDirectory(run).read_recipe()
    for change, words in (({"hidden_size": 32}, "has shape"), ({"layout": "5"}, "belong to another model")):
        other = replace(recipe, model=replace(recipe.model, **change))
        with pytest.raises(OuroborosError, match=words):
            resume(run, recipe=other, allow_changes=True)
    other = replace(recipe, optim=replace(recipe.optim, matrix_optimizer="adamw"))
    with pytest.raises(OuroborosError, match="optimiser state is of BatchedMuon, AdamW; the run uses AdamW"):
        resume(run, recipe=other, allow_changes=True)
    assert resume(run).finished


@pytest.mark.parametrize("damage", ["truncate", "alter", "marker", "remove"])
def test_a_damaged_newest_checkpoint_falls_back_loudly(damage, make, stop_at, sha, tmp_path, caplog):
    recipe = make(**{"train.checkpoint_every": 2, "train.keep_last": 3})
    start(recipe, tmp_path / "whole")
    run = tmp_path / "run"
    start(recipe, run, progress=stop_at(5, signal.SIGTERM))
    newest = run / "checkpoints" / "step-00000005"
    weights = newest / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "alter":
        weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
    elif damage == "marker":
        (newest / "COMPLETE.json").unlink()
    else:
        weights.unlink()
    caplog.clear()
    assert resume(run).finished
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("DAMAGED" in record.message and "step-00000005" in record.message for record in loud)
    assert sha(run) == sha(tmp_path / "whole")


def test_without_any_good_checkpoint_resume_says_what_is_wrong(make, stop_at, tmp_path):
    run = tmp_path / "run"
    start(make(), run, progress=stop_at(2, signal.SIGTERM))
    (run / "checkpoints" / "step-00000002" / "state.json").write_text("{}")
    with pytest.raises(OuroborosError, match=r"no good checkpoint: .*state\.json: has 2 bytes"):
        resume(run)


def test_a_changed_source_is_refused_by_name(make, stop_at, text, tmp_path):
    run = tmp_path / "run"
    start(make(), run, progress=stop_at(2, signal.SIGTERM))
    original = text.read_bytes()
    text.write_bytes(original.replace(b"a", b"b", 1))
    before = tree(run)
    with pytest.raises(OuroborosError, match=r"text\.txt': has changed since"):
        resume(run)
    assert tree(run) == before
    text.write_bytes(original)
    assert resume(run).finished


def test_a_run_goes_on_without_its_text_while_what_was_prepared_is_intact(make, stop_at, text, tmp_path, caplog):
    run = tmp_path / "run"
    start(make(), run, progress=stop_at(2, signal.SIGTERM))
    text.unlink()
    shards = run / "data" / "0-train.raw"
    original = shards.read_bytes()
    shards.write_bytes(original[::-1])
    with pytest.raises(OuroborosError, match=r"0-train\.raw was altered"):
        resume(run)
    shards.write_bytes(original)
    assert resume(run).finished
    assert "not there any more; the run goes on with the text prepared from it" in caplog.text


def test_a_finished_run_is_refused_and_can_be_extended(make, sha, tmp_path, monkeypatch):
    run = tmp_path / "run"
    start(make(), run)
    before = tree(run)
    with pytest.raises(OuroborosError, match=r"the run is complete \(6 steps\); .* --train\.steps N --allow-changes"):
        resume(run)
    assert tree(run) == before
    recipe = RunDirectory(run).read_recipe()
    longer = replace(recipe, train=replace(recipe.train, steps=8))

    def stopped_before_export(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(session, "export", stopped_before_export)
        with pytest.raises(Crash):
            resume(run, recipe=longer, allow_changes=True)
    assert not (run / "model.safetensors").exists()  # six steps' weights must not pass for those of eight
    assert load_model(run / "checkpoints" / "step-00000008") is not None
    result = resume(run)
    assert result.finished and result.loss is None and result.counters.step == 8
    saved = load_model(run / "checkpoints" / "step-00000008").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in load_model(run).state_dict().items())


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again(make, stop_at, sha, tmp_path):
    start(make(), tmp_path / "whole")
    run = tmp_path / "run"
    with pytest.raises(Crash):
        start(make(), run, progress=stop_at(3, Crash))
    assert not (run / "checkpoints").exists()
    assert resume(run).finished and sha(run) == sha(tmp_path / "whole")
    steps = [r["step"] for r in read_metrics(run / "metrics.jsonl")]
    assert steps == sorted(set(steps))


def test_a_locked_run_is_refused(make, stop_at, tmp_path):
    run = tmp_path / "run"
    start(make(), run, progress=stop_at(2, signal.SIGTERM))
    with run_lock(run):
        before = tree(run)
        with pytest.raises(OuroborosError, match="is in use by process"):
            resume(run)
        assert tree(run) == before
    empty = tmp_path / "empty"
    empty.mkdir()
    with run_lock(empty), pytest.raises(OuroborosError, match="is in use by process"):
        start(make(), empty)
    assert resume(run).finished


def test_existing_directories_are_refused_and_left_alone(make, text, tmp_path):
    start(make(), tmp_path / "run")
    with pytest.raises(OuroborosError, match=r"holds a run of recipe 'small'; .*ouroboros resume .* another --out"):
        start(replace(make(), name="other"), tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    for path in (tmp_path / "full", text):
        with pytest.raises(OuroborosError, match="exists and is not an empty directory"):
            start(make(), path)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    with pytest.raises(OuroborosError, match="cannot make the run directory"):
        start(make(), text / "run")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.sources": ["nowhere.txt"]}, r"source 'nowhere\.txt': no such file"),
        ({"data.sequence_length": 5000}, "one window needs 5001"),
        ({"train.loops.backprop": 1}, r"train\.loops\.backprop=1 leaves the blocks before the loop without gradient"),
        ({"data.tokenizer": "bytse"}, "did you mean 'bytes'"),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(change, message, existing, make, tmp_path):
    out = tmp_path / "new" / "run"
    if existing:
        out.mkdir(parents=True)
    with pytest.raises(OuroborosError, match=message):
        start(make(**change), out)
    assert list(out.iterdir()) == [] if existing else not out.parent.exists()
    assert start(make(**{"train.steps": 1}), out).finished


def test_data_prepared_before_is_used_and_kept(make, tmp_path):
    start(make(**{"train.steps": 1}), tmp_path / "first")
    out = tmp_path / "second"
    shutil.copytree(tmp_path / "first" / "data", out / "data")
    (out / ".lock").touch()
    (out / ".data.tmp-host-1-abc").mkdir()  # left by a start that was killed
    prepared = tree(out / "data")
    with pytest.raises(OuroborosError, match="backprop"):
        start(make(**{"train.loops.backprop": 1}), out)
    assert tree(out / "data") == prepared
    assert start(make(**{"train.steps": 1}), out).finished and tree(out / "data") == prepared


def test_a_budget_is_needed(make, tmp_path):
    with pytest.raises(OuroborosError, match="exactly one of --steps, --tokens and --minutes"):
        start(make(**{"train.steps": None}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("tokens", "steps"), [(256, 2), (257, 3)])
def test_a_budget_of_tokens(tokens, steps, make, tmp_path):
    result = start(make(**{"train.steps": None, "train.tokens": tokens}), tmp_path / "run")
    assert (result.counters.step, result.counters.tokens) == (steps, steps * 128)


def test_a_budget_of_minutes_counts_earlier_sessions(make, stop_at, tmp_path):
    recipe = make(**{"train.steps": None, "train.minutes": 0.02, "train.log_every": 1})
    first = start(recipe, tmp_path / "run", progress=stop_at(1, signal.SIGTERM))
    result = resume(tmp_path / "run")
    assert result.finished and result.counters.seconds >= 1.2 > first.counters.seconds
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    rates = [record["lr"] for record in records if record["kind"] == "train"]
    assert rates[-1] < 0.3 * max(rates)  # the schedule follows the clock to its end


def test_what_is_no_run(tmp_path):
    with pytest.raises(OuroborosError, match=r"nope does not exist; start a run with `ouroboros train"):
        resume(tmp_path / "nope")
    with pytest.raises(OuroborosError, match="is not a run directory"):
        resume(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_says_what_is_about_to_run(make, tmp_path, stop_at, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(Progress, "message", lambda self, text: said.append(text))
    start(make(**{"train.eval_every": 3}), tmp_path / "run", progress=stop_at(4, signal.SIGTERM))
    resume(tmp_path / "run")
    opening = [line for line in said if "parameters" in line]
    assert opening[0].startswith("small 1 (1)x2 1: ") and "128 tokens/step, float32, compile: off" in opening[0]
    assert "resumed at step 4" in opening[1] and "resumed" not in opening[0]
    assert sum("validation" in line for line in said) == 2 and any("SIGTERM: saving" in line for line in said)


def records(path: Path, lines: int = 120) -> Path:
    """A jsonl or parquet file of question-like records."""
    rows = [{"text": f"Record {n} of the stream: {n} times {n} is {n * n}.\n"} for n in range(lines)]
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path, row_group_size=32)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def streamed(make, path: Path, text: Path):
    """``make``'s recipe over two streams, of which the second is read more than once."""
    sources = [f"{records(path)}=2", str(records(text.with_name("few.jsonl"), 40))]
    return make(**{"data.sources": sources, "data.stream": True, "data.valid_fraction": 0.1})


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_streamed_run_resumes_bit_for_bit(kind, everything, stop_at, sha, text, tmp_path):
    recipe = streamed(everything, tmp_path / f"records.{kind}", text)
    whole = start(recipe, tmp_path / "whole")
    run = tmp_path / "parts"
    assert start(recipe, run, progress=stop_at(5, signal.SIGTERM)).counters.step == 5
    assert resume(run, progress=stop_at(8, signal.SIGTERM)).counters.step == 8
    assert resume(run).finished
    assert sha(run) == sha(tmp_path / "whole") and whole.counters.step == 12
    streams = [
        [record for record in read_metrics(path / "metrics.jsonl") if record["kind"] == "stream"]
        for path in (run, tmp_path / "whole")
    ]
    assert streams[0] == streams[1] and [record["step"] for record in streams[0]] == [1, 2, 4, 6, 8, 10, 12]
    ends = streams[0][-1]["sources"]
    assert ends[0]["source"].endswith(f"records.{kind}") and [end["restarts"] for end in ends] == [0, 0]
    assert ends[0]["epoch"] == 0 < ends[0]["record"] and ends[0]["counts"]["read"] == ends[0]["record"]


def test_a_stream_that_breaks_changes_no_weight(make, sha, text, tmp_path, monkeypatch):
    from ouroboros.data import stream

    recipe = streamed(make, tmp_path / "records.jsonl", text)
    start(recipe, tmp_path / "whole")
    read, broken = stream.judged_documents, iter([7, 7, 21])

    def breaking(ref, spec, **options):
        fails = next(broken, None) if options["start"] else 3
        for document in read(ref, spec, **options):
            if fails is not None and document.index >= max(fails, options["start"]):
                raise ConnectionError("the line is dead")
            yield document

    monkeypatch.setattr(stream, "judged_documents", breaking)
    monkeypatch.setattr(stream, "sleep", lambda seconds: None)
    start(recipe, tmp_path / "broken")
    assert sha(tmp_path / "broken") == sha(tmp_path / "whole")
    record = [r for r in read_metrics(tmp_path / "broken" / "metrics.jsonl") if r["kind"] == "stream"][-1]
    assert sum(source["restarts"] for source in record["sources"]) > 3


def test_a_source_that_cannot_be_streamed_leaves_no_run(make, text, tmp_path, monkeypatch):
    from ouroboros.data import stream

    recipe = streamed(make, tmp_path / "records.jsonl", text)

    def closed(ref, spec, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(stream, "judged_documents", closed)
    with pytest.raises(OuroborosError, match=r"source '.*': cannot be opened: ConnectionError: no route"):
        start(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_streamed_source_may_grow_but_not_change_where_it_is_read(make, stop_at, text, tmp_path):
    path = tmp_path / "records.jsonl"
    recipe = streamed(make, path, text)
    for run in ("grown", "changed"):
        start(recipe, tmp_path / run, progress=stop_at(5, signal.SIGTERM))
    with path.open("a") as file:
        file.write('{"text": "one more"}\n' * 20)
    assert resume(tmp_path / "grown").finished
    path.write_text(path.read_text().replace("Record", "Entry"))
    with pytest.raises(OuroborosError, match="next training batch is not the recorded one; a source or the prepared"):
        resume(tmp_path / "changed")
