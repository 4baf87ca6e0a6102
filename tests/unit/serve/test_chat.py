"""The chat: history, commands, a full context, interruption."""

import dataclasses
import json
import re
from typing import Literal

import pytest

from ouroboros.config import DataSpec
from ouroboros.data.formats import formats
from ouroboros.errors import OuroborosError
from ouroboros.recipes import recipe
from ouroboros.serve.chat import HELP, Chat, Turn, converse, find_template, recipe_template
from ouroboros.serve.sampling import Sampling
from ouroboros.serve.stream import text_ids
from ouroboros.serve.transcript import Transcript


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
    assert chat._prompt("and you?") == ([], b"hi\nhello\n\nand you?\n")


def test_without_history_each_line_is_continued_by_itself(scripted, tokenizer):
    answers = scripted(b"hello\n\nmore", b"hi")
    chat = Chat(answers, tokenizer, Sampling(temperature=0.0, max_new_tokens=60), Writer(), history=False)
    for _ in range(2):
        chat.say("hi")
    assert [turn.model for turn in chat.turns] == ["hello\n\nmore"] * 2  # and a blank line ends nothing
    assert chat._prompt("and you?") == ([], b"and you?")
    chat.turns *= 50
    assert chat._prompt("x" * 40) == ([], b"x" * 40) and len(chat.turns) == 100 and "forgotten" not in chat.write.text
    chat.template = formats()["qa"]
    assert chat._prompt("Why?") == ([], b"Q: Why?\nA:") and chat._stop() == formats()["qa"].stop


def test_how_fast_an_answer_came_is_said_on_request(scripted, tokenizer):
    chat = Chat(scripted(b"hello", b"hi\n"), tokenizer, Sampling(temperature=0.0), Writer(), shows_rate=True)
    chat.say("hi")
    assert re.fullmatch(r"hello\n\[6 tokens, [\d,]+ tokens/s\]\n", chat.write.text) and chat.turns == [
        Turn("hi", "hello")
    ]


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

    plain = Chat(build(recipe("gpt", "tiny")).eval(), tokenizer, Sampling(), Writer())
    with pytest.raises(OuroborosError, match="has no loop"):
        plain.command("/loops 3")


def test_controls_are_set_by_name_and_checked(chat):
    for line in ("/set temperature 0.5", "/set top_k 7", "/set max_new_tokens 9"):
        assert chat.command(line)
    assert (chat.sampling.temperature, chat.sampling.top_k, chat.sampling.max_new_tokens) == (0.5, 7, 9)
    chat.command("/show")
    assert "loops=2" in chat.write.text and "temperature=0.5" in chat.write.text and "stop" not in chat.write.text
    assert "template=none" in chat.write.text and "window=none" in chat.write.text
    chat.command("/set window 40")
    assert chat.sampling.window == 40
    chat.command("/set window none")
    assert chat.sampling.window is None
    for line, words in (
        ("/set tempratur 1", "did you mean 'temperature'?"),
        ("/set temperature", "takes a name and a value"),
        ("/set", "takes a name and a value"),
        ("/set stop x", "/set: stop: Input should be a valid tuple"),
        ("/set temperature warm", "/set: temperature: Input should be a valid number"),
        ("/set top_k 1.5", "/set: top_k: Input should be a valid integer"),
        ("/set top_k none", "/set: top_k: Input should be a valid integer"),
        ("/set top_p 2", r"top_p must be in \(0, 1\]"),
    ):
        with pytest.raises(OuroborosError, match=words):
            chat.command(line)
    assert (chat.sampling.temperature, chat.sampling.top_p) == (0.5, 0.95)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published(Sampling):
    """A style with controls of its own."""

    ban: bool = False
    rule: Literal["one", "two"] = "one"


def test_controls_of_a_published_style_are_set_and_shown_too(chat):
    chat.sampling = Published()
    chat.command("/show")
    assert "ban=off" in chat.write.text and "rule=one" in chat.write.text
    for line in ("/set ban on", "/set rule two"):
        chat.command(line)
    assert chat.sampling == Published(ban=True, rule="two")
    for line, words in (("/set ban 7", "ban: Input should be a valid boolean"), ("/set rule x", "'two'")):
        with pytest.raises(OuroborosError, match=words):
            chat.command(line)


def test_every_command_of_the_help_exists(chat, tmp_path):
    named = [line.split()[0] for line in HELP.splitlines()]
    assert named == ["/loops", "/set", "/template", "/show", "/clear", "/save", "/help", "/quit"]
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
    assert chat.turns == [] and chat._prompt("new") == ([], b"new\n")


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
    assert prompt == ([], b"six\n66666\n\nnow\n") and [turn.user for turn in chat.turns] == ["six"]
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
    assert chat._prompt("x")[1].startswith(b"caf\xe9\n")


def test_with_a_template_every_turn_is_a_document_of_its_form(scripted, tokenizer):
    prompt = b"Q: hi\nA:"
    model = scripted(b" hello\nQ: what next?", prompt)
    chat = Chat(model, tokenizer, Sampling(temperature=0.0), Writer(), template=formats()["qa"])
    chat.say("hi")
    assert chat.turns == [Turn("hi", " hello")]  # the template's stop string ended it
    earlier, prompt = chat._prompt("and?")
    assert (earlier, prompt) == ([b"Q: hi\nA: hello"], b"Q: and?\nA:")
    # As the shards of training: an end-of-text token (256) before every document.
    assert text_ids(tokenizer, prompt, earlier) == [256, *earlier[0], 256, *prompt]
    chat.command("/template none")
    assert chat._prompt("and?") == ([], b"hi\n hello\n\nand?\n")


def test_answers_end_where_template_and_user_say(chat):
    assert chat._stop() == ("\n\n",)
    chat.sampling = Sampling(stop=("END",))
    assert chat._stop() == ("END",)
    chat.template = formats()["qa"]
    assert chat._stop() == ("END", *formats()["qa"].stop) and len(chat._stop()) > 1


def test_templates_are_named_or_written(chat):
    chat.command("/template qa")
    chat.command("/show")
    assert "[template qa]" in chat.write.text and "template=qa" in chat.write.text
    chat.command("/template Ask: {a}\\nTell: {b}")
    assert chat._prompt("x") == ([], b"Ask: x\nTell:")
    for line, words in (
        ("/template", "takes a format's name"),
        ("/template qaa", "format 'qaa': unknown"),
        ("/template cosmopedia", "no second column"),
    ):
        with pytest.raises(OuroborosError, match=words):
            chat.command(line)
    assert chat._prompt("x") == ([], b"Ask: x\nTell:")


def test_a_full_context_counts_earlier_documents(chat):
    chat.template = formats()["qa"]
    chat.turns = [Turn("one", "1" * 10), Turn("six", "6" * 5)]
    earlier, _ = chat._prompt("now")
    assert earlier == [b"Q: six\nA:66666"] and "1 oldest turn(s) forgotten" in chat.write.text


def test_a_long_line_is_an_error_or_seen_through_a_window(chat):
    converse(chat, reader("x" * 10_000, "/set window 16", "y" * 10_000, "short", "/set window 65", "no"))
    text = chat.write.text
    assert "error: the prompt has 10002 tokens but the model's context holds 64" in text
    assert [turn.user[0] for turn in chat.turns] == ["s"] and "forgotten" in text
    assert "error: the window is 65 tokens but the model's context holds 64" in text


def test_turns_go_to_the_transcript_as_they_happen(chat, tmp_path):
    chat.transcript = Transcript(tmp_path / "talk.jsonl")
    converse(chat, reader("hello", "/loops 3", "/template qa", "again"))
    lines = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    assert [(line["user"], line["loops"], line["template"]) for line in lines] == [
        ("hello", 2, None),
        ("again", 3, "qa"),
    ]
    assert [line["model"] for line in lines] == [turn.model for turn in chat.turns]
    assert lines[0]["sampling"]["max_new_tokens"] == 5 and lines[0]["stopped"] is False


def test_an_interrupted_turn_is_in_the_transcript(scripted, tokenizer, tmp_path):
    writer = Writer(interrupt_at=3)
    chat = Chat(scripted(b"abcdefgh", b"hi\n"), tokenizer, Sampling(temperature=0.0, max_new_tokens=8), writer)
    chat.transcript = Transcript(tmp_path / "talk.jsonl")
    converse(chat, reader("hi"))
    (line,) = (json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines())
    assert line["stopped"] is True and line["model"] == chat.turns[0].model and line["model"].startswith("abc")


def test_a_transcript_that_cannot_be_written_does_not_end_the_conversation(chat, tmp_path, monkeypatch):
    chat.transcript = Transcript(tmp_path / "talk.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        converse(chat, reader("one", "two"))
    assert chat.write.text.count("No space left on device") == 2
    assert (tmp_path / "talk.jsonl").read_bytes() == b""
    converse(chat, reader("three"))
    lines = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    assert [line["user"] for line in lines] == ["one", "two", "three"] == [turn.user for turn in chat.turns]


def test_ctrl_c_around_an_answer_does_not_leave(chat, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "say", interrupted)
    converse(chat, reader("hello", "/show"))
    assert " [stopped]" in chat.write.text and "loops=2" in chat.write.text


def test_conversations_go_on_in_one_text(chat):
    chat.template = formats()["messages"]
    chat.sampling = Sampling(window=200)
    chat.turns = [Turn("Hello?", " Hi."), Turn("And you?", "Fine")]
    expected = b"User: Hello?\nAssistant: Hi.\nUser: And you?\nAssistant: Fine\nUser: Why?\nAssistant:"
    assert chat._prompt("Why?") == ([], expected)
    assert chat._stop()[-1] == "\nUser:"
    chat.history = False
    assert chat._prompt("Why?") == ([], b"User: Why?\nAssistant:")


def test_names_templates_and_none():
    assert find_template("none") is None
    assert find_template("metamath") is formats()["metamath"]
    written = find_template("Ask {a}:\\nTell {b}")
    assert written is not None and written.prompt("me") == "Ask me:\nTell"


def test_every_named_format_is_usable_or_says_why():
    for name, form in formats().items():
        if form.prompt("x") is None:
            with pytest.raises(OuroborosError, match=f"template '{name}' has no second column.*use .*metamath.*none"):
                find_template(name)
        else:
            assert find_template(name) is form


def test_unknown_names_offer_the_nearest():
    with pytest.raises(OuroborosError, match="format 'metamth': unknown; did you mean 'metamath'"):
        find_template("metamth")


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        (("python:",), None),
        (("a.jsonl@qa=0.4", "b.jsonl@mbpp=0.6"), "mbpp"),
        (("a.jsonl@qa", "b.jsonl@mbpp"), "qa"),
        (("a.jsonl@qa=0.4", "notes.txt=0.6"), None),
        (("mix:rhrm",), "tinygsm"),
        (("mix:rhrm:gone=2", "b.jsonl@qa=1"), "qa"),
        (("a.jsonl@cosmopedia=2", "b.jsonl@qa"), None),
    ],
)
def test_the_template_of_the_heaviest_source(sources, name):
    trained = dataclasses.replace(recipe("gpt", "tiny"), data=DataSpec(sources=sources))
    found = recipe_template(trained)
    assert (found.name if found else None) == name
