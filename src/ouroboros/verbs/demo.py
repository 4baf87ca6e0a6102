"""``ouroboros demo``: the main job on the bundled text."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ouroboros.config.demo import DemoOptions
from ouroboros.verbs.options import emit_json, log_to_stderr, parse, quiet_transformers, say, signal_status


def demo(arguments: Sequence[str]) -> int:
    """The verb ``demo``; the status of a stopped one is the signal's."""
    options = parse(DemoOptions, "demo", arguments)
    log_to_stderr()
    quiet_transformers()
    from ouroboros.demo import DemoStopped, run_demo
    from ouroboros.train.log import Progress

    try:
        numbers = run_demo(options, (lambda line: None) if options.json else say, Progress)
    except DemoStopped as stopped:
        sys.stderr.write(f"error: {stopped}\n")
        return signal_status(stopped.reason)
    if options.json:
        emit_json(numbers)
    return 0
