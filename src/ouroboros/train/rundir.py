"""The run directory: what a run keeps, and under which names.

``RUN/`` holds ``recipe.json``, ``data/`` (prepared shards), ``checkpoints/``, ``metrics.jsonl`` and, when training has
ended, the model itself as a transformers directory (``config.json``, ``model.safetensors``, tokenizer). ``ouroboros
eval`` adds ``eval.json``, its scores on the run's own held-out text.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.config import Recipe, from_json, to_json
from ouroboros.errors import OuroborosError
from ouroboros.files import read_text, write_whole

if TYPE_CHECKING:
    from ouroboros.data.prepared import PreparedData
    from ouroboros.train.checkpoint import Checkpoint

RECIPE = "recipe.json"
"""In the run directory, and in each of its checkpoints."""
STATE = "state.json"
"""In a checkpoint: counters, data position, and what the run chose for itself."""
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
"""The last file of a finished model to appear in the run directory; in a checkpoint the weights before averaging."""


class RunDirectory:
    """A directory that ``ouroboros train`` made or will make. Nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / RECIPE
        """The resolved recipe as JSON; without it the directory is no run."""
        self.metrics_file = path / "metrics.jsonl"
        """What was measured, as JSON lines (:func:`ouroboros.train.log.read_metrics`)."""
        self.data = path / "data"
        """The prepared shards (:mod:`ouroboros.data.prepared`)."""
        self.checkpoints = path / "checkpoints"
        """The directory of checkpoints (:mod:`ouroboros.train.checkpoint`)."""
        self.weights_file = path / WEIGHTS
        """The weights of the finished model; they are there once training has ended."""
        self.scores_file = path / "eval.json"
        """Scores of the finished model on the run's own held-out text, as JSON."""

    @property
    def is_run(self) -> bool:
        """Whether a run was begun here."""
        return self.recipe_file.is_file()

    @property
    def has_data(self) -> bool:
        """Whether the run has prepared data, and so held-out text, of its own."""
        from ouroboros.data.prepared import MANIFEST

        return (self.data / MANIFEST).is_file()

    def read_recipe(self) -> Recipe:
        """The resolved recipe.

        Raises:
            OuroborosError: this is no run, or its recipe cannot be read.
        """
        if not self.is_run:
            what = f"is not a run directory (no {RECIPE})" if self.path.is_dir() else "does not exist"
            raise OuroborosError(
                f"{self.path} {what}; start a run with `ouroboros train RECIPE --data SRC --out {self.path}`"
            )
        return from_json(Recipe, read_text(self.recipe_file), where=str(self.recipe_file))

    def write_recipe(self, recipe: Recipe) -> None:
        """Write the resolved recipe, whole or not at all."""
        write_whole(self.recipe_file, to_json(recipe).encode())

    def open_data(self) -> PreparedData:
        """The prepared data.

        Raises:
            OuroborosError: there is none, or it is damaged.
        """
        from ouroboros.data.prepared import open_prepared

        return open_prepared(self.data)

    def newest(self) -> Checkpoint | None:
        """The newest good checkpoint, or None before the first one.

        Raises:
            OuroborosError: there are some and all are damaged.
        """
        from ouroboros.train.checkpoint import candidates, load_newest

        return load_newest(self.checkpoints) if candidates(self.checkpoints) else None

    def state(self) -> dict[str, Any]:
        """``state.json`` of the newest good checkpoint: counters, data position, precision.

        Raises:
            OuroborosError: there is no good checkpoint.
        """
        from ouroboros.train.checkpoint import load_newest

        return load_newest(self.checkpoints).documents[STATE]

    def model_directory(self) -> Path | None:
        """The transformers directory of the finished model, else of the newest good checkpoint, else None.

        Raises:
            OuroborosError: the run has no finished model and no good checkpoint.
        """
        if (self.path / CONFIG).is_file() and self.weights_file.is_file():
            return self.path
        if not self.checkpoints.is_dir():
            return None
        from ouroboros.train.checkpoint import load_newest

        return load_newest(self.checkpoints).path
