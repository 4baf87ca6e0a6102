"""Serving: tokens per second through the endpoint beside the same decoding in process, eight clients at once beside
one, the time to the first token, memory over many requests, and the start of the command.

The server is a process of its own, and its clients are in this one. Both have one thread, unless asked otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import alternate, build, load, parser, progress, ratio, report, set_threads, spread, timed

CLIENTS = 8


def main() -> None:
    """Run the measurement."""
    options = parser(__doc__)
    options.add_argument("--size", default="small", help="size of the recipe loop")
    options.add_argument("--requests", type=int, default=1000, help="requests over which memory is watched")
    chosen = options.parse_args()
    size, new = ("tiny", 8) if chosen.quick else (chosen.size, 64)
    started, threads = load(), chosen.threads or 1
    set_threads(threads)
    from ouroboros.data.tokenize import byte_tokenizer
    from ouroboros.recipes import recipe

    model = build(recipe("loop", size).model)
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        byte_tokenizer().save(place)
        with _Server(Path(place), threads) as server:
            arms = _arms(model, server, new)
            for arm in arms.values():
                arm()
            rates = alternate(arms, chosen.rounds or (2 if chosen.quick else 9))
            first = [server.first_token() for _ in range(2 if chosen.quick else 20)]
            memory = _memory(server, 30 if chosen.quick else chosen.requests)
            report(
                "serve",
                started,
                new_tokens=new,
                tokens_per_second={name: spread(values) for name, values in rates.items()},
                endpoint_to_in_process=ratio(rates["endpoint"], rates["in process"]),
                work_of_endpoint_to_in_process=_work(arms, server, 2 if chosen.quick else 10),
                stream_to_in_process=ratio(rates["endpoint, streamed"], rates["in process"]),
                eight_to_one=ratio(rates["eight clients"], rates["endpoint"]),
                seconds_to_first_token=spread(first),
                seconds_to_start=float(f"{server.start_seconds:.3g}"),
                megabytes=memory,
            )


def _arms(model: Any, server: _Server, new: int) -> dict[str, Any]:
    """What is measured in turns, each in tokens per second."""
    from ouroboros.data.tokenize import byte_tokenizer
    from ouroboros.serve.sampling import Sampling
    from ouroboros.serve.stream import Continuation

    prompt, tokenizer = "The river that runs through the old town ", byte_tokenizer()
    asked = {"prompt": prompt, "max_tokens": new, "temperature": 0}

    def in_process() -> float:
        found = Continuation(model, tokenizer, prompt.encode(), Sampling(temperature=0.0, max_new_tokens=new))
        return 1 / (timed(lambda: list(found)) / found.tokens)

    def endpoint(**more: Any) -> float:
        start = time.perf_counter()
        return server.tokens({**asked, **more}) / (time.perf_counter() - start)

    def together() -> float:
        counts: list[int] = []
        clients = [threading.Thread(target=lambda: counts.append(server.tokens(asked))) for _ in range(CLIENTS)]
        start = time.perf_counter()
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        return sum(counts) / (time.perf_counter() - start)

    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    return {
        "in process": in_process,
        "endpoint": endpoint,
        "endpoint, streamed": lambda: endpoint(**streamed),
        "eight clients": together,
    }


def _work(arms: dict[str, Any], server: _Server, rounds: int) -> float:
    """Processor time of the server for some answers, by that of this process for the same ones: on a busy machine the
    clock tells more about the others."""
    before, start = server.processor_seconds(), time.process_time()
    for _ in range(rounds):
        arms["in process"]()
    own = time.process_time() - start
    for _ in range(rounds):
        arms["endpoint"]()
    return float(f"{(server.processor_seconds() - before) / own:.3g}")


def _memory(server: _Server, requests: int) -> dict[str, float]:
    """Resident megabytes of the server after a tenth of the requests, and after all of them."""
    asked = {"prompt": "The river", "max_tokens": 4, "temperature": 0}
    found = {}
    for number in range(1, requests + 1):
        server.tokens({**asked, "stream": number % 2 == 0, "loops": 1 + number % 3})
        if number in (requests // 10, requests):
            found[f"after {number:,} requests"] = float(f"{server.resident() / 1e6:.4g}")
            progress(f"{number} requests, {found}")
    return found


class _Server:
    """The command ``ouroboros serve``, and requests to it."""

    def __init__(self, model: Path, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "ouroboros.cli", "serve", str(model), "--port", "0"]
        start = time.perf_counter()
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        self.start_seconds = time.perf_counter() - start
        self.url = next(word for word in line.split() if word.startswith("http://")).rstrip("/")

    def __enter__(self) -> _Server:
        import httpx2

        self.client = httpx2.Client(base_url=self.url, timeout=600)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.kill()
        self.process.communicate()

    def tokens(self, asked: dict[str, Any]) -> int:
        """How many tokens a completion has."""
        answer = self.client.post("/v1/completions", json=asked)
        answer.raise_for_status()
        if not asked.get("stream"):
            return answer.json()["usage"]["completion_tokens"]
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        return events[-1]["usage"]["completion_tokens"] if asked.get("stream_options") else len(events)

    def first_token(self) -> float:
        """Seconds from a request to the first piece of its stream."""
        asked = {"prompt": "The river", "max_tokens": 2, "temperature": 0, "stream": True}
        start = time.perf_counter()
        with self.client.stream("POST", "/v1/completions", json=asked) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    return time.perf_counter() - start
        raise AssertionError("an empty stream")

    def processor_seconds(self) -> float:
        """What the server has used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> int:
        """Bytes of memory that the server occupies."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
