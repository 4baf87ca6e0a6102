"""``ouroboros demo``: the main job on the bundled text."""

from __future__ import annotations

from collections.abc import Sequence

from ouroboros.verbs.options import emit_json, log_to_stderr, parse, quiet_transformers, say


def demo(arguments: Sequence[str]) -> int:
    """The verb ``demo``."""
    from ouroboros.demo import DemoOptions, run_demo

    options = parse(DemoOptions, "demo", arguments)
    log_to_stderr()
    quiet_transformers()
    from ouroboros.train.log import Progress

    numbers = run_demo(options, (lambda line: None) if options.json else say, Progress)
    if options.json:
        emit_json(numbers)
    return 0
