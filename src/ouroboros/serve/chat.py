"""The chat: a conversation with history, streamed, with commands.

A base model continues text. Without a template the conversation is one growing text: each turn adds the user's line and
a newline, the model continues until a blank line. With a template each turn is a text of the form that the model was
trained on or, where those were conversations, the next turn of one. Without history each line is continued by itself.
When the context is full the oldest turns are dropped, and the user is told.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.data.formats import ChatFormat, TextFormat
from ouroboros.data.tokenize import TextTokenizer
from ouroboros.errors import OuroborosError, check, nearest
from ouroboros.serve.decoder import LoopDecoder
from ouroboros.serve.sampling import Sampling
from ouroboros.serve.stream import Continuation, text_ids
from ouroboros.serve.template import NONE, find_template
from ouroboros.serve.transcript import Transcript

if TYPE_CHECKING:
    from ouroboros.model.modeling import OuroborosForCausalLM

HELP = """\
/loops N        use N loops for each token (more or fewer than trained)
/set NAME VALUE change temperature, top_p, window or another control that /show names
/template NAME  put each line into a template (a format's name, 'Q: {question}\\nA: {answer}' or none)
/show           the present settings
/clear          forget the conversation
/save FILE      write the conversation as JSON
/help           this list
/quit           leave (Ctrl-D too; Ctrl-C stops an answer)"""


@dataclass
class Turn:
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
        decoder: writes the tokens; None leaves it to ``model.generate``.
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
            answer.cancel()
            stopped = True
            self.write(" [stopped]")
        self.write(f"\n[{answer.rate}]\n" if self.shows_rate else "\n")
        self.turns.append(Turn(line, written))
        if self.transcript is not None:
            self.transcript.add(line, written, stopped=stopped, **self._facts())

    def command(self, line: str) -> bool:
        """Carry out a line that begins with ``/``; False means leave."""
        name, *words = line[1:].split() or [""]
        commands: dict[str, Callable[[list[str]], None]] = {
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
        if name not in commands:
            raise OuroborosError(f"unknown command /{name}{nearest(name, commands)}; /help lists them")
        commands[name](words)
        return True

    def _prompt(self, line: str) -> tuple[list[bytes], bytes]:
        """Earlier documents and the text to go on from; oldest turns are dropped when the context is full."""
        context = self.sampling.window or self.model.config.max_position_embeddings - 1
        dropped = 0
        while True:
            earlier, prompt = self._documents(line)
            # Half the context is kept for the answer unless this line alone needs more.
            if not (self.turns and self.history) or len(text_ids(self.tokenizer, prompt, earlier)) - 1 <= context // 2:
                break
            self.turns.pop(0)
            dropped += 1
        if dropped:
            self.write(f"[the context is full: {dropped} oldest turn(s) forgotten]\n")
        return earlier, prompt

    def _documents(self, line: str) -> tuple[list[bytes], bytes]:
        if not self.history:
            return [], _bytes(self._templated(line))
        if self.template is None:
            return [], _bytes("".join(f"{turn.user}\n{turn.model}\n\n" for turn in self.turns) + line + "\n")
        if isinstance(self.template, ChatFormat):  # in training, too, a conversation is one text
            return [], _bytes(self.template.conversation([(turn.user, turn.model) for turn in self.turns], line))
        # In training one record is one document, and an end-of-text token stands between two: a second question
        # inside a document, after a blank line say, is something the model has never seen. So each turn is a document.
        # What that costs: training has taught the model that documents are about different things.
        earlier = [_bytes(self._templated(turn.user) + turn.model) for turn in self.turns]
        return earlier, _bytes(self._templated(line))

    def _templated(self, line: str) -> str:
        return line if self.template is None else self.template.prompt(line) or line

    def _stop(self) -> tuple[str, ...]:
        """Where answers end."""
        if self.template is not None:
            return (*self.sampling.stop, *self.template.stop)
        return self.sampling.stop or (("\n\n",) if self.history else ())

    def _facts(self) -> dict[str, Any]:
        """What a turn was made with."""
        return {
            "loops": self.model.schedule.loops,
            "template": self.template.name if self.template else None,
            "sampling": dataclasses.asdict(self.sampling),
        }

    def _settings(self) -> str:
        facts = self._facts()
        controls = facts.pop("sampling")
        del controls["stop"]  # not to be set here
        words = {"None": NONE, "True": "on", "False": "off"}
        return "  ".join(f"{name}={words.get(str(value), value)}" for name, value in (facts | controls).items())

    def _loops(self, words: list[str]) -> None:
        if len(words) != 1 or not (words[0].isascii() and words[0].isdigit()):
            raise OuroborosError("/loops takes a number, for example /loops 4")
        self.model = self.base.with_loops(int(words[0]))
        trained = self.base.schedule.loops
        note = "" if int(words[0]) == trained else f" (trained with {trained})"
        self.write(f"[{words[0]} loops{note}]\n")

    def _set(self, words: list[str]) -> None:
        check(len(words) == 2, "/set takes a name and a value, for example /set temperature 0.7; /show names them")
        try:
            self.sampling = self.sampling.with_value(*words)
        except OuroborosError as error:
            raise OuroborosError(f"/set {error}") from None

    def _set_template(self, words: list[str]) -> None:
        check(bool(words), "/template takes a format's name, a template or none")
        self.template = find_template(" ".join(words))
        self.write(f"[template {self.template.name if self.template else NONE}]\n")

    def _save(self, words: list[str]) -> None:
        if len(words) != 1:
            raise OuroborosError("/save takes a file name")
        path = Path(words[0])
        if path.exists():
            raise OuroborosError(f"{path} exists; choose another name")
        body = {**self._facts(), "turns": [dataclasses.asdict(turn) for turn in self.turns]}
        path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        self.write(f"[saved {len(self.turns)} turn(s) to {path}]\n")


def _bytes(text: str) -> bytes:
    """A line as the bytes that were typed; those that are not UTF-8 arrive as surrogates."""
    return text.encode("utf-8", "surrogateescape")


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
        except (OuroborosError, OSError) as error:
            chat.write(f"error: {error}\n")
