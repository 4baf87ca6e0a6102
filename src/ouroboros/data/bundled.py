"""The bundled text: the source of this interpreter's own standard library, about 8 MB, on every machine.

Left out are tests and directories whose files are near-copies of each other or of generated tables (they would
leak from training into held-out files), and modules that are mostly generated data.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ouroboros.errors import OuroborosError

EXCLUDED_DIRECTORIES = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "distutils",  # three compilers share half their lines; gone since Python 3.12
        "encodings",  # generated code pages
        "ensurepip",
        "idle_test",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",  # generated topics
        "site-packages",
        "test",
        "tests",
        "turtledemo",
        "venv",
    }
)
EXCLUDED_FILES = frozenset(
    {
        "_compat_pickle.py",  # tables
        "_opcode_metadata.py",  # generated
        "chunk.py",  # copied into wave.py
        "html/entities.py",  # table
        "keyword.py",  # generated
        "locale.py",  # mostly a generated alias table
        "re/_casefix.py",  # generated
        "stringprep.py",  # generated
        "token.py",  # generated
    }
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "test_")


def bundled_files() -> Iterator[tuple[str, Path]]:
    """Files of the bundled text in sorted order: (path relative to the library, with ``/``; path).

    Raises:
        OuroborosError: this interpreter has no readable standard library directory (an embedded or zipped one).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (root / "argparse.py").is_file():
        raise OuroborosError(f"source 'python:': no standard library sources in {root}; name your own text with --data")
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if _is_wanted(name) and name not in EXCLUDED_DIRECTORIES]
        names += [
            Path(folder, name).relative_to(root).as_posix()
            for name in files
            if name.endswith(".py") and _is_wanted(name)
        ]
    for name in sorted(set(names) - EXCLUDED_FILES):
        yield name, root / name


def _is_wanted(name: str) -> bool:
    return not name.startswith((".", *EXCLUDED_PREFIXES))
