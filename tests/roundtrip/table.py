"""All models at all layouts, as a table."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.roundtrip.models import MODELS, huggingfaces, tampering_is_refused, there_and_back
from tests.support.program import run_ranks

LIMIT = 1e-5
"""Largest difference of a token log-prob to HuggingFace's, nats; both compute in fp32."""

LAYOUTS = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "TP2×PP2": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
}


@dataclass
class Result:
    """What was found of one model."""

    model: str
    bit_equal: bool
    """Whether the weights are the same after the way there and back."""
    differences: dict[str, float]
    """Layout -> largest difference of a token log-prob to HuggingFace's, nats."""
    certified: bool
    """Whether the certificate was written and is valid, and refused once it was tampered with."""

    @property
    def passed(self) -> bool:
        return self.bit_equal and self.certified and all(value <= LIMIT for value in self.differences.values())


def run(root: Path, only: str = "", layouts: Collection[str] = tuple(LAYOUTS)) -> list[Result]:
    """Every model whose name contains `only`, there, back, and at some of LAYOUTS."""
    chosen = [made for made in MODELS if only in made.name]
    results, expected = [], []
    for made in chosen:
        folder = made.folder(root)
        bit_equal = there_and_back(made, folder)
        results.append(Result(made.name, bit_equal, {}, tampering_is_refused(folder)))
        expected.append(huggingfaces(folder))
        print(f"  {made.name}: there and back", flush=True)
    checkpoints = [str(made.folder(root) / "megatron") for made in chosen]
    for layout in layouts:
        size, parallel = LAYOUTS[layout]
        found = run_ranks("tests.roundtrip.ranks", "score", size, parallel=parallel, checkpoints=checkpoints)
        for result, logps, theirs in zip(results, found, expected, strict=True):
            result.differences[layout] = float((torch.tensor(logps) - theirs).abs().max())
        print(f"  {layout}: scored", flush=True)
    return results


def table(results: list[Result]) -> str:
    """One line per model."""
    width = max([len(result.model) for result in results], default=5)
    layouts = "  ".join(f"{layout:>8}" for layout in LAYOUTS)
    lines = [f"{'model':{width}}  bit-equal  {layouts}  certificate"]
    for result in results:
        differences = "  ".join(f"{result.differences[layout]:8.1e}" for layout in LAYOUTS)
        bits, certified = ("yes" if good else "NO" for good in (result.bit_equal, result.certified))
        passed = "pass" if result.passed else "FAIL"
        lines.append(f"{result.model:{width}}  {bits:9}  {differences}  {certified:11}  {passed}")
    return "\n".join([*lines, f"{'limit':{width}}  {'':9}  {'  '.join(f'{LIMIT:8.0e}' for _ in LAYOUTS)}"])
