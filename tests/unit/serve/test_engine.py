"""Answers that are written together are those that each request gets alone; waiting, cancelling, failing."""

import threading
import time

import pytest
import torch

from ouroboros.errors import OuroborosError
from ouroboros.serve import engine as module
from ouroboros.serve.engine import Ask, BusyError, Engine, processors
from ouroboros.serve.sampling import Sampling
from ouroboros.serve.stream import Continuation, text_ids


class Listener:
    """Collects the events of one request."""

    def __init__(self, count=1):
        self.events, self.texts, self.error = [], {}, None
        self._ended = threading.Semaphore(0)
        self.count = count

    def __call__(self, event):
        self.events.append(event)
        self.texts[event.index] = self.texts.get(event.index, "") + event.text
        if event.error is not None:
            self.error = event.error
        if event.finish or event.error is not None:
            self._ended.release()

    def wait(self):
        for _ in range(self.count):
            assert self._ended.acquire(timeout=60)
            if self.error is not None:
                break
        return self


def ask(tokenizer, prompt, listener, **options):
    sampling = options.pop("sampling", Sampling(temperature=0.0, max_new_tokens=8))
    return Ask(ids=text_ids(tokenizer, prompt), tell=listener, sampling=sampling, **{"loops": 2, **options})


@pytest.fixture
def engine(model, tokenizer):
    found = Engine(model, tokenizer, rows=4, queue=12, context=64)
    found.start()
    yield found
    found.close()


def test_requests_that_run_together_are_answered_as_alone(engine, model, tokenizer, monkeypatch):
    """Greedy and sampled, at two loop counts, prompts that are read in pieces; more than are written at once."""
    monkeypatch.setattr(module, "PIECE", 7)
    sizes = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, ids, **k: sizes.append(len(ids)) or forward(self, ids, **k)
    )
    expected, asks = [], []
    for number, prompt in enumerate([b"abc", b"hello there what", b"", b"x" * 30, b"q"]):
        for loops in (2, 3):
            controls = {"repetition_penalty": 1.3, "top_k": 40} if number == 3 else {}
            sampling = Sampling(max_new_tokens=12 + 3 * number, temperature=0.8 * (number % 2), **controls)
            torch.manual_seed(5)
            expected.append("".join(Continuation(model.with_loops(loops), tokenizer, prompt, sampling)))
            asks.append(ask(tokenizer, prompt, Listener(), sampling=sampling, loops=loops, seed=5))
    sizes.clear()
    for one in asks:
        engine.submit([one])
    assert [one.tell.wait().texts[0] for one in asks] == expected
    assert max(sizes) > 1  # some were written together
    end = time.monotonic() + 60
    while engine.load != {"running": 0, "waiting": 0}:  # the thread tells an end before it makes room
        assert time.monotonic() < end


def test_several_answers_have_seeds_in_a_row(engine, tokenizer):
    sampling = Sampling(max_new_tokens=10)
    several = Listener(3)
    engine.submit([ask(tokenizer, b"ab", several, sampling=sampling, seed=4, count=3, first=6)])
    several.wait()
    for index, seed in ((6, 4), (7, 5), (8, 6)):
        single = Listener()
        engine.submit([ask(tokenizer, b"ab", single, sampling=sampling, seed=seed)])
        assert single.wait().texts[0] == several.texts[index]


def test_reasons_for_an_end(model, tokenizer, scripted):
    engine = Engine(scripted(b"one. two"), tokenizer, rows=1, queue=4, context=64)
    engine.start()
    cases = {(): ("one. two", "stop"), ("two",): ("one. ", "stop"), (". t",): ("one", "stop")}
    for stop, (text, reason) in cases.items():
        found = Listener()
        engine.submit([ask(tokenizer, b"", found, sampling=Sampling(temperature=0.0, max_new_tokens=20, stop=stop))])
        assert found.wait().texts[0] == text and found.events[-1].finish == reason
    found = Listener()
    engine.submit([ask(tokenizer, b"", found, sampling=Sampling(temperature=0.0, max_new_tokens=5))])
    assert found.wait().texts[0] == "one. " and found.events[-1].finish == "length"
    assert sum(event.tokens for event in found.events) == 5
    engine.close()


def test_what_the_model_thought(engine, model, tokenizer):
    found = Listener()
    engine.submit([ask(tokenizer, b"ab", found, best=3, sampling=Sampling(max_new_tokens=4, temperature=2.0), seed=1)])
    found.wait()
    ids = text_ids(tokenizer, b"ab")
    for event in found.events:
        (told,) = event.told
        with torch.no_grad():
            nats = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert told.nats == pytest.approx(float(nats[told.token]), abs=1e-4) and len(told.best) == 3
        assert told.best[0][1] == pytest.approx(float(nats.max()), abs=1e-4)
        ids.append(told.token)


def test_the_context_ends_an_answer(engine, tokenizer):
    found = Listener()
    engine.submit([ask(tokenizer, b"x" * 60, found, sampling=Sampling(temperature=0.0, max_new_tokens=50))])
    found.wait()
    assert sum(event.tokens for event in found.events) == 3 and found.events[-1].finish == "length"


@pytest.fixture
def slow(model, monkeypatch):
    """Each call of the model takes 20 ms at least."""
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: time.sleep(0.02) or forward(*a, **k))


LONG = Sampling(temperature=0.0, max_new_tokens=50, stop=("\0no",))


def test_one_that_is_cancelled_stops_and_makes_room(engine, tokenizer, slow):
    listeners = [Listener() for _ in range(4)]
    asks = [ask(tokenizer, b"a", each, sampling=LONG) for each in listeners]
    engine.submit(asks)
    while not all(each.events for each in listeners):
        time.sleep(0.01)
    last = Listener()
    engine.submit([ask(tokenizer, b"b", last)])
    asks[0].cancelled = asks[2].cancelled = True
    assert last.wait().error is None
    assert listeners[1].wait().error is None and listeners[3].wait().error is None
    for number in (0, 2):
        assert len(listeners[number].events) < 50


def test_more_than_may_wait_are_refused(engine, tokenizer, slow):
    asks = [ask(tokenizer, b"a", Listener(), sampling=LONG) for _ in range(16)]
    engine.submit(asks)
    with pytest.raises(BusyError, match="requests are waiting, and no more may; try again later"):
        engine.submit([ask(tokenizer, b"a", Listener())])
    for one in asks:
        one.cancelled = True


def test_time_ends_an_answer_and_a_wait(engine, tokenizer, slow):
    now = time.monotonic()
    writing = [ask(tokenizer, b"a", Listener(), sampling=LONG, deadline=now + 0.4) for _ in range(4)]
    late = ask(tokenizer, b"a", Listener(), deadline=now + 0.01)
    engine.submit([*writing, late])
    for one in writing:
        assert one.tell.wait().events[-1].finish == "length"
        assert 0 < sum(event.tokens for event in one.tell.events) < 50
    assert isinstance(late.tell.wait().error, BusyError)


def test_a_failure_is_told_and_the_engine_goes_on(engine, model, tokenizer, monkeypatch, caplog):
    forward = type(model).forward

    def fails(self, ids, **keywords):
        if 33 in ids:
            raise RuntimeError("out of memory")
        return forward(self, ids, **keywords)

    monkeypatch.setattr(type(model), "forward", fails)
    failed, good = Listener(), Listener()
    engine.submit([ask(tokenizer, b"!", failed), ask(tokenizer, b"a", good)])
    assert str(failed.wait().error) == "out of memory" and "a request failed" in caplog.text
    assert good.wait().error is None


def test_logits_that_are_no_numbers_fail_one_request_alone(engine, model, tokenizer, monkeypatch):
    forward = type(model).forward

    def breaks(self, ids, **keywords):
        out = forward(self, ids, **keywords)
        if len(ids) == 2:
            out.logits[0] = float("nan")
        return out

    monkeypatch.setattr(type(model), "forward", breaks)
    asks = [ask(tokenizer, b"a", Listener(), sampling=Sampling(max_new_tokens=8), seed=seed) for seed in (0, 1)]
    engine.submit(asks)
    assert asks[0].tell.wait().error is not None and asks[1].tell.wait().error is None


@pytest.mark.parametrize("controls", [{}, {"temperature": 0.5, "top_k": 5, "top_p": 0.5, "repetition_penalty": 1.2}])
def test_processors_are_those_of_generate(controls, model):
    options = {**Sampling(**controls).options(), "max_new_tokens": 1}
    kept = []

    def keep(model, ids, logits_processor, **prepared):
        kept.append(logits_processor)
        return ids

    model.generate(torch.tensor([[1, 2]]), custom_generate=keep, **options)
    ids, scores = torch.tensor([[1, 2, 3]]), torch.randn(1, 257)
    found = processors(Sampling(**controls))(ids, scores.clone())
    torch.testing.assert_close(found, kept[0](ids, scores.clone()))
    assert not processors(Sampling(temperature=0.0))


def test_a_loop_count_the_model_does_not_have(engine, tokenizer):
    found = Listener()
    engine.submit([ask(tokenizer, b"a", found, loops=0)])
    assert isinstance(found.wait().error, OuroborosError) and engine.works
