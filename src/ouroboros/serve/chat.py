"""The chat: a conversation with history, streamed, with commands.

A base model continues text; the conversation is therefore one growing text. Each turn adds the user's line and a
newline, the model continues until a blank line. When the context is full the oldest turns are dropped, and the user
is told.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ouroboros.data.tokenize import TextTokenizer
from ouroboros.errors import OuroborosError, nearest
from ouroboros.serve.sampling import Sampling
from ouroboros.serve.stream import Continuation, Decoder

if TYPE_CHECKING:
    from ouroboros.model.modeling import OuroborosForCausalLM

HELP = """\
/loops N        use N loops for each token (more or fewer than trained)
/set NAME VALUE change temperature, top_k, top_p, repetition_penalty, no_repeat_ngram or max_new_tokens
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
        sampling: starting controls.
        write: receives text as it is written.
        decoder: writes the tokens; None leaves it to ``model.generate``.
    """

    model: OuroborosForCausalLM
    tokenizer: TextTokenizer
    sampling: Sampling
    write: Callable[[str], None]
    turns: list[Turn] = field(default_factory=list)
    decoder: Decoder | None = None

    def __post_init__(self) -> None:
        self.base = self.model

    def say(self, line: str) -> None:
        """Answer ``line``, streamed; an interruption keeps what was written so far."""
        prompt = self._prompt(line)
        answer = Continuation(self.model, self.tokenizer, _bytes(prompt), self.sampling, self.decoder)
        written = ""
        try:
            for piece in answer:
                written += piece
                self.write(piece)
        except KeyboardInterrupt:
            answer.cancel()
            self.write(" [stopped]")
        self.write("\n")
        self.turns.append(Turn(line, written))

    def command(self, line: str) -> bool:
        """Carry out a line that begins with ``/``; False means leave."""
        name, *words = line[1:].split() or [""]
        commands: dict[str, Callable[[list[str]], None]] = {
            "loops": self._loops,
            "set": self._set,
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

    def _prompt(self, line: str) -> str:
        """The conversation so far and ``line``; oldest turns are dropped when the context is full."""
        limit = self.model.config.max_position_embeddings - 1
        dropped = 0
        while True:
            text = "".join(f"{turn.user}\n{turn.model}\n\n" for turn in self.turns) + line + "\n"
            # Half the context is kept for the answer unless this line alone needs more.
            if not self.turns or len(self.tokenizer.encode(_bytes(text))) <= limit // 2:
                break
            self.turns.pop(0)
            dropped += 1
        if dropped:
            self.write(f"[the context is full: {dropped} oldest turn(s) forgotten]\n")
        return text

    def _settings(self) -> str:
        values = dataclasses.asdict(self.sampling)
        return "  ".join(
            [f"loops={self.model.schedule.loops}", *(f"{k}={v}" for k, v in values.items() if k != "stop")]
        )

    def _loops(self, words: list[str]) -> None:
        if len(words) != 1 or not (words[0].isascii() and words[0].isdigit()):
            raise OuroborosError("/loops takes a number, for example /loops 4")
        self.model = self.base.with_loops(int(words[0]))
        trained = self.base.schedule.loops
        note = "" if int(words[0]) == trained else f" (trained with {trained})"
        self.write(f"[{words[0]} loops{note}]\n")

    def _set(self, words: list[str]) -> None:
        numbers = {f.name for f in dataclasses.fields(Sampling)} - {"stop"}
        if len(words) != 2 or words[0] not in numbers:
            hint = nearest(words[0], numbers) if words else ""
            raise OuroborosError(f"/set takes a name and a number, for example /set temperature 0.7{hint}")
        current = getattr(self.sampling, words[0])
        try:
            value = type(current)(words[1])
        except ValueError:
            raise OuroborosError(f"/set {words[0]}: {words[1]!r} is not a number of the right kind") from None
        self.sampling = dataclasses.replace(self.sampling, **{words[0]: value})

    def _save(self, words: list[str]) -> None:
        if len(words) != 1:
            raise OuroborosError("/save takes a file name")
        path = Path(words[0])
        if path.exists():
            raise OuroborosError(f"{path} exists; choose another name")
        body = {
            "loops": self.model.schedule.loops,
            "sampling": dataclasses.asdict(self.sampling),
            "turns": [dataclasses.asdict(turn) for turn in self.turns],
        }
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
        except (OuroborosError, OSError) as error:
            chat.write(f"error: {error}\n")
