"""The section on what the stability guard saw: unusual steps, where they began, and what was done about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ouroboros.report.content import Section, Table
from ouroboros.report.text import MISSING, finite, plural

if TYPE_CHECKING:
    from ouroboros.report.run import Run

MOST = 30
"""Rows of the table; a run that has more is not understood by reading them."""
LEAD = (
    "At every step a guard compares the loss, the gradient norm and the state of each loop with the ten steps before."
    " Here is what was far out of the usual, and where it began."
)


def guard_section(run: Run) -> Section | None:
    """A table of the records of the guard and of rollbacks; None of a run without such."""
    found = [record for record in run.metrics if record.get("kind") in ("guard", "rollback")]
    if not found:
        return None
    alarms = [record for record in found if record["kind"] == "guard"]
    back = [record for record in found if record["kind"] == "rollback"]
    words = [f"{plural(len(alarms), 'report')} of unusual steps"] if alarms else []
    if alarms:
        words.append(f"the first at step {alarms[0]['step']:,} in {alarms[0]['place']}")
    if back:
        words.append(f"{plural(len(back), 'return')} to earlier weights")
    left = len(found) - MOST
    note = f"{left:,} later records are in metrics.jsonl." if left > 0 else ""
    head = ("step", "where", "what", "value", "usually at most")
    return Section(
        ident="guard",
        title="Stability",
        headline=f"{', '.join(words)}.",
        lead=LEAD,
        tables=[Table(head, [_row(record) for record in found[:MOST]], note)],
    )


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    step = f"{record['step']:,}"
    if record["kind"] == "guard":  # the log has nothing in place of what is no finite number
        value, usual = finite(record["value"]), finite(record["usual"])
        numbers = ("not finite" if value is None else f"{value:.3g}", MISSING if usual is None else f"{usual:.3g}")
        return step, str(record["place"]), str(record["quantity"]), *numbers
    what = f"back to the weights of step {record['to_step']:,}"
    after = f"rate times {record['lr_factor']:g}" if record["goes_on"] else "the run stops"
    return step, "the run", what, after, MISSING
