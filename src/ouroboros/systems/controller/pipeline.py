"""How the published program orders its texts, sets its rate and rewards an answer, for comparisons with it."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
_MARKED = re.compile(r"####\s*(-?[\d,]*\.?\d+)")
_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d[\d,]*)?\.?\d+")  # a hyphen behind a digit or a letter is no sign
_BOXED = re.compile(r"\\boxed\{([^}]*)\}")


def windows(texts: Iterable[Sequence[int]], length: int) -> Iterator[list[int]]:
    """Windows of ``length + 1`` ids: texts one behind the other without a separator, each window beginning with the
    last id of the one before; what does not fill one at the end is left out."""
    waiting: list[int] = []
    for text in texts:
        waiting.extend(text)
        while len(waiting) > length:
            yield waiting[: length + 1]
            waiting = waiting[length:]


def interleaved(streams: Sequence[Iterable[T]], weights: Sequence[float], seed: int) -> Iterator[T]:
    """Items of several streams, the next one's drawn by ``weights`` among those that are not known to have ended. A
    draw of a stream that turns out to have ended gives nothing."""
    draw, running = random.Random(seed), {index: iter(stream) for index, stream in enumerate(streams)}
    while running:
        names = list(running)
        (chosen,) = draw.choices(names, [weights[name] for name in names])
        try:
            yield next(running[chosen])
        except StopIteration:
            del running[chosen]


def rate(update: int, *, peak: float, least: float, warmup: int, total: int, accumulation: int) -> float:
    """The learning rate of an update, counted from 1.

    The warm-up counts micro-steps, ``accumulation`` for each update. The cosine begins at the last rate of the warm-up
    and spans ``total`` micro-steps too, but goes on by one for each update, so that it hardly falls.
    """
    rising = (warmup - 1) // accumulation  # updates of the warm-up
    highest = peak * min(update, rising) * accumulation / warmup
    if update <= rising:
        return highest
    return least + (highest - least) * 0.5 * (1 + math.cos(math.pi * (update - rising - 1) / total))


def reward(completion: str, reference: str, *, plain: bool = False) -> float:
    """1 where the answers of both texts are equal, as numbers if both are such, else as text; 0 where one has none.

    The completion's answer is read as :func:`answer` does; a reference without a marked one is its answer as a whole.
    """
    found, expected = answer(completion, plain=plain), answer(reference)
    if found is None:
        return 0.0
    expected = reference.strip() if expected is None else expected
    try:
        return float(float(found) == float(expected))
    except ValueError:
        return float(found == expected)


def answer(text: str, *, plain: bool = False) -> str | None:
    """The first number behind ``####`` without the commas of its thousands, or else what the first ``\\boxed{...}``
    holds up to its first closing brace; None where neither is. With ``plain`` it is then the last number of the text,
    which is no part of the published reward."""
    if (marked := _MARKED.search(text)) is not None:
        return marked[1].replace(",", "")
    if (boxed := _BOXED.search(text)) is not None:
        return boxed[1].strip()
    numbers = _NUMBER.findall(text) if plain else []
    return numbers[-1].replace(",", "") if numbers else None
