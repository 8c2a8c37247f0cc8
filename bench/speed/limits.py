"""Timed ratios beside the ratio that theory allows in the same run.

Two programs go over the same batches in turn. Each batch gives a ratio of seconds, and a ratio of what theory says the
two must cost, for example their counted operations. The first divided by the second is that batch's share of the limit.
Shares of long and short batches can be compared where their ratios cannot, so the median share is a steady number: one
slow moment of a busy machine moves it no more than any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from bench.rows import Row

NEAR = 0.90
"""Share of a limit that is a target where two programs differ in what is not counted: norms, exponentials, copies and
casts, AdamW, Python."""
COUNTED = "the ratio of the operations counted"


@dataclass
class Timed:
    """What one program took on each batch, and what it costs by theory.

    Attributes:
        seconds: Measured, of the process's CPU.
        cost: By theory, in any unit that both programs of a ratio share.
    """

    seconds: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)

    def mean_of_two(self) -> Timed:
        """The same with every two measurements that follow each other made one."""
        halves = zip(self.seconds[0::2], self.seconds[1::2], strict=True)
        return Timed([(first + second) / 2 for first, second in halves], self.cost[0::2])


def within_limit(
    name: str, over: Timed, under: Timed, *, at_most: bool, share: float, limit: str, note: str = ""
) -> Row:
    """How many times as long one program takes as another, and whether that is near enough to the limit.

    The row is the median share of the limit, times the limit over all batches.

    Args:
        share: How near: the target is this share of the limit or, where less is better, the limit divided by it.
        limit: What the limit is made of, in words.
    """
    allowed = sum(over.cost) / sum(under.cost)
    shares = [
        (taken / other) / (cost / less)
        for taken, other, cost, less in zip(over.seconds, under.seconds, over.cost, under.cost, strict=True)
    ]
    reached = median(shares)
    spread = f"{reached:.3f} of the limit, {min(shares):.2f}–{max(shares):.2f} in {len(shares)} pairs of measurements"
    return Row(
        name,
        reached * allowed,
        target=allowed / share if at_most else allowed * share,
        at_most=at_most,
        limit=f"{limit}; the target is the limit {'/' if at_most else '×'} {share:.2f}",
        note=f"{note}; {spread}" if note else spread,
        details={"limit": allowed, "reached": reached, "shares": shares, "over": vars(over), "under": vars(under)},
    )
