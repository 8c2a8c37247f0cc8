"""Programs that a rank starts beside its job."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tgdpo_megatron.platform import programs


def test_a_program_beside_a_job_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    of_a_job = ("RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_NAME", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    for name in (*of_a_job, "SLURM_STEP_ID", "TGDPO_LAUNCHED", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("HF_TOKEN", "kept")
    found = programs.environment()
    expected = {name: value for name, value in os.environ.items() if name not in (*of_a_job, "SLURM_STEP_ID")}
    expected = {name: value for name, value in expected.items() if not name.startswith("SLURM_")}
    del expected["TGDPO_LAUNCHED"], expected["OMP_NUM_THREADS"]
    assert found == expected | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": found["PYTHONPATH"],
        "TGDPO_PARENT": str(os.getpid()),
    }


def test_files_in_the_users_folder_do_not_take_the_place_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tgdpo_megatron", "tools", "json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the user's')")
    monkeypatch.chdir(tmp_path)
    command = programs.command("tgdpo_megatron.platform.programs")
    subprocess.run(command, env=programs.environment(), check=True)
