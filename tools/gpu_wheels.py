"""Collect the packages that tools.gpu_environment installs, for a GPU machine without network.

    python -m tools.gpu_wheels [wheels] [--python 3.12] [--have LIST] [--split MIB] [--no-transformer-engine]

LIST is the output of `pip list --format=freeze` on that machine. Packages that it has, in versions that the others
accept, are left out. With --split the files are put into folders transfer-0, transfer-1, ... of at most MIB mebibytes
each. Larger files are cut into parts, which tools.gpu_environment puts together again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tgdpo_megatron.errors import CommandLine, UserError, one_sentence_errors
from tools.file_parts import PART, SUM, cut
from tools.gpu_environment import read_pins

# pip takes a platform tag literally, so the tags of all Linux versions that wheels are built for are listed. The list
# begins with the newest, which machines with CUDA 13 have.
PLATFORMS = [
    *(f"manylinux_2_{minor}_x86_64" for minor in range(39, 16, -1)),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]
MIB = 1 << 20

# What the build script of Transformer Engine's torch part needs of torch before it tells its name and version.
_TORCH_FOR_METADATA = {
    "torch/__init__.py": "class version:\n    cuda = '13.0'\n__version__ = '0'\n",
    "torch/utils/__init__.py": "",
    "torch/utils/cpp_extension.py": (
        "from setuptools import Extension\n"
        "from setuptools.command.build_ext import build_ext as BuildExtension\n"
        "def CppExtension(**settings):\n"
        "    return Extension(settings['name'], settings['sources'])\n"
    ),
    "bin/nvcc": "#!/bin/sh\necho release 13.0\n",
}


def collect(folder: Path, *, python: str, have: dict[str, Version | None], transformer_engine: bool) -> list[Path]:
    """Download everything in constraints-gpu.txt that the machine lacks.

    Args:
        folder: Folder for the packages, made if it is missing. Packages in it that the machine has, and parts of files,
            are removed.
        python: Version of the machine's Python, such as "3.12".
        have: What the machine has: canonical name -> version, None where the version is not known.
        transformer_engine: Whether to include Transformer Engine: its compiled core and the source of its torch part.

    Returns:
        The files.

    Raises:
        UserError: The folder holds something that is not a package, or pip could not find or fetch a package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if others := [file.name for file in folder.iterdir() if not _is_package(file)]:
        raise UserError(f"{folder}: holds {min(others)}, which is not a package; choose a folder for packages only.")
    for earlier in folder.glob("transfer-*"):
        shutil.rmtree(earlier)
    pins = {name: pin for name, pin in read_pins().items() if not name.startswith("transformer-engine")}
    _download([f"{name}=={pin}" for name, pin in pins.items()], folder, python)
    taken = _lacking({_name(file): file for file in folder.glob("*.whl") if _name(file) in pins}, have, python)
    if transformer_engine:
        version = read_pins()["transformer-engine"]
        _download([f"{name}=={version}" for name in ("transformer_engine", "transformer_engine_cu13")], folder, python)
        _download_source(f"transformer_engine_torch=={version}", folder)
        taken += sorted(folder.glob(f"transformer_engine*-{version}[.-]*"))
    for file in folder.iterdir():
        if file.is_file() and file not in taken:
            file.unlink()
    return taken


def pack(files: list[Path], folder: Path, *, mib: int) -> list[Path]:
    """Move files to folders `transfer-0`, ... of at most `mib` MiB each, and cut larger files. Returns the folders."""
    if mib < 2:
        raise UserError(f"--split {mib}: the size must be at least 2 MiB.")
    room = (mib - 1) * MIB  # one MiB is left for what a transfer adds
    pieces = [file for file in files if file.stat().st_size <= room]
    for file in files:
        if file not in pieces:
            pieces += [*cut(file, folder, size=room), folder / f"{file.name}{SUM}"]
            file.unlink()
    sizes = {piece: piece.stat().st_size for piece in pieces}
    loads: list[list[Path]] = []
    for piece in sorted(pieces, key=lambda piece: -sizes[piece]):
        load = next((load for load in loads if sum(sizes[other] for other in load) + sizes[piece] <= room), None)
        if load is None:
            loads.append(load := [])
        load.append(piece)
    targets = []
    for place, load in enumerate(loads):
        targets.append(folder / f"transfer-{place}")
        targets[-1].mkdir()
        for piece in load:
            piece.rename(targets[-1] / piece.name)
    return targets


def _is_package(file: Path) -> bool:
    """Whether this program may have written a file or folder."""
    if file.is_dir():
        return re.fullmatch(r"transfer-\d+", file.name) is not None and all(map(_is_package, file.iterdir()))
    return file.name.endswith((".whl", ".tar.gz", SUM)) or PART in file.name


def _lacking(wheels: dict[str, Path], have: dict[str, Version | None], python: str) -> list[Path]:
    """The wheels whose package the machine lacks, or has in a version that one of the other taken wheels refuses."""
    environment = {
        **{key: str(value) for key, value in default_environment().items()},
        "python_version": python,
        "platform_machine": "x86_64",
        "sys_platform": "linux",
        "extra": "",
    }
    taken = {name for name in wheels if name not in have}
    waiting = list(taken)
    while waiting:
        for line in _metadata(wheels[waiting.pop()]).get_all("Requires-Dist", []):
            need = Requirement(line)
            name = canonicalize_name(need.name)
            version = have.get(name)
            refused = version is not None and not need.specifier.contains(version, prereleases=True)
            applies = need.marker is None or need.marker.evaluate(environment)
            if applies and refused and name in wheels and name not in taken:
                taken.add(name)
                waiting.append(name)
    return [wheels[name] for name in sorted(taken)]


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def _name(wheel: Path) -> str:
    return canonicalize_name(wheel.name.split("-")[0])


def _download(requirements: list[str], folder: Path, python: str) -> None:
    target = ["--python-version", python, "--implementation", "cp", *(f"--platform={tag}" for tag in PLATFORMS)]
    _pip(["download", "--no-deps", "--only-binary=:all:", *target, "--dest", str(folder), *requirements])


def _download_source(requirement: str, folder: Path) -> None:
    """Fetch a source archive. pip runs its build script to learn its name, so the script gets a stand-in for torch."""
    with tempfile.TemporaryDirectory() as temporary:
        stand_in = Path(temporary)
        _pip(["install", "--target", temporary, "setuptools", "wheel", "packaging"])
        for name, text in _TORCH_FOR_METADATA.items():
            (stand_in / name).parent.mkdir(parents=True, exist_ok=True)
            (stand_in / name).write_text(text, encoding="utf-8")
        (stand_in / "bin" / "nvcc").chmod(0o755)
        (stand_in / "include").mkdir()
        source = ["--no-deps", "--no-binary=:all:", "--no-build-isolation"]
        _pip(["download", *source, "--dest", str(folder), requirement], PYTHONPATH=temporary, CUDA_HOME=temporary)


def _pip(arguments: list[str], **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise UserError(f"pip {arguments[0]} failed: {done.stderr.strip().splitlines()[-1]}")


def read_have(path: Path) -> dict[str, Version | None]:
    """Read what `pip list --format=freeze` wrote. A line may also be a name without a version.

    Raises:
        UserError: No such file, or a line that is neither.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; write it with `pip list --format=freeze` on the GPU machine.")
    have: dict[str, Version | None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, _, version = line.strip().partition("==")
        try:
            have[canonicalize_name(name, validate=True)] = Version(version) if version else None
        except ValueError:
            raise UserError(f"{path}:{number}: {line.strip()!r} is not NAME==VERSION.") from None
    return have


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(prog="tools.gpu_wheels", description=(__doc__ or "").split("\n")[0])
        parser.add_argument(
            "folder",
            type=Path,
            nargs="?",
            default=Path("runs/wheels"),
            help="folder for the packages (default: %(default)s)",
        )
        parser.add_argument("--python", default="3.12", help="version of the machine's Python (default: %(default)s)")
        parser.add_argument(
            "--have", type=Path, help="file with the output of pip list --format=freeze on that machine"
        )
        parser.add_argument(
            "--split", type=int, metavar="MIB", help="put the packages into folders of at most this size, for transfers"
        )
        parser.add_argument("--no-transformer-engine", action="store_true", help="do not collect Transformer Engine")
        arguments = parser.parse_args()
        have = read_have(arguments.have) if arguments.have else {}
        files = collect(
            arguments.folder,
            python=arguments.python,
            have=have,
            transformer_engine=not arguments.no_transformer_engine,
        )
        sizes = {file.name: file.stat().st_size / MIB for file in files}
        core = sum(size for name, size in sizes.items() if name.startswith("transformer_engine_cu"))
        print(f"{len(files)} files in {arguments.folder}: {sum(sizes.values()) - core:.1f} MiB", end="")
        print(f", and {core:.1f} MiB of Transformer Engine's core" if core else "")
        if arguments.split:
            for target in pack(files, arguments.folder, mib=arguments.split):
                print(f"  {target}: {sum(file.stat().st_size for file in target.iterdir()) / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
