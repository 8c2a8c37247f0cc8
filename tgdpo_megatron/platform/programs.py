"""Programs of this package that a process starts beside a job, and that are no part of the job."""

from __future__ import annotations

import os
import re
import sys

from tgdpo_megatron.commands import ROOT
from tgdpo_megatron.platform.interrupts import LAUNCHED, STARTED
from tgdpo_megatron.platform.parents import PARENT

_OF_A_JOB = re.compile(
    f"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)|MASTER_.*|TORCHELASTIC_.*|{LAUNCHED}|{STARTED}|SLURM_.*|OMP_NUM_THREADS"
)
"""Variables that tell a process of a job its place in it, and its share of the cores."""


def command(module: str, *arguments: object) -> list[str]:
    """How a module of this package is started as a program. -P: a file of its name in the user's folder is not it."""
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


def environment() -> dict[str, str]:
    """The variables of such a program: those of this process, without a place in a job and without a GPU.

    It ends with this process.
    """
    inherited = {name: value for name, value in os.environ.items() if not _OF_A_JOB.fullmatch(name)}
    path = os.pathsep.join(filter(None, (str(ROOT), inherited.get("PYTHONPATH"))))
    return inherited | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, PARENT: str(os.getpid())}
