"""The machine: variables of a job, ports, permissions, disks, limits, packages and GPUs."""

from __future__ import annotations

import os
import socket
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path

from tests.faults.inputs.entry import BadInput, convert, export, score, train
from tests.faults.inputs.run import ROOT
from tests.support.ports import free_port
from tgdpo_megatron.platform.versions import MEGATRON

ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
MINUTE = "train.distributed_timeout_minutes=1"


@cache
def _listening() -> socket.socket:
    """A program that listens and says nothing, as long as this one runs."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(100)
    return listener


def _port() -> str:
    return str(_listening().getsockname()[1])


def rank(name: str, says: str, *changes: str, seconds: float = 10, **variables: str) -> BadInput:
    """A process that its environment calls a rank."""
    given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
    together = {key: value for key, value in (given | variables).items() if value != "unset"}
    return BadInput(name, train(*changes), says, environment=together, seconds=seconds, fresh=seconds > 60)


def _needs_root() -> str | None:
    return None if os.getuid() == 0 else "needs root"


@cache
def _needs_a_disk() -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "none", folder], stderr=subprocess.DEVNULL, check=False)
        if mounted.returncode == 0:
            subprocess.run(["umount", folder], check=True)
    return None if mounted.returncode == 0 else "may not mount a small disk"


def closed(name: str, says: str, path: str, command: tuple[str, ...]) -> BadInput:
    """A file or folder that the user may not open."""
    files = {"my.yaml": "recipe: dpo_tiny\n", "closed/mine.txt": "mine"}

    def make(folder: Path) -> None:
        (folder / path).chmod(0)

    return BadInput(name, command, says, files=files, make=make, obeys=True, skip=_needs_root)


def full(name: str, says: str, room: int, command: tuple[str, ...], **more: object) -> BadInput:
    """A disk without enough room."""
    return BadInput(name, command, says, room=room, skip=_needs_a_disk, **more)  # type: ignore[arg-type]


def package(name: str, files: Sequence[str], says: str, *, starts_with: str = "") -> BadInput:
    """A package that is found before the installed one.

    Args:
        starts_with: What Python does first.
    """
    content = {f"site/{file}": _METADATA if file.endswith("METADATA") else "" for file in files}
    return BadInput(
        name,
        train(),
        says,
        files=content | {"site/sitecustomize.py": starts_with},
        environment={"PYTHONPATH": f"site:{ROOT}"},
        fresh=True,
    )


def without_megatron(name: str, files: Sequence[str], says: str) -> BadInput:
    """The installed packages but for megatron-core, and a package that is found before them."""

    def make(folder: Path) -> None:
        (folder / "others").mkdir()
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if not path.name.startswith("megatron"):
                (folder / "others" / path.name).symlink_to(path)

    return replace(package(name, files, says, starts_with=_OTHERS), make=make)


_METADATA = "Metadata-Version: 2.1\nName: megatron-core\nVersion: 9.9.9\n"
_OTHERS = """
import sys
others = __file__.replace("site/sitecustomize.py", "others")
sys.path = [others if "site-packages" in path else path for path in sys.path]
"""
_CHECKED = ", ".join(MEGATRON)


ENTRIES = [
    # A rank's place.
    rank(
        "RANK alone",
        "WORLD_SIZE is not set, where RANK=0 makes this process a rank of a job; start ranks with "
        "torchrun or --nproc-per-node, or unset RANK.",
        WORLD_SIZE="unset",
        LOCAL_RANK="unset",
        MASTER_ADDR="unset",
        MASTER_PORT="unset",
    ),
    rank(
        "no MASTER_ADDR",
        "MASTER_ADDR is not set, where WORLD_SIZE=2 ranks have to meet; start them with torchrun, or "
        "with --nproc-per-node.",
        MASTER_ADDR="unset",
    ),
    rank(
        "no MASTER_PORT",
        "MASTER_PORT is not set, where RANK=0 makes this process a rank of a job; start ranks with "
        "torchrun or --nproc-per-node, or unset RANK.",
        MASTER_PORT="unset",
    ),
    rank(
        "no LOCAL_RANK",
        "LOCAL_RANK is not set, where RANK=0 makes this process a rank of a job; start ranks with "
        "torchrun or --nproc-per-node, or unset RANK.",
        LOCAL_RANK="unset",
    ),
    rank(
        "an empty RANK", "RANK='' is not a whole number from 0 to 1; start ranks with torchrun, which sets it.", RANK=""
    ),
    rank(
        "RANK in words",
        "RANK='abc' is not a whole number from 0 to 1; start ranks with torchrun, which sets it.",
        RANK="abc",
    ),
    rank(
        "RANK below 0",
        "RANK='-1' is not a whole number from 0 to 1; start ranks with torchrun, which sets it.",
        RANK="-1",
    ),
    rank(
        "RANK with two signs",
        "RANK='--5' is not a whole number from 0 to 1; start ranks with torchrun, which sets it.",
        RANK="--5",
    ),
    rank(
        "RANK beyond WORLD_SIZE",
        "RANK='5' is not a whole number from 0 to 1; start ranks with torchrun, which sets it.",
        RANK="5",
    ),
    rank(
        "WORLD_SIZE 0",
        "WORLD_SIZE='0' is not a whole number of 1 or more; start ranks with torchrun, which sets it.",
        WORLD_SIZE="0",
    ),
    rank(
        "WORLD_SIZE with 5,000 digits",
        "WORLD_SIZE='9999999999999999999999999999999999999999' is not a whole number of 1 or more; start "
        "ranks with torchrun, which sets it.",
        WORLD_SIZE="9" * 5000,
    ),
    rank(
        "LOCAL_RANK in words",
        "LOCAL_RANK='abc' is not a whole number from 0 to 1; start ranks with torchrun, which sets it.",
        LOCAL_RANK="abc",
    ),
    rank(
        "MASTER_PORT in words",
        "MASTER_PORT='abc' is not a whole number from 1 to 65535; start ranks with torchrun, which sets it.",
        MASTER_PORT="abc",
    ),
    rank(
        "MASTER_PORT beyond 65535",
        "MASTER_PORT='70000' is not a whole number from 1 to 65535; start ranks with torchrun, which sets it.",
        MASTER_PORT="70000",
    ),
    BadInput(
        "SLURM_NTASKS in words",
        train(),
        "SLURM_NTASKS='abc' is not a whole number of 1 or more; start ranks with torchrun, which sets it.",
        environment={"SLURM_STEP_ID": "0", "SLURM_NTASKS": "abc"},
    ),
    BadInput(
        "more tasks of srun than nodes",
        train(),
        "srun started 2 tasks, but this program starts the ranks of a node itself; start it once on each node "
        "(--ntasks-per-node=1), with --nnodes, --node-rank and --rdzv-endpoint.",
        environment={"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"},
    ),
    BadInput(
        "TGDPO_LAUNCHED inherited",
        train("data.train=no.jsonl"),
        "no.jsonl: no such data file, and no data set on a hub, which is "
        "ORGANISATION/NAME[@REVISION][:[CONFIG/]SPLIT].",
        environment={"TGDPO_LAUNCHED": "1"},
    ),
    BadInput(
        "recipes.align under torchrun",
        ("recipes.align", "--recipe=dpo_tiny"),
        "recipes.align starts ranks itself; give --nproc-per-node, and start it without torchrun.",
        environment={"RANK": "0"},
    ),
    # Where ranks meet.
    rank(
        "a port that is taken",
        "MASTER_PORT=*: another program listens there on this machine; choose another port.",
        MASTER_PORT=_port(),
    ),
    rank(
        "a name that no machine has",
        "MASTER_ADDR=nosuch.invalid: there is no machine of this name; give the address of the first rank's.",
        RANK="1",
        MASTER_ADDR="nosuch.invalid",
        seconds=70,
    ),
    rank(
        "a second rank that never comes",
        "not all of the 2 ranks came to 127.0.0.1:* within 1 min; start all of them, each with "
        "MASTER_ADDR=127.0.0.1 MASTER_PORT=* WORLD_SIZE=2 and a RANK of its own.",
        MINUTE,
        MASTER_PORT=str(free_port()),
        seconds=75,
    ),
    rank(
        "a first rank that nobody started",
        "rank 1 of 2 did not reach rank 0 at 127.0.0.1:* within 1 min (Connection refused); check MASTER_ADDR and "
        "MASTER_PORT, that rank 0 was started, and that no firewall is between.",
        MINUTE,
        RANK="1",
        MASTER_PORT=str(free_port()),
        seconds=75,
    ),
    rank(
        "something silent where the first rank should be",
        "rank 1: what listens at 127.0.0.1:* did not answer as rank 0 of this job within 1 min; check "
        "MASTER_ADDR and MASTER_PORT.",
        MINUTE,
        RANK="1",
        MASTER_PORT=_port(),
        seconds=75,
    ),
    # Files.
    BadInput(
        "an output folder in use",
        train("train.output=hf"),
        "hf: already there and not empty; choose another train.output, or continue the run in it with "
        "train.resume=true.",
    ),
    BadInput(
        "an output folder below a file",
        train("train.output=pairs.jsonl/out"),
        "pairs.jsonl/out: cannot be written (Not a directory).",
    ),
    BadInput(
        "an output folder where nobody may write",
        train("train.output=/proc/out"),
        "/proc/out: cannot be written (No such file or directory).",
    ),
    BadInput(
        "a cache below a file",
        train("model.checkpoint=hf"),
        "FOLDER/pairs.jsonl/cache: the operating system refused with 'Not a directory'; TGDPO_DEBUG=1 "
        "shows at which line of the program.",
        environment={"TGDPO_CACHE": "pairs.jsonl/cache"},
    ),
    closed(
        "pairs that may not be read",
        "pairs.jsonl: the operating system refused with 'Permission denied'; TGDPO_DEBUG=1 shows at "
        "which line of the program.",
        "pairs.jsonl",
        train(),
    ),
    closed(
        "a configuration that may not be read",
        "my.yaml: cannot be read (Permission denied).",
        "my.yaml",
        train("--conf=my.yaml"),
    ),
    closed(
        "a model's configuration that may not be read",
        "hf/config.json: cannot be read (Permission denied).",
        "hf/config.json",
        convert(),
    ),
    closed(
        "weights that may not be read",
        "hf/model.safetensors: cannot be read (Permission denied).",
        "hf/model.safetensors",
        convert(),
    ),
    closed(
        "a manifest that may not be read",
        "megatron/manifest.json: cannot be read (Permission denied).",
        "megatron/manifest.json",
        train(),
    ),
    closed(
        "a folder of weights that may not be read",
        "megatron/weights/.metadata: the operating system refused with 'Permission denied'; "
        "TGDPO_DEBUG=1 shows at which line of the program.",
        "megatron/weights",
        export(),
    ),
    closed(
        "a folder that may not be written",
        "closed/out: the operating system refused with 'Permission denied'; TGDPO_DEBUG=1 shows at which "
        "line of the program.",
        "closed",
        train("train.output=closed/out"),
    ),
    # Disks and limits.
    full(
        "a disk full of tokenised pairs",
        "the operating system refused with 'No space left on device'; TGDPO_DEBUG=1 shows at which line "
        "of the program.",
        4096,
        train("train.output=disk/out"),
        late=True,
    ),
    full(
        "a disk full of scores",
        "disk/out/train: the scores cannot be written (No space left on device); what was written before is kept.",
        24576,
        score("scores.path=disk/out"),
        leaves=("disk/*",),
        late=True,
    ),
    full(
        "a disk full of a conversion",
        "disk/out: 0.00 GB are still to be written, but only 0.00 GB are free there; make room, or "
        "choose another disk.",
        102400,
        (*convert()[:-1], "disk/out"),
        late=True,
    ),
    full(
        "a disk full of an export",
        "disk/out: 0.00 GB are still to be written, but only 0.00 GB are free there; make room, or "
        "choose another disk.",
        102400,
        (*export()[:-1], "disk/out"),
    ),
    BadInput(
        "files of 1,200 bytes in training",
        train(),
        "the operating system refused with 'File too large'; TGDPO_DEBUG=1 shows at which line of the program.",
        limits={"RLIMIT_FSIZE": 1200},
        late=True,
    ),
    BadInput(
        "files of 1,200 bytes in scoring",
        score(),
        "the operating system refused with 'File too large'; TGDPO_DEBUG=1 shows at which line of the program.",
        limits={"RLIMIT_FSIZE": 1200},
        late=True,
    ),
    BadInput(
        "files of 20 kB in a conversion",
        convert(),
        "FOLDER/out.partial: the conversion cannot be written ([Errno 27] File too large); look at the "
        "space left there, and at the permissions.",
        limits={"RLIMIT_FSIZE": 20_000},
        late=True,
    ),
    BadInput(
        "files of 20 kB in an export",
        export(),
        "FOLDER/out.partial: the model cannot be written ([Errno 27] File too large); look at the space "
        "left there, and at the permissions.",
        limits={"RLIMIT_FSIZE": 20_000},
    ),
    BadInput(
        "20 open files",
        train(),
        "a process may open 20 files here, and a rank needs 128; raise it (ulimit -n).",
        limits={"RLIMIT_NOFILE": 20},
    ),
    # Packages, GPUs, locale.
    package(
        "a foreign apex",
        ("apex/__init__.py",),
        "the package 'apex' at FOLDER/site/apex/__init__.py is not NVIDIA's apex and would change "
        "Megatron's layers; uninstall it.",
    ),
    BadInput(
        "a Transformer Engine built for another torch",
        train(),
        "Transformer Engine 2.11.0 does not load, because it was built for another torch than the installed "
        f"{metadata.version('torch')}; install the torch that it came with, or build it again for this one, or "
        "uninstall it to run on Megatron's local layers.",
        files={
            "site/transformer_engine/__init__.py": "",
            "site/transformer_engine/pytorch.py": "raise ImportError('te.so: undefined symbol: _ZN3c105ErrorC2E')",
            "site/transformer_engine-2.11.0.dist-info/METADATA": "Name: transformer-engine\nVersion: 2.11.0\n",
        },
        environment={"PYTHONPATH": f"site:{ROOT}"},
        fresh=True,
    ),
    package(
        "two megatron-cores",
        ("megatron/core/__init__.py", "megatron_core-9.9.9.dist-info/METADATA"),
        "megatron-core is on Python's path more than once (9.9.9 in FOLDER/site, * in *); uninstall all but one, or "
        "take the others off PYTHONPATH.",
    ),
    package(
        "a folder of Megatron-LM beside megatron-core",
        ("megatron/core/__init__.py",),
        "megatron-core is on Python's path more than once (one of no version in FOLDER/site, * in *); uninstall all "
        "but one, or take the others off PYTHONPATH.",
    ),
    without_megatron("no megatron-core", (), f"megatron-core is not installed; install one of {_CHECKED}."),
    without_megatron(
        "a megatron-core that was not checked",
        ("megatron/core/__init__.py", "megatron_core-9.9.9.dist-info/METADATA"),
        f"megatron-core 9.9.9 was not checked with this project; install one of {_CHECKED}, or set "
        "TGDPO_UNCHECKED_VERSIONS=1 to use it all the same.",
    ),
    without_megatron(
        "a megatron-core without metadata",
        ("megatron/core/__init__.py",),
        "nothing says which version the megatron-core in FOLDER/site is; install it with pip (pip install --no-deps "
        f"FOLDER/site), or install one of {_CHECKED} in its place.",
    ),
    package(
        "a Python that is too old",
        (),
        "Python 3.10.4 is too old for this project; use Python 3.11, 3.12 or 3.13.",
        starts_with="import sys; sys.version_info = (3, 10, 4)",
    ),
    package(
        "a Python that was not checked",
        (),
        "Python 3.14.1 was not checked with this project; use Python 3.11, 3.12 or 3.13, or set "
        "TGDPO_UNCHECKED_VERSIONS=1 to use it all the same.",
        starts_with="import sys; sys.version_info = (3, 14, 1)",
    ),
    BadInput(
        "FP8 without a GPU",
        train("train.fp8=hybrid", "train.precision=bf16"),
        "train.fp8=hybrid cannot be computed here: there is no GPU; leave it out (train.fp8=null).",
    ),
    BadInput(
        "an ASCII locale and a name that is not",
        train("data.train=größe.jsonl"),
        "gr\\udcc3\\udcb6\\udcc3\\udc9fe.jsonl: no such data file, and no data set on a hub, which is "
        "ORGANISATION/NAME[@REVISION][:[CONFIG/]SPLIT].",
        environment=ASCII_LOCALE,
        fresh=True,
    ),
    BadInput(
        "an ASCII locale and a setting that is not",
        train("loss.type=größe"),
        "command line: loss.type='gr\\udcc3\\udcb6\\udcc3\\udc9fe' is refused: it should be text in UTF-8.",
        environment=ASCII_LOCALE,
        fresh=True,
    ),
]
