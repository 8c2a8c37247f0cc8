"""The cluster that these tests share. They run with `make slurm` alone, since they may install Debian's packages."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slurm" not in str(config.option.markexpr):
        for item in items:
            if "slurm" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="starts a Slurm; run make slurm"))


@pytest.fixture(scope="session")
def slurm() -> Iterator[cluster.Slurm]:
    """A running cluster, and a folder to submit from: it sees the repository's documents, settings and scripts."""
    if reason := cluster.missing():
        pytest.skip(reason)
    # Short, because there is a socket in it.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        (work := folder / "work").mkdir()
        for shared in ("docs", "conf", "slurm"):
            (work / shared).symlink_to(ROOT / shared)
        of_jobs = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TGDPO_VENV": sys.prefix,
            "TGDPO_CACHE": str(folder / "cache"),
            "TGDPO_RENDEZVOUS": "127.0.0.1",  # the nodes' names are known to Slurm alone
            "CUDA_VISIBLE_DEVICES": "",
        }
        with cluster.running(folder) as where:
            started = cluster.Slurm(work, {**os.environ, **of_jobs, **where})
            try:
                yield started
            finally:
                subprocess.run(["scancel", "--user=root"], env=started.environment)
                started.wait_until(lambda: not started.queue(), 60, "end of all jobs")
