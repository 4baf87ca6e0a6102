"""Streaming: bytes become text as they arrive, stop strings and cancellation end it, nothing is lost."""

import dataclasses
import types

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ouroboros.data.tokenize import train_bpe
from ouroboros.errors import OuroborosError
from ouroboros.serve import stream
from ouroboros.serve.fast import FastDecoder
from ouroboros.serve.sampling import Sampling
from ouroboros.serve.stream import Continuation, text_ids

GREEDY = Sampling(temperature=0.0, max_new_tokens=40)


def stopping(*texts: str) -> Sampling:
    return Sampling(temperature=0.0, max_new_tokens=40, stop=texts)


def test_text_is_what_generate_gives(model, tokenizer):
    continuation = Continuation(model, tokenizer, b"abc", GREEDY)
    pieces = list(continuation)
    ids = torch.tensor([[256, *b"abc"]])
    expected = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=256, pad_token_id=256)
    assert continuation.text == tokenizer.decode(expected[0, 4:].numpy())
    assert "".join(pieces) == continuation.text.decode("utf-8", "replace") and len(pieces) > 1


def test_sampling_is_seeded_by_the_caller(model, tokenizer):
    def sampled(seed: int) -> str:
        torch.manual_seed(seed)
        return "".join(Continuation(model, tokenizer, b"", Sampling(max_new_tokens=20)))

    assert sampled(1) == sampled(1) != sampled(2)


@pytest.mark.parametrize("prompt", [b"", b"so "])
def test_characters_of_several_bytes_come_whole(prompt, scripted, tokenizer):
    answer = "caf\u00e9 \u4e16\u754c \U0001f40d!"
    continuation = Continuation(scripted(answer.encode(), prompt), tokenizer, prompt, GREEDY)
    pieces = list(continuation)
    assert pieces == list(answer)  # one character each: never a replacement for half of one
    assert continuation.text == answer.encode()


def test_bytes_that_are_no_text_are_replaced_in_the_stream_and_kept_in_the_result(scripted, tokenizer):
    answer = b"ab\xff\xc3(\xe4\xb8"
    continuation = Continuation(scripted(answer), tokenizer, b"", GREEDY)
    assert "".join(continuation) == answer.decode("utf-8", "replace") and continuation.text == answer


@pytest.mark.parametrize(
    ("answer", "stop", "text"),
    [
        (b"one. two. three", (". t",), b"one"),
        (b"aab", ("ab",), b"a"),
        (b"abababc", ("ababc",), b"ab"),
        (b"abcabx", ("abx", "zzz"), b"abc"),
        (b"xyz", ("z", "y"), b"x"),
        (b"never", ("stop",), b"never"),
        (b"almost sto", ("stop",), b"almost sto"),
        ("caf\u00e9 au lait".encode(), ("\u00e9",), b"caf"),
    ],
)
def test_stop_strings_over_token_boundaries(answer, stop, text, scripted, tokenizer):
    """Every byte is a token of its own here, so each stop string crosses boundaries."""
    continuation = Continuation(scripted(answer), tokenizer, b"", stopping(*stop))
    assert "".join(continuation) == text.decode() and continuation.text == text


def test_writing_ends_at_a_stop_string(scripted, tokenizer, monkeypatch):
    model = scripted(b"ab" * 20)
    calls = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))
    assert "".join(Continuation(model, tokenizer, b"", stopping("ba"))) == "a"
    assert len(calls) <= 4


class Dictated:
    """In place of a decoder: the tokens that it is given."""

    def __init__(self, *ids: int) -> None:
        self.ids, self.taken = ids, 0

    def tokens(self, model, input_ids, **options):
        for token in self.ids:
            self.taken += 1
            yield torch.tensor([[token]])


def dictated(model, tokenizer, stop: str, *ids: int) -> tuple[list[str], Continuation, Dictated]:
    decoder = Dictated(*ids)
    continuation = Continuation(model, tokenizer, b"", stopping(stop), decoder)
    return list(continuation), continuation, decoder


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["a", "b", "ab", "\u00e9", "ba"]), max_size=12),
    st.sampled_from(["ab", "bb", "\u00e9a", "aba"]),
)
def test_no_cut_of_the_text_into_tokens_changes_where_it_stops(model, words, stop):
    tokenizer = train_bpe([b"abababba baab \xc3\xa9 abba " * 20], 270)
    text = "".join(words).encode()
    expected = text.split(stop.encode())[0]
    for ids in (list(tokenizer.encode(text)), [token for byte in text for token in _single(tokenizer, byte)]):
        pieces, continuation, _ = dictated(model, tokenizer, stop, *ids)
        assert "".join(pieces).encode() == continuation.text == expected


def _single(tokenizer, byte: int) -> list[int]:
    """The token of one byte."""
    return [index for index, piece in enumerate(tokenizer._byte_table) if piece == bytes([byte])][:1]


def test_a_long_token_may_contain_a_stop_string_and_more(model):
    tokenizer = train_bpe([b"abcd " * 50], 262)
    ids = list(tokenizer.encode(b"abcd"))
    assert len(ids) == 1
    pieces, continuation, decoder = dictated(model, tokenizer, "bc", *ids, *tokenizer.encode(b"more"))
    assert pieces == ["a"] and continuation.text == b"a" and decoder.taken == 1


def test_the_end_of_text_is_not_text(scripted, tokenizer):
    assert "".join(Continuation(scripted(b"done"), tokenizer, b"", GREEDY)) == "done"
    assert "".join(Continuation(scripted(b""), tokenizer, b"", GREEDY)) == ""


def test_a_prompt_leaves_room_for_a_token_or_is_refused(model, tokenizer):
    full = Continuation(model, tokenizer, b"x" * 62, GREEDY)  # with the first token 63 of 64
    list(full)
    assert full.room == 1 and len(full.text) <= 1
    with pytest.raises(OuroborosError, match=r"the prompt has 64 tokens but the model's context holds 64; shorten"):
        Continuation(model, tokenizer, b"x" * 63, GREEDY)


def test_the_context_bounds_the_answer(scripted, tokenizer):
    continuation = Continuation(scripted(b"y" * 100, b"x" * 50), tokenizer, b"x" * 50, Sampling(max_new_tokens=100))
    assert "".join(continuation) == "y" * (64 - 51)


def test_an_empty_prompt_starts_a_document(model, tokenizer):
    assert Continuation(model, tokenizer, b"", GREEDY).input_ids.tolist() == [[256]]


def test_text_that_is_not_utf8_is_refused_where_the_tokenizer_needs_it(model):
    bpe = train_bpe([b"some text " * 20], 260)
    with pytest.raises(OuroborosError, match="prompt: invalid UTF-8 at byte 2"):
        Continuation(model, bpe, b"ab\xff", GREEDY)


def test_leaving_early_ends_the_writing(model, tokenizer):
    decoder = Dictated(*b"abcdef")
    continuation = Continuation(model, tokenizer, b"", GREEDY, decoder)
    for piece in continuation:
        if piece == "b":
            break
    assert decoder.taken == continuation.tokens == 2 and continuation.text == b"ab"


def test_a_failure_while_writing_is_raised_to_the_reader(model, tokenizer, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(model), "forward", broken)
    with pytest.raises(OuroborosError, match="generation failed: out of memory"):
        list(Continuation(model, tokenizer, b"", GREEDY))


def test_earlier_documents_come_before_the_prompt_each_after_an_end_of_text(model, tokenizer):
    continuation = Continuation(model, tokenizer, b"c", GREEDY, earlier=[b"ab", b""])
    assert continuation.input_ids.tolist() == [[256, 97, 98, 256, 256, 99]]
    assert text_ids(tokenizer, b"c", [b"ab", b""]) == continuation.input_ids[0].tolist()


def test_a_window_takes_a_text_of_any_length_and_bounds_nothing(model, tokenizer):
    windowed = Sampling(temperature=0.0, max_new_tokens=90, window=8)
    continuation = Continuation(model, tokenizer, b"x" * 10_000, windowed)
    list(continuation)
    assert continuation.input_ids.shape == (1, 10_000) and continuation.room == 90
    same = Continuation(model, tokenizer, b"x" * 8, windowed)
    list(same)
    assert continuation.text == same.text and len(same.text) > 64  # past the context, which a window does not fill


def test_a_window_shows_text_and_no_beginning_unless_there_is_no_text(model, tokenizer):
    windowed = Sampling(window=8)
    assert Continuation(model, tokenizer, b"ab", windowed).input_ids.tolist() == [[97, 98]]
    assert Continuation(model, tokenizer, b"", windowed).input_ids.tolist() == [[256]]
    earlier = Continuation(model, tokenizer, b"b", windowed, earlier=[b"a"])
    assert earlier.input_ids.tolist() == [[97, 256, 98]]


def test_a_window_and_fast_decoding_exclude_each_other(model, tokenizer):
    with pytest.raises(OuroborosError, match="a window needs the whole of it at every step, which fast decoding"):
        Continuation(model, tokenizer, b"a", Sampling(window=8), FastDecoder())


def test_what_the_controls_bring_along_is_applied(scripted, tokenizer):
    """The model wants to write one letter for ever; a style with processors and a reading of its own forbids it."""

    class Other(Sampling):
        def options(self):
            return super().options() | {
                "logits_processor": [lambda ids, scores: scores.index_fill(1, ids[0, -1:], -1e9)]
            }

        def read(self, ids):
            return [*ids, 98]

    continuation = Continuation(scripted(b"a" * 12, b"b"), tokenizer, b"", Other(temperature=0.0, max_new_tokens=4))
    list(continuation)
    assert continuation.input_ids.tolist() == [[256, 98]]
    assert continuation.text[:1] == continuation.text[2:3] == b"a" and b"aa" not in continuation.text


def test_tokens_are_counted_and_timed_without_the_reading_of_the_prompt(scripted, tokenizer, monkeypatch):
    model = scripted(b"abcdef", b"xyz")
    forward, now = type(model).forward, [0.0]

    def slow(self, input_ids, *arguments, **options):
        now[0] += 50.0 if input_ids.shape[1] > 1 else 0.25
        return forward(self, input_ids, *arguments, **options)

    monkeypatch.setattr(type(model), "forward", slow)
    monkeypatch.setattr(stream, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    continuation = Continuation(model, tokenizer, b"xyz", GREEDY)
    list(continuation)
    assert continuation.tokens == 7  # with the end of the text
    assert continuation.seconds == 6 * 0.25 and continuation.rate == "7 tokens, 4 tokens/s"


@pytest.mark.parametrize(("written", "rate"), [(0, "0 tokens"), (1, "1 token")])
def test_one_token_has_no_speed(written, rate, model, tokenizer):
    continuation = Continuation(model, tokenizer, b"", dataclasses.replace(GREEDY, max_new_tokens=1))
    if written:
        list(continuation)
    assert continuation.rate == rate
