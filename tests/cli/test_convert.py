"""``convert``: a published checkpoint becomes a model that the other verbs use."""

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from ouroboros import registry
from ouroboros.api import build
from ouroboros.convert.checkpoint import Published
from ouroboros.convert.readers import Option, Reader
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.model.reading import load_model
from ouroboros.recipes import recipe

WIDTH, HEADS, LATENT, INNER = 12, 3, 5, 20


def tensors() -> dict[str, Tensor]:
    """A published checkpoint of small sizes."""
    torch.manual_seed(0)
    attention = {
        "q_down": (LATENT, WIDTH),
        "kv_down": (LATENT, WIDTH),
        "q_up": (WIDTH, LATENT),
        "k_up": (WIDTH, LATENT),
        "v_up": (WIDTH, LATENT),
        "out_proj": (WIDTH, WIDTH),
    }
    found = {f"shared_block.attn.{name}.weight": torch.randn(shape) for name, shape in attention.items()}
    for name, shape in {"w1": (INNER, WIDTH), "w2": (INNER, WIDTH), "w3": (WIDTH, INNER)}.items():
        found[f"shared_block.ffn.{name}.weight"] = torch.randn(shape)
        found[f"shared_block.ffn.{name}.bias"] = torch.randn(shape[0])
    found |= {f"shared_block.attn.{name}.scale": torch.ones(WIDTH // HEADS) for name in ("q_norm", "k_norm")}
    found |= {f"{name}.scale": torch.ones(WIDTH) for name in ("ln_f", "shared_block.ln1", "shared_block.ln2")}
    found["token_embedding.weight"] = found["lm_head.weight"] = torch.randn(257, WIDTH)
    return {**found, "reasoning_tokens": torch.randn(1, 2, WIDTH)}


@pytest.fixture
def source(tmp_path):
    torch.save(tensors(), tmp_path / "best_model.pth")
    byte_tokenizer().save(tmp_path / "tokenizer")
    return tmp_path / "best_model.pth"


def test_a_published_checkpoint_can_be_talked_to(cli, source, tmp_path):
    out = tmp_path / "model"
    result = cli("convert", source, "--out", out, "--loops", 3, "--tokenizer", tmp_path / "tokenizer")
    assert result.status == 0 and result.err == ""
    assert "3 heads, 3 loops, 2 registers, vocabulary 257" in result.out and result.out.count("\n") == 1
    options = ["--style", "published", "--max-new-tokens", "5", "--json"]
    facts = cli("generate", out, "--prompt", "y" * 300, *options).json  # a window takes any prompt
    assert facts["loops"] == 3 and facts["prompt"] == "y" * 300


def test_as_json(cli, source, tmp_path, caplog):
    facts = cli("convert", source, "--out", tmp_path / "model", "--loops", 3, "--json").json
    expected = {"d_model": 12, "heads": 3, "loops": 3, "d_latent": 5, "d_ff": 20, "prefix_tokens": 2, "head_dim": 4}
    assert facts.items() >= expected.items() and facts["vocab_size"] == 257 and facts["tokenizer"] is False
    assert facts["source"] == str(source) and facts["out"] == str(tmp_path / "model")
    assert "has no tokenizer; give --tokenizer DIR" in caplog.text
    assert "holds no tokenizer" in cli("generate", tmp_path / "model", "--prompt", "x").error()


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ([], 1, "the number of loops leaves no trace in this checkpoint, and width 12 is no published preset's"),
        (["--loops", "2", "--tokenizer", "nowhere"], 1, "tokenizer 'nowhere': no such directory"),
        (["--loops", "two"], 2, "--loops"),
        (["--loop", "2"], 2, "did you mean --loops?"),
        (["--loops", "0"], 1, "0"),
    ],
)
def test_bad_options_leave_nothing(options, status, words, cli, source, tmp_path):
    assert words in cli("convert", source, "--out", tmp_path / "model", *options).error(status)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best_model.pth", "tokenizer"]


def test_other_sources_and_places(cli, source, trained, tmp_path):
    for other in (trained, trained / "recipe.json", "nowhere.pth"):
        assert "give a published checkpoint" in cli("convert", other, "--out", tmp_path / "m").error()
    error = cli("convert", source, "--out", tmp_path / "m", "--loops", 2, "--config", source).error()
    others = "the Controller or Crawler or Deep Delta Learning"
    assert f"this is a checkpoint of R-HRM, and --config is for {others}: leave it out" in error
    assert "Missing" in cli("convert", source).error(2)
    assert "exists and is not an empty directory" in cli("convert", source, "--out", tmp_path, "--loops", 2).error()
    assert not (tmp_path / "m").exists()


@pytest.fixture
def toy(monkeypatch):
    """A system beside the library that brings a reader, with an option of its own, and a writer."""

    def convert(checkpoint, *, eos_token_id, loops=1):
        return Published(model=build(recipe("gpt", "tiny")), sizes={"loops": loops}, summary=f"{loops} turns")

    def write(model, tokenizer, out):
        out.write_text("toy")
        return {"system": "Toy", "words": 1234}

    module = ModuleType("toy_system")
    options = {"loops": Option(type=int, help="Turns of the toy."), "turns_per_day": Option(type=int, help="Pace.")}
    module.READER = Reader(system="Toy", recognises=lambda it: it.has("toy."), convert=convert, options=options)
    module.WRITER = write
    entries = {"readers": {"toy": "toy_system:READER"}, "writers": {"toy": "toy_system:WRITER"}}
    module.SYSTEM = registry.System(name="toy", title="Toy", entries=entries)
    monkeypatch.setitem(sys.modules, "toy_system", module)
    monkeypatch.setattr(registry, "entry_points", lambda group: [SimpleNamespace(value="toy_system")])
    registry.systems.cache_clear()
    yield
    registry.systems.cache_clear()


def test_a_system_beside_the_library_brings_its_reader_and_writer(cli, toy, trained, tmp_path):
    shown = " ".join(cli("convert", "--help").out.replace("\u2502", " ").split())
    assert "told by its content: the Controller, Crawler, Deep Delta Learning, OSAM, R-HRM, Toy." in shown
    assert "--turns-per-day" in shown
    assert "R-HRM: Number of loops" in shown and "Toy: Turns of the toy." in shown
    torch.save({"toy.weight": torch.ones(2)}, tmp_path / "toy.pt")
    result = cli("convert", tmp_path / "toy.pt", "--out", tmp_path / "model", "--loops", 3)
    assert result.status == 0 and "Toy, " in result.out and "3 turns" in result.out
    assert load_model(tmp_path / "model").schedule.loops == 1
    assert "--heads is for R-HRM" in cli("convert", tmp_path / "toy.pt", "--out", tmp_path / "m", "--heads", 3).error()
    result = cli("convert", trained, "--to", "toy", "--out", tmp_path / "out.toy")
    assert result.out == f"{tmp_path}/out.toy: a checkpoint of Toy's published program, 1,234 words\n"


@pytest.fixture
def donor(tmp_path):
    """A tiny pretrained model of another library, and a text."""
    sizes = {"vocab_size": 257, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_hidden_layers=5)).save_pretrained(tmp_path / "donor")
    byte_tokenizer().save(tmp_path / "donor")
    (tmp_path / "text.txt").write_text("".join(f"{n} times 7 is {7 * n}.\n" for n in range(200)))
    return tmp_path / "donor"


def test_layers_of_a_loop_are_chosen_by_measurement(cli, donor, tmp_path):
    options = ["--layout", "1 loop:(1)x2 1", "--init", "selected", "--held-out", tmp_path / "text.txt"]
    facts = cli("convert", donor, "--out", tmp_path / "one", *options, "--json").json
    table = facts["choice"]["candidates"]
    best = min(table, key=lambda row: row["loss"])["start"]
    assert [row["start"] for row in table] == [1, 2, 3] and facts["layers"] == [0, best, 4]
    assert table[0].keys() == {"start", "loss", "angular_distance", "block_influence"}
    assert facts["choice"]["donor_loss"] > 0 and facts["choice"]["tokens"] > 1000
    lines = cli("convert", donor, "--out", tmp_path / "two", *options).out.splitlines()
    assert f"keeps layers 0,{best},4 and" in lines[0].replace("0-1", "0,1").replace("3-4", "3,4") and len(lines) == 6
    assert [line[:2] for line in lines[2:5]] == ["* " if row["start"] == best else "  " for row in table]


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--layout", "3"], 1, "say with --keep which layer each block takes, for example --keep 0-2, or with --init"),
        (["--layout", "3", "--init", "averaged"], 1, "layout '3' has no loop whose layers could be chosen"),
        (["--layout", "3 (1)x2 3", "--init", "stepwise"], 1, "has 7 blocks and the donor 5 layers: take fewer blocks"),
        (["--layout", "1 (1)x2 1", "--init", "selected"], 1, "give a file of it with --held-out"),
        (["--layout", "1 (1)x2 1", "--init", "random"], 2, "random"),
        (["--held-out", "text.txt", "--to", "osam"], 1, "--held-out is about reading a model: leave it out with --to"),
    ],
)
def test_layers_that_cannot_be_chosen(options, status, words, cli, donor, tmp_path):
    assert words in cli("convert", donor, "--out", tmp_path / "model", *options).error(status)
    assert not (tmp_path / "model").exists()


def test_the_options_are_known_without_torch():
    code = "from ouroboros.verbs import convert as v; v._all_options(nested=True); sys.exit('torch' in sys.modules)"
    code = f"import sys; {code}"
    subprocess.run([sys.executable, "-c", code], check=True)
