"""What a model reads while it is calibrated."""

from __future__ import annotations

import pytest
import torch
from variants import BASE

from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.pack.ids import generated_ids, random_ids, text_ids


def test_text():
    tokenizer = byte_tokenizer()
    rows = text_ids(iter([b"abc", b"defgh", b"never read"]), tokenizer, rows=2, length=4)
    stream = [tokenizer.eos_id, *tokenizer.encode(b"abc"), tokenizer.eos_id, *tokenizer.encode(b"defgh")]
    assert [row.tolist() for row in rows] == [stream[:4], stream[4:8]]
    few = text_ids([b"abcde"], tokenizer, rows=4, length=4)
    assert [len(row) for row in few] == [4, 2]
    with pytest.raises(OuroborosError, match="text is empty"):
        text_ids([b""], tokenizer, rows=1, length=4)


def test_what_the_model_writes():
    torch.manual_seed(0)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(BASE)).train()
    with torch.no_grad():  # it then repeats the token that it has read
        model.model.embed_tokens.weight.copy_(torch.eye(67, 32) * 40)
    rows = generated_ids(model, rows=4, length=6, first=3, seed=1)
    assert [row.tolist() for row in rows] == [[3] * 6] * 4
    assert model.training


def test_what_it_writes_depends_on_the_seed_alone():
    torch.manual_seed(0)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(BASE))
    one, again, other = (torch.stack(generated_ids(model, rows=3, length=8, first=0, seed=s)) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.shape == (3, 8)


def test_random():
    rows = torch.stack(random_ids(5, rows=40, length=50, seed=0))
    assert rows.shape == (40, 50)
    assert set(rows.flatten().tolist()) == set(range(5))
    assert torch.equal(rows, torch.stack(random_ids(5, rows=40, length=50, seed=0)))
