"""Recorded numbers: every JSON file of the golden directories is a case, checked by the function of its ``kind``.

A case holds everything its check needs: sizes, settings, seeds, tolerances. An unknown kind is a failure.
``index.json`` is not a case; it describes what several cases of its directory share.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ouroboros.config import Recipe, from_dict
from ouroboros.train.log import read_metrics
from ouroboros.train.run import start


def training_losses(case: dict[str, Any], path: Path, work: Path) -> None:
    """A run of the case's recipe on generated text has the recorded loss at each step, in nats per token."""
    text = work / "text.txt"
    text.write_text("".join(case["line"].format(n=n, square=n * n) for n in range(case["lines"])))
    recipe = from_dict(Recipe, case["recipe"], where=str(path))
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sources=(str(text),)))
    start(recipe, work / "run")
    records = [record for record in read_metrics(work / "run" / "metrics.jsonl") if record["kind"] == "train"]
    assert [r["loss"] for r in records] == pytest.approx(case["losses"], abs=case["tolerance"])


DATA = Path(__file__).with_name("data")

Check = Callable[[dict[str, Any], Path, Path], None]


def kinds_of(name: str) -> dict[str, Check]:
    """``KINDS`` of the file ``name`` beside this one; tests are no package, so it is loaded by its path."""
    place = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"golden_{name}", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.KINDS


KINDS: dict[str, Check] = {
    "training-losses": training_losses,
    **kinds_of("rhrm_model"),
    **kinds_of("rhrm_data"),
    **kinds_of("rhrm_optim"),
    **kinds_of("rhrm_chat"),
    **kinds_of("delta_parts"),
    **kinds_of("delta_model"),
    **kinds_of("osam_model"),
    **kinds_of("osam_sampling"),
    **kinds_of("osam_data"),
    **kinds_of("crawler_model"),
    **kinds_of("crawler_delta_rule"),
    **kinds_of("crawler_training"),
    **kinds_of("crawler_score"),
    **kinds_of("crawler_packing"),
    **kinds_of("controller_model"),
    **kinds_of("controller_halting"),
    **kinds_of("controller_first"),
    **kinds_of("controller_pipeline"),
}
"""The check of every kind of case."""


def check(path: Path, work: Path) -> None:
    """Check one case file."""
    case = json.loads(path.read_text(encoding="utf-8"))
    kind = case.get("kind")
    assert kind in KINDS, f"{path}: unknown kind {kind!r}; known: {', '.join(sorted(KINDS))}"
    KINDS[kind](case, path, work)


def cases(folders: list[Path]) -> dict[str, Path]:
    """Every case by its name, ``delta/kv-shift``, after its directory where an earlier directory has the name too."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.json")):
            if path.name == "index.json":
                continue
            name = path.relative_to(folder).with_suffix("").as_posix()
            found[f"{folder.as_posix()}/{name}" if name in found else name] = path
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case of the project and of every ``--golden DIR``: only names are read before it runs."""
    if "case_path" in metafunc.fixturenames:
        found = cases([DATA, *metafunc.config.getoption("golden")])
        metafunc.parametrize("case_path", found.values(), ids=found)


def test_case(case_path: Path, tmp_path: Path):
    check(case_path, tmp_path)


def test_names_of_cases(tmp_path: Path):
    places = ("one/delta/a.json", "one/delta/index.json", "two/delta/a.json", "two/osam/b.json")
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    a, _, again, b = (tmp_path / place for place in places)
    second = tmp_path / "two"
    assert cases([tmp_path / "one", second]) == {"delta/a": a, f"{second}/delta/a": again, "osam/b": b}


def test_an_unknown_kind_is_a_failure(tmp_path: Path):
    case = tmp_path / "case.json"
    case.write_text('{"kind": "nonsense"}')
    with pytest.raises(AssertionError, match="unknown kind 'nonsense'"):
        check(case, tmp_path)


def test_a_changed_number_is_a_failure(tmp_path: Path):
    case = json.loads((DATA / "recipes" / "gpt.json").read_text())
    case["losses"][-1] += 10 * case["tolerance"]
    changed = tmp_path / "gpt.json"
    changed.write_text(json.dumps(case))
    with pytest.raises(AssertionError):
        check(changed, tmp_path)
