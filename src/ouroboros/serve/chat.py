"""The chat: a conversation with history, streamed, with commands.

A base model continues text. Without a template the conversation is one growing text: each turn adds the user's line and
a newline, the model continues until a blank line. With a template each turn is a text of the form that the model was
trained on or, where those were conversations, the next turn of one. Without history each line is continued by itself.
When the context is full the oldest turns are dropped, and the user is told.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ouroboros.config import Recipe, from_dict
from ouroboros.data.formats import ChatFormat, TextFormat, find_format, formats
from ouroboros.data.sources import parse_sources
from ouroboros.data.templates import chat_format
from ouroboros.data.tokenize import TextTokenizer
from ouroboros.errors import OuroborosError, check, nearest
from ouroboros.files import write_whole
from ouroboros.serve.decoder import LoopDecoder
from ouroboros.serve.sampling import Sampling
from ouroboros.serve.stream import Continuation, text_ids
from ouroboros.serve.transcript import Transcript

if TYPE_CHECKING:
    from ouroboros.api import OpenedModel
    from ouroboros.model.modeling import OuroborosForCausalLM

logger = logging.getLogger(__name__)

HELP = """\
/loops N        use N loops for each token (more or fewer than trained)
/set NAME VALUE change temperature, top_p, window or another control that /show names
/template NAME  put each line into a template (a format's name, 'Q: {question}\\nA: {answer}' or none)
/show           the present settings
/clear          forget the conversation
/save FILE      write the conversation as JSON
/help           this list
/quit           leave (Ctrl-D too; Ctrl-C stops an answer)"""


BLANK_LINE = "\n\n"
"""Ends an answer in a conversation without a template."""


class Turn(NamedTuple):
    """One exchange."""

    user: str
    model: str


@dataclass
class Chat:
    """A conversation.

    Args:
        model: the model as loaded; ``/loops`` makes views of it.
        tokenizer: its tokenizer.
        sampling: starting controls; answers also end where the template says, without one at a blank line unless
            ``sampling.stop`` says otherwise.
        write: receives text as it is written.
        decoder: writes the tokens; None takes a growing cache.
        template: makes a prompt of each line; None for plain conversation.
        transcript: is given every turn.
        history: False lets the model continue each line by itself, as it was typed and without a line break behind it.
        shows_rate: write how many tokens an answer had, and how fast they came, behind it.
    """

    model: OuroborosForCausalLM
    tokenizer: TextTokenizer
    sampling: Sampling
    write: Callable[[str], None]
    turns: list[Turn] = field(default_factory=list)
    decoder: LoopDecoder | None = None
    template: TextFormat | None = None
    transcript: Transcript | None = None
    history: bool = True
    shows_rate: bool = False

    def __post_init__(self) -> None:
        self.base = self.model

    def say(self, line: str) -> None:
        """Answer ``line``, streamed; an interruption keeps what was written so far."""
        earlier, prompt = self._prompt(line)
        sampling = dataclasses.replace(self.sampling, stop=self._stop())
        answer = Continuation(self.model, self.tokenizer, prompt, sampling, self.decoder, earlier)
        written, stopped = "", False
        try:
            for piece in answer:
                written += piece
                self.write(piece)
        except KeyboardInterrupt:
            stopped = True
            self.write(" [stopped]")
        self.write(f"\n[{answer.rate}]\n" if self.shows_rate else "\n")
        self.turns.append(Turn(line, written))
        if self.transcript is not None:
            self.transcript.add(line, written, stopped=stopped, **self._facts())

    def command(self, line: str) -> bool:
        """Carry out a line that begins with ``/``; False means leave."""
        name, *words = line[1:].split() or [""]
        commands: dict[str, Callable[..., None]] = {
            "loops": self._loops,
            "set": self._set,
            "template": self._set_template,
            "show": lambda _: self.write(self._settings() + "\n"),
            "clear": lambda _: self.turns.clear(),
            "save": self._save,
            "help": lambda _: self.write(HELP + "\n"),
        }
        if name in ("quit", "exit", "q"):
            return False
        check(name in commands, f"unknown command /{name}{nearest(name, commands)}; /help lists them")
        commands[name](words)
        return True

    def _prompt(self, line: str) -> tuple[list[bytes], bytes]:
        """Earlier documents and the text to go on from; oldest turns are dropped when the context is full."""
        context = self.sampling.window or self.model.config.max_position_embeddings - 1
        before = len(self.turns)
        earlier, prompt = self._documents(line)
        # Half the context is kept for the answer unless this line alone needs more.
        while self.turns and self.history and len(text_ids(self.tokenizer, prompt, earlier)) - 1 > context // 2:
            self.turns.pop(0)
            earlier, prompt = self._documents(line)
        if dropped := before - len(self.turns):
            self.write(f"[the context is full: {dropped} oldest turn(s) forgotten]\n")
        return earlier, prompt

    def _documents(self, line: str) -> tuple[list[bytes], bytes]:
        if not self.history:
            text = line if self.template is None else self.template.prompt(line) or line
            return [], text.encode("utf-8", "surrogateescape")
        return documents(self.template, self.turns, line)

    def _stop(self) -> tuple[str, ...]:
        """Where answers end."""
        if self.template is not None:
            return (*self.sampling.stop, *self.template.stop)
        return self.sampling.stop or ((BLANK_LINE,) if self.history else ())

    def _facts(self) -> dict[str, Any]:
        """What a turn was made with."""
        return {
            "loops": self.model.schedule.loops,
            "template": self.template.name if self.template else None,
            "sampling": dataclasses.asdict(self.sampling),
        }

    def _settings(self) -> str:
        facts = self._facts()
        facts |= facts.pop("sampling")
        del facts["stop"]  # not to be set here
        words = {"None": "none", "True": "on", "False": "off"}
        return "  ".join(f"{name}={words.get(str(value), value)}" for name, value in facts.items())

    def _loops(self, words: list[str]) -> None:
        fits = len(words) == 1 and words[0].isascii() and words[0].isdigit()
        check(fits, "/loops takes a number, for example /loops 4")
        self.model = self.base.with_loops(int(words[0]))
        trained = self.base.schedule.loops
        note = "" if int(words[0]) == trained else f" (trained with {trained})"
        self.write(f"[{words[0]} loops{note}]\n")

    def _set(self, words: list[str]) -> None:
        check(len(words) == 2, "/set takes a name and a value, for example /set temperature 0.7; /show names them")
        name, text = words
        values = vars(self.sampling) | {name: None if text == "none" else text}
        self.sampling = from_dict(type(self.sampling), values, where="/set")

    def _set_template(self, words: list[str]) -> None:
        check(bool(words), "/template takes a format's name, a template or none")
        self.template = find_template(" ".join(words))
        self.write(f"[template {self.template.name if self.template else 'none'}]\n")

    def _save(self, words: list[str]) -> None:
        check(len(words) == 1, "/save takes a file name")
        path = Path(words[0])
        check(not path.exists(), f"{path} exists; choose another name")
        body = {**self._facts(), "turns": [turn._asdict() for turn in self.turns]}
        write_whole(path, (json.dumps(body, indent=2) + "\n").encode())
        self.write(f"[saved {len(self.turns)} turn(s) to {path}]\n")


def converse(chat: Chat, read: Callable[[], str]) -> None:
    """Read lines until the end of input or ``/quit``; an error is shown and the conversation goes on.

    Args:
        chat: the conversation.
        read: returns the next line, raises EOFError at the end and KeyboardInterrupt on Ctrl-C.
    """
    while True:
        try:
            line = read().strip()
        except EOFError:
            chat.write("\n")
            return
        except KeyboardInterrupt:
            chat.write("\n[Ctrl-D or /quit leaves]\n")
            continue
        try:
            if line.startswith("/"):
                if not chat.command(line):
                    return
            elif line:
                chat.say(line)
        except KeyboardInterrupt:  # before the first word of an answer, or after the last
            chat.write(" [stopped]\n")
        except OuroborosError as error:
            chat.write(f"error: {error}\n")


def documents(template: TextFormat | None, earlier: Sequence[tuple[str, str]], line: str) -> tuple[list[bytes], bytes]:
    """A conversation as a model reads it: whole documents, and the one to go on with.

    Args:
        template: makes a prompt of each line; None makes one growing text of the whole conversation.
        earlier: lines and their answers.
        line: the one to answer.
    """
    before: list[str] = []
    if template is None:
        prompt = "".join(f"{user}\n{answer}{BLANK_LINE}" for user, answer in earlier) + line + "\n"
    elif isinstance(template, ChatFormat):  # in training, too, a conversation is one text
        prompt = template.conversation(earlier, line)
    else:
        # In training one record is one document, and an end-of-text token stands between two: a second question
        # inside a document, after a blank line say, is something the model has never seen. So each turn is a
        # document. What that costs: training has taught the model that documents are about different things.
        before = [(template.prompt(user) or user) + answer for user, answer in earlier]
        prompt = template.prompt(line) or line
    # Bytes that were typed and are not UTF-8 arrive as surrogates.
    return [text.encode("utf-8", "surrogateescape") for text in before], prompt.encode("utf-8", "surrogateescape")


def find_template(text: str) -> TextFormat | None:
    """A format that makes prompts of lines, by name or as a template; None for ``none``.

    Raises:
        OuroborosError: no such format, or one whose texts have nothing to answer.
    """
    if text == "none":
        return None
    found = find_format(text)
    if found.prompt("") is None:
        usable = [name for name, form in formats().items() if form.prompt("") is not None]
        raise OuroborosError(
            f"template {text!r} has no second column to answer with; use {', '.join(usable)}, none or a template"
            " such as 'Q: {question}\\nA: {answer}'"
        )
    return found


def spoken_to(
    opened: OpenedModel, tokenizer: TextTokenizer, given: str | None
) -> tuple[TextFormat | None, TextTokenizer]:
    """How a model is spoken to: the template, None for plain conversation, and the tokenizer that reads it.

    Args:
        opened: the model; its recipe, if it has one, tells what it was trained on.
        tokenizer: the model's.
        given: the name of a format, a template or ``none``; None takes the form of the heaviest source that the model
            was trained on, or the chat template that came with the tokenizer.

    Raises:
        OuroborosError: there is no such format, or nothing in it is to be answered.
    """
    if given is not None:
        return chat_format(find_template(given), tokenizer), tokenizer
    try:
        form = chat_format(recipe_template(opened.recipe) if opened.recipe else None, tokenizer)
    except OuroborosError as error:  # a recipe that cannot be read is no reason not to talk
        logger.warning("no template from the recipe: %s", error)
        form = None
    if form is None and opened.recipe is None and getattr(tokenizer.hf, "chat_template", None):
        tokenizer = tokenizer.reading_specials()  # the template's marks are special tokens
        form = chat_format(find_format("messages"), tokenizer)
    return form, tokenizer


def recipe_template(recipe: Recipe) -> TextFormat | None:
    """The format of the heaviest source of ``recipe``, if it makes prompts.

    Raises:
        OuroborosError: a source that cannot be read as one.
    """
    heaviest = max(parse_sources(recipe.data.sources, need_files=False), key=lambda ref: ref.weight)
    found = find_format(heaviest.format) if heaviest.format else None
    return found if found and found.prompt("") is not None else None
