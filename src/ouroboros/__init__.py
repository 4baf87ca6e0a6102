"""Ouroboros: language models that reuse their weights.

>>> import ouroboros
>>> recipe = ouroboros.RECIPES["loop"]
>>> model = ouroboros.build(recipe)

``ouroboros.load(path)`` returns a trained model and its tokenizer. After ``import ouroboros``, transformers' Auto
classes load Ouroboros models from their directories without remote code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ouroboros import _register

if TYPE_CHECKING:
    from ouroboros.api import RECIPES, build, load

__version__ = "0.1.0"
__all__ = ["RECIPES", "__version__", "build", "load"]

_register.install()


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that ``import ouroboros`` needs neither torch nor transformers."""
    if name in ("RECIPES", "build", "load"):
        from ouroboros import api

        return getattr(api, name)
    raise AttributeError(f"module 'ouroboros' has no attribute {name!r}")
