"""``ouroboros serve MODEL``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ouroboros.errors import check
from ouroboros.verbs.options import Loops, Model, log_to_stderr, parse, quiet_transformers

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Serve a model over HTTP: OpenAI's interface at /v1, and a page to talk to it at /."""

    model: Model
    host: str = "127.0.0.1"
    """The address to listen at. The default is reached from this machine alone; 0.0.0.0 lets the whole network in, and
    nobody is asked for a password."""
    port: int = 8000
    """The port to listen at; 0 takes a free one."""
    loops: Loops = None
    max_loops: int | None = None
    """The largest loop count that a request may ask for; by default four times the largest that training used."""
    template: str | None = None
    """The form of conversations: the name of a format, 'Q: {question}\\nA: {answer}', or none. The default is the form
    that the model was trained on, or the chat template of its tokenizer."""
    batch: int = 8
    """How many answers are written at once; further requests wait."""
    queue: int = 64
    """How many answers may wait; further requests are refused with status 429."""
    context: int | None = None
    """How many tokens a prompt and its answer may have together; by default as many as the model's context holds."""
    seconds: float = 300.0
    """The time that a request may take, waiting included. What has been written by then is the answer."""
    max_body: int = 4_000_000
    """How many bytes the body of a request may have."""
    client_timeout: float = 20.0
    """How many seconds a client may need to send its request, or to take what was written for it."""

    def __post_init__(self) -> None:
        for name in ("batch", "seconds", "max_body", "client_timeout"):
            check(getattr(self, name) > 0, f"--{name.replace('_', '-')} must be > 0, got {getattr(self, name)}")
        check(self.queue >= 0, f"--queue must be >= 0, got {self.queue}")
        check(self.context is None or self.context >= 2, f"--context must be >= 2, got {self.context}")


def serve(arguments: Sequence[str]) -> int:
    """The verb ``serve``."""
    options = parse(ServeOptions, "serve", arguments)
    log_to_stderr()
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    check(not missing, f"serve needs {' and '.join(missing)}: pip install 'ouroboros-lm[serve]'")
    from ouroboros.api import open_model
    from ouroboros.serve.engine import Engine
    from ouroboros.serve.facts import check_memory, most_loops, trained_loops
    from ouroboros.serve.server import Limits, Service, listen, run

    quiet_transformers()
    opened = open_model(options.model)
    spec = opened.spec
    trained = trained_loops(spec, opened.recipe)
    most = most_loops(spec, trained, options.max_loops)
    check(options.loops is None or options.loops <= most, f"--loops must be at most --max-loops {most}")
    context = min(options.context or spec.max_position_embeddings, spec.max_position_embeddings)
    check_memory(spec, rows=options.batch, context=context, loops=most)
    with listen(options.host, options.port) as bound:
        from ouroboros.serve.chat import spoken_to

        template, tokenizer = spoken_to(opened, opened.tokenizer, options.template)
        model = opened.model if options.loops is None else opened.model.with_loops(options.loops)
        engine = Engine(model, tokenizer, rows=options.batch, queue=options.queue, context=context)
        limits = Limits(body=options.max_body, seconds=options.seconds, patience=options.client_timeout, loops=most)
        facts = _facts(model, template, trained, most, context)
        name = options.model.resolve().name
        service = Service(engine, name=name, tokenizer=tokenizer, template=template, facts=facts, limits=limits)
        _announce(options, name, bound.getsockname()[1])
        run(service, bound)
    return 0


def _facts(model: Any, template: Any, trained: tuple[int, int], most: int, context: int) -> dict[str, Any]:
    """What the page shows."""
    from ouroboros.serve.facts import loop_costs, segments

    spec = model.model.spec
    return {
        "layout": spec.schedule.notation,
        "segments": segments(spec.schedule),
        "is_looped": spec.schedule.is_looped,
        "parameters": model.num_parameters(),
        "context": context,
        "loops": model.schedule.loops,
        "trained_loops": list(trained),
        "max_loops": most,
        "costs": loop_costs(spec, most, context // 2),
        "template": template.name if template else None,
    }


def _announce(options: ServeOptions, name: str, port: int) -> None:
    host = f"[{options.host}]" if ":" in options.host else options.host
    sys.stderr.write(
        f"{name}: http://{host}:{port}/ (a page), http://{host}:{port}/v1 (OpenAI's interface); Ctrl-C stops\n"
    )
    if options.host not in LOCAL:
        sys.stderr.write("everyone who reaches this address can use the model; nobody is asked for a password\n")
    sys.stderr.flush()
