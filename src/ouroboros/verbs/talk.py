"""``ouroboros generate MODEL`` and ``ouroboros chat MODEL``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from ouroboros.data.tokenize import TextTokenizer
from ouroboros.errors import OuroborosError, check
from ouroboros.serve.sampling import Sampling
from ouroboros.verbs.options import emit_json, log_to_stderr, parse, quiet_transformers

if TYPE_CHECKING:
    from ouroboros.model.modeling import OuroborosForCausalLM
    from ouroboros.serve.fast import FastDecoder


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Continue a prompt, streamed to standard output."""

    model: tyro.conf.Positional[Path]
    """Run directory or transformers directory."""
    prompt: str | None = None
    """The text to continue; '-' reads standard input. Empty starts a new document."""
    loops: int | None = None
    """Loop count; by default the trained one."""
    seed: int = 0
    count: int = 1
    """Number of continuations."""
    json: bool = False
    """Print one JSON object instead of text."""
    fast: bool = False
    """Compile the decoding step: three times the tokens per second after about half a minute of compilation, which pays
    from some 10,000 tokens on."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)


def generate(arguments: Sequence[str]) -> int:
    """The verb ``generate``."""
    options = parse(GenerateOptions, "generate", arguments)
    if options.prompt is None:
        raise OuroborosError("generate: give --prompt TEXT ('' starts a new document, '-' reads standard input)")
    check(options.count >= 1, f"generate: --count must be >= 1, got {options.count}")
    log_to_stderr()
    model, tokenizer = _load(options.model, options.loops)
    import torch

    from ouroboros.serve.stream import Continuation

    prompt = sys.stdin.buffer.read() if options.prompt == "-" else options.prompt.encode("utf-8", "surrogateescape")
    texts, decoder = [], _decoder(options.fast)
    for index in range(options.count):
        torch.manual_seed(options.seed + index)
        continuation = Continuation(model, tokenizer, prompt, options.sampling, decoder)
        if not options.json:
            sys.stdout.write(prompt.decode("utf-8", "replace"))
        for piece in continuation:
            if not options.json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        if not options.json:
            sys.stdout.write("\n")
        texts.append(continuation.text.decode("utf-8", "replace"))
    if options.json:
        emit_json(
            {
                "model": str(options.model),
                "prompt": prompt.decode("utf-8", "replace"),
                "continuations": texts,
                "loops": model.schedule.loops,
                "seed": options.seed,
            }
        )
    return 0


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Talk to a model; /help lists the commands."""

    model: tyro.conf.Positional[Path]
    """Run directory or transformers directory."""
    loops: int | None = None
    """Loop count; by default the trained one."""
    seed: int = 0
    fast: bool = False
    """Compile the decoding step: three times the tokens per second after about half a minute of compilation, which pays
    from some 10,000 tokens on."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=lambda: Sampling(stop=("\n\n",)))


def chat(arguments: Sequence[str]) -> int:
    """The verb ``chat``."""
    options = parse(ChatOptions, "chat", arguments)
    log_to_stderr()
    model, tokenizer = _load(options.model, options.loops)
    import torch

    from ouroboros.serve.chat import Chat, converse

    torch.manual_seed(options.seed)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 (line editing in input())

        write(
            f"{options.model}: {model.schedule.notation}, {model.num_parameters():,} parameters; /help lists commands\n"
        )
    conversation = Chat(model, tokenizer, options.sampling, write, decoder=_decoder(options.fast))
    converse(conversation, lambda: input("> " if interactive else ""))
    return 0


def _decoder(fast: bool) -> FastDecoder | None:
    from ouroboros.serve.fast import FastDecoder

    return FastDecoder() if fast else None


def _load(path: Path, loops: int | None) -> tuple[OuroborosForCausalLM, TextTokenizer]:
    """Model (as a view with ``loops``, if given) and tokenizer."""
    from ouroboros.api import load_model, model_directory
    from ouroboros.data import load_tokenizer

    quiet_transformers()
    directory = model_directory(path)
    model = load_model(directory)
    return (model if loops is None else model.with_loops(loops)), load_tokenizer(directory)
