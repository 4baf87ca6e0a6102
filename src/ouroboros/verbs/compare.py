"""``ouroboros compare RECIPE``: does a recipe pay, against its plain twins or another recipe?"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from ouroboros.recipes import recipe as make_recipe
from ouroboros.verbs.options import emit_json, log_to_stderr, quiet_transformers, say, signal_status
from ouroboros.verbs.train import RecipeOptions, read_recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions(RecipeOptions):
    """Train a recipe and its plain twins on the same text in the same order, with several seeds, and say whether the
    recipe is better. Everything of the recipe can be set: --model.*, --optim.*, --train.*, --data.*"""

    out: Annotated[
        Path,
        arg(
            help="The directory of the comparison. The same command goes on where it was stopped, and more seeds may be"
            " asked for later."
        ),
    ]
    against: str | None = None
    """Compare with this recipe in place of plain twins; where it is more than 1 % larger or smaller, the width of its
    feed-forward network is changed."""
    match: Literal["parameters", "bytes", "flops", "time", "all"] = "parameters"
    """What the twins have as much of as the recipe: stored parameters, bytes of the packed file, operations of training
    or its time by the clock; all asks for each of them."""
    budget: str | None = None
    """Pack every model into at most so many bytes, such as 256kB, and compare the packed files too. With --match bytes
    the default is six bits for each stored parameter."""
    seeds: int = 3
    """How many times each model is trained. The first seed is --seed, and the others follow it. An interval needs
    two."""
    workers: int = 1
    """How many models are trained at the same time, each with its share of the threads."""


def compare(arguments: Sequence[str]) -> int:
    """The verb ``compare``."""
    options, recipe, _, choice = read_recipe(CompareOptions, "compare", arguments)
    from ouroboros.pack.budget import parse_size

    other = None if options.against is None else make_recipe(options.against, options.size or "small")
    budget = None if options.budget is None else parse_size(options.budget)
    log_to_stderr()
    quiet_transformers()
    from ouroboros.ablate.cells import Stopped
    from ouroboros.ablate.compare import ANSWER, MATCHES, Comparison
    from ouroboros.ablate.compare import compare as run_comparison
    from ouroboros.files import write_whole

    asked = Comparison(
        recipe=recipe,
        against=other,
        matches=MATCHES if options.match == "all" else (options.match,),
        seeds=options.seeds,
        budget=budget,
    )
    if choice and not options.quiet:
        sys.stderr.write(f"{choice}\n")

    def tell(line: str) -> None:
        if not options.quiet:
            sys.stderr.write(f"{line}\n")

    try:
        found = run_comparison(asked, options.out, processes=options.workers, tell=tell)
    except Stopped as stop:
        sys.stderr.write(f"{stop}\n")
        return signal_status(stop.reason)
    answer = {"matches": found} if options.match == "all" else found[0]
    write_whole(options.out / ANSWER, (json.dumps(answer, indent=2) + "\n").encode())
    if options.json:
        emit_json(answer)
    else:
        for number, judged in enumerate(found):
            _show(judged, number > 0)
    return 0


def _show(judged: dict[str, Any], again: bool) -> None:
    """One match as a table, and the verdict; before and after packing where there is that."""
    first = judged.get("unpacked", judged)
    count = len(judged["seeds"])
    runs = f"{count} {'seed' if count == 1 else 'seeds'}, {first['recipe']['steps']:,} steps"
    say(f"{chr(10) if again else ''}{runs}, scored on {judged['scored_bytes']:,} held-out bytes")
    _table(first, "weights")
    say(first["sentence"])
    if "packed" in judged:
        _table(judged["packed"], "packed")
        say(judged["packed"]["sentence"])
    for name, why in judged["left_out"].items():
        say(f"left out: {name}: {why}")


def _table(judged: dict[str, Any], bytes_of: str) -> None:
    own, what = judged["recipe"], {"parameters": "parameters", "bytes": "bytes", "flops": "FLOPs", "time": "seconds"}
    lines = [own, *judged["twins"]]
    name, layout = (max(len(str(line[key])) for line in lines) for key in ("name", "layout"))
    layout = max(layout, len("layout"))
    say(
        f"{'':<{name}}  {'layout':<{layout}}  parameters  {bytes_of:>11}  seconds  bits/byte  difference"
        f"  95 % interval       {what[judged['match']]}"
    )
    for line in lines:
        text = f"{line['name']:<{name}}  {line['layout']:<{layout}}  {line['parameters']:>10,}  {line['bytes']:>11,}"
        text += f"  {line['seconds']:>7.1f}  {line['bits_per_byte']:>9.4f}"
        if line is not own:
            interval = "" if line["low"] is None else f"{line['low']:+.4f} .. {line['high']:+.4f}"
            text += f"  {line['difference']:>+10.4f}  {interval:<18}  {100 * line['deviation']:+.2f} %"
        say(text)
