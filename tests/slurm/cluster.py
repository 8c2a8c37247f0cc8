"""A Slurm of two nodes on this machine, from Debian's packages: slurmctld, two slurmd and munge, as root.

Both nodes are this machine under two names. Each claims eight GPUs that do not exist: Slurm counts them, and the
programs, which find none, run on the CPU. Everything that the cluster writes is in one folder, which SLURM_CONF names.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NODES = ("node1", "node2")

_SLURM_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is queued again waits for as long as a credential is valid.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmdLogFile={folder}/slurmd.%n.log
# Nothing here may need a control group, or a number of cores that this machine has.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=0
SlurmdTimeout=60
InactiveLimit=0
KillWait=20
MinJobAge=3600
GresTypes=gpu
{nodes}
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=16 ThreadsPerCore=1 RealMemory=128000 Gres=gpu:8 State=UNKNOWN"
)
# slurmd reads it though nothing is to be controlled; version 1 touches nothing unless it is told to.
_CGROUP_CONF = """
CgroupPlugin=cgroup/v1
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no
"""


def missing() -> str | None:
    """Why no cluster can be started here; None where one can. Debian's packages are installed where they are not."""
    if os.geteuid() != 0:
        return "a local Slurm needs root"
    if not Path("/etc/debian_version").is_file():
        return "a local Slurm is made of Debian's packages, and this is not Debian"
    running = [path.parent.name for path in Path("/proc").glob("[0-9]*/comm") if _is_slurm(path)]
    if running:
        return f"another Slurm runs on this machine (process {', '.join(running)})"
    if Path("/etc/slurm/slurm.conf").exists():
        return "this machine belongs to a Slurm already (/etc/slurm/slurm.conf)"
    if not all(map(shutil.which, PROGRAMS)) and (said := _install()):
        return f"Debian's packages {', '.join(PACKAGES)} cannot be installed: {said}"
    return None


def _is_slurm(comm: Path) -> bool:
    with contextlib.suppress(OSError):  # it ended in between
        return comm.read_text().strip() in ("slurmctld", "slurmd")
    return False


def _install() -> str | None:
    """Install the packages without starting their services; returns what went wrong."""
    no_services = Path("/usr/sbin/policy-rc.d")
    ours = not no_services.exists()
    if ours:
        no_services.write_text("#!/bin/sh\nexit 101\n")
        no_services.chmod(0o755)
    try:
        for command in (["update", "-qq"], ["install", "-qq", "--yes", "--no-install-recommends", *PACKAGES]):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True)
            if done.returncode:
                return (done.stderr.strip().splitlines() or ["apt-get failed"])[-1]
    finally:
        if ours:
            no_services.unlink()
    return None


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """The cluster, for as long as the block runs.

    Args:
        folder: Where everything is kept. Its path must be short: there is a socket in it.

    Yields:
        The variable that Slurm's commands need.
    """
    host = os.uname().nodename.partition(".")[0]
    nodes = [_NODE.format(name=name, host=host, port=17001 + place) for place, name in enumerate(NODES)]
    (folder / "slurm.conf").write_text(_SLURM_CONF.format(host=host, folder=folder, nodes="\n".join(nodes)))
    (folder / "cgroup.conf").write_text(_CGROUP_CONF)
    (folder / "gres.conf").write_text("".join(f"NodeName={name} Name=gpu File={folder}/gpu[0-7]\n" for name in NODES))
    for gpu in range(8):
        (folder / f"gpu{gpu}").touch()
    (folder / "state").mkdir()
    for name in NODES:
        (folder / f"spool.{name}").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    for path, mode in ((folder, 0o755), (key, 0o600)):
        path.chmod(mode)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    files = {name: folder / f"munge{name}" for name in (".key", ".socket", ".pid", ".log", ".seed")}
    try:
        _start(
            ["munged", "--force", f"--key-file={key}", f"--socket={files['.socket']}", f"--pid-file={files['.pid']}"]
            + [f"--log-file={files['.log']}", f"--seed-file={files['.seed']}"],
            environment,
        )
        _start(["slurmctld", "-c"], environment)
        for name in NODES:
            _start(["slurmd", "-N", name], environment)
        yield {"SLURM_CONF": environment["SLURM_CONF"]}
    finally:
        for name in [f"slurmd.{node}" for node in NODES] + ["slurmctld", "munge"]:
            _stop(folder / f"{name}.pid")


def _start(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _stop(pid_file: Path) -> None:
    """End the one process whose id stands in a file, and wait for its end."""
    if not pid_file.is_file() or not (text := pid_file.read_text().strip()):
        return
    with contextlib.suppress(ProcessLookupError):
        for number in [signal.SIGTERM] * 100 + [signal.SIGKILL]:
            os.kill(int(text), number)
            time.sleep(0.1)


@dataclass(frozen=True)
class Slurm:
    """A running cluster.

    Attributes:
        folder: Where jobs are submitted.
        environment: Variables of the jobs, and of Slurm's commands.
    """

    folder: Path
    environment: dict[str, str]

    def run(self, commands: str) -> str:
        """What some lines of bash print; they must succeed."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail"],
            input=commands,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, commands + done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    def queue(self) -> list[str]:
        """Ids of the jobs that wait or run."""
        return self.run("squeue --noheader --format=%A").split()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job, such as its JobState, ExitCode and Restarts."""
        shown = self.run(f"scontrol --oneliner show job {job}").splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def wait_until(self, condition: Callable[[], Any], seconds: float, what: str) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what} within {seconds:.0f} s"
            time.sleep(0.2)

    def wait_for_end(self, job: str, seconds: float = 900) -> dict[str, str]:
        """Wait until a job is done, whichever way, and say what Slurm knows of it then."""
        unfinished = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED")
        self.wait_until(lambda: self.job(job)["JobState"] not in unfinished, seconds, f"end of job {job}")
        return self.job(job)


def submitted(printed: str) -> dict[str, str]:
    """Stage -> id of its job, as tools.submit prints them."""
    return {stage: job for job, stage in re.findall(r"^(\d+) +(\S+) +\S+$", printed, flags=re.MULTILINE)}
