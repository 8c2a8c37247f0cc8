"""What bench.logits says: rows with their targets, and the tables of docs/measurements.md."""

from __future__ import annotations

from typing import Any

from bench.pages import markdown_table
from bench.rows import Row

NAME = "written by python -m bench.logits"
"""Of the tables in their page."""
QUANTITIES = {
    "logp": "log-prob of a token, nats",
    "log_ratio": "r̂ / β_r of a token: log-ratio of guidance and reference, nats",
    "weight": "TGDPO's weight of a token",
    "margin": "reward margin of a pair",
}

Numbers = dict[str, Any]


def rows(summary: Numbers) -> list[Row]:
    """What keeping the sums must bring, set before it was measured."""
    found = []
    for vocabulary, of in summary["vocabularies"].items():
        words = f"vocabulary of {int(vocabulary):,}"
        found += [
            Row(
                f"largest error of a log-prob from unrounded logits, nats, {words}",
                of["head"]["unrounded"]["max"],
                1e-5,
                limit="float64 of the same bf16 numbers",
                note=f"from rounded logits {of['head']['rounded']['max']:.2g}",
            ),
            Row(
                f"noise of r̂, unrounded logits over rounded ones, {words}",
                of["errors"]["unrounded"]["log_ratio"]["std"] / of["errors"]["rounded"]["log_ratio"]["std"],
                1 / 3,
                limit="against fp32 states; what is left is their rounding to bf16",
            ),
        ]
    return found


def markdown(summary: Numbers) -> str:
    """What the logits are, and the noise of everything that is made of them."""
    return "\n\n".join(make(summary) for make in (_headline, _sizes, _noise, _head, _claims))


def _headline(summary: Numbers) -> str:
    def shares(kind: str) -> str:
        found = [100 * _noise_share(of, kind, "log_ratio") for of in summary["vocabularies"].values()]
        return " and ".join(f"{share:.2g}" for share in found)

    sizes = " and ".join(f"{int(vocabulary):,}" for vocabulary in summary["vocabularies"])
    return (
        f"**Rounding the logits puts noise of {shares('rounded')} % of its spread into r̂, and leaving them unrounded "
        f"{shares('unrounded')} %**, with vocabularies of {sizes} tokens."
    )


def _sizes(summary: Numbers) -> str:
    lines = [
        [
            f"{int(vocabulary):,}",
            f"{of['logits']['mean']:.1f} ± {of['logits']['std']:.1f}",
            f"{of['logits']['largest']:.1f}",
            f"{100 * of['logits']['above_16']:.0f} %",
            f"{of['logits']['logp']:.2f}",
            f"{of['spread']['log_ratio']:.2f}",
        ]
        for vocabulary, of in summary["vocabularies"].items()
    ]
    columns = ("all logits", "largest of a position", "label's is 16 or more", "label's log-prob", "spread of r̂ / β_r")
    return markdown_table(("vocabulary", *columns), lines)


def _noise(summary: Numbers) -> str:
    lines = [
        [
            QUANTITIES[name],
            f"{int(vocabulary):,}",
            *(
                f"{of['errors'][kind][name]['std']:.2g} ({100 * _noise_share(of, kind, name):.2g} %)"
                for kind in ("rounded", "unrounded")
            ),
        ]
        for name in QUANTITIES
        for vocabulary, of in summary["vocabularies"].items()
    ]
    columns = ("standard deviation of the noise (and its share of the spread)", "vocabulary", "rounded", "unrounded")
    return markdown_table(columns, lines)


def _noise_share(of: Numbers, kind: str, name: str) -> float:
    share: float = of["errors"][kind][name]["std"] / of["spread"][name]
    return share


def _head(summary: Numbers) -> str:
    lines = [
        [f"{int(vocabulary):,}", *(f"{of['head'][kind]['max']:.1e}" for kind in ("rounded", "unrounded"))]
        for vocabulary, of in summary["vocabularies"].items()
    ]
    columns = ("largest error of a log-prob, nats, against float64 from the same states", "rounded", "unrounded")
    return markdown_table(columns, lines)


def _claims(summary: Numbers) -> str:
    lines = [[row.name, f"{row.measured:.2g}", f"≤ {row.target:.2g}"] for row in rows(summary)]
    return markdown_table(("what must hold", "measured", "target"), lines)


def tables(summary: Numbers) -> dict[str, str]:
    """What stands in the page: name -> text."""
    machine = summary["machine"]
    origin = f"Commit {machine['commit']}, {machine['date']}; {summary['cpu_seconds']} CPU seconds."
    return {NAME: f"{markdown(summary)}\n\n{origin}"}
