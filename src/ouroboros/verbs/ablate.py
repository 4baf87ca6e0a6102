"""``ouroboros ablate STUDY``: runs a study, and prints what it found."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ouroboros.errors import OuroborosError, check, first_line, nearest
from ouroboros.verbs.options import (
    Json,
    Quiet,
    collect,
    emit_json,
    log_to_stderr,
    parse,
    quiet_transformers,
    say,
    signal_status,
)

if TYPE_CHECKING:
    from ouroboros.ablate.study import Arm, Study


@dataclass(frozen=True, kw_only=True)
class AblateOptions:
    """Run a study: a control and arms that change one thing each, trained with the same seeds on the same text, and
    compared seed by seed. The same command goes on where it was stopped."""

    study: tyro.conf.Positional[str]
    """A Python file that defines STUDY, an ouroboros.ablate.study.Study, or the name of a study that comes with the
    library. The file is run as a program."""
    out: Path
    """The study's directory: new, or that of the same study, which is then continued."""
    sources: Annotated[list[str], tyro.conf.arg(name="data")] = field(default_factory=list)
    """Train every arm on these sources in place of those that the study names."""
    workers: int = 1
    """How many runs are trained at the same time, each in a process of its own with its share of the threads."""
    cluster: str | None = None
    """Run the study as tasks of the Ray cluster at this address, whose machines share the study's directory; local
    means a cluster on this machine for as long as the study runs."""
    quiet: Quiet = False
    json: Json = False


def ablate(arguments: Sequence[str]) -> int:
    """The verb ``ablate``."""
    options = parse(AblateOptions, "ablate", collect(arguments, "--data"))
    log_to_stderr()
    quiet_transformers()
    study = _with_sources(_find(options.study), options.sources)
    from ouroboros.ablate.cells import Stopped
    from ouroboros.ablate.runner import run_study
    from ouroboros.ablate.summary import summary, table
    from ouroboros.files import write_whole

    def tell(line: str) -> None:
        if not options.quiet:
            sys.stderr.write(f"{line}\n")

    dead: dict[str, str] = {}
    try:
        results = run_study(study, options.out, workers=options.workers, cluster=options.cluster, tell=tell, dead=dead)
    except Stopped as stop:
        sys.stderr.write(f"{stop}\n")
        return signal_status(stop.reason)
    found = summary(study, results, dead)
    write_whole(options.out / "summary.json", (json.dumps(found, indent=2) + "\n").encode())
    if options.json:
        emit_json(found)
    else:
        for line in table(found):
            say(line)
    return 0


def _find(name: str) -> Study:
    """The study in a file, or of a name."""
    from ouroboros.ablate.studies import STUDIES
    from ouroboros.ablate.study import Study

    path = Path(name)
    if name in STUDIES:
        return STUDIES[name]()
    check(
        path.suffix == ".py", f"{name!r} is neither a Python file (.py) nor the name of a study{nearest(name, STUDIES)}"
    )
    check(path.is_file(), f"{path}: no such file; a study is a Python file that defines STUDY")
    spec = importlib.util.spec_from_file_location(f"ouroboros_study_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except OuroborosError as error:
        raise OuroborosError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:  # whatever the file does wrong
        if isinstance(error, SystemExit) and type(error) is not SystemExit:
            raise  # a signal ends the program
        lines = [
            f":{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
        ]
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else (lines or [""])[-1]
        raise OuroborosError(f"{path}{line}: {type(error).__name__}: {first_line(error)}") from error
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise OuroborosError(f"{path}: defines no STUDY; set STUDY = ouroboros.ablate.study.Study(...)")
    return study


def _with_sources(study: Study, sources: Sequence[str]) -> Study:
    """The study on other text."""
    if not sources:
        return study

    def moved(arm: Arm) -> Arm:
        recipe = arm.recipe
        data = dataclasses.replace(recipe.data, sources=tuple(sources))
        return dataclasses.replace(arm, recipe=dataclasses.replace(recipe, data=data))

    return dataclasses.replace(study, control=moved(study.control), arms=tuple(map(moved, study.arms)))
