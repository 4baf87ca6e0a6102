"""``ouroboros generate MODEL`` and ``ouroboros chat MODEL``."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os.path
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import tyro

from ouroboros.errors import OuroborosError, check
from ouroboros.serve.sampling import Sampling, StyleName
from ouroboros.verbs.options import Json, Loops, Model, emit_json, log_to_stderr, parse, quiet_transformers

if TYPE_CHECKING:
    from ouroboros.api import OpenedModel
    from ouroboros.model.modeling import OuroborosForCausalLM
    from ouroboros.serve.fast import FastDecoder


@dataclass(frozen=True, kw_only=True)
class TalkOptions:
    """What ``generate`` and ``chat`` have in common."""

    model: Model
    loops: Loops = None
    seed: int = 0
    """Seed of the random numbers that choose the tokens."""
    fast: bool = False
    """Compile the decoding step: about three times the tokens per second after half a minute of compilation, which pays
    from some 10,000 tokens on."""
    style: StyleName = "standard"
    """Where the defaults of the controls below come from: this library (standard), or the program that was published
    with the model's system (published), which may also add controls of its own."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)

    def decoder(self) -> FastDecoder | None:
        """The decoder that was asked for; None for a growing cache."""
        if not self.fast:
            return None
        window = self.sampling.window
        check(window is None, f"--fast does not serve --window ({window}): leave one of them out")
        from ouroboros.serve.fast import FastDecoder

        return FastDecoder()

    def open(self) -> OpenedModel:
        """The model that was asked for."""
        from ouroboros.api import open_model

        quiet_transformers()
        return open_model(self.model)

    def at_loops(self, model: OuroborosForCausalLM) -> OuroborosForCausalLM:
        """``model`` with the loop count that was asked for."""
        return model if self.loops is None else model.with_loops(self.loops)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(TalkOptions):
    """Continue a prompt, streamed to standard output."""

    prompt: str | None = None
    """The text to continue. An empty text starts a new document; '-' reads standard input."""
    count: int = 1
    """How many continuations to write, each with a seed of its own."""
    template: str = "none"
    """Put the prompt into a template: the name of a format, 'Q: {question}\\nA: {answer}', or none."""
    json: Json = False


def generate(arguments: Sequence[str]) -> int:
    """The verb ``generate``."""
    options = _parse(GenerateOptions, "generate", arguments)
    if options.prompt is None:
        raise OuroborosError("generate: give --prompt TEXT ('' starts a new document, '-' reads standard input)")
    check(options.count >= 1, f"generate: --count must be >= 1, got {options.count}")
    log_to_stderr()
    import torch

    from ouroboros.data.templates import chat_format
    from ouroboros.serve.chat import find_template
    from ouroboros.serve.stream import Continuation

    decoder, template = options.decoder(), find_template(options.template)
    opened = options.open()
    model, tokenizer = options.at_loops(opened.model), opened.tokenizer
    template = chat_format(template, tokenizer)
    prompt = sys.stdin.buffer.read() if options.prompt == "-" else options.prompt.encode("utf-8", "surrogateescape")
    sampling, written = options.sampling, []
    if template is not None:
        prompt = (template.prompt(prompt.decode("utf-8", "surrogateescape")) or "").encode("utf-8", "surrogateescape")
        sampling = dataclasses.replace(sampling, stop=(*sampling.stop, *template.stop))
    text = prompt.decode("utf-8", "replace")
    for seed in range(options.seed, options.seed + options.count):
        torch.manual_seed(seed)
        written.append(Continuation(model, tokenizer, prompt, sampling, decoder))
        for piece in itertools.chain([text], written[-1], ["\n"]):
            if not options.json:
                _write(piece)
        if not options.json:
            sys.stderr.write(f"[{written[-1].rate}]\n")
    if options.json:
        emit_json(
            {
                "model": str(options.model),
                "prompt": text,
                "continuations": [continuation.text.decode("utf-8", "replace") for continuation in written],
                "tokens": [continuation.tokens for continuation in written],
                "seconds": [round(continuation.seconds, 6) for continuation in written],
                "loops": model.schedule.loops,
                "template": template.name if template else None,
                "seed": options.seed,
            }
        )
    return 0


@dataclass(frozen=True, kw_only=True)
class ChatOptions(TalkOptions):
    """Talk to a model; /help lists the commands."""

    template: str | None = None
    """Put each line into a template: the name of a format, 'Q: {question}\\nA: {answer}', or none. The default is the
    format of the heaviest source that the model was trained on, if that format makes prompts."""
    history: bool = True
    """Show the model the conversation so far. Without it, the model continues each line by itself, as it was typed."""
    transcript: Path | None = None
    """Append every turn to this file as it happens, one JSON object a line."""


def chat(arguments: Sequence[str]) -> int:
    """The verb ``chat``."""
    options = _parse(ChatOptions, "chat", arguments)
    log_to_stderr()
    import torch

    from ouroboros.serve.chat import Chat, converse, find_template, spoken_to
    from ouroboros.serve.transcript import Transcript

    decoder = options.decoder()
    if options.template is not None:
        find_template(options.template)  # refused before the model is read
    transcript = None if options.transcript is None else Transcript(options.transcript)
    opened = options.open()
    template, tokenizer = spoken_to(opened, opened.tokenizer, options.template)
    model = options.at_loops(opened.model)
    torch.manual_seed(options.seed)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 (line editing in input())

        _write(
            f"{options.model}: {model.schedule.notation}, {model.num_parameters():,} parameters,"
            f" template {template.name if template else 'none'}; /help lists commands\n"
        )
    settings = {"decoder": decoder, "template": template, "transcript": transcript, "history": options.history}
    conversation = Chat(model, tokenizer, options.sampling, _write, **settings, shows_rate=interactive)
    try:
        converse(conversation, lambda: input("> " if interactive else ""))
    finally:
        if transcript is not None:
            transcript.flush()
    return 0


_O = TypeVar("_O", GenerateOptions, ChatOptions)


def _parse(cls: type[_O], verb: str, arguments: Sequence[str]) -> _O:
    """The options, those of the published style included if it is asked for."""
    words, model, default = list(arguments), None, None
    if "--style=published" in words or ("--style", "published") in itertools.pairwise(words):
        # Which controls there are depends on the model, so it is looked for before the words can be parsed.
        for model in (Path(word) for word in words if os.path.isdir(word)):
            with contextlib.suppress(OuroborosError):  # another directory, or no model, which parsing will tell
                default = _published(cls, model)
                break
    options = parse(cls, verb, words, default=default)
    if options.style == "published" and (default is None or options.model != model):
        options = parse(cls, verb, words, default=_published(cls, options.model))
    return options


def _published(cls: type[_O], model: Path) -> _O:
    """Options without a model, at the defaults of the style published with the system of ``model``."""
    from ouroboros.api import open_model
    from ouroboros.serve.sampling import published_sampling

    return cls(model=tyro.MISSING, sampling=published_sampling(open_model(model).spec))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
