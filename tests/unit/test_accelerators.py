"""Transformer Engine and apex: not taken without a GPU, and called by their names."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tgdpo_megatron.platform.accelerators import name_layers, name_optimizer

ROOT = Path(__file__).resolve().parents[2]
START = """
from tgdpo_megatron.platform import checks, cpu
checks.check_packages()
cpu.install()
import megatron.core.optimizer as optimizer
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.optimizer import clip_grads
from tgdpo_megatron.model.build import HAVE_TRANSFORMER_ENGINE
print(optimizer.Adam.__module__, clip_grads.l2_norm_impl.__module__, HAVE_TE, HAVE_TRANSFORMER_ENGINE)
"""
ENGINE = (
    "class FusedAdam: ...\nFusedSGD = multi_tensor_applier = multi_tensor_l2norm = multi_tensor_scale = FusedAdam\n"
)


@pytest.fixture
def nvidias(tmp_path: Path) -> Path:
    """A folder with the parts of Transformer Engine and apex for which Megatron looks."""
    files = {
        "transformer_engine/__init__.py": "",
        "transformer_engine/pytorch/__init__.py": "from transformer_engine.pytorch import optimizers",
        "transformer_engine/pytorch/optimizers/__init__.py": ENGINE,
        "transformer_engine-2.11.0.dist-info/METADATA": "Name: transformer-engine\nVersion: 2.11.0\n",
        "apex/__init__.py": "",
        "apex/optimizers/__init__.py": ENGINE,
        "apex/multi_tensor_apply/__init__.py": ENGINE,
        "amp_C.py": ENGINE,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_without_a_gpu_megatron_takes_torchs_adam_though_nvidias_packages_are_there(nvidias: Path) -> None:
    """As in NVIDIA's containers on a machine without a GPU: their kernels are CUDA's."""
    path = {"PYTHONPATH": os.pathsep.join([str(nvidias), str(ROOT)]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, env=os.environ | path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "torch.optim.adamw megatron.core.utils False False"


@pytest.mark.parametrize(
    ("module", "kind", "words"),
    [
        ("torch.optim.adamw", "AdamW", "optimizer: torch's AdamW"),
        ("apex.optimizers.fused_adam", "FusedAdam", "optimizer: apex's FusedAdam"),
        (
            "transformer_engine.pytorch.optimizers.fused_adam",
            "FusedAdam",
            "optimizer: Transformer Engine's FusedAdam",
        ),
    ],
)
def test_an_optimizer_is_called_by_its_name_and_its_maker(module: str, kind: str, words: str) -> None:
    inner = type(kind, (), {"__module__": module})()
    one = SimpleNamespace(optimizer=inner)
    assert name_optimizer(one) == name_optimizer(SimpleNamespace(chained_optimizers=[one, one])) == words


def test_torchs_own_is_called_by_its_name() -> None:
    adam = torch.optim.AdamW([torch.zeros(1)])
    assert name_optimizer(SimpleNamespace(optimizer=adam)) == "optimizer: torch's AdamW"


def test_layers_are_named_with_their_versions(nvidias: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = f"(megatron-core {version('megatron-core')})"
    assert name_layers(transformer_engine=False) == f"layers: local {core}"
    monkeypatch.syspath_prepend(nvidias)
    assert name_layers(transformer_engine=True) == f"layers: Transformer Engine 2.11.0 {core}"
