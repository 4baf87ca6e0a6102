"""The picture of the README: a plain transformer, a looped one as it is stored, and the same as it is computed.

    python runs/looping_picture.py > docs/looping.svg

Colours are chosen to be read on light and on dark pages alike, since a page shows the picture as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

TOPS, BOTTOM = (8, 80, 188), 272
"""Where the three rows begin, and where the picture ends, in pixels."""
BOX, GAP, HEIGHT = 44, 12, 40
"""A block's width, the space behind it and its height."""
START = 268
"""Where the first block of a row begins; its label stands to the left of it."""
INK = "#757d88"
"""Text and lines: the same contrast of 4.2 : 1 or more on white and on the dark pages of the usual sites."""
ONCE, LOOPED = "#7a828e", ("#0f7f63", "#b3561a")
"""Fill of a block that is used once, and of the two that are looped; white on each is readable."""


def text(content: str, x: float, y: float, *, size: int = 14, weight: int = 400, anchor: str = "start") -> str:
    """A line of text, its baseline at ``y``."""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{INK}">{content}</text>'
    )


def arrow(x: float, y: float, length: float) -> str:
    """An arrow to the right that ends at ``x + length``."""
    tip = x + length
    return (
        f'<path d="M{x:g} {y:g}H{tip - 2:g}" stroke="{INK}" stroke-width="1.5" fill="none"/>'
        f'<path d="M{tip - 6:g} {y - 4:g}L{tip:g} {y:g}L{tip - 6:g} {y + 4:g}" stroke="{INK}" stroke-width="1.5" '
        'fill="none"/>'
    )


def left(place: int) -> float:
    """Where the block at ``place`` of a row begins."""
    return START + 62 + place * (BOX + GAP)


def row(y: float, title: str, lines: Sequence[str], blocks: Sequence[int]) -> str:
    """A row: a label, then tokens, the blocks in the order in which they run, and the next token."""
    middle = y + HEIGHT / 2
    parts = [text(title, 0, y + 14, size=16, weight=600)]
    parts += [text(line, 0, y + 34 + 18 * number, size=14) for number, line in enumerate(lines)]
    parts.append(text("tokens", START - 14, middle + 5))
    parts.append(arrow(START + 40, middle, 20))
    for place, block in enumerate(blocks):
        fill = LOOPED[block - 2] if block in (2, 3) and len(lines) > 1 else ONCE
        x = left(place)
        parts.append(f'<rect x="{x:g}" y="{y:g}" width="{BOX}" height="{HEIGHT}" rx="7" fill="{fill}"/>')
        parts.append(
            f'<text x="{x + BOX / 2:g}" y="{middle + 6:g}" font-size="17" font-weight="600" text-anchor="middle" '
            f'fill="#ffffff">{block}</text>'
        )
    end = left(len(blocks)) - GAP
    parts.append(arrow(end + 2, middle, 20))
    return "".join([*parts, text("next token", end + 28, middle + 5)])


def loop_arrow(y: float, first: int, last: int, label: str) -> str:
    """The way back from behind the block at ``last`` to before the one at ``first``, below a row at ``y``."""
    begin, end, bottom = left(last) + BOX / 2, left(first) + BOX / 2, y + HEIGHT
    return (
        f'<path d="M{begin:g} {bottom + 3:g}v14q0 8 -8 8H{end + 8:g}q-8 0 -8 -8V{bottom + 5:g}" stroke="{INK}" '
        f'stroke-width="1.5" fill="none"/><path d="M{end - 4:g} {bottom + 10:g}L{end:g} {bottom + 4:g}'
        f'L{end + 4:g} {bottom + 10:g}" stroke="{INK}" stroke-width="1.5" fill="none"/>'
    ) + text(label, (begin + end) / 2, bottom + 42, anchor="middle")


def brace(y: float, first: int, last: int, label: str) -> str:
    """A line below the blocks from ``first`` to ``last``, named."""
    begin, end, at = left(first), left(last) + BOX, y + HEIGHT + 7
    line = f'<path d="M{begin:g} {at:g}v5H{end:g}v-5" stroke="{INK}" stroke-width="1.5" fill="none"/>'
    return line + text(label, (begin + end) / 2, at + 23, anchor="middle")


def draw() -> str:
    """The picture as SVG."""
    plain, stored, computed = TOPS
    description = (
        "A plain transformer runs six blocks once each. A looped one stores six blocks, runs the middle two twice,"
        " and so computes eight."
    )
    parts = [
        row(plain, "Plain transformer", ["stores 6 blocks, computes 6"], range(6)),
        row(stored, "Looped transformer", ["stores 6 blocks;", "blocks 2 and 3 are a loop"], range(6)),
        loop_arrow(stored, 2, 3, "two times"),
        row(
            computed,
            "The same, step by step",
            ["computes 8 blocks; equal colours", "are equal weights"],
            (0, 1, 2, 3, 2, 3, 4, 5),
        ),
        brace(computed, 2, 3, "first loop"),
        brace(computed, 4, 5, "second loop"),
    ]
    width, height = left(8) + 110, BOTTOM
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    label = f'role="img" aria-label="{description}" font-family="system-ui, sans-serif"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {label}>{"".join(parts)}</svg>\n'


if __name__ == "__main__":
    print(draw(), end="")
