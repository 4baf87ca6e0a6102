"""What people train and adapt models of transformers with: its own trainer, PEFT and TRL, the real libraries."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.config.parts.loop import InjectionSpec
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM

STEPS = 10
TEXTS = [f"{n} times {n} is {n * n}." for n in range(64)]
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture(autouse=True)
def as_before(given_back: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """A trainer sets seeds and threads of its own."""
    with given_back():
        yield


@pytest.fixture
def model() -> OuroborosForCausalLM:
    """A looped model of bytes."""
    torch.manual_seed(0)
    spec = ModelSpec(layout="1 (1)x2 1", vocab_size=257, hidden_size=16, loop=(InjectionSpec(),)).replace(
        mixer=AttentionSpec(num_heads=4, num_kv_heads=2), ffn=FeedForwardSpec(intermediate_size=24)
    )
    return OuroborosForCausalLM(OuroborosConfig.from_spec(spec, eos_token_id=256))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    byte_tokenizer().save(tmp_path / "tokens")
    return AutoTokenizer.from_pretrained(tmp_path / "tokens")


def losses(trainer: Any) -> list[float]:
    """Of each step of a training run."""
    trainer.train()
    found = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(found) == STEPS
    return found


def test_trainer(model: OuroborosForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": TEXTS}).map(lambda record: tokenizer(record["text"]), remove_columns="text")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    settings = TrainingArguments(output_dir=str(tmp_path), **SETTINGS)
    trainer = Trainer(model=model, args=settings, train_dataset=data, data_collator=collator)
    found = losses(trainer)
    assert found[-1] < found[0] - 0.5
    trainer.save_model(str(tmp_path / "saved"))
    saved = OuroborosForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), model.parameters(), strict=True))


def test_lora_belongs_to_a_block_and_serves_all_its_visits(model: OuroborosForCausalLM, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ids = torch.randint(0, 256, (2, 9))
    expected = {loops: model.with_loops(loops)(ids).logits for loops in (2, 3)}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    blocks = len(model.model.decoder.layers)
    assert len(trained) == 2 * 7 * blocks and all("lora_" in name for name in trained), "seven maps of each block"
    assert torch.equal(adapted(ids).logits, expected[2]), "neutral at the start"
    calls: list[int] = []
    looped = model.model.decoder.layers[1].self_attn.q_proj
    looped.register_forward_hook(lambda *_: calls.append(1))
    adapted(ids, labels=ids).loss.backward()
    assert len(calls) == 2, "the two visits of the looped block run one adapter"
    assert all(p.grad is not None for p in trained.values())
    with torch.no_grad():
        for name, p in trained.items():
            p.add_(0.1 if "lora_B" in name else 0.0)
    changed = {loops: adapted.with_loops(loops)(ids).logits for loops in (2, 3)}
    assert all((changed[loops] - expected[loops]).abs().max() > 1e-3 for loops in changed)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, changed[2], rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
def test_sft_trainer(model: OuroborosForCausalLM, tokenizer: Any, tmp_path: Path, adapter: bool) -> None:
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = trl.SFTConfig(output_dir=str(tmp_path), max_length=48, **SETTINGS)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    data = Dataset.from_dict({"text": TEXTS})
    found = losses(
        trl.SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    )
    assert found[-1] < found[0] - (0.03 if adapter else 0.5)
    kept = [
        torch.equal(p, before[name.replace("base_layer.", "")])
        for name, p in model.named_parameters()
        if "lora" not in name
    ]
    assert all(kept) if adapter else not any(kept)
