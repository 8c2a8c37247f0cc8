"""A row of the benchmark: what was measured, its target, and the limit it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        measured: A ratio or share; None where it could not be measured, and `note` says why.
        target: What `measured` must reach; None for a number that is only reported.
        at_most: Whether the target is an upper bound; otherwise a lower one.
        limit: What theory allows, or how the target follows, in words. Where it is a number of the same run,
            `details["limit"]` is that number.
        note: Spread, absolute numbers, or why the row was skipped.
        broke: The measuring failed: a failed row.
        file: Of rows, which measured this one.
        details: Everything behind the number.
    """

    name: str
    measured: float | None
    target: float | None = None
    at_most: bool = True
    limit: str = ""
    note: str = ""
    broke: bool = False
    file: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def limit_with_number(self) -> str:
        """The words of the limit, after its number where it has one."""
        number = self.details.get("limit")
        return self.limit if number is None else f"{number:.3g}, {self.limit}"

    @property
    def verdict(self) -> str:
        """`pass`, `FAIL`, `skipped`, or `–` where there is no target."""
        if self.broke:
            return "FAIL"
        if self.measured is None:
            return "skipped"
        if self.target is None:
            return "–"
        reached = self.measured <= self.target if self.at_most else self.measured >= self.target
        return "pass" if reached else "FAIL"

    def as_dict(self) -> dict[str, Any]:
        """JSON types, the verdict included. Rows of a benchmark with one file of rows name none."""
        found = {**asdict(self), "verdict": self.verdict}
        return found if self.file else {name: value for name, value in found.items() if name != "file"}


def skipped(name: str, reason: str) -> Row:
    """A row that could not be measured here."""
    return Row(name, None, note=reason)


def paired(name: str, over: Sequence[float], under: Sequence[float], *, note: str = "", **settings: Any) -> Row:
    """The median of over[i] / under[i], numbers measured one after the other."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    spread = f"{min(ratios):.2f}–{max(ratios):.2f} in {len(ratios)} pairs"
    details = {"over": list(over), "under": list(under)}
    return Row(name, median(ratios), note=f"{note}; {spread}" if note else spread, details=details, **settings)


def table(rows: Sequence[Row]) -> str:
    """One line per row, and its words below it."""
    width = max((len(row.name) for row in rows), default=0)
    lines = [f"{'':{width}}  measured   target"]
    for row in rows:
        measured = f"{row.measured:8.4g}" if row.measured is not None else f"{'–':>8}"
        target = f"{'≤' if row.at_most else '≥'}{row.target:.4g}" if row.target is not None else "–"
        lines.append(f"{row.name:{width}}  {measured}  {target:>7}  {row.verdict}")
        words = "; ".join(part for part in (f"limit {row.limit_with_number}" if row.limit else "", row.note) if part)
        lines += [f"    {words}"] if words else []
    return "\n".join(lines)
