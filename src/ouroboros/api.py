"""The public Python interface: recipes, building, loading."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.config import Recipe
from ouroboros.errors import OuroborosError, first_line
from ouroboros.recipes import RECIPES, recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ouroboros.data.tokenize import TextTokenizer
    from ouroboros.model.modeling import OuroborosForCausalLM

__all__ = ["RECIPES", "build", "load", "model_directory", "recipe"]

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")
_PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}


def build(recipe: Recipe, *, eos_token_id: int | None = None) -> OuroborosForCausalLM:
    """A freshly initialised model (seed it with ``torch.manual_seed`` before).

    Args:
        recipe: what to build, for example ``ouroboros.RECIPES["loop"]``.
        eos_token_id: end-of-text token; by default 256, the byte tokenizer's, where the recipe uses that tokenizer and
            its vocabulary.
    """
    from ouroboros.model.configuration import OuroborosConfig
    from ouroboros.model.modeling import OuroborosForCausalLM

    if eos_token_id is None and recipe.data.tokenizer == "bytes" and recipe.model.vocab_size > 256:
        eos_token_id = 256
    return OuroborosForCausalLM(OuroborosConfig.from_spec(recipe.model, eos_token_id=eos_token_id))


def load(path: str | Path) -> tuple[OuroborosForCausalLM, PreTrainedTokenizerBase]:
    """A trained model in evaluation mode and its transformers tokenizer.

    Args:
        path: a run directory (its finished model, else its newest complete checkpoint) or a transformers directory.

    Raises:
        OuroborosError: nothing loadable there; weights that are missing, unexpected, misshapen or not finite; no
            tokenizer, or one of another vocabulary.
    """
    from transformers import AutoTokenizer

    directory = model_directory(path)
    model = load_model(directory)
    _check_tokenizer_present(directory)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer has its own; the user needs one line
        raise OuroborosError(f"{directory}: cannot load the tokenizer: {first_line(error)}") from error
    _check_vocabulary(directory, model, max(tokenizer.get_vocab().values(), default=-1) + 1)
    return model, tokenizer


def load_with_text_tokenizer(directory: Path) -> tuple[OuroborosForCausalLM, TextTokenizer]:
    """The model in a transformers directory and its tokenizer as one of bytes; errors as in :func:`load`."""
    from ouroboros.data.tokenize import load_tokenizer

    model = load_model(directory)
    _check_tokenizer_present(directory)
    tokenizer = load_tokenizer(directory)
    _check_vocabulary(directory, model, tokenizer.vocab_size)
    return model, tokenizer


def _check_tokenizer_present(directory: Path) -> None:
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise OuroborosError(
            f"{directory}: holds no tokenizer (tokenizer.json); copy the one that the model was trained with there"
        )


def _check_vocabulary(directory: Path, model: OuroborosForCausalLM, entries: int) -> None:
    expected = model.config.vocab_size
    if entries != expected:
        raise OuroborosError(
            f"{directory}: the model has a vocabulary of {expected} and the tokenizer one of {entries}: they do not"
            " belong together; copy the tokenizer that the model was trained with there"
        )


def load_model(directory: Path) -> OuroborosForCausalLM:
    """The model in a transformers directory; see :func:`load`."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    try:
        with _quiet(logging):
            model, info = AutoModelForCausalLM.from_pretrained(
                directory,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in ``info``, and refused below with their names
                output_loading_info=True,
            )
    except OuroborosError:
        raise
    except Exception as error:  # safetensors, JSON and transformers all have their own; the user needs one line
        raise OuroborosError(f"{directory}: cannot load the model: {first_line(error)}") from error
    wrong = {key: sorted(map(_described, names)) for key, names in info.items() if names}
    if wrong:
        listed = "; ".join(f"{key.replace('_', ' ')}: {', '.join(names[:5])}" for key, names in wrong.items())
        raise OuroborosError(f"{directory}: the weights do not fit the configuration ({listed})")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise OuroborosError(
                f"{directory}: weight {name!r} holds NaN or infinity; train again or use an older checkpoint"
            )
    return model.eval()


def model_directory(path: str | Path) -> Path:
    """The transformers directory that ``path`` stands for.

    Raises:
        OuroborosError: says what was looked for and what to give instead.
    """
    path = Path(path)
    if path.suffix in _PICKLES:
        raise OuroborosError(
            f"{path}: pickled weights are never read, because loading them runs code; save as safetensors"
            " (`ouroboros convert` makes a model directory of a published checkpoint)"
        )
    if path.is_file():
        raise OuroborosError(f"{path} is a file; give a run directory or a transformers directory")
    if not path.is_dir():
        raise OuroborosError(
            f"{path}: no such model directory; `ouroboros train RECIPE --data SRC --out {path}` makes one"
        )
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        return path
    if (path / "checkpoints").is_dir():
        from ouroboros.train.checkpoint import load_newest

        return load_newest(path / "checkpoints").path
    raise OuroborosError(
        f"{path}: neither a finished model (config.json, model.safetensors) nor a run with checkpoints"
    )


def _described(entry: Any) -> str:
    """A weight's name, with both shapes if they differ."""
    if isinstance(entry, tuple):
        name, found, expected = entry
        return f"{name} of shape {tuple(found)} for {tuple(expected)}"
    return str(entry)


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """No loading bars and reports from transformers inside; its settings are restored."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
