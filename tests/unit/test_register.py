"""Registration with transformers, whatever is imported first."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from ouroboros import _register

WORKS = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
config = AutoConfig.for_model("ouroboros")
assert type(config).__module__ == "ouroboros.model.configuration", config
model = AutoModelForCausalLM.from_config(config)
assert type(model).__name__ == "OuroborosForCausalLM"
assert type(AutoModel.from_config(config)).__name__ == "OuroborosModel"
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING
from ouroboros.model.cache import CONSTANT_STATE
assert CONSTANT_STATE in DYNAMIC_LAYER_TYPE_MAPPING and CONSTANT_STATE in STATIC_LAYER_TYPE_MAPPING
from ouroboros import _register
_register.install()
"""


def run(code: str) -> None:
    """Run ``code`` in a fresh interpreter, warnings being errors."""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr


def test_import_is_light() -> None:
    run(
        "import sys, ouroboros\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pydantic', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "ouroboros.RECIPES['loop']\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )


@pytest.mark.parametrize(
    "order",
    [
        "import ouroboros, transformers",  # the rest of transformers' modules follow later, on first use
        "from transformers import AutoConfig, AutoModelForCausalLM; import ouroboros",
    ],
)
def test_import_order(order: str) -> None:
    run(order + WORKS)


class TestAfterImport:
    """The waiting itself, on a module of our own, because a fresh transformers takes seconds."""

    @pytest.fixture
    def calls(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        calls: list[str] = []
        (tmp_path / "late_module.py").write_text("VALUE = 3\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
        monkeypatch.setattr(
            _register, "_AFTER", {"late_module": lambda: calls.append(str(sys.modules["late_module"].VALUE))}
        )
        monkeypatch.setitem(sys.modules, "late_module", None)
        monkeypatch.delitem(sys.modules, "late_module")
        return calls

    def test_waits_for_the_import(self, calls: list[str]) -> None:
        _register.install()
        assert calls == []
        importlib.import_module("json")
        assert calls == []
        module = importlib.import_module("late_module")
        assert calls == ["3"], "the module was complete when the action ran"
        importlib.reload(module)
        importlib.import_module("late_module")
        assert calls == ["3"]

    def test_acts_at_once_after_the_import(self, calls: list[str]) -> None:
        importlib.import_module("late_module")
        finders = list(sys.meta_path)
        _register.install()
        assert calls == ["3"] and sys.meta_path == finders

    def test_a_module_that_does_not_exist_is_still_missing(
        self, calls: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_register, "_AFTER", {"no_such_module": lambda: calls.append("x")})
        _register.install()
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("no_such_module")
        assert calls == []


def test_unknown_name() -> None:
    import ouroboros

    with pytest.raises(AttributeError, match="module 'ouroboros' has no attribute 'bild'"):
        ouroboros.bild  # noqa: B018
    assert set(ouroboros.__all__) == {"RECIPES", "__version__", "build", "load"}
    assert all(hasattr(ouroboros, name) for name in ouroboros.__all__)
