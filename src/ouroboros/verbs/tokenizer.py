"""``ouroboros tokenizer``: train a byte-level BPE tokenizer, and write texts as token shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ouroboros.config import DataSpec
from ouroboros.errors import check
from ouroboros.verbs.options import (
    Json,
    SkipBadRecords,
    TextField,
    collect,
    emit_json,
    log_to_stderr,
    parse,
    say,
)

if TYPE_CHECKING:
    from ouroboros.data.records import Document
    from ouroboros.data.tokenize import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Train a byte-level BPE tokenizer on the training split of the sources, and write them as token shards."""

    data: list[str]
    """The text to learn from: sources as for `ouroboros train`."""
    out: Path | None = None
    """The new directory to write; give it to `ouroboros train --data.tokenizer`."""
    vocab_size: int = 4096
    """How many entries the vocabulary has, the 256 bytes and the end-of-text token included."""
    units: Literal["code", "qwen"] = "code"
    """Inside which pieces of text entries merge: ``code`` suits code and prose alike (`bpe:N` of `ouroboros train`);
    ``qwen`` cuts as Qwen3.5 does, for llama.cpp (`bpe-qwen:N`)."""
    tokenizer: Path | None = None
    """With --shards: use the tokenizer of this directory in place of training one."""
    shards: Path | None = None
    """Also write the parts of the text as token shards, `train_000000.bin` and so on, into this new directory; train on
    them with `--data shards:DIR/train_*.bin --data.tokenizer` and the tokenizer."""
    shard_tokens: int = 100_000_000
    """How many ids a shard has."""
    text_field: TextField = "text"
    skip_bad_records: SkipBadRecords = False
    json: Json = False


def tokenizer(arguments: Sequence[str]) -> int:
    """The verb ``tokenizer``."""
    options = parse(TokenizerOptions, "tokenizer", collect(arguments, "--data"))
    _check(options)
    log_to_stderr()
    from ouroboros.data.tokenize import UNITS, load_tokenizer, train_bpe

    parts = _parts(options)
    texts = [document.data for document in parts["train"]]
    if options.tokenizer is None:
        kind = "bpe" if options.units == "code" else "bpe-qwen"
        made = train_bpe(texts, options.vocab_size, pattern=UNITS[kind], shows_progress=True)
    else:
        made = load_tokenizer(options.tokenizer)
    facts: dict[str, Any] = {"out": str(options.out or options.tokenizer), "vocab_size": made.vocab_size}
    if options.out is not None:
        made.save(options.out)
    size, tokens = sum(map(len, texts)), sum(len(ids) for ids in made.encode_many(texts))
    facts |= {"bytes": size, "tokens": tokens}
    if options.shards is not None:
        facts["shards"] = _write_shards(options, options.shards, made, parts)
    if options.json:
        emit_json(facts)
        return 0
    each = f"{size / tokens:.2f} bytes per token on {size:,} training bytes"
    say(f"{facts['out']}: {made.vocab_size} entries, {each}")
    if options.shards is not None:
        say(f"{options.shards}: {', '.join(facts['shards'])}")
    return 0


def _check(options: TokenizerOptions) -> None:
    """Refuse options that exclude one another, and places that are taken."""
    for path, name in ((options.out, "--out"), (options.shards, "--shards")):
        check(path is None or not path.exists(), f"{path} exists; choose another {name}")
    check(
        (options.out is None) != (options.tokenizer is None),
        "tokenizer: give --out DIR to train a tokenizer, or --tokenizer DIR to write shards with an existing one",
    )
    check(
        options.tokenizer is None or options.shards is not None,
        "tokenizer: --tokenizer changes nothing without --shards; give the directory of the shards",
    )


def _parts(options: TokenizerOptions) -> dict[str, list[Document]]:
    """The documents of each split, of all sources."""
    from ouroboros.data.documents import name_formats, read_documents
    from ouroboros.data.sources import parse_sources
    from ouroboros.data.splits import SPLITS, split_documents
    from ouroboros.data.tokenize import decode_utf8

    given = DataSpec(
        sources=tuple(options.data), text_field=options.text_field, skip_bad_records=options.skip_bad_records
    )
    spec = name_formats(given)
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for ref in parse_sources(spec.sources):
        documents = list(read_documents(ref, spec))
        for document in documents:
            decode_utf8(document.data, document.name)
        splits = split_documents(documents, spec.valid_fraction, spec.test_fraction)
        for split in SPLITS:
            parts[split] += splits.documents(split)
    return parts


def _write_shards(
    options: TokenizerOptions, directory: Path, tokenizer: TextTokenizer, parts: dict[str, list[Document]]
) -> list[str]:
    """Write every part as shards, each document behind an end-of-text id; the names of the files."""
    import numpy as np

    from ouroboros.data.lossless import check_round_trip
    from ouroboros.data.token_shards import write_shards
    from ouroboros.files import whole_directory

    names: list[str] = []
    eos = np.array([tokenizer.eos_id])
    with whole_directory(directory, replace=False) as work:
        for split, documents in parts.items():
            named = [(document.name, document.data) for document in documents]
            check_round_trip(tokenizer, named, what=f"tokenizer {str(options.tokenizer or options.out)!r}")
            encoded = tokenizer.encode_many((data for _, data in named), names=[name for name, _ in named])
            ids = (np.concatenate([eos, part]) for part in encoded)
            names += [file.name for file in write_shards(work, split, ids, shard_tokens=options.shard_tokens)]
    return names
