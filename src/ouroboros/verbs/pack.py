"""``ouroboros pack MODEL --out FILE``: a model in one small file, scored again as another process reads it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, arg

from ouroboros.errors import OuroborosError, check
from ouroboros.verbs.evaluate import EvalOptions, default_window, texts
from ouroboros.verbs.options import (
    Json,
    Model,
    Quiet,
    TextField,
    collect,
    emit_json,
    log_to_stderr,
    parse,
    quiet_transformers,
    say,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.api import OpenedModel
    from ouroboros.pack.calibrate import Quantized
    from ouroboros.pack.header import Claim
    from ouroboros.pack.plan import Plan


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Write a model as one small file, which every verb that takes a model reads, and score it again."""

    model: Model
    out: Annotated[Path, arg(help="The file to write.")]
    budget: str | None = None
    """How large the file may be: bytes, or a size such as 256kB or 1MB (1 kB is 1,000 bytes). Every tensor gets the
    precision with which the model loses least on the calibration text."""
    bits: int | None = None
    """Instead of a budget: code every tensor with so many bits, 2 to 8."""
    bits_of: tuple[str, ...] = ()
    """Other bits for some tensors, each as WHICH=BITS. WHICH is a pattern of names, such as in '*.mlp.*=4', or a place:
    once (blocks that are visited once), looped (blocks that are visited several times, and what stands at the
    boundaries of loops) or outside (embeddings, head and all else). Of several that fit a tensor, the first decides.
    With --budget these tensors have these bits, and the others share the bytes that are left."""
    mode: Literal["loop-aware", "per-call", "rounding"] = "loop-aware"
    """How codes are chosen. loop-aware makes codes make up for each other's errors (GPTQ), and codes what loops by what
    it reads in the packed model at every visit; per-call looks once at the unchanged model, as other tools do; rounding
    takes the nearest codes."""
    calibration: str | None = None
    """Text that the quantiser is shown: a file or another source of text, or the word generated for text that the model
    writes itself, or random for ids drawn at random. A file of that name is ./generated or ./random. The default is the
    run's own training text; a model without one writes text itself."""
    calibration_tokens: int = 16384
    """How many tokens of it."""
    held_out: str | None = None
    """Text that the model is scored on before and after; the default is the run's own test split."""
    max_bytes: int = 200_000
    """Score at most this many bytes of it."""
    text_field: TextField = "text"
    allow_fallbacks: FlagCreatePairsOff[bool] = False
    """Go on where a tensor has to be rounded although GPTQ was asked for, and list these tensors."""
    json: Json = False
    quiet: Quiet = False


def pack(arguments: Sequence[str]) -> int:
    """The verb ``pack``."""
    options = parse(PackOptions, "pack", collect(arguments, "--bits-of"))
    from ouroboros.pack.budget import parse_size

    _check(options)
    budget = None if options.budget is None else parse_size(options.budget)
    log_to_stderr()
    quiet_transformers()
    from ouroboros.api import PICKLES, open_model
    from ouroboros.files import remove_leftovers, replacing
    from ouroboros.pack.plan import uniform

    ending = options.out.suffix
    check(
        ending not in PICKLES, f"{options.out}: {ending} is an ending of pickles, which are not opened; choose another"
    )

    watch = _Watch(quiet=options.quiet or options.json)
    opened = open_model(options.model)
    plan = uniform(options.bits or 8).mixed(opened.own_model, options.bits_of, "pack: --bits-of")
    window = default_window(options.model, opened.model.config.max_position_embeddings)
    ids, origin = _calibration(options, opened, window)
    if options.mode != "rounding" and not options.allow_fallbacks:
        _check_rank(opened.model, plan, ids)
    watch("calibration text")
    documents = _held_out(options, opened)
    before = None if documents is None else _score(opened, documents, window)
    watch("score of the model")
    packer = _Packer(options, opened, plan, origin, before)
    made, feasible = packer.quantized(ids, budget)
    watch("codes")
    try:
        remove_leftovers(options.out.parent, options.out.name)
        with replacing(options.out) as temporary:
            temporary.write_bytes(packer.file(made, before))
            after = None if documents is None else _score_again(temporary, documents, window)
            watch("score of the file")
            temporary.write_bytes(packer.file(made, after))
            facts = _facts(options, temporary, opened.model, made, before, after)
    except OSError as error:
        raise OuroborosError(f"cannot write {options.out}: {error.strerror or error}") from None
    facts |= {"budget": budget, "feasible": feasible, "calibration": origin, "seconds": watch.seconds}
    if options.json:
        emit_json(facts)
    else:
        _tell(facts)
    if not feasible:
        sys.stderr.write(
            f"error: no file of this model has {budget:,} bytes or less: {options.out} is the smallest there is, with"
            f" {facts['bytes']:,}\n"
        )
    return 0 if feasible else 1


def _check(options: PackOptions) -> None:
    """Refuse what makes no sense before anything takes long."""
    check((options.budget is None) != (options.bits is None), "pack: give one of --budget and --bits")
    check(options.bits is None or 2 <= options.bits <= 8, f"pack: --bits must be 2 to 8, got {options.bits}")
    check(options.calibration_tokens >= 1, f"pack: --calibration-tokens must be >= 1, got {options.calibration_tokens}")
    check(options.max_bytes >= 1, f"pack: --max-bytes must be >= 1, got {options.max_bytes}")
    idle = options.calibration is not None and options.mode == "rounding" and options.budget is None
    check(not idle, "pack: --calibration changes nothing with --mode rounding and --bits; leave it out")
    check(not options.out.is_dir(), f"{options.out} is a directory; --out is the file to write")
    check(options.out.parent.is_dir(), f"{options.out.parent} is no directory; make it first, or choose another --out")


class _Watch:
    """What each stage takes, said as it ends."""

    def __init__(self, *, quiet: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._quiet, self._begin = quiet, time.monotonic()

    def __call__(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(now - self._begin, 2)
        self._begin = now
        if not self._quiet:
            sys.stderr.write(f"{stage}: {self.seconds[stage]:.1f} s\n")


def _texts(options: PackOptions, opened: OpenedModel, source: str, split: Any, most: int) -> list[bytes]:
    """The documents of a source; of a built-in one those of ``split``."""
    from ouroboros.data.sources import parse_source

    chosen = EvalOptions(
        model=options.model,
        data=[source],
        split=split if parse_source(source).is_built_in else None,
        max_bytes=None if parse_source(source).is_built_in else most,
        text_field=options.text_field,
    )
    return texts(chosen, str(opened.directory) if opened.tokenizer.reads_specials else "bytes")


def _calibration(options: PackOptions, opened: OpenedModel, length: int) -> tuple[list[Tensor], dict[str, Any]]:
    """What the quantiser reads, rows of up to ``length`` ids, and where it comes from."""
    from ouroboros.pack.ids import generated_ids, random_ids, text_ids, training_ids

    length = min(length, options.calibration_tokens)
    tokenizer, rows = opened.tokenizer, -(-options.calibration_tokens // length)
    source = options.calibration
    if source == "random":
        ids, origin = random_ids(opened.spec.vocab_size, rows=rows, length=length), "random ids"
    elif source is not None and source != "generated":
        documents = _texts(options, opened, source, "train", 16 * options.calibration_tokens)
        ids, origin = text_ids(documents, tokenizer, rows=rows, length=length), source
    elif source is None and opened.run is not None and opened.run.has_data:
        ids, origin = training_ids(opened.run.open_data(), rows, length), "training text"
    else:
        ids = generated_ids(opened.model, rows=rows, length=length, first=tokenizer.eos_id)
        origin = "written by the model"
    digest = hashlib.sha256()
    for row in ids:
        digest.update(row.long().numpy().astype("<i8").tobytes())
    return ids, {"text": origin, "tokens": sum(map(len, ids)), "ids_sha256": digest.hexdigest()}


def _check_rank(model: Any, plan: Plan, ids: Sequence[Tensor]) -> None:
    """Refuse text that leaves directions of a map's input unseen, for which its codes would be a guess."""
    tokens = sum(map(len, ids))
    maps = [e for e, rule in plan.choose(model).values() if rule.keep is None and e.role == "matrix"]
    widest = max(maps, key=lambda entry: entry.tensor.shape[-1], default=None)
    if widest is not None and tokens < widest.tensor.shape[-1]:
        raise OuroborosError(
            f"calibration: {tokens:,} tokens leave {widest.name} with its {widest.tensor.shape[-1]:,} inputs"
            " rank-deficient: give more with --calibration or --calibration-tokens, or take --mode rounding"
        )


def _held_out(options: PackOptions, opened: OpenedModel) -> list[bytes] | None:
    """The documents to score; None where there are none."""
    from ouroboros.eval.score import with_text

    if options.held_out is not None:
        documents = _texts(options, opened, options.held_out, "test", options.max_bytes)
    elif opened.run is not None and opened.run.has_data:
        documents = opened.run.open_data().documents("test")
    else:
        return None
    return with_text(documents, options.max_bytes)


def _claim(found: dict[str, Any]) -> Claim:
    """What a file says of a score; rounded, so that a score changes the size of the file little."""
    from ouroboros.pack.header import Claim

    values = {field.name: found[field.name] for field in dataclasses.fields(Claim)}
    return Claim(**values | {"bits_per_byte": round(found["bits_per_byte"], 6)})


def _score(opened: OpenedModel, documents: list[bytes], window: int) -> Claim:
    """Of the model as it is."""
    from ouroboros.eval.score import score_loops

    return _claim(score_loops(opened.model, opened.tokenizer, documents, [None], window=window)[0].to_dict())


def _score_again(file: Path, documents: list[bytes], window: int) -> Claim:
    """Of a packed file, by `ouroboros eval` in a process of its own.

    Raises:
        OuroborosError: that process cannot score it; says why.
    """
    with tempfile.TemporaryDirectory(prefix="ouroboros-") as directory:
        for number, document in enumerate(documents):
            (Path(directory) / f"{number:06}.txt").write_bytes(document)
        text = Path(directory) / "000000.txt" if len(documents) == 1 else Path(directory)
        command = [sys.executable, "-m", "ouroboros.cli", "eval", str(file), "--data", str(text)]
        command += ["--window", str(window), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1].removeprefix("error: ")
    check(done.returncode == 0, f"the packed model cannot be scored: {last}")
    return _claim(json.loads(done.stdout))


class _Packer:
    """Makes files of one model."""

    def __init__(
        self, options: PackOptions, opened: OpenedModel, plan: Plan, calibration: dict[str, Any], score: Claim | None
    ) -> None:
        from ouroboros import __version__
        from ouroboros.config import to_dict
        from ouroboros.pack.header import Facts

        self.options, self.opened, self.plan, self.score = options, opened, plan, score
        asked = {"budget": options.budget, "bits": options.bits, "bits_of": [*options.bits_of] or None}
        recipe = opened.recipe
        self.facts = Facts(
            recipe=None if recipe is None else to_dict(recipe),
            provenance={"model": options.model.resolve().name, "ouroboros": __version__},
            method={"mode": options.mode, **{name: value for name, value in asked.items() if value is not None}},
            calibration=calibration,
        )

    def file(self, made: Quantized, score: Claim | None) -> bytes:
        """The bytes of the file that claims ``score``."""
        from ouroboros.pack.write import end_of_text
        from ouroboros.pack.write import pack as packed

        facts, model = dataclasses.replace(self.facts, score=score), self.opened.model
        return packed(self.opened.spec, made.tensors, self.opened.tokenizer, facts, eos_token_id=end_of_text(model))

    def quantized(self, ids: Sequence[Tensor], budget: int | None) -> tuple[Quantized, bool]:
        """The tensors, and whether their file is within the budget."""
        from ouroboros.pack.budget import fit
        from ouroboros.pack.calibrate import quantize_model

        given: dict[str, Any] = {"mode": self.options.mode, "allow_fallbacks": self.options.allow_fallbacks}
        if budget is None:
            return quantize_model(self.opened.model, self.plan, ids, **given), True
        # The score that the file will claim is not known yet: a few bytes are kept free for its other digits.
        size_of: Callable[[Any], int] = lambda made: len(self.file(made, self.score)) + 16  # noqa: E731
        found = fit(self.opened.model, ids, budget, size_of, plan=self.plan, **given)
        return found.made, found.feasible


def _facts(
    options: PackOptions, file: Path, model: Any, made: Quantized, before: Claim | None, after: Claim | None
) -> dict[str, Any]:
    """What ``--json`` prints of a file."""
    from ouroboros.pack.artifact import Artifact
    from ouroboros.pack.plan import entries
    from ouroboros.verbs.inspect import describe

    if before is not None and after is not None:
        same = (before.data_sha256, before.bytes) == (after.data_sha256, after.bytes)
        check(same, "the held-out text reads differently in another process, so the scores cannot be compared")
    described = describe(Artifact(file))
    kinds = {entry.name: f"{entry.role}, {entry.place}" for entry in entries(model)}
    groups: dict[str, dict[str, Any]] = {}
    for tensor in described["tensors"]:
        name, stored = kinds[tensor["name"]], tensor["stored"]
        empty = {"name": name, "tensors": 0, "numbers": 0, "bytes": 0, "stored": []}
        group = groups.setdefault(name, empty)
        group["tensors"] += 1
        for key in ("numbers", "bytes"):
            group[key] += tensor[key]
        group["stored"] = sorted({*group["stored"], stored})
    for group in groups.values():
        group["bits_per_weight"] = round(8 * group["bytes"] / group["numbers"], 4)
    return {
        "file": str(options.out),
        "bytes": described["bytes"],
        "bits_per_byte_before": None if before is None else before.bits_per_byte,
        "bits_per_byte_after": None if after is None else after.bits_per_byte,
        "held_out": None if after is None else {"bytes": after.bytes, "data_sha256": after.data_sha256},
        "method": options.mode,
        "fallbacks": made.exceptions,
        "numbers": described["numbers"],
        "bits_per_weight": described["bits_per_weight"],
        "groups": list(groups.values()),
        "sections": described["sections"],
    }


def _tell(facts: dict[str, Any]) -> None:
    """The same as text."""
    used = "" if facts["budget"] is None else f", {100 * facts['bytes'] / facts['budget']:.1f} % of the budget"
    say(f"{facts['file']}: {facts['bytes']:,} bytes{used}, {facts['bits_per_weight']:.3f} bits per weight")
    say(f"{'':<20}{'tensors':>8}{'numbers':>12}{'bytes':>12}{'bits/weight':>13}  stored as")
    for group in facts["groups"]:
        numbers = f"{group['tensors']:>8}{group['numbers']:>12,}{group['bytes']:>12,}{group['bits_per_weight']:>13.3f}"
        say(f"{group['name']:<20}{numbers}  {', '.join(group['stored'])}")
    before, after = facts["bits_per_byte_before"], facts["bits_per_byte_after"]
    if before is None:
        say("not scored, as there is no held-out text: name one with --held-out FILE")
    else:
        say(f"bits per byte of {facts['held_out']['bytes']:,} held-out bytes: {before:.4f}")
        say(f"of the packed file, read by another process: {after:.4f} ({after - before:+.4f})")
    for line in facts["fallbacks"]:
        say(f"not as planned: {line}")
