"""The machine: variables of a job, ports, permissions, disks, limits, packages and GPUs."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path

from tests.faults.inputs.entry import BadInput, convert, export, score, train
from tests.faults.inputs.run import ROOT

DEBIAN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
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


def _free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def rank(name: str, says: str, *changes: str, seconds: float = 10, **variables: str) -> BadInput:
    """A process that its environment calls a rank."""
    given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
    together = {key: value for key, value in (given | variables).items() if value != "unset"}
    return BadInput(name, train(*changes), says, environment=together, seconds=seconds, fresh=seconds > 60)


def needs_root() -> str | None:
    return None if os.getuid() == 0 else "needs root"


def closed(name: str, says: str, path: str, command: tuple[str, ...]) -> BadInput:
    """A file or folder that the user may not read."""

    def make(folder: Path) -> None:
        found = folder / path
        if not found.exists():
            found.write_text("recipe: dpo_tiny\n") if found.suffix else found.mkdir()
        found.chmod(0)

    return BadInput(name, command, says, make=make, obeys=True, skip=needs_root)


def full(name: str, says: str, room: int, command: tuple[str, ...], **more: object) -> BadInput:
    """A disk without enough room."""
    return BadInput(name, command, says, room=room, skip=needs_root, **more)  # type: ignore[arg-type]


def package(name: str, files: tuple[str, ...], says: str) -> BadInput:
    """A package that is found before the installed one."""
    site = {"PYTHONPATH": f"site:{ROOT}"}
    return BadInput(
        name,
        train(),
        says,
        files={f"site/{file}": _METADATA if file.endswith("METADATA") else "" for file in files},
        environment=site,
        fresh=True,
    )


_METADATA = "Metadata-Version: 2.1\nName: megatron-core\nVersion: 9.9.9\n"


ENTRIES = [
    # A rank's place.
    rank("RANK alone", "?", WORLD_SIZE="unset", LOCAL_RANK="unset", MASTER_ADDR="unset", MASTER_PORT="unset"),
    rank("no MASTER_ADDR", "?", MASTER_ADDR="unset"),
    rank("no MASTER_PORT", "?", MASTER_PORT="unset"),
    rank("no LOCAL_RANK", "?", LOCAL_RANK="unset"),
    rank("an empty RANK", "?", RANK=""),
    rank("RANK in words", "?", RANK="abc"),
    rank("RANK below 0", "?", RANK="-1"),
    rank("RANK beyond WORLD_SIZE", "?", RANK="5"),
    rank("WORLD_SIZE 0", "?", WORLD_SIZE="0"),
    rank("WORLD_SIZE with 5,000 digits", "?", WORLD_SIZE="9" * 5000),
    rank("LOCAL_RANK in words", "?", LOCAL_RANK="abc"),
    rank("MASTER_PORT in words", "?", MASTER_PORT="abc"),
    rank("MASTER_PORT beyond 65535", "?", MASTER_PORT="70000"),
    BadInput("SLURM_NTASKS in words", train(), "?", environment={"SLURM_STEP_ID": "0", "SLURM_NTASKS": "abc"}),
    BadInput(
        "several tasks of srun without ranks", train(), "?", environment={"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}
    ),
    BadInput("TGDPO_LAUNCHED inherited", train("data.train=no.jsonl"), "?", environment={"TGDPO_LAUNCHED": "1"}),
    BadInput("recipes.align under torchrun", ("recipes.align", "--recipe=dpo_tiny"), "?", environment={"RANK": "0"}),
    # Where ranks meet.
    rank("a port that is taken", "?", MASTER_PORT=_port()),
    rank("a name that no machine has", "?", RANK="1", MASTER_ADDR="nosuch.invalid", seconds=70),
    rank("a second rank that never comes", "?", MINUTE, MASTER_PORT=_free_port(), seconds=75),
    rank("a first rank that nobody started", "?", MINUTE, RANK="1", MASTER_PORT=_free_port(), seconds=75),
    rank("something silent where the first rank should be", "?", MINUTE, RANK="1", MASTER_PORT=_port(), seconds=75),
    # Files.
    BadInput("an output folder in use", train("train.output=hf"), "?"),
    BadInput("an output folder below a file", train("train.output=pairs.jsonl/out"), "?"),
    BadInput("an output folder where nobody may write", train("train.output=/proc/out"), "?"),
    BadInput(
        "a cache below a file", train("model.checkpoint=hf"), "?", environment={"TGDPO_CACHE": "pairs.jsonl/cache"}
    ),
    closed("pairs that may not be read", "?", "pairs.jsonl", train()),
    closed("a configuration that may not be read", "?", "my.yaml", train("--conf=my.yaml")),
    closed("a model's configuration that may not be read", "?", "hf/config.json", convert()),
    closed("weights that may not be read", "?", "hf/model.safetensors", convert()),
    closed("a manifest that may not be read", "?", "megatron/manifest.json", train()),
    closed("a folder of weights that may not be read", "?", "megatron/weights", export()),
    closed("a folder that may not be written", "?", "closed", train("train.output=closed/out")),
    # Disks and limits.
    full("a disk full of tokenised pairs", "?", 4096, train("train.output=disk/out")),
    full("a disk full of scores", "?", 20480, score("scores.path=disk/out"), leaves=("disk/*",)),
    full("a disk full of a conversion", "?", 102400, (*convert()[:-1], "disk/out")),
    full("a disk full of an export", "?", 102400, (*export()[:-1], "disk/out")),
    BadInput("files of 1,200 bytes in training", train(), "?", limits={"RLIMIT_FSIZE": 1200}),
    BadInput("files of 1,200 bytes in scoring", score(), "?", limits={"RLIMIT_FSIZE": 1200}),
    BadInput("files of 20 kB in a conversion", convert(), "?", limits={"RLIMIT_FSIZE": 20_000}),
    BadInput("files of 20 kB in an export", export(), "?", limits={"RLIMIT_FSIZE": 20_000}),
    BadInput("20 open files", train(), "?", limits={"RLIMIT_NOFILE": 20}),
    # Packages, GPUs, locale.
    package("a foreign apex", ("apex/__init__.py",), "?"),
    package("a megatron-core that was not checked", ("megatron_core-9.9.9.dist-info/METADATA",), "?"),
    BadInput("FP8 without a GPU", train("train.fp8=hybrid", "train.precision=bf16"), "?"),
    BadInput(
        "an ASCII locale and a name that is not", train("data.train=größe.jsonl"), "?", environment=DEBIAN, fresh=True
    ),
    BadInput(
        "an ASCII locale and a setting that is not", train("loss.type=größe"), "?", environment=DEBIAN, fresh=True
    ),
]
