"""``serve``: the real command, OpenAI's own client, and the page in a real browser."""

import re
import signal
import socket
from pathlib import Path

import openai
import pytest
from browser import CHROMIUM, browser

PACKED = Path(__file__).resolve().parents[1] / "fixtures" / "packed-version-1.ouro"


@pytest.fixture(scope="module")
def server(spawn, trained):
    """The address of a running command, and its process."""
    process = spawn("serve", trained, "--port", "0", "--loops", "3", "--batch", "2")
    try:
        line = process.stderr.readline()
        found = re.match(
            r"run: (http://127\.0\.0\.1:\d+)/ \(a page\), \1/v1 \(OpenAI's interface\); Ctrl-C stops\n", line
        )
        assert found, (line, process.poll())
        yield found[1], process
    finally:
        process.kill()
        process.communicate()


def test_openais_client(server, cli, trained):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none") as client:
        asked = {"prompt": "abc", "max_tokens": 12, "seed": 0}
        found = client.completions.create(model="run", **asked)
        talk = client.chat.completions.create(model="run", messages=[{"role": "user", "content": "hi"}], max_tokens=4)
        streamed = client.completions.create(model="run", **asked, stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == found.choices[0].text
    generated = cli("generate", trained, "--prompt", "abc", "--max-new-tokens", "12", "--loops", "3", "--json").json
    assert found.choices[0].text == generated["continuations"][0] and found.model_extra["loops"] == 3
    assert talk.choices[0].finish_reason in ("length", "stop")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page(server, tmp_path):
    """By keyboard alone: a question, a second loop count, an answer that is stopped."""
    with browser(tmp_path) as page:
        page.screen(1200, 800)
        page.call("Page.navigate", url=f"{server[0]}/")
        page.wait("typeof about === 'object' && about !== null && document.activeElement.id === 'line'")
        page.run("document.getElementById('max_tokens').value = 12")
        page.type("abc")
        page.press("Enter", 13, "\r")
        page.wait("turns.length === 1 && running === null")
        (facts,) = page.run("[...document.querySelectorAll('.answer .soft')].map(each => each.textContent)")
        assert re.match(r"3 loops \u00b7 \d+ tokens? \u00b7 ([\d,.]+ tokens/s \u00b7 )?first token after", facts), facts

        page.run("document.getElementById('two').focus()")
        page.press(" ", 32, " ")
        page.run("document.getElementById('loops1').focus()")
        page.press("ArrowRight", 39)
        words = page.run("document.getElementById('cost1').textContent")
        assert "times those of 3 loops" in words and "outside of what it was trained with" in words
        label = page.run("document.querySelector('#schedule svg').getAttribute('aria-label')")
        assert label == "3 stored blocks, 6 visits at 4 loops"
        page.run("document.getElementById('line').focus()")
        page.type("again")
        page.press("Enter", 13, "\r")
        page.wait("turns.length === 2 && running === null")
        assert page.run("document.querySelectorAll('.answer.second .text').length") == 1
        assert page.run("turns[1].answers.length") == 2

        page.run("document.getElementById('max_tokens').value = 100000")
        page.type("x" * 60)
        page.press("Enter", 13, "\r")
        page.press("Escape", 27)
        page.wait("turns.length === 3 && running === null")

        for width in (1200, 390):
            for dark in (False, True):
                page.screen(width, 800, dark=dark)
                assert page.run("document.documentElement.scrollWidth") == width  # nothing is cut at the side
                shown = page.run("getComputedStyle(document.body).backgroundColor")
                assert shown == ("rgb(19, 20, 18)" if dark else "rgb(250, 249, 246)")
        unnamed = """[...document.querySelectorAll('input, textarea, button')].filter(each =>
            !(each.labels && each.labels.length) && !each.textContent.trim()).map(each => each.id)"""
        assert page.run(unnamed) == []
        asked = [e["params"]["request"]["url"] for e in page.log if e["method"] == "Network.requestWillBeSent"]
        assert all(url.startswith((server[0], "data:")) for url in asked), asked
        faults = [event for event in page.log if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        assert not faults


def test_it_stops_when_it_is_told_to(server):
    """The last test of this file: what follows would find no server."""
    server[1].send_signal(signal.SIGINT)
    _, errors = server[1].communicate(timeout=60)
    assert server[1].returncode == 130 and errors == "interrupted\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "70000"], "--port must be in 0..65535, got 70000"),
        (["--batch", "0"], "--batch must be > 0, got 0"),
        (["--queue", "-1"], "--queue must be >= 0, got -1"),
        (["--context", "1"], "--context must be >= 2, got 1"),
        (["--max-loops", "1"], "--max-loops must be at least the model's 2, got 1"),
        (["--loops", "9"], "--loops must be at most --max-loops 8"),
        (["--loops", "0"], "loops must be >= 1, got 0"),
        (["--template", "cosmopedia"], "has no second column to answer with"),
        (["--batch", "1000000000"], "lower --batch, --context or --max-loops, or take a smaller model"),
    ],
)
def test_refusals(options, words, cli, trained):
    status = 2 if options[0] in ("--batch", "--queue", "--context") and len(options[1]) < 3 else 1
    assert words in cli("serve", trained, "--port", "0", *options).error(status)


def test_a_port_in_use_and_a_missing_model(cli, trained, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        message = cli("serve", trained, "--port", taken.getsockname()[1]).error()
    assert "Address already in use; choose another --host or --port" in message
    assert "no such model directory" in cli("serve", tmp_path / "none").error()


def test_a_packed_file_and_what_it_needs(cli, monkeypatch):
    """The packages are named where they are missing; a packed file is served as a directory is."""
    served = []
    monkeypatch.setattr("ouroboros.serve.server.run", lambda service, bound: served.append(service))
    monkeypatch.setattr("ouroboros.serve.server.listen", lambda host, port: socket.create_server(("127.0.0.1", 0)))
    assert cli("serve", PACKED, "--host", "0.0.0.0").err.endswith("nobody is asked for a password\n")
    assert served[0].name == PACKED.name and served[0].facts["parameters"] > 0
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'ouroboros-lm[serve]'" in cli("serve", PACKED).error()
