"""The public Python interface: recipes, building a model, opening a trained one."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros import registry
from ouroboros.config import ModelSpec, Recipe, from_dict
from ouroboros.errors import OuroborosError, check, first_line
from ouroboros.recipes import RECIPES, recipe
from ouroboros.train.rundir import CONFIG, WEIGHTS, RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ouroboros.data.tokenize import TextTokenizer
    from ouroboros.model.modeling import OuroborosForCausalLM

__all__ = ["RECIPES", "OpenedModel", "build", "load", "open_model", "recipe"]

PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}
"""Names that end so are never opened as a model."""


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


class OpenedModel:
    """What a command's MODEL stands for. Weights and tokenizer are read when they are first asked for.

    A reader of another form (see :func:`open_model`) returns a subclass that overrides what it reads in its own way.

    Args:
        path: as the user gave it.
        directory: the transformers directory with the weights; of a run itself, or its newest good checkpoint.
        run: the run directory, if ``path`` is one.
    """

    def __init__(self, path: Path, directory: Path, run: RunDirectory | None = None) -> None:
        self.path, self.directory, self.run = path, directory, run

    @functools.cached_property
    def model(self) -> OuroborosForCausalLM:
        """The model in evaluation mode.

        Raises:
            OuroborosError: weights that cannot be read, are missing, unexpected, misshapen or not finite.
        """
        from ouroboros.model.reading import load_model

        return load_model(self.directory)

    @property
    def own_model(self) -> OuroborosForCausalLM:
        """:attr:`model`, for what only a model of this library allows.

        Raises:
            OuroborosError: it is a model of another library, or as of :attr:`model`.
        """
        model: Any = self.model
        check(
            hasattr(model, "schedule"),
            f"{self.path}: holds a model of another library ({type(model).__name__});"
            f" `ouroboros convert {self.path} --out RUN` makes one of this library",
        )
        return model

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer as one of bytes.

        Raises:
            OuroborosError: there is none, it cannot be read, or it is of another vocabulary than the model's.
        """
        from ouroboros.data.tokenize import load_tokenizer

        return self._fitting(load_tokenizer, lambda tokenizer: tokenizer.vocab_size)

    @functools.cached_property
    def transformers_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as one of transformers; errors as of :attr:`tokenizer`."""

        def read(directory: Path) -> Any:
            from transformers import AutoTokenizer

            try:
                return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            except Exception as error:  # each kind of tokenizer has its own; the user needs one line
                raise OuroborosError(f"{directory}: cannot load the tokenizer: {first_line(error)}") from error

        return self._fitting(read, lambda tokenizer: max(tokenizer.get_vocab().values(), default=-1) + 1)

    def _fitting(self, read: Callable[[Path], Any], entries: Callable[[Any], int]) -> Any:
        """What ``read`` makes of the tokenizer's files, if it has as many entries as the model's vocabulary."""
        from ouroboros.data.tokenize import TOKENIZER_FILES

        expected = self.model.config.vocab_size
        check(
            any((self.directory / name).is_file() for name in TOKENIZER_FILES),
            f"{self.directory}: holds no tokenizer (tokenizer.json); copy the one that the model was trained with"
            " there",
        )
        tokenizer = read(self.directory)
        check(
            entries(tokenizer) == expected,
            f"{self.directory}: the model has a vocabulary of {expected} and the tokenizer one of {entries(tokenizer)}:"
            " they do not belong together; copy the tokenizer that the model was trained with there",
        )
        return tokenizer

    @functools.cached_property
    def spec(self) -> ModelSpec:
        """The model's specification, for which its weights are not read; a damaged configuration is an error."""
        path = self.directory / CONFIG
        try:
            values = json.loads(path.read_bytes())["spec"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise OuroborosError(f"{path}: cannot read the model's specification: {first_line(error)}") from None
        return from_dict(ModelSpec, values, where=str(path))

    @functools.cached_property
    def recipe(self) -> Recipe | None:
        """The resolved recipe that the model was trained by; None where nothing tells."""
        for place in (self.run, RunDirectory(self.directory)):
            if place is not None and place.is_run:
                return place.read_recipe()
        return None


class PackedModel(OpenedModel):
    """A model in a packed file (:mod:`ouroboros.pack`). Its tokenizer's files lie in a temporary directory, which goes
    with this object.

    Raises:
        OuroborosError: the file is damaged, or is not of this version.
    """

    def __init__(self, path: Path) -> None:
        from ouroboros.pack.artifact import Artifact

        self.artifact = Artifact(path)
        files = self.artifact.tokenizer_files()
        super().__init__(path, Path(tempfile.mkdtemp(prefix="ouroboros-")))
        weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        for name, content in files.items():
            (self.directory / name).write_bytes(content)

    @functools.cached_property
    def model(self) -> OuroborosForCausalLM:
        """The model in evaluation mode, float32; a file that is damaged or whose tensors are not the model's is an
        error."""
        from ouroboros.convert.tensors import model_of

        return model_of(self.spec, self.artifact.weights(), eos_token_id=self.artifact.header.eos_token_id)

    def _fitting(self, read: Callable[[Path], Any], entries: Callable[[Any], int]) -> Any:
        try:
            return super()._fitting(read, entries)
        except OuroborosError as error:  # the user knows the file, not the directory
            raise OuroborosError(str(error).replace(str(self.directory), str(self.path))) from None

    @property
    def spec(self) -> ModelSpec:
        """The model's specification."""
        return self.artifact.spec

    @functools.cached_property
    def recipe(self) -> Recipe | None:
        """The recipe in the file; None where it holds none."""
        values = self.artifact.header.facts.recipe
        return None if values is None else from_dict(Recipe, values, where=f"{self.path}: header: facts.recipe")


def open_model(path: str | Path) -> OpenedModel:
    """The one way to open a MODEL: a run directory, a transformers directory, a packed file, or what a registered
    reader knows.

    Entries of the registry's place ``openers`` are functions of a path that exists. They return an
    :class:`OpenedModel`, or None where the path is not of their form, and are asked first, by the order of their names.

    Raises:
        OuroborosError: says what was looked for and what to give instead.
    """
    path = Path(path)
    for _, target in sorted(registry.found("openers").items()) if path.exists() else ():
        opened = registry.load(target)(path)
        if opened is not None:
            return opened
    check(
        path.suffix not in PICKLES,
        f"{path}: pickled weights are never read, because loading them runs code; save as safetensors"
        " (`ouroboros convert` makes a model directory of a published checkpoint)",
    )
    if path.is_file():
        return PackedModel(path)
    check(path.is_dir(), f"{path}: no such model directory; `ouroboros train RECIPE --data SRC --out {path}` makes one")
    run = RunDirectory(path)
    directory = run.model_directory()
    if directory is None:
        raise OuroborosError(f"{path}: neither a finished model ({CONFIG}, {WEIGHTS}) nor a run with checkpoints")
    return OpenedModel(path, directory, run if run.is_run else None)


def load(path: str | Path) -> tuple[OuroborosForCausalLM, PreTrainedTokenizerBase]:
    """A trained model in evaluation mode and its transformers tokenizer.

    Args:
        path: a run directory (its finished model, else its newest complete checkpoint), a transformers directory or a
            packed file.

    Raises:
        OuroborosError: as of :func:`open_model`, :attr:`OpenedModel.model` and :attr:`OpenedModel.tokenizer`.
    """
    opened = open_model(path)
    return opened.model, opened.transformers_tokenizer
