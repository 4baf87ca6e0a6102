"""Which recipe goes where: the table in the documentation is what the exports say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ouroboros.api import build, open_model
from ouroboros.config import Recipe, to_dict
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.pack.artifact import expected_tensors
from ouroboros.pack.header import Facts
from ouroboros.pack.quantize import quantize
from ouroboros.pack.write import write_artifact
from ouroboros.recipes import RECIPES, recipe
from ouroboros.registry import load
from ouroboros.verbs.export import FORMS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "export.md"
COLUMNS = [form for form in FORMS if form != "donor"]  # which only what came of a donor goes back to
REASON = re.compile(r",? (\(there|are not|have no place|is not one loop|which the standalone|where the standalone).*")
PATH = re.compile(r"^\S*/\S+: ")


def outcome(write: Callable[..., Any], *arguments: Any) -> str:
    """``works``, or what has no place."""
    try:
        write(*arguments)
    except OuroborosError as error:
        return f"refused: {REASON.sub('', PATH.sub('', str(error)))}"
    return "works"


def packed(made: Recipe, model: Any, path: Path) -> Path:
    """Of codes of 6 bits, which any model has."""
    weights = model.state_dict()
    tensors = {name: weights[name] for name in expected_tensors(made.model)}
    coded = {
        name: quantize(x, 6) if x.ndim > 1 else x.half() if x.is_floating_point() else x for name, x in tensors.items()
    }
    write_artifact(path, made.model, coded, byte_tokenizer(), Facts(recipe=to_dict(made)), eos_token_id=256)
    return path


def row(name: str, place: Path) -> str:
    """A row of the table: what becomes of a recipe in each form."""
    made = recipe(name, "tiny")
    made = dataclasses.replace(made, model=made.model.replace(vocab_size=257))
    torch.manual_seed(0)
    model, text, found = build(made).eval(), byte_tokenizer(), []
    for form in COLUMNS:
        source, given = place / "run", model
        if form == "standalone":
            source = packed(made, model, place / f"{name}.pack")
            given = open_model(source).model
        found.append(outcome(load(FORMS[form][0]), source, given, place / f"{name}.{form}", text))
    return f"| `{name}` | {' | '.join(found)} |"


def test_the_table_is_what_the_exports_say(tmp_path: Path) -> None:
    rows = [row(name, tmp_path) for name in sorted(RECIPES)]
    head = [f"| recipe | {' | '.join(f'`{form}`' for form in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    table = "\n".join((*head, *rows))
    assert table in PAGE.read_text(encoding="utf-8"), f"the table is now\n{table}"
    assert "works | works | works | works" in next(line for line in rows if "loop-portable" in line)
