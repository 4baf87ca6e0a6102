"""The pictures of the delta residuals in the order of the page, each with what it shows and what it does not."""

from __future__ import annotations

import math
from typing import NamedTuple

from ouroboros.report import residual_charts as charts
from ouroboros.report.delta import LOW, DeltaFacts, Use
from ouroboros.report.depth import MAX_VISITS, NAMES
from ouroboros.report.text import percent, plural


class Picture(NamedTuple):
    """A chart with its words."""

    title: str
    svg: str
    words: str


def pictures(facts: DeltaFacts) -> list[Picture]:
    """Those that there is something to draw for."""
    groups = (_gates(facts), _directions(facts), _amounts(facts), _channels(facts), _ablations(facts))
    return [picture._replace(words=_typeset(picture.words)) for group in groups for picture in group if picture.svg]


def _typeset(words: str) -> str:
    """A percentage on one line, and formulas with their signs."""
    return words.replace(" %", chr(0xA0) + "%").replace("k.X", f"k{chr(0xB7)}X").replace(" - k", f" {chr(0x2212)} k")


def lead(facts: DeltaFacts) -> str:
    """What was looked at, and how to read the axis."""
    parts = [
        f"Each residual takes the direction k of its sublayer's output, {'erases' if facts.erase else 'leaves'} what"
        f" the state holds along it, by a gate b between 0 and 2, and writes a value v there: the state becomes"
        f" {'X + b k (v - k.X)' if facts.erase else 'X + b k v'}. The pictures are of the run's {facts.model} on"
        f" {facts.tokens:,} tokens of its {facts.split} text ({plural(facts.sequences, 'sequence')} of"
        f" {facts.length:,}); they describe those tokens and no others. Attention stands to the left of the"
        " feed-forward network of the same block."
    ]
    visits = facts.schedule.num_visits
    if facts.schedule.is_looped:
        parts.append(
            "The axis is the order of visits: a looped block is visited again with the same weights, and then has"
            f" other gates, because it reads another state ({facts.schedule.num_blocks} blocks, {visits} visits)."
        )
    if visits > MAX_VISITS:
        parts.append(f"Of the {visits:,} visits {MAX_VISITS} at even distances are drawn.")
    if not facts.ablations:
        parts.append("Forcing single gates would take too long for a model of this size, and is left out.")
    if not facts.erase:
        parts.append(
            "This is the control that only writes, so there is no eigenvalue, regime, product or coupling to show."
        )
    return _typeset(" ".join(parts))


def _mean(facts: DeltaFacts, field: str) -> float:
    values = [getattr(use.summary, field) for use in facts.uses]
    return sum(values) / len(values)


def _name(facts: DeltaFacts, slot: int, sublayer: str) -> str:
    return f"the {NAMES[sublayer]} of {'visit' if facts.schedule.is_looped else 'block'} {slot}"


def _gates(facts: DeltaFacts) -> list[Picture]:
    closed, opened = _mean(facts, "gate_closed"), _mean(facts, "gate_open")
    meaning = "0 leaves the state as it is, 1 replaces what it holds along k, 2 turns it round."
    if not facts.erase:
        meaning = "0 leaves the state as it is, 1 adds v along k, 2 adds twice as much."
    return [
        Picture(
            "Gate b by depth",
            charts.gate_chart(facts),
            "The stronger the colour, the more tokens have that gate; each column is scaled to its own fullest part."
            f" {meaning} Shares within 0.001 of"
            f" the ends, where a gate has stopped learning: {percent(closed)} at 0, {percent(opened)} at 2. A gate says"
            " nothing of how much the state held along k: see what is erased and written.",
        ),
        Picture(
            "Eigenvalue along k by depth",
            charts.eigenvalue_chart(facts),
            f"1 {chr(0x2212)} b |k|{chr(0xB2)}, the factor on what lies along k; all other directions keep the factor"
            " 1. Dot: median; thick: half of the tokens; thin: 90 %. Below 0 (tinted) the sign turns. This is the"
            " shortcut with k, b and v held fixed, not the Jacobian of the layer: k, b and v depend on the state too,"
            " so the layer as a whole can amplify although its shortcut cannot.",
        ),
        Picture(
            "Keep, erase or reflect",
            charts.regime_chart(facts) if facts.erase else "",
            "Shares of the tokens with a gate below 0.5, from 0.5 to 1.5, and from 1.5 on. The cuts are a convention:"
            " the gate is continuous. A finer cut is in the table below.",
        ),
    ]


def _directions(facts: DeltaFacts) -> list[Picture]:
    found = []
    if facts.product is not None:
        last = facts.product.below[-1]
        found.append(
            Picture(
                "Product of the shortcuts by depth",
                charts.product_chart(facts),
                "Each cell is a singular value of the product of all shortcuts so far: empty is 1 (kept), full is 0"
                f" (gone). The line counts those below {LOW:g}; after the last residual {last:.1f} on average over"
                f" {plural(facts.product.tokens, 'token')}. It says how much of the first state reaches that depth"
                " through the frozen shortcuts alone, not what the layers write, and it is not the Jacobian.",
            )
        )
    found += [
        Picture(
            "Do residuals use the same directions?",
            charts.coherence_chart(facts, signed=False, ident="delta-coherence"),
            f"|k{chr(0x1D62)}{chr(0xB7)}k{chr(0x2C7C)}| between every two residuals, mean over tokens; full is 1."
            " Two frozen shortcuts act on each other through this number alone. Unrelated directions of width"
            f" {facts.width:,} would give {math.sqrt(2 / math.pi / facts.width):.2f}. It does not say whether two"
            " residuals write the same values.",
        ),
        Picture(
            "The same with sign",
            charts.coherence_chart(facts, signed=True, ident="delta-coherence-signed"),
            f"k{chr(0x1D62)}{chr(0xB7)}k{chr(0x2C7C)}: green points the same way, orange the opposite way. Empty here"
            " and full on the left means that the sign changes from token to token.",
        ),
    ]
    if facts.coupling is not None:
        one = facts.coupling
        largest = max(abs(value) for row in one.matrix for value in row)
        found.append(
            Picture(
                "Which features one update mixes",
                charts.coupling_chart(facts),
                f"{chr(0x2212)}b k k{chr(0x1D40)} of one token (position {one.position} of sequence {one.sequence})"
                f" in {_name(facts, one.slot, one.sublayer)}, with gate {one.beta:.2f}: its strongest"
                f" {plural(len(one.features), 'feature')}, which hold {percent(one.share)} of k. Green adds, orange"
                f" takes away; full is {largest:.2g}. The residual and token that erase most were chosen, so it is an"
                " extreme, not an average.",
            )
        )
    return found


def _amounts(facts: DeltaFacts) -> list[Picture]:
    low, high = (
        [getattr(use.summary, field) for use in facts.uses if getattr(use.summary, field) is not None]
        for field in ("value_low", "value_high")
    )
    saturated = ""
    if low:
        saturated = (
            f" In the outer 2.5 % of the range, where the sigmoid hardly learns: {percent(sum(low) / len(low))} at the"
            f" low and {percent(sum(high) / len(high))} at the high end. A sigmoid target is never negative."
        )
    small = _mean(facts, "h_small")
    return [
        Picture(
            "Erased and written",
            charts.amount_chart(facts),
            "b |k.X| is taken away along k and b |v| put in its place, mean over tokens. Amounts of opposite sign do"
            " not cancel here, so the state may move by more or less than their difference.",
        ),
        Picture(
            "Distance from the target",
            charts.discrepancy_chart(facts),
            "|v - k.X| before and after the update, mean over tokens. A gate of 1 makes it 0, one near 0 or 2 leaves"
            " it as large as it was. It need not become small: v is what the residual writes, not a truth.",
        ),
        Picture(
            "Length of the state",
            charts.norm_chart(facts),
            "|X| after every residual. The broken line is a new model of the same seed on the same text. A twin with"
            " the usual additive residual would have to be trained to stand beside them.",
        ),
        Picture(
            "Target v by depth",
            charts.target_chart(facts),
            "The stronger the colour, the more tokens have that target; each column is scaled to its own fullest"
            f" part.{saturated}",
        ),
        Picture(
            "Length of the sublayer's output",
            charts.output_chart(facts),
            f"|h|, of which only the direction is used. Dot: median; thick: half of the tokens; thin: 90 %. Below 100"
            f" eps ({100 * facts.eps:g}), where the guard or noise decides the direction:"
            f" {percent(small)} of the tokens. The length has no effect on the state, but gradients are divided by it.",
        ),
    ]


def _channels(facts: DeltaFacts) -> list[Picture]:
    if not facts.readings:
        return []
    return [
        Picture(
            "Length of the value channels",
            charts.channel_chart(facts),
            "Each channel of the state by itself, after every residual. Equal lengths do not mean equal contents.",
        ),
        Picture(
            "Are the value channels different?",
            charts.cosine_chart(facts),
            "Cosine between two channels of the state, mean over tokens: 1 is the same direction, as at the start,"
            " when all are copies. Near 1 the extra channels hold little that one would not.",
        ),
        Picture(
            "Read vectors",
            charts.reading_chart(facts, filtered=False, ident="delta-read"),
            "What each compressor multiplies the channels by after its filter; green is positive, orange negative. A"
            " weight says how a channel is read, not how much is in it.",
        ),
        Picture(
            "Weights of the channels, filter included",
            charts.reading_chart(facts, filtered=True, ident="delta-weights"),
            "The same with the compressor's filter folded in, mean over features: single features may differ from it.",
        ),
    ]


def _ablations(facts: DeltaFacts) -> list[Picture]:
    words = (
        f"Change of the loss on {facts.ablation_tokens:,} of the tokens when one gate is forced to 0 (keep), 1 (erase)"
        " or 2 (reflect) for every token, with 95 % intervals. The axis is linear up to 0.01 and logarithmic beyond."
        " The model was not trained that way: a large bar says that it relies on this gate, not that another model"
        " could not do without."
    )
    return [
        Picture(
            f"Forcing one gate: {name}",
            charts.ablation_chart(facts, sublayer, ident=f"delta-forced-{sublayer}"),
            words if sublayer == "mixer" else "The same for the feed-forward networks.",
        )
        for sublayer, name in NAMES.items()
    ]


def table(facts: DeltaFacts) -> list[list[str]]:
    """One line for each residual: name, quantiles of the gate, and its shares in the finer regimes."""

    def row(use: Use) -> list[str]:
        summary = use.summary
        gates = [f"{value:.2f}" for value in (summary.beta[0], summary.median_beta, summary.beta[-1])]
        return [f"{use.slot} {NAMES[use.sublayer]}", *gates, *map(percent, summary.fine_regimes)]

    return [row(use) for use in facts.uses]
