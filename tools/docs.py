"""Write the tables of docs/ that are derived from the code: losses, token rewards, metrics of single losses, and the
names of other programs' settings, differences between versions of megatron-core. And those of the faults, of the
versions that were tried and of the speed benchmark, which are derived from their results.

A table stands between two lines of its page, `<!-- NAME: begin -->` and `<!-- NAME: end -->`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.pages import with_tables, write
from bench.speed import FILES
from tgdpo_megatron.config import Config
from tgdpo_megatron.config.foreign_names import LLAMA_FACTORY, MEGATRON, NEMO, SWIFT, TRL, of_tool
from tgdpo_megatron.errors import CommandLine, one_sentence_errors
from tgdpo_megatron.losses import LOSSES, check_declarations
from tgdpo_megatron.losses.rewards import REWARD_SOURCES
from tgdpo_megatron.platform.versions import DIFFERENCES

ROOT = Path(__file__).resolve().parent.parent


def tables() -> dict[str, dict[str, str]]:
    """Page -> name of a table -> its text."""
    return {
        "methods.md": {"losses": _losses(), "token rewards": _token_rewards()},
        "metrics.md": {"metrics of losses": _metrics()},
        "faults.md": {"faults": faults(ROOT / "results" / "faults.json")},
        "requirements.md": {
            "written by make versions": versions(ROOT / "results" / "versions.json"),
            "differences": _differences(),
        },
        "measurements.md": speed(ROOT / "results" / "bench.json"),
        "coming-from.md": {tool: _foreign(tool) for tool in (TRL, LLAMA_FACTORY, SWIFT, NEMO, MEGATRON)},
    }


def _losses() -> str:
    rows = [
        (
            f"[`{loss.name}`](../{loss.file})",
            loss.meaning,
            loss.equation,
            _options(loss.defaults),
            _rewards(loss.rewards),
            loss.paper,
        )
        for loss in LOSSES.values()
    ]
    headings = ("`loss.type`", "meaning", "loss of a pair", "options and defaults", "token rewards", "source")
    return _table(headings, rows)


def faults(results: Path) -> str:
    """How many faults of each subject were tried, and how many ended as they must."""
    if not results.is_file():
        return "There are no results of this version yet."
    rows = [row for part in json.loads(results.read_text(encoding="utf-8")).values() for row in part]
    tried, passed = (Counter(row["subject"] for row in some) for some in (rows, [row for row in rows if row["passed"]]))
    return _table(("subject", "rows", "as they must"), [(name, str(tried[name]), str(passed[name])) for name in tried])


def versions(results: Path) -> str:
    """What every check found in every environment, those that no environment reached too."""
    if not results.is_file():
        return "There are no results of this version yet."
    found = json.loads(results.read_text(encoding="utf-8"))
    environments = dict.fromkeys((row["megatron"], row["python"]) for row in found["rows"])
    cells = {
        (row["check"], row["megatron"], row["python"]): row["said"] if row["passed"] else f"**failed**: {row['said']}"
        for row in found["rows"]
    }
    rows = [
        (check, *(cells.get((check, *environment), "not run") for environment in environments))
        for check in found["checks"]
    ]
    table = _table(("", *(f"{megatron}, Python {python}" for megatron, python in environments)), rows)
    machine = found["machine"]
    return f"{table}\n\nCommit {machine['commit']}, {machine['date']}; {machine['cores']} cores."


def speed(results: Path) -> dict[str, str]:
    """Name of each file of the speed benchmark's rows -> those that were measured, with target and limit."""
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"] if results.is_file() else []
    return {f"make bench, {file}": _measured([row for row in rows if row["file"] == file]) for file in FILES}


def _measured(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        (row["name"], f"{row['measured']:.3g}", _target(row), _limit(row))
        for row in rows
        if row["measured"] is not None
    ]
    if not cells:
        return "There are no results of this version yet."
    return _table(("", "measured", "target", "limit"), cells)


def _target(row: dict[str, Any]) -> str:
    return f"{'≤' if row['at_most'] else '≥'} {row['target']:.3g}" if row["target"] is not None else "–"


def _limit(row: dict[str, Any]) -> str:
    """In words, after its number and the share of it that is measured where it is a number of the same run."""
    details, words = row["details"], row["limit"] or "–"
    if "limit" not in details:
        return words
    return f"{details['limit']:.3g}, {words}; {details['reached']:.3f} of it is measured"


def _differences() -> str:
    rows = [(difference.since, difference.what, difference.here) for difference in DIFFERENCES]
    return _table(("from", "megatron-core", "what this project does"), rows)


def _rewards(source: str | None) -> str:
    return f"`{source}`" if source else "–"


def _token_rewards() -> str:
    rows = [
        (
            f"`{name}`",
            source.meaning,
            source.given_by,
            _options(source.options),
            ", ".join(f"`{loss.name}`" for loss in LOSSES.values() if loss.rewards == name) or "–",
        )
        for name, source in REWARD_SOURCES.items()
    ]
    headings = ("`loss.token_rewards`", "r̂ of a token", "given by", "settings and defaults", "default of")
    return _table(headings, rows)


def _metrics() -> str:
    """Metrics of single losses. A sum of squares is listed under the name of the standard deviation."""
    declared = {
        re.sub("square$", "std", name): (
            metric,
            ", ".join(f"`{loss.name}`" for loss in LOSSES.values() if name in loss.metrics),
        )
        for loss in LOSSES.values()
        for name, metric in loss.metrics.items()
    }
    rows = [(f"`{name}`", losses, metric.meaning) for name, (metric, losses) in declared.items()]
    return _table(("metric", "losses", "meaning"), rows)


def _foreign(tool: str) -> str:
    """The names of one program, with ours."""
    groups = "|".join(Config.model_fields)
    rows = [
        (
            ", ".join(f"`{name}`" for name in foreign.names),
            f"`{foreign.ours}`" if foreign.ours else "–",
            re.sub(rf"\b(?:{groups})\.(?!html|jsonl)\w+(?:=\w+)?", r"`\g<0>`", foreign.difference),
        )
        for foreign in of_tool(tool)
    ]
    return _table((tool, "here", "what differs"), rows)


def _options(defaults: Any) -> str:
    return " ".join(f"`{name}={_yaml(value)}`" for name, value in defaults.items()) or "–"


def _yaml(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    with one_sentence_errors():
        CommandLine(prog="python -m tools.docs", description=__doc__).parse_args()
        check_declarations()
        for name, content in tables().items():
            path = ROOT / "docs" / name
            write({path: with_tables(path, content)})


if __name__ == "__main__":
    main()
