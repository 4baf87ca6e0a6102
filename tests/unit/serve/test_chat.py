"""The chat: history, commands, a full context, interruption."""

import json

import pytest

from ouroboros.errors import OuroborosError
from ouroboros.serve.chat import HELP, Chat, Turn, converse
from ouroboros.serve.sampling import Sampling


class Writer:
    """Collects what is written; raises KeyboardInterrupt at the given write, once."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.pieces: list[str] = []
        self.interrupt_at = interrupt_at

    def __call__(self, text: str) -> None:
        if len(self.pieces) == self.interrupt_at:
            self.interrupt_at = None
            raise KeyboardInterrupt
        self.pieces.append(text)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@pytest.fixture
def chat(model, tokenizer) -> Chat:
    return Chat(model, tokenizer, Sampling(temperature=0.0, max_new_tokens=5), Writer())


def reader(*lines: str | type[BaseException]):
    """Reads the given lines, then the end of input."""
    waiting = list(lines)

    def read() -> str:
        if not waiting:
            raise EOFError
        line = waiting.pop(0)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_turns_grow_into_one_text(scripted, tokenizer):
    prompt = b"hi\n"
    chat = Chat(scripted(b"hello\n\nmore", prompt), tokenizer, Sampling(temperature=0.0, stop=("\n\n",)), Writer())
    chat.say("hi")
    assert chat.turns == [Turn("hi", "hello")] and chat.write.text == "hello\n"
    assert chat._prompt("and you?") == "hi\nhello\n\nand you?\n"


def test_lines_are_answered_until_the_end(chat):
    converse(chat, reader("hello", "  ", "again"))
    assert [turn.user for turn in chat.turns] == ["hello", "again"] and chat.write.text.endswith("\n\n")


def test_quit_leaves(chat):
    for word in ("/quit", "/exit", "/q"):
        converse(chat, reader(word, "never read"))
    assert chat.turns == []


def test_loops_make_a_view_of_the_same_weights(chat, model):
    assert chat.command("/loops 5")
    assert chat.model.schedule.loops == 5 and model.schedule.loops == 2
    assert chat.model.lm_head.weight is model.lm_head.weight
    assert "[5 loops (trained with 2)]" in chat.write.text
    chat.say("hello")
    chat.command("/loops 2")
    assert chat.write.text.endswith("[2 loops]\n") and chat.model.schedule.loops == 2


@pytest.mark.parametrize("line", ["/loops", "/loops x", "/loops -1", "/loops 1 2", "/loops \u00b2", "/loops 0"])
def test_bad_loop_counts_are_refused_and_change_nothing(line, chat):
    with pytest.raises(OuroborosError, match="/loops takes a number|loops must be >= 1"):
        chat.command(line)
    assert chat.model.schedule.loops == 2


def test_a_plain_model_has_no_loops_to_set(tokenizer, model):
    from ouroboros.api import build
    from ouroboros.recipes import recipe

    plain = Chat(build(recipe("gpt", "tiny")).eval(), tokenizer, Sampling(), Writer())
    with pytest.raises(OuroborosError, match="has no loop"):
        plain.command("/loops 3")


def test_controls_are_set_by_name_and_checked(chat):
    for line in ("/set temperature 0.5", "/set top_k 7", "/set max_new_tokens 9"):
        assert chat.command(line)
    assert (chat.sampling.temperature, chat.sampling.top_k, chat.sampling.max_new_tokens) == (0.5, 7, 9)
    chat.command("/show")
    assert "loops=2" in chat.write.text and "temperature=0.5" in chat.write.text and "stop" not in chat.write.text
    for line, words in (
        ("/set tempratur 1", "did you mean 'temperature'?"),
        ("/set temperature", "takes a name and a number"),
        ("/set", "takes a name and a number"),
        ("/set stop x", "takes a name and a number"),
        ("/set temperature warm", "'warm' is not a number of the right kind"),
        ("/set top_k 1.5", "'1.5' is not a number"),
        ("/set top_p 2", r"top_p must be in \(0, 1\]"),
    ):
        with pytest.raises(OuroborosError, match=words):
            chat.command(line)
    assert (chat.sampling.temperature, chat.sampling.top_p) == (0.5, 0.95)


def test_every_command_of_the_help_exists(chat, tmp_path):
    named = [line.split()[0] for line in HELP.splitlines()]
    assert named == ["/loops", "/set", "/show", "/clear", "/save", "/help", "/quit"]
    chat.command("/help")
    assert chat.write.text == HELP + "\n"


def test_unknown_commands_offer_the_nearest(chat):
    with pytest.raises(OuroborosError, match=r"unknown command /lops; did you mean 'loops'\?; /help lists them"):
        chat.command("/lops 3")
    with pytest.raises(OuroborosError, match="unknown command /;"):
        chat.command("/")


def test_clear_forgets(chat):
    chat.say("hello")
    chat.command("/clear")
    assert chat.turns == [] and chat._prompt("new") == "new\n"


def test_save_writes_json_once(chat, tmp_path):
    chat.say("caf\u00e9")
    path = tmp_path / "talk.json"
    chat.command(f"/save {path}")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["turns"] == [{"user": "caf\u00e9", "model": chat.turns[0].model}] and saved["loops"] == 2
    assert saved["sampling"]["max_new_tokens"] == 5 and f"[saved 1 turn(s) to {path}]" in chat.write.text
    before = path.read_bytes()
    for line, words in ((f"/save {path}", "exists; choose another name"), ("/save", "takes a file name")):
        with pytest.raises(OuroborosError, match=words):
            chat.command(line)
    assert path.read_bytes() == before


def test_errors_are_shown_and_the_conversation_goes_on(chat, tmp_path):
    converse(chat, reader("/nonsense", f"/save {tmp_path / 'no' / 'where.json'}", "x" * 80, "hello"))
    text = chat.write.text
    assert "error: unknown command /nonsense" in text and "No such file or directory" in text
    assert "error: the prompt has 82 tokens but the model's context holds 64" in text
    assert [turn.user for turn in chat.turns] == ["hello"]


def test_a_full_context_drops_the_oldest_turns_and_says_so(chat):
    chat.turns = [Turn("one", "1" * 10), Turn("two", "2" * 11), Turn("six", "6" * 5)]
    prompt = chat._prompt("now")
    # Half of the 63 usable tokens stay free for the answer; with the second turn the text would have 32 bytes.
    assert prompt == "six\n66666\n\nnow\n" and [turn.user for turn in chat.turns] == ["six"]
    assert chat.write.text == "[the context is full: 2 oldest turn(s) forgotten]\n"
    assert chat._prompt("now") == prompt and chat.write.text.count("forgotten") == 1
    chat.turns = [Turn("two", "2" * 10), Turn("six", "6" * 5)]  # 31 bytes
    chat._prompt("now")
    assert len(chat.turns) == 2


def test_a_line_that_fits_alone_is_answered_though_it_needs_more_than_half(chat):
    chat.turns = [Turn("one", "1")]
    chat.say("x" * 50)
    assert [turn.user for turn in chat.turns] == ["x" * 50] and "error" not in chat.write.text


def test_an_interruption_keeps_what_was_written_and_the_chat_goes_on(scripted, tokenizer):
    writer = Writer(interrupt_at=3)
    chat = Chat(scripted(b"abcdefgh", b"hi\n"), tokenizer, Sampling(temperature=0.0, max_new_tokens=8), writer)
    chat.say("hi")
    assert writer.text == "abc [stopped]\n" and chat.turns[0].model.startswith("abc")
    assert len(chat.turns[0].model) <= 4
    converse(chat, reader("/show"))
    assert "loops=2" in writer.text


def test_ctrl_c_at_the_prompt_tells_how_to_leave(chat):
    converse(chat, reader(KeyboardInterrupt, "hello"))
    assert "[Ctrl-D or /quit leaves]" in chat.write.text and [turn.user for turn in chat.turns] == ["hello"]


def test_bytes_that_are_no_text_pass_through(chat, model):
    converse(chat, reader("caf\udce9"))
    assert [turn.user for turn in chat.turns] == ["caf\udce9"] and "error" not in chat.write.text
    assert chat._prompt("x").startswith("caf\udce9\n")
