"""Tasks of lm-eval: records and what is wrong with them, requests against lm-eval's own, figures against ``hf``."""

from __future__ import annotations

import gzip
import json
import math
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ouroboros.api import build
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.eval.score import next_token_nats, score
from ouroboros.eval.tasks import TASKS, find_task, harness_model, read_task, score_tasks
from ouroboros.recipes import recipe

WINDOW = 48
QUESTIONS = [
    ("Which of these is hot?", ["the sun", "an ice cube", "snow", "a cold lake"], 0),
    ("What do plants need to grow?", ["stones", "light", "metal"], 1),
    ("Which is an animal?", ["a cup", "a book", "a chair", "a cow"], 3),
    ("How many legs has a spider, which is not an insect?", ["six", "eight"], 1),
    ("Where do fish live?", ["in the water", "in the sky", "in a book", "in trees"], 0),
]
RECORDS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [{"query": f"Question: {q}", "choices": c, "gold": g} for q, c, g in QUESTIONS],
    "arc_challenge": [{"query": f"Question: {q}", "choices": c, "gold": g} for q, c, g in QUESTIONS],
    "blimp": [
        {"sentence_good": f"{name} {good}.", "sentence_bad": f"{name} {bad}.", "UID": uid}
        for uid, good, bad in (("agreement", "sings", "sing"), ("object", "has eaten it", "has eaten"))
        for name in ("Anna", "Tom", "Lea")
    ],
    "hellaswag": [
        {"query": "Roofing: A man sits on a roof. He", "choices": ["sings.", "takes a tile.", "skis."], "gold": 1},
        {"query": "Cooking: She boils water. The pot", "choices": ["is warm.", "flies.", "is a dog."], "gold": 0},
    ],
    "lambada_openai": [
        {"context": "The dog barked, and then the cat saw the", "continuation": "dog"},
        {"context": "Tom gave Lea a book, so Lea thanked", "continuation": "Tom"},
        {"context": "It was a rainy day, and we all got wet in the", "continuation": "rain"},
    ],
    "piqa": [
        {"query": "Question: dry hands\n", "choices": ["use a towel", "use a lake"], "gold": 0},
        {"query": "Question: cut bread\n", "choices": ["with a spoon", "with a knife"], "gold": 1},
    ],
    "winogrande": [
        {
            "context_options": ["Sarah was ill, so Sarah", "Sarah was ill, so Maria"],
            "continuation": "rested.",
            "gold": 0,
        }
    ],
}


def write(directory: Path, name: str, records: list[dict[str, Any]]) -> Path:
    path = directory / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory with a few records of each task."""
    for name, records in RECORDS.items():
        write(tmp_path, name, records)
    return tmp_path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small looped model in a directory, with the byte tokenizer."""
    torch.manual_seed(3)
    model = build(recipe("loop", "tiny"))
    for parameter in model.parameters():  # else a fresh model finds everything about alike
        parameter.data.mul_(1.5)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    byte_tokenizer().save(path)
    return path


@pytest.fixture(scope="module")
def opened(saved: Path) -> Any:
    """The model and its tokenizer of transformers."""
    import ouroboros

    return ouroboros.load(saved)


def test_every_task_is_read(data):
    for name, records in RECORDS.items():
        task = read_task(name, data)
        assert len(task.rows) == len(records)
    assert read_task("arc_easy", data).chance == pytest.approx((3 / 4 + 1 / 3 + 1 / 2) / 5)
    assert read_task("lambada_openai", data).chance is None
    assert len(read_task("arc_easy", data, 2).rows) == 2 and len(read_task("arc_easy", data, 99).rows) == 5
    groups = [row["group"] for row in read_task("blimp", data, 4).rows]
    assert groups == ["agreement", "object"] * 2  # a beginning has as much of each


def test_files_may_be_compressed_and_carry_the_split(tmp_path):
    with gzip.open(tmp_path / "hellaswag_val.jsonl.gz", "wt") as file:
        file.write(json.dumps(RECORDS["hellaswag"][0]) + "\n")
    assert find_task("hellaswag", tmp_path).name == "hellaswag_val.jsonl.gz"
    assert len(read_task("hellaswag", tmp_path).rows) == 1


def test_published_files_are_read(shared_data):
    """Of each a few records, where real data lie beside the project."""
    for name in TASKS:
        assert len(read_task(name, shared_data / "eval", 3).rows) == 3


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        (
            "arc_easy",
            {"gold": 4},
            "easy.jsonl:2: field 'gold' must be the position of the right one of 4, from 0 to 3; got 4",
        ),
        ("arc_easy", {"gold": True}, "got True"),
        ("arc_easy", {"gold": "A"}, "got 'A'"),
        ("arc_easy", {"choices": "abc"}, ":2: field 'choices' must be a list of at least two texts"),
        ("arc_easy", {"choices": ["a", " "]}, ":2: entry 1 of field 'choices' must be a text that is not blank"),
        ("piqa", {"query": None}, "piqa.jsonl:2: field 'query' must be a text that is not blank, got None"),
        ("winogrande", {"context_options": ["a"]}, "field 'context_options' must be a list"),
        ("lambada_openai", {"continuation": 5}, "field 'continuation' must be a text that is not blank, got 5"),
        ("blimp", {"UID": ""}, "field 'UID' must be a text"),
    ],
)
def test_a_wrong_record_is_named(tmp_path, name, fields, words):
    first = RECORDS[name][0]
    write(tmp_path, name, [first, first | fields])
    with pytest.raises(OuroborosError) as caught:
        read_task(name, tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path, data):
    with pytest.raises(OuroborosError, match=r"unknown task 'arc_esay'; did you mean 'arc_easy'\?"):
        find_task("arc_esay", data)
    with pytest.raises(OuroborosError, match=r"nowhere: no such directory; give the one that holds piqa.jsonl"):
        find_task("piqa", tmp_path / "nowhere")
    (data / "hellaswag.jsonl").unlink()
    with pytest.raises(OuroborosError, match=r"task 'hellaswag': .* holds no hellaswag.jsonl or hellaswag_val.jsonl"):
        find_task("hellaswag", data)
    for text, words in (("", "holds no record"), ("{\n", "piqa.jsonl:1"), ("[1]\n", ":1: not a JSON object")):
        (data / "piqa.jsonl").write_text(text)
        with pytest.raises(OuroborosError, match=words):
            read_task("piqa", data)


def test_without_lm_eval_one_line_says_what_to_install(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OuroborosError, match=r"lm-eval: pip install 'ouroboros-lm\[eval\]'"):
        score_tasks(None, None, [read_task("piqa", data)], [None], window=8)


def labelled(choices: list[str], gold: int) -> dict[str, Any]:
    letters = "ABCD"[: len(choices)]
    return {"choices": {"text": choices, "label": list(letters)}, "answerKey": letters[gold]}


ORIGINALS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "arc_easy": ("arc/arc_easy", [{"question": q, **labelled(c, g)} for q, c, g in QUESTIONS]),
    "arc_challenge": ("arc/arc_challenge", [{"question": q, **labelled(c, g)} for q, c, g in QUESTIONS]),
    "blimp": ("blimp/adjunct_island", RECORDS["blimp"]),
    "hellaswag": (
        "hellaswag/hellaswag",
        [
            {"activity_label": label, "ctx_a": a, "ctx_b": b, "endings": record["choices"], "label": record["gold"]}
            for (label, a, b), record in zip(
                [("Roofing", "A man sits on a roof.", "he"), ("Cooking", "She boils water.", "the pot")],
                RECORDS["hellaswag"],
            )
        ],
    ),
    "lambada_openai": (
        "lambada/lambada_openai",
        [{"text": f"{record['context']} {record['continuation']}"} for record in RECORDS["lambada_openai"]],
    ),
    "piqa": (
        "piqa/piqa",
        [
            {"goal": r["query"][10:-1], "sol1": r["choices"][0], "sol2": r["choices"][1], "label": r["gold"]}
            for r in RECORDS["piqa"]
        ],
    ),
    "winogrande": (
        "winogrande/default",
        [{"sentence": "Sarah was ill, so _ rested.", "option1": "Sarah", "option2": "Maria", "answer": "1"}],
    ),
}
"""lm-eval's own definition of each task, and :data:`RECORDS` in the form that it reads."""


@pytest.mark.parametrize("name", TASKS)
def test_requests_and_metrics_are_those_of_lm_eval(name, data):
    lm_eval = pytest.importorskip("lm_eval")
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    from ouroboros.eval.tasks import _configurable

    file, rows = ORIGINALS[name]
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{file}.yaml")
    table = Dataset.from_list(rows)
    splits = dict.fromkeys(("train", "validation", "test"), table)
    config = {key: value for key, value in config.items() if key != "tag"} | {"custom_dataset": lambda **_: splits}
    task = read_task(name, data)
    if name == "blimp":
        task.rows.sort(key=lambda row: row["group"])  # the order of lm-eval's files; the figures do not depend on it
    theirs, ours = ConfigurableTask(config=config), _configurable(task)
    found = []
    for built in (theirs, ours):
        built.set_config(key="num_fewshot", value=0)
        built.build_all_requests()
        targets = [built.doc_to_target(doc) for doc in built.eval_docs]
        texts = [built.doc_to_text(doc) for doc in built.eval_docs]
        found.append(([request.args for request in built.instances], targets, texts, set(built.aggregation())))
    assert found[0] == found[1]
    assert found[1][3] == set(TASKS[name].form.metrics)


def test_figures_are_those_of_hf_in_lm_eval(saved, opened, data, monkeypatch):
    """``lm_eval --model hf`` on the saved directory: the same to 1e-6, for all tasks."""
    pytest.importorskip("lm_eval")
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    from ouroboros.eval.tasks import _configurable

    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # lists packages for seconds
    tasks = [read_task(name, data) for name in TASKS]
    theirs = evaluator.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(saved), "max_length": WINDOW},
        device="cpu",
        tasks=[_configurable(task) for task in tasks],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=1,
    )["results"]
    ours = score_tasks(*opened, tasks, [None], window=WINDOW)
    assert len(ours) == 12
    for found in ours:
        value, stderr = (theirs[found.task][f"{found.metric}{part},none"] for part in ("", "_stderr"))
        if found.metric == "perplexity":  # of a model that was never trained: ten digits before the point
            assert math.log(found.value) == pytest.approx(math.log(value), rel=1e-6)
            continue
        assert found.value == pytest.approx(value, abs=1e-6), found
        assert found.documents == 1 or found.stderr == pytest.approx(stderr, abs=1e-6), found
    assert len({found.value for found in ours}) > 4  # neither all right nor all wrong


def last_nats(model: Any, text: str, continuation: str) -> float:
    """Minus the log-probability of ``continuation`` behind ``text``, from the last WINDOW bytes before each."""
    ids = torch.tensor([list((text + continuation).encode())])[:, -WINDOW - 1 :]
    return float(next_token_nats(model, ids)[0, -len(continuation.encode()) :].sum())


def test_figures_by_hand_at_each_loop_count(opened, data):
    pytest.importorskip("lm_eval")
    model, tokenizer = opened
    names = ("arc_easy", "lambada_openai")
    found = score_tasks(model, tokenizer, [read_task(name, data) for name in names], [1, 2], window=WINDOW)
    each = [("arc_easy", "acc"), ("arc_easy", "acc_norm"), ("lambada_openai", "acc"), ("lambada_openai", "perplexity")]
    names = [(score.loops, score.task, score.metric) for score in found]
    assert names == [(loops, *name) for loops in (1, 2) for name in each]
    for loops, (right, normed, _, perplexity) in ((1, found[:4]), (2, found[4:])):
        view, hits, hits_normed = model.with_loops(loops), [], []
        for question, choices, gold in QUESTIONS:
            prompt = f"Question: {question}\nAnswer:"
            nats = [last_nats(view, prompt, f" {choice}") for choice in choices]
            hits.append(int(np.argmin(nats)) == gold)
            hits_normed.append(int(np.argmin(np.divide(nats, [len(choice) for choice in choices]))) == gold)
        assert (right.value, normed.value) == pytest.approx((np.mean(hits), np.mean(hits_normed)))
        assert right.stderr == pytest.approx(np.std(hits, ddof=1) / math.sqrt(len(hits)))
        nats = [last_nats(view, r["context"], f" {r['continuation']}") for r in RECORDS["lambada_openai"]]
        assert perplexity.value == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
        error = perplexity.value * np.std(nats, ddof=1) / math.sqrt(len(nats))
        assert perplexity.stderr == pytest.approx(error, rel=1e-3)
        requests = [
            f"Question: {question}\nAnswer: {choice}" for question, choices, _ in QUESTIONS for choice in choices
        ]
        assert 0 < right.cut == sum(len(request) > WINDOW + 1 for request in requests) < len(requests)


def test_a_long_continuation_is_read_in_windows(opened, tmp_path):
    pytest.importorskip("lm_eval")
    model, tokenizer = opened
    record = RECORDS["lambada_openai"][0] | {"continuation": "dog, " * 20 + "dog"}
    write(tmp_path, "lambada_openai", [record])
    found = score_tasks(model, tokenizer, [read_task("lambada_openai", tmp_path)], [None], window=WINDOW)[1]
    text, whole = record["context"], f" {record['continuation']}"
    pieces = [(text + whole[:at], whole[at : at + WINDOW]) for at in range(0, len(whole), WINDOW)]
    assert len(pieces) == 3
    assert math.log(found.value) == pytest.approx(sum(last_nats(model, *piece) for piece in pieces), rel=1e-5)
    assert (found.stderr, found.cut, found.documents) == (None, 1, 1)


def test_bits_per_byte_agree_on_a_model_of_transformers(tmp_path):
    """For texts that fill their windows or fit in one: in the last window of others lm-eval reads more context."""
    pytest.importorskip("lm_eval")
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=64, initializer_range=0.3, **sizes))
    byte_tokenizer().save(tmp_path)
    texts = [("A bird sings. " * 20)[:size] for size in (37, 64, 192)]
    table = Dataset.from_list([{"text": text} for text in texts])
    task = ConfigurableTask(
        config={
            "task": "texts",
            "custom_dataset": lambda **_: {"test": table},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "num_fewshot": 0,
            "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        }
    )
    lm = harness_model(model, AutoTokenizer.from_pretrained(tmp_path), window=64)
    theirs = evaluate(lm, {"tasks": {"texts": task}}, log_samples=False)["results"]["texts"]["bits_per_byte,none"]
    ours = score(model, byte_tokenizer(), [text.encode() for text in texts], window=64)
    assert ours.bits_per_byte == pytest.approx(theirs, abs=1e-5) and lm.cut == 0
    assert abs(ours.bits_per_byte - 8) > 0.1


def test_nothing_is_fetched_and_nothing_printed(opened, data, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    asked = []
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda _, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    score_tasks(*opened, [read_task(name, data) for name in TASKS], [None], window=WINDOW)
    assert asked == [] and capsys.readouterr().out == ""
    assert torch.equal(before[0], torch.random.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_windows_out_of_range_and_models_without_loops_are_refused(opened, data, fakes):
    pytest.importorskip("lm_eval")
    model, tokenizer = opened
    task = read_task("piqa", data)
    with pytest.raises(OuroborosError, match="longer than the model's context"):
        score_tasks(model, tokenizer, [task], [None], window=model.config.max_position_embeddings + 1)
    with pytest.raises(OuroborosError, match="has no loops"):
        score_tasks(fakes.Uniform(), tokenizer, [task], [2], window=8)
