"""Pretrained models of other libraries: found, read through transformers, and proved to be the same here.

A donor is a transformers directory, a GGUF file, or a name on the hub. No code of it runs.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ouroboros.convert import nanbeige
from ouroboros.convert.families import FAMILIES, Family, check_settings, family_of, spec_of
from ouroboros.convert.gguf_file import needs_gguf
from ouroboros.convert.layers import Init, Layers, chosen, cut, initial, named, split
from ouroboros.convert.tensors import model_of
from ouroboros.errors import OuroborosError, check, first_line
from ouroboros.files import write_whole
from ouroboros.schedule import Schedule, parse

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.config import ModelSpec
    from ouroboros.convert.choose import Choice
    from ouroboros.data.tokenize import TextTokenizer
    from ouroboros.model.modeling import OuroborosForCausalLM

logger = logging.getLogger(__name__)

CONFIG = "config.json"
RECORD = "donor.json"
"""Beside the model: what its donor's configuration was, for the way back."""
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What configurations call the ids that begin, end and pad texts."""
TOLERANCE = 1e-4
"""How far logits in float32 may be from the donor's, as a share of the largest."""
LEAST_TOKENS, MOST_TOKENS = 64, 1100
"""Random tokens that are compared: a window that ends within ``MOST_TOKENS`` is exceeded."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Donor:
    """A pretrained model that has been found; nothing of its weights is read yet."""

    source: str
    """As the user named it."""
    directory: Path
    gguf: str | None = None
    """The name of its GGUF file in ``directory``, if it is one."""
    repeated: nanbeige.Repeated | None = None
    """That its whole stack of layers runs several times, which ``directory`` does not say, if it does."""

    @functools.cached_property
    def config(self) -> Any:
        """Its configuration, of transformers.

        Raises:
            OuroborosError: it cannot be read, or asks for what our parts lack.
        """
        from transformers import AutoConfig

        if self.gguf is None:
            check_settings(_settings(self.directory))
        config = self._read(AutoConfig)
        if self.gguf is not None:
            # What transformers notes about the file's quantisation: the weights it returns are dequantised.
            config.__dict__.pop("quantization_config", None)
            check_settings(config.to_dict())
        if self.repeated is not None:
            config.model_type, config.num_loops = nanbeige.NANBEIGE, self.repeated.loops
            config.skip_loop_final_norm = self.repeated.skips_norm
        return config

    @property
    def family(self) -> Family:
        """What kind of model it is."""
        return family_of(self.config.model_type)

    def model(self) -> Any:
        """The donor itself, as transformers' class, float32, in evaluation mode.

        Raises:
            OuroborosError: its weights cannot be read or do not fit its configuration.
        """
        import torch
        from transformers import AutoModelForCausalLM

        more = {} if self.gguf else {"use_safetensors": True}
        more["ignore_mismatched_sizes"] = True  # they are in ``info``, and refused below with their names
        model, info = self._read(AutoModelForCausalLM, dtype=torch.float32, output_loading_info=True, **more)
        wrong = [
            f"{key.replace('_', ' ')}: {', '.join(map(str, sorted(names)[:3]))}" for key, names in info.items() if names
        ]
        check(not wrong, f"{self.source}: the weights do not fit the configuration ({'; '.join(wrong)})")
        return model.eval()

    def looped(self, model: Any) -> Any:
        """What :meth:`model` returned as it runs: with its stack as often as it is repeated."""
        found = self.repeated
        return model if found is None else nanbeige.repeat(model, found.loops, skips_norm=found.skips_norm)

    def tokenizer(self) -> TextTokenizer:
        """The donor's tokenizer.

        Raises:
            OuroborosError: it has none, or none that can be read.
        """
        from ouroboros.data.tokenize import TOKENIZER_FILES, load_tokenizer

        fix = "give one with --tokenizer DIR, or leave it out with --no-tokenizer"
        if self.gguf is None:
            present = any((self.directory / name).is_file() for name in TOKENIZER_FILES)
            check(present, f"{self.source}: holds no tokenizer (tokenizer.json); {fix}")
            return _own_tokenizer(self.directory)
        from transformers import AutoTokenizer

        try:
            found = self._read(AutoTokenizer)
        except OuroborosError as error:
            raise OuroborosError(f"{error}: it may hold no tokenizer; {fix}") from None
        with tempfile.TemporaryDirectory() as place:
            found.save_pretrained(place)
            return load_tokenizer(place)

    def _read(self, reader: Any, **options: Any) -> Any:
        # With the whole path: a file of this name where the command runs would be read instead.
        more = {"gguf_file": str((self.directory / self.gguf).absolute())} if self.gguf else {}
        # Of a GGUF file transformers shows a loading bar that no setting of it turns off.
        quiet = contextlib.redirect_stderr(io.StringIO()) if self.gguf else contextlib.nullcontext()
        try:
            with quiet:
                return reader.from_pretrained(
                    self.directory, local_files_only=True, trust_remote_code=False, **more, **options
                )
        except Exception as error:  # each kind of file fails in its own way; the user needs one line
            problem = "it is damaged, cut short, or of a kind that transformers does not read" if self.gguf else ""
            reason = f"{problem} ({first_line(error)})" if problem else first_line(error)
            raise OuroborosError(f"{self.source}: cannot be read: {reason}") from None


def _own_tokenizer(directory: Path) -> TextTokenizer:
    """The tokenizer as its own files describe it.

    Beside ``config.json`` transformers takes the class that is usual for such models, which may add tokens of its own.
    """
    from ouroboros.data.tokenize import load_tokenizer

    with tempfile.TemporaryDirectory() as place:
        for path in directory.iterdir():
            if path.name != CONFIG and path.suffix != ".safetensors":
                (Path(place) / path.name).symlink_to(path.resolve())
        try:
            return load_tokenizer(place)
        except OuroborosError as error:
            logger.debug("tokenizer of %s: %s", directory, error)
    return load_tokenizer(directory)  # its files name no class


def find(source: Path | str, *, cache: Path | None = None) -> Donor | None:
    """The donor that ``source`` names; None where it is something else.

    Args:
        source: a transformers directory or a GGUF file, told by their content, or a hub name that no path has.
        cache: the hub's cache; None for the usual place.

    Raises:
        OuroborosError: a model of another kind than those of :data:`~ouroboros.convert.families.FAMILIES`, a GGUF file
            that cannot be read here, a hub name that is neither in the cache nor to be had.
    """
    path = Path(source)
    if path.is_file():
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        check(is_gguf or path.suffix != ".gguf", f"{path}: is no GGUF file: it does not begin with GGUF")
        return _of_gguf(path) if is_gguf else None
    if path.is_dir():
        return _of_directory(str(source), path) if (path / CONFIG).is_file() else None
    if not _HUB_NAME.fullmatch(str(source)):
        return None
    return _of_directory(str(source), _from_hub(str(source), cache))


def _of_directory(source: str, directory: Path) -> Donor | None:
    settings = _settings(directory)
    if settings.get("model_type") == nanbeige.NANBEIGE:
        repeated = nanbeige.of_directory(directory, settings)
        return Donor(source, repeated.place.directory, repeated=repeated)
    return Donor(source, directory) if _is_model(settings) else None


def _of_gguf(path: Path) -> Donor:
    needs_gguf(path, "reading")
    if nanbeige.is_nanbeige_gguf(path):
        repeated = nanbeige.of_gguf(path)
        return Donor(str(path), repeated.place.directory, path.name, repeated)
    return Donor(str(path), path.parent, path.name)


def _settings(directory: Path) -> Mapping[str, Any]:
    try:
        values = json.loads((directory / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise OuroborosError(f"{directory / CONFIG}: cannot be read: {first_line(error)}") from None
    check(isinstance(values, dict), f"{directory / CONFIG}: holds no settings")
    return values


def _is_model(settings: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a model that transformers knows, ours apart."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = settings.get("model_type")
    return kind in FAMILIES or kind in CONFIG_MAPPING_NAMES


def _from_hub(name: str, cache: Path | None) -> Path:
    """The directory of a model in the hub's cache, fetched if it is not there."""
    from huggingface_hub import snapshot_download

    problem = ""
    for local in (True, False):
        try:
            found = Path(snapshot_download(name, cache_dir=cache, local_files_only=local, allow_patterns=_FETCHED))
        except Exception as error:  # network, name and permission fail in their own ways
            problem = first_line(error)
            continue
        if (found / CONFIG).is_file() and any(found.glob("*.safetensors")):
            return found
        problem = f"it has no {CONFIG} with weights as safetensors"
    raise OuroborosError(f"{name}: no such file or directory, and not to be had from the hub or its cache: {problem}")


@dataclass(frozen=True, kw_only=True)
class Proof:
    """How a model compares with transformers' on random tokens, in float32."""

    difference: float
    """The largest difference of two logits, as a share of the largest logit."""
    tokens: int

    @property
    def facts(self) -> dict[str, float]:
        """For JSON."""
        return {"difference": self.difference, "tokens": self.tokens}

    def describe(self) -> str:
        """One clause for people."""
        return f"logits on {self.tokens} random tokens differ by {self.difference:.1e} of the largest"


def prove(model: OuroborosForCausalLM, other: Any, name: str, tolerance: float = TOLERANCE) -> Proof:
    """Compare the logits of ``model`` with those of ``other``, of transformers.

    Raises:
        OuroborosError: they differ by more than ``tolerance``, as a share of the largest.
    """
    import torch

    spec = model.config.model_spec
    windows = [window for block in spec.blocks if (window := block.mixer.looks_back) is not None]
    longest = max([LEAST_TOKENS, *(window + LEAST_TOKENS // 2 for window in windows if window < MOST_TOKENS)])
    tokens = min(spec.max_position_embeddings, longest)
    ids = torch.randint(0, spec.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = other(ids, use_cache=False).logits
        difference = ((model(ids, use_cache=False).logits - want).abs().max() / want.abs().max()).item()
    proof = Proof(difference=difference, tokens=tokens)
    check(
        difference <= tolerance,  # not so for NaN
        f"{name}: {proof.describe()}, and at most {tolerance:.0e} is allowed: the model is not understood",
    )
    return proof


def tensors_of(family: Family, model: Any) -> dict[str, Tensor]:
    """The tensors of a donor under our names.

    Raises:
        OuroborosError: it has others than its family.
    """
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    family.table.check(state)
    return family.table.renamed({name: x + 1 if family.is_gain(name) else x for name, x in state.items()})


@dataclass(frozen=True, kw_only=True)
class Read:
    """A donor as a model of this library."""

    model: OuroborosForCausalLM
    proof: Proof
    same: bool
    """Whether the model is the donor: all layers in order, each once."""
    kept: Layers
    """The donor's layers that each block is made of."""
    choice: Choice | None = None
    """How the layers of the loop were chosen by measurement, if they were."""


def read(
    donor: Donor,
    layout: str | None = None,
    keep: str | None = None,
    init: Init | None = None,
    held_out: Tensor | None = None,
) -> Read:
    """The model of a donor, proved to be the same where its layers stay as they are.

    With another layout the proof is of the whole donor, and what is cut out of it is another model.

    Args:
        donor: from :func:`find`.
        layout: of the blocks; None for the donor's own.
        keep: the donor's layers that each block takes, as a list with ranges and means: ``0-7,15+16,22-29``.
        init: instead of ``keep``, how the layers of the loop are chosen.
        held_out: windows of text that ``selected`` layers are measured on, ids (B, T).

    Raises:
        OuroborosError: a donor that is not read, is not understood, or does not fit the layout.
    """
    whole = spec_of(donor.config)
    layers, looped = whole.schedule.num_blocks, whole.schedule.is_looped
    schedule = whole.schedule if layout is None else parse(layout)
    _check_options(donor, whole, layout, keep, init)
    needed = "--init selected measures on held-out text: give a file of it with --held-out"
    check(init != "selected" or held_out is not None, needed)
    check(init == "selected" or held_out is None, "--held-out is what --init selected measures on: add that option")
    place = split(schedule, layers) if init is not None else None
    kept = None if init == "selected" else _kept(schedule, layers, keep, init)
    spec = whole if kept is None else cut(whole, schedule.notation, kept)
    same = looped or (kept is not None and _is_whole(schedule, kept, layers))
    theirs = donor.model()
    try:
        state = tensors_of(donor.family, theirs)
    except OuroborosError as error:
        raise OuroborosError(f"{donor.source}: {error}") from None
    if whole.loop:
        state |= nanbeige.loop_state(state, whole.schedule.loops)
    tokens = _special_tokens(theirs)
    model = _made(spec if same else whole, state, tokens)
    proof = prove(model, donor.looped(theirs), donor.source)
    del theirs
    if same and kept is not None:
        return Read(model=model, proof=proof, same=True, kept=kept)
    choice = None
    if kept is None:
        from ouroboros.convert.choose import choose

        assert place is not None and held_out is not None
        choice = choose(model, held_out, schedule)
        first = choice.best.start
        kept = place.kept([(layer,) for layer in range(first, first + place.looped)])
        spec = cut(whole, schedule.notation, kept)
    model, same = _made(spec, chosen(state, kept), tokens), _is_whole(schedule, kept, layers)
    return Read(model=model, proof=proof, same=same, kept=kept, choice=choice)


def _check_options(donor: Donor, whole: ModelSpec, layout: str | None, keep: str | None, init: Init | None) -> None:
    """Refuse options of cutting that exclude each other, and all of them for a donor that is looped itself."""
    check(
        not whole.schedule.is_looped or (layout, keep, init) == (None, None, None),
        f"{donor.source} runs its layers several times already, as layout {whole.layout!r} says: leave --layout, --keep"
        " and --init out",
    )
    check(keep is None or init is None, "--keep and --init exclude each other: both say which layers are kept")


def _is_whole(schedule: Schedule, kept: Layers, layers: int) -> bool:
    """Whether all layers are visited in order, each once."""
    return [kept[visit.block] for visit in schedule.visits] == [(layer,) for layer in range(layers)]


def _kept(schedule: Schedule, layers: int, keep: str | None, init: Literal["stepwise", "averaged"] | None) -> Layers:
    """The donor's layers of each block.

    Raises:
        OuroborosError: another number of blocks than layers, and nothing says which ones are kept.
    """
    if init is not None:
        return initial(init, schedule, layers)
    here = schedule.num_blocks
    check(
        keep is not None or here == layers,
        f"layout {schedule.notation!r} has {here} blocks and the donor {layers} layers: say with --keep which layer"
        f" each block takes, for example --keep 0-{min(here, layers) - 1}, or with --init how a loop's are chosen",
    )
    return tuple((layer,) for layer in range(layers)) if keep is None else named(keep, layers, here)


def _special_tokens(theirs: Any) -> dict[str, Any]:
    """The ids that begin, end and pad texts, as generation uses them."""
    found = {name: getattr(theirs.config, name, None) for name in SPECIAL_TOKENS}
    given = {name: getattr(theirs.generation_config, name, None) for name in SPECIAL_TOKENS}
    return {name: found[name] if given[name] is None else given[name] for name in SPECIAL_TOKENS}


def _made(spec: ModelSpec, state: Mapping[str, Tensor], tokens: Mapping[str, Any]) -> OuroborosForCausalLM:
    model = model_of(spec, state)
    for name, value in tokens.items():
        setattr(model.config, name, value)
        setattr(model.generation_config, name, value)
    return model


def write_record(donor: Donor, directory: Path) -> None:
    """Write the donor's configuration beside its model."""
    record = {**donor.config.to_dict(), "model_type": donor.config.model_type}
    write_whole(directory / RECORD, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


def record_beside(directory: Path) -> dict[str, bytes]:
    """What :func:`write_record` wrote there, as a file for another model that is made of this one; empty if nothing."""
    path = directory / RECORD
    return {RECORD: path.read_bytes()} if path.is_file() else {}
