"""The bundled text: the source of this interpreter's own standard library, about 8 MB, on every machine.

Left out are tests, directories whose files are near-copies of each other or of generated tables (they would leak from
training into held-out files), and modules that are mostly generated data.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ouroboros.errors import check

_DIRECTORIES = """
    __pycache__ dist-packages distutils encodings ensurepip idle_test idlelib lib-dynload lib2to3 pydoc_data
    site-packages test tests turtledemo venv
"""
_FILES = """
    _compat_pickle.py _opcode_metadata.py chunk.py html/entities.py keyword.py locale.py re/_casefix.py stringprep.py
    token.py
"""
EXCLUDED_DIRECTORIES = frozenset(_DIRECTORIES.split())
"""In ``distutils`` three compilers share half their lines; ``encodings`` and ``pydoc_data`` are generated."""
EXCLUDED_FILES = frozenset(_FILES.split())
"""Tables and generated code; ``chunk.py`` was copied into ``wave.py``."""
EXCLUDED_PREFIXES = (".", "_sysconfigdata", "config-", "test_")


def bundled_files() -> Iterator[tuple[str, Path]]:
    """Files of the bundled text in sorted order: (path relative to the library, with ``/``; path). An interpreter
    without a readable standard library, an embedded or zipped one, is refused."""
    root = Path(sysconfig.get_paths()["stdlib"])
    check(
        (root / "argparse.py").is_file(),
        f"source 'python:': no standard library sources in {root}; name your own text with --data",
    )
    names: set[str] = set()
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name for name in folders if name not in EXCLUDED_DIRECTORIES and not name.startswith(EXCLUDED_PREFIXES)
        ]
        wanted = [name for name in files if name.endswith(".py") and not name.startswith(EXCLUDED_PREFIXES)]
        names.update(Path(folder, name).relative_to(root).as_posix() for name in wanted)
    for name in sorted(names - EXCLUDED_FILES):
        yield name, root / name
