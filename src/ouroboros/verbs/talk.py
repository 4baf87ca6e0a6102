"""``ouroboros generate MODEL`` and ``ouroboros chat MODEL``."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import tyro

from ouroboros.data.tokenize import TextTokenizer
from ouroboros.errors import OuroborosError, check
from ouroboros.serve.sampling import Sampling, Style, controls
from ouroboros.verbs.options import emit_json, log_to_stderr, parse, quiet_transformers

if TYPE_CHECKING:
    from ouroboros.data.formats import TextFormat
    from ouroboros.model.modeling import OuroborosForCausalLM
    from ouroboros.serve.fast import FastDecoder

logger = logging.getLogger(__name__)


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
    template: str = "none"
    """Put the prompt into a template: a format's name, 'Q: {question}\\nA: {answer}', or none."""
    style: Style = "standard"
    """Defaults of the controls below: published is as the program published with the model's system, which is OSAM's
    for its mixer and R-HRM's chat, with a window of 128 tokens, for all others."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)


def generate(arguments: Sequence[str]) -> int:
    """The verb ``generate``."""
    options = _parse(GenerateOptions, "generate", arguments)
    if options.prompt is None:
        raise OuroborosError("generate: give --prompt TEXT ('' starts a new document, '-' reads standard input)")
    check(options.count >= 1, f"generate: --count must be >= 1, got {options.count}")
    log_to_stderr()
    from ouroboros.serve.template import find_template

    decoder, template = _decoder(options.fast, options.sampling), find_template(options.template)
    model, tokenizer = _load(options.model, options.loops)
    import torch

    from ouroboros.data.templates import chat_format
    from ouroboros.serve.stream import Continuation

    template = chat_format(template, tokenizer)
    prompt = sys.stdin.buffer.read() if options.prompt == "-" else options.prompt.encode("utf-8", "surrogateescape")
    sampling, written = options.sampling, []
    if template is not None:
        prompt = (template.prompt(prompt.decode("utf-8", "surrogateescape")) or "").encode("utf-8", "surrogateescape")
        sampling = dataclasses.replace(sampling, stop=(*sampling.stop, *template.stop))
    for index in range(options.count):
        torch.manual_seed(options.seed + index)
        continuation = Continuation(model, tokenizer, prompt, sampling, decoder)
        if not options.json:
            sys.stdout.write(prompt.decode("utf-8", "replace"))
        for piece in continuation:
            if not options.json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        if not options.json:
            sys.stdout.write("\n")
            sys.stdout.flush()
            sys.stderr.write(f"[{continuation.rate}]\n")
        written.append(continuation)
    if options.json:
        emit_json(
            {
                "model": str(options.model),
                "prompt": prompt.decode("utf-8", "replace"),
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
    template: str | None = None
    """Put each line into a template: a format's name, 'Q: {question}\\nA: {answer}', or none. By default that of the
    heaviest source that the model was trained on, if it makes prompts."""
    history: bool = True
    """Show the model the conversation so far; without, it continues each line by itself, as it was typed."""
    transcript: Path | None = None
    """Append every turn to this file as it happens, one JSON object a line."""
    style: Style = "standard"
    """Defaults of the controls below: published is as the program published with the model's system, which is OSAM's
    for its mixer and R-HRM's chat, with a window of 128 tokens, for all others."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)


def chat(arguments: Sequence[str]) -> int:
    """The verb ``chat``."""
    options = _parse(ChatOptions, "chat", arguments)
    log_to_stderr()
    import torch

    from ouroboros.data.templates import chat_format
    from ouroboros.serve.chat import Chat, converse
    from ouroboros.serve.template import find_template
    from ouroboros.serve.transcript import Transcript

    decoder = _decoder(options.fast, options.sampling)
    given = None if options.template is None else find_template(options.template)
    transcript = None if options.transcript is None else Transcript(options.transcript)
    model, tokenizer = _load(options.model, options.loops)
    template = chat_format(_trained_template(options.model) if options.template is None else given, tokenizer)
    torch.manual_seed(options.seed)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 (line editing in input())

        write(
            f"{options.model}: {model.schedule.notation}, {model.num_parameters():,} parameters,"
            f" template {template.name if template else 'none'}; /help lists commands\n"
        )
    conversation = Chat(
        model,
        tokenizer,
        options.sampling,
        write,
        decoder=decoder,
        template=template,
        transcript=transcript,
        history=options.history,
        shows_rate=interactive,
    )
    try:
        converse(conversation, lambda: input("> " if interactive else ""))
    finally:
        if transcript is not None:
            transcript.flush()
    return 0


_O = TypeVar("_O", GenerateOptions, ChatOptions)


def _parse(cls: type[_O], verb: str, arguments: Sequence[str]) -> _O:
    """The options, with the controls of the style that they name as defaults."""
    options = parse(cls, verb, arguments)
    if options.style == "standard":
        return options
    sampling = controls(options.style, _mixer(options.model))
    return parse(cls, verb, arguments, default=cls(model=tyro.MISSING, sampling=sampling))


def _mixer(path: Path) -> str:
    """The kind of the model's mixer; of a model that cannot be read, which loading it explains, an empty one."""
    from ouroboros.api import open_model

    try:
        return open_model(path).spec.mixer.kind
    except OuroborosError:
        return ""


def _decoder(fast: bool, sampling: Sampling) -> FastDecoder | None:
    if not fast:
        return None
    check(sampling.window is None, f"--fast does not serve --window ({sampling.window}): leave one of them out")
    from ouroboros.serve.fast import FastDecoder

    return FastDecoder()


def _trained_template(path: Path) -> TextFormat | None:
    """The template of the text that a run was trained on; a recipe that cannot be read is no reason not to talk."""
    from ouroboros.api import open_model
    from ouroboros.serve.template import recipe_template

    opened = open_model(path)
    try:
        return None if opened.recipe is None else recipe_template(opened.recipe)
    except OuroborosError as error:
        logger.warning("chat: no template from the recipe: %s", error)
        return None


def _load(path: Path, loops: int | None) -> tuple[OuroborosForCausalLM, TextTokenizer]:
    """Model (as a view with ``loops``, if given) and tokenizer."""
    from ouroboros.api import open_model

    quiet_transformers()
    opened = open_model(path)
    return (opened.model if loops is None else opened.model.with_loops(loops)), opened.tokenizer
