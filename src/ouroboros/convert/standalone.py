"""The way out without a library: a packed file beside one readable program that runs it.

The program is :mod:`ouroboros.convert.standalone_run`, copied as it is. It imports nothing of this library, so it says
itself which parts and options it knows, and refuses all others by name.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ouroboros.convert import standalone_run
from ouroboros.convert.donors import Proof, prove
from ouroboros.convert.export import UNROLLED_TOLERANCE
from ouroboros.errors import OuroborosError, check
from ouroboros.files import new_directory

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.data.tokenize import TextTokenizer
    from ouroboros.model.modeling import OuroborosForCausalLM

ARTIFACT, SCRIPT = "model.pack", "run.py"
"""Names of the two files."""


@dataclass(frozen=True, kw_only=True)
class Standalone:
    """What an export wrote."""

    artifact_bytes: int
    script_bytes: int
    proof: Proof

    @property
    def facts(self) -> dict[str, Any]:
        """For JSON; ``bytes`` are those of both files."""
        sizes = {"artifact_bytes": self.artifact_bytes, "script_bytes": self.script_bytes}
        return {**sizes, "bytes": sum(sizes.values()), "proof": self.proof.facts}

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{ARTIFACT} of {self.artifact_bytes:,} bytes and {SCRIPT} of {self.script_bytes:,},"
            f" {self.artifact_bytes + self.script_bytes:,} bytes in all; {self.proof.describe()}"
        )


def to_standalone(source: Path, model: OuroborosForCausalLM, out: Path, tokenizer: TextTokenizer | None) -> Standalone:
    """Write the packed file ``source`` and the program that runs it into the directory ``out``, whole or not at all.

    Args:
        source: the packed file.
        model: the model in it, in evaluation mode.
        out: new or empty directory.
        tokenizer: the tokenizer in it.

    Raises:
        OuroborosError: ``source`` is no packed file, the program does not know something that the model or its
            tokenizer has, or its logits differ from the model's by more than
            :data:`~ouroboros.convert.export.UNROLLED_TOLERANCE` of the largest.
    """
    check(
        source.is_file(),
        f"{source} is a directory, and --to standalone takes a packed file: `ouroboros pack {source} --bits 6 --out"
        " FILE` makes one",
    )
    if tokenizer is None:
        raise OuroborosError("--no-tokenizer has no meaning with --to standalone: the packed file stays as it is")
    try:
        program = standalone_run.Model(source)
        text = standalone_run.Text(program.files, program.header["eos_token_id"])
        program.logits([text.end])  # reads every option and tensor
    except ValueError as error:
        raise OuroborosError(f"{source}: {error}") from None
    except KeyError as error:  # an earlier version did not write what later ones have
        raise OuroborosError(
            f"{source}: lacks {error}, which the standalone program reads; pack the model again"
        ) from None
    marks = "".join(token.content for token in tokenizer.backend.get_added_tokens_decoder().values())
    sample = f"Caf\u00e9, 12 {marks}\n".encode()
    check(
        text.encode(sample) == [tokenizer.eos_id, *tokenizer.encode(sample).tolist()],
        f"{source}: the tokenizer reads {sample.decode()!r} as other ids than the standalone program, which knows"
        " tokenizers of bytes and byte-level BPE that read no special tokens in a text",
    )

    def logits_of(ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=ids.new_tensor(program.logits(ids[0].tolist()), dtype=model.dtype)[None])

    proof = prove(model, logits_of, "the standalone program", UNROLLED_TOLERANCE)
    with new_directory(out) as work:
        shutil.copyfile(source, work / ARTIFACT)
        shutil.copyfile(standalone_run.__file__, work / SCRIPT)
    sizes = [(out / name).stat().st_size for name in (ARTIFACT, SCRIPT)]
    return Standalone(artifact_bytes=sizes[0], script_bytes=sizes[1], proof=proof)
