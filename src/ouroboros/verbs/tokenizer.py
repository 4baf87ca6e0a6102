"""``ouroboros tokenizer``: train a byte-level BPE tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ouroboros.config import DataSpec
from ouroboros.errors import OuroborosError
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


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Train a byte-level BPE tokenizer on the training split of the sources."""

    data: list[str]
    """The text to learn from: sources as for `ouroboros train`."""
    out: Path
    """The new directory to write; give it to `ouroboros train --data.tokenizer`."""
    vocab_size: int = 4096
    """How many entries the vocabulary has, the 256 bytes and the end-of-text token included."""
    text_field: TextField = "text"
    skip_bad_records: SkipBadRecords = False
    json: Json = False


def tokenizer(arguments: Sequence[str]) -> int:
    """The verb ``tokenizer``."""
    options = parse(TokenizerOptions, "tokenizer", collect(arguments, "--data"))
    log_to_stderr()
    from ouroboros.data.documents import name_formats, read_documents
    from ouroboros.data.sources import parse_sources
    from ouroboros.data.splits import split_documents
    from ouroboros.data.tokenize import decode_utf8, train_bpe

    if options.out.exists():
        raise OuroborosError(f"{options.out} exists; choose another --out")
    given = DataSpec(
        sources=tuple(options.data), text_field=options.text_field, skip_bad_records=options.skip_bad_records
    )
    spec = name_formats(given)
    texts: list[bytes] = []
    for ref in parse_sources(spec.sources):
        documents = list(read_documents(ref, spec))
        for document in documents:
            decode_utf8(document.data, document.name)
        splits = split_documents(documents, spec.valid_fraction, spec.test_fraction)
        texts += [span.document.data for span in splits.train]
    made = train_bpe(texts, options.vocab_size, shows_progress=True)
    made.save(options.out)
    size, tokens = sum(map(len, texts)), sum(len(ids) for ids in made.encode_many(texts))
    facts = {"out": str(options.out), "vocab_size": made.vocab_size, "bytes": size, "tokens": tokens}
    if options.json:
        emit_json(facts)
    else:
        say(f"{options.out}: {made.vocab_size} entries, {size / tokens:.2f} bytes per token on {size:,} training bytes")
    return 0
