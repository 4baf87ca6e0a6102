"""Registration with transformers' Auto classes, without importing transformers.

``import ouroboros`` has to make ``AutoModelForCausalLM.from_pretrained`` work, and ``ouroboros --help`` has to stay
fast. So the registration waits: it happens right after transformers' own Auto modules are imported, by whoever
imports them, or at once if they already are.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def _register_config() -> None:
    from transformers import AutoConfig

    from ouroboros.model.configuration import OuroborosConfig

    AutoConfig.register("ouroboros", OuroborosConfig, exist_ok=True)


def _register_model() -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    from ouroboros.model.cache import register_cache_layers
    from ouroboros.model.configuration import OuroborosConfig
    from ouroboros.model.modeling import OuroborosForCausalLM, OuroborosModel

    _register_config()
    register_cache_layers()
    AutoModel.register(OuroborosConfig, OuroborosModel, exist_ok=True)
    AutoModelForCausalLM.register(OuroborosConfig, OuroborosForCausalLM, exist_ok=True)


def for_vllm() -> None:
    """What vLLM calls in each of its processes, as the entry point says: its backend for transformers models looks for
    their classes among the names of transformers itself, and builds them by the Auto classes."""
    import transformers

    from ouroboros.model.modeling import OuroborosForCausalLM

    install()
    transformers.OuroborosForCausalLM = OuroborosForCausalLM  # pyrefly: ignore


_AFTER = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs a function once, right after the import of each module that waits."""

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self.waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        action = self.waiting.pop(fullname, None)
        if action is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            action()

        spec.loader.exec_module = exec_module  # pyrefly: ignore
        return spec


def install() -> None:
    """Register now what can be registered now, and the rest when transformers is imported."""
    for name in _AFTER.keys() & sys.modules.keys():
        _AFTER[name]()
    if waiting := {name: action for name, action in _AFTER.items() if name not in sys.modules}:
        sys.meta_path.insert(0, _AfterImport(waiting))
