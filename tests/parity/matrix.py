"""All rows: the models, the oracle, ranks of every world size, and a table of what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.parity.formulas import METHODS
from tests.parity.models import make_model
from tests.parity.oracle import ROLES, frozen_scores, make_pairs, train
from tests.parity.rows import LIMITS, ROWS, Result, selected


def run_matrix(folder: Path, only: str = "") -> list[Result]:
    """Run every row whose name contains `only`; results in the order of ROWS."""
    rows = selected(only)
    for models, family, tied in {(row.models, row.family, row.tied) for row in rows}:
        prepare(folder / models, family, tied, {row.method for row in rows if row.models == models})
    results: list[Result] = []
    for world_size in sorted({row.world_size for row in rows}):
        output = folder / f"results-{world_size}.json"
        command = [sys.executable, "-m", "tests.parity.ranks", str(folder), str(world_size), str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, "--only", only], env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"the ranks of world size {world_size} failed with exit code {done.returncode}")
        results += [Result(**result) for result in json.loads(output.read_text())]
    order = {row.name: place for place, row in enumerate(ROWS)}
    return sorted(results, key=lambda result: order[result.row])


def prepare(place: Path, family: str, tied: bool, methods: set[str]) -> None:
    """Write the models, and what the oracle makes of them: once for all layouts."""
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron

    for seed, role in enumerate(ROLES):
        make_model(seed, family, tied).save_pretrained(place / "hf" / role)
        hf_to_megatron(place / "hf" / role, place / role)
    data = make_pairs()
    scores = frozen_scores(data, family, tied)
    torch.save(scores, place / "scores.pt")
    for method in methods:
        torch.save(train(data, family, tied, METHODS[method], scores), place / f"{method}.pt")


def table(results: list[Result]) -> str:
    """One line per row and source of scores, with the largest error of each kind; then the largest of each method."""
    width = max(len(result.row) for result in results)
    lines = [f"{'layout':{width}}  scores  " + "  ".join(f"{kind:>10}" for kind in LIMITS)]
    for result in results:
        passed = "pass" if result.passed else "FAIL"
        lines.append(f"{result.row:{width}}  {result.scores:6}  {_cells(result.errors)}  {passed}")
    lines += ["", f"{'largest':{width}}"]
    for method in dict.fromkeys(result.method for result in results):
        worst = _largest([result for result in results if result.method == method])
        lines.append(f"{method:{width}}          {_cells(worst)}")
    lines.append(f"{'all':{width}}          {_cells(_largest(results))}")
    lines.append(f"{'limit':{width}}          {_cells(LIMITS)}")
    return "\n".join(lines)


def _largest(results: Sequence[Result]) -> dict[str, float]:
    """The largest error of each kind that any result has."""
    found: dict[str, float] = {}
    for result in results:
        for kind, error in result.errors.items():
            found[kind] = max(found.get(kind, 0.0), error)
    return found


def _cells(errors: Mapping[str, float]) -> str:
    return "  ".join(f"{errors[kind]:10.1e}" if kind in errors else f"{'–':>10}" for kind in LIMITS)
