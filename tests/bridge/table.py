"""Both ways, for each family: bits."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.bridge.theirs import FAMILIES
from tgdpo_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
from tgdpo_megatron.checkpoint.foreign.folder import BRIDGE, find_foreign
from tgdpo_megatron.checkpoint.foreign.reading import foreign_to_hf
from tgdpo_megatron.checkpoint.foreign.writing import hf_to_bridge

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Result:
    """What became of one model's tensors.

    Attributes:
        tensors: How many HuggingFace's model has.
        read: How many are the same, bit for bit, after Megatron-Bridge saved them and this project read them.
        written: How many are the same after this project wrote them, through its own checkpoint, and Megatron-Bridge
            loaded and exported them.
    """

    family: str
    tensors: int
    read: int
    written: int

    @property
    def passed(self) -> bool:
        return 0 < self.tensors == self.read == self.written


def run(python: Path, root: Path, only: str = "") -> list[Result]:
    """Every family whose name contains `only`.

    Args:
        python: Of the environment with Megatron-Bridge.
        root: Folder for files.
    """
    return [_both_ways(python, root / family, family) for family in FAMILIES if only in family]


def versions(python: Path) -> dict[str, str]:
    """Of the packages of Megatron-Bridge's environment."""
    found: dict[str, str] = json.loads(_theirs(python, "versions"))
    return found


def _both_ways(python: Path, folder: Path, family: str) -> Result:
    folder.mkdir()
    hf = folder / "hf"
    _theirs(python, "make", family, hf)
    before = load_file(hf / "model.safetensors")

    _theirs(python, "save", hf, folder / "of-bridge")
    foreign = find_foreign(folder / "of-bridge")
    assert foreign is not None and foreign.program == BRIDGE and foreign.tokenizer is not None
    foreign_to_hf(foreign, folder / "read", hf)

    hf_to_megatron(hf, folder / "megatron")
    megatron_to_hf(folder / "megatron", folder / "exported")
    hf_to_bridge(folder / "exported", folder / "for-bridge")
    _theirs(python, "load", folder / "for-bridge", hf, folder / "written.safetensors")
    return Result(
        family,
        len(before),
        _same(before, load_file(folder / "read" / "model.safetensors")),
        _same(before, load_file(folder / "written.safetensors")),
    )


def _same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> int:
    """How many tensors are the same, bit for bit; 0 where others are there.

    A tied output matrix may be written as well: it is then the embedding.
    """
    tied = "lm_head.weight" not in before and "lm_head.weight" in after
    if tied and torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"]):
        after = {name: tensor for name, tensor in after.items() if name != "lm_head.weight"}
    if after.keys() - before.keys():
        return 0
    return sum(
        name in after and tensor.dtype == after[name].dtype and torch.equal(tensor, after[name])
        for name, tensor in before.items()
    )


def _theirs(python: Path, *arguments: Any) -> str:
    command = [str(python), "-W", "ignore", "-m", "tests.bridge.theirs", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def table(results: list[Result], packages: dict[str, str]) -> str:
    """One line per family."""
    lines = [", ".join(f"{name} {version}" for name, version in packages.items())]
    lines.append(f"{'family':8}  {'tensors':>7}  {'Bridge to us':>12}  {'us to Bridge':>12}")
    for one in results:
        passed = "pass" if one.passed else "FAIL"
        lines.append(f"{one.family:8}  {one.tensors:7}  {one.read:12}  {one.written:12}  {passed}")
    return "\n".join(lines)
