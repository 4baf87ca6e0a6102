"""The demo's options: no framework is needed to read them."""

import subprocess
import sys

from ouroboros.config.demo import DemoOptions

HELP = """
import sys
from ouroboros.cli import main
try:
    main(["demo", "--help"])
finally:
    assert not {"torch", "transformers"} & set(sys.modules), "imported"
"""


def test_help_needs_no_framework():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--minutes" in done.stdout, done.stderr


def test_size_and_tokenizer_are_chosen_by_the_demo_unless_given():
    assert DemoOptions().size is None and DemoOptions().tokenizer is None and DemoOptions().minutes == 10
