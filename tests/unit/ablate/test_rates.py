"""Speeds are measured once, and what was measured is kept."""

import dataclasses

import pytest

from ouroboros.ablate import rates
from ouroboros.ablate.rates import training_rates
from ouroboros.data.shards import prepare
from ouroboros.recipes import recipe
from ouroboros.train.run import resolve


def test_a_longer_model_is_slower_and_nothing_is_measured_twice(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {n} of some text.\n" for n in range(2000)))
    base = recipe("gpt", "tiny")
    data_spec = dataclasses.replace(base.data, sources=(str(text),), sequence_length=32)
    train = dataclasses.replace(base.train, steps=3, batch_size=2, threads=1, precision="fp32", compile="off")
    base = dataclasses.replace(base, data=data_spec, train=train)
    data = prepare(base.data, tmp_path / "data")
    base = resolve(dataclasses.replace(base, model=base.model.replace(hidden_size=16, layout="1")), data)
    long = dataclasses.replace(base, model=base.model.replace(layout="24"))
    kept = tmp_path / "rates.json"
    fast, slow = training_rates([base, long], data, kept)
    assert fast > slow > 0  # 24 blocks against one: no other program makes that equal
    monkeypatch.setattr(rates, "_measured", lambda *_: pytest.fail("measured again"))
    assert training_rates([long, base], data, kept) == [slow, fast]
