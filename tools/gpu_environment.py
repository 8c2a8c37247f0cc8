"""Make an environment for a GPU machine from the torch that it has and the packages that it lacks.

    python3 -m tools.gpu_environment [.venv-gpu] [--wheels FOLDER] [--no-transformer-engine]

The Python that runs this must have torch. Its packages stay as they are, and are used where the project accepts their
versions; where its megatron-core is not accepted, nothing is installed. What is missing is installed beside them, at
the versions of constraints-gpu.txt. It comes from the package index or, with --wheels and without network, from a
folder that tools.gpu_wheels filled. The torch part of Transformer Engine is compiled here, unless the folder holds it
compiled for this Python and torch. Everything else works without it. A second run installs only what is still missing.
This program needs only Python's standard library.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tgdpo_megatron.errors import CommandLine, UserError, one_sentence_errors
from tgdpo_megatron.platform.versions import check_megatron_version
from tools.file_parts import join

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "constraints-gpu.txt"
TRANSFORMER_ENGINE_NEEDS = ["einops", "onnx", "onnxscript", "pydantic", "packaging", "importlib-metadata"]
BUILD_NEEDS = ["setuptools", "wheel", "ninja"]

# The new environment's Python runs this to list what it has. Transformer Engine is imported, because a package can be
# installed and still fail to load.
_LOOK = """
import importlib.metadata as metadata, json, platform
found = {}
for distribution in metadata.distributions():
    found.setdefault(distribution.metadata["Name"].lower().replace("_", "-"), distribution.version)
import torch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
try:
    import transformer_engine.pytorch
    engine = None
except Exception as error:
    engine = (str(error) or type(error).__name__).strip().splitlines()[-1]
print(json.dumps({"packages": found, "cuda": torch.version.cuda, "gpu": gpu, "no_engine": engine,
                  "torch": torch.__version__, "python": platform.python_version()}))
"""


def gpu_environment(folder: Path, *, wheels: Path | None, transformer_engine: bool) -> None:
    """Make or complete the environment, and print what it holds.

    Args:
        folder: Folder of the environment, made if it is missing.
        wheels: Folder from which packages are installed instead of the index. Large packages may be there in parts.
        transformer_engine: Whether to install Transformer Engine.

    Raises:
        UserError: This Python has no torch, or a megatron-core that was not checked; the folder of wheels does not
            exist, or a package cannot be installed.
    """
    if wheels is not None and not wheels.is_dir():
        raise UserError(f"{wheels}: no such folder; fill it with `make gpu-wheels` where there is a network.")
    step = _Progress()
    step(f"environment {folder}, on top of {sys.prefix}")
    python = _make(folder)
    found = _look(python)
    if found["cuda"] is None:
        raise UserError(
            f"{sys.executable}: its torch {found['torch']} is built without CUDA; use a Python whose torch has CUDA."
        )
    if version := found["packages"].get("megatron-core"):
        check_megatron_version(version)
    if wheels is not None:
        step(f"packages from {wheels}")
        join(wheels)
    else:
        step("packages from the index")
    _install(python, _requirements(found["packages"]), found, wheels)
    absent = found["no_engine"]
    if transformer_engine and absent:
        step("Transformer Engine; compiling its torch part, if it must be compiled, takes minutes")
        absent = _add_transformer_engine(python, found, wheels)
    step("done")
    print(_table(_look(python), absent))


class _Progress:
    """Prints what is done next, with the time since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:4.0f} s] {text}", flush=True)


def _make(folder: Path) -> Path:
    """Make an environment that sees this Python's packages, pip included. Returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", str(folder)])
    # Where this Python is a virtual environment itself, --system-site-packages would leave its packages out.
    below = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    text = "".join(f"import site; site.addsitedir({place!r})\n" for place in below)
    Path(own, "packages-below.pth").write_text(text, encoding="utf-8")
    # Transformer Engine looks for CUDA's libraries only among the packages of its own environment.
    nvidia = importlib.util.find_spec("nvidia")
    if nvidia and nvidia.submodule_search_locations and not Path(own, "nvidia").exists():
        Path(own, "nvidia").symlink_to(next(iter(nvidia.submodule_search_locations)))
    return python


def _look(python: Path) -> dict[str, Any]:
    """What the environment holds, by the keys of _LOOK."""
    done = subprocess.run([python, "-c", _LOOK], capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"{sys.executable}: its packages cannot be listed ({why}); run this with the Python that has torch."
        )
    looked: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return looked


def _requirements(here: Mapping[str, str]) -> list[str]:
    """What the project asks for, but for a megatron-core that is here: a second one beside it would be refused."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    tests = [requirement for requirement in extras["dev"] if requirement.startswith("pytest")]
    asked = [*project["dependencies"], *extras["tracking"], *tests]
    return [one for one in asked if not ("megatron-core" in here and one.startswith("megatron-core"))]


def _install(python: Path, requirements: list[str], found: Mapping[str, Any], wheels: Path | None) -> None:
    """Install what is missing. torch is kept, and so is every package that the requirements accept."""
    here = found["packages"]
    pins = [f"torch=={here['torch']}", *(f"{name}=={pin}" for name, pin in read_pins().items() if name not in here)]
    constraints = python.parent.parent / "constraints.txt"
    constraints.write_text("\n".join(pins), encoding="utf-8")
    _pip(python, ["--constraint", str(constraints), *requirements], wheels)


def _add_transformer_engine(python: Path, found: Mapping[str, Any], wheels: Path | None) -> str | None:
    """Install Transformer Engine. Returns why that failed, or None if it did not."""
    version = read_pins()["transformer-engine"]
    core = f"transformer_engine_cu{str(found['cuda']).split('.')[0]}=={version}"
    try:
        _install(python, [*TRANSFORMER_ENGINE_NEEDS, *BUILD_NEEDS], found, wheels)
        _pip(python, ["--no-deps", f"transformer_engine=={version}", core], wheels)
        _pip(
            python,
            ["--no-deps", "--no-build-isolation", f"transformer_engine_torch=={version}"],
            wheels,
            {**_compiler_environment(python), **({"NVTE_PYTORCH_FORCE_BUILD": "TRUE"} if wheels else {})},
        )
        reason: str | None = _look(python)["no_engine"]
    except UserError as error:
        reason = str(error)
    if reason:  # a part of it would be taken for the whole
        names = ["transformer_engine", core.partition("==")[0], "transformer_engine_torch"]
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *names], capture_output=True, check=False)
    return reason


def _compiler_environment(python: Path) -> dict[str, str]:
    """Environment variables that lead the compiler to CUDA's toolkit and to the headers of torch's NVIDIA packages."""
    ask = "import glob, nvidia; print(*(f for p in nvidia.__path__ for f in glob.glob(p + '/*/include')), sep=':')"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    headers = [done.stdout.strip(), os.environ.get("CPATH", "")]
    toolkits = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        toolkits.append(str(Path(nvcc).resolve().parents[1]))
    toolkit = next((place for place in toolkits if place and Path(place, "bin", "nvcc").exists()), None)
    return {
        "CPATH": ":".join(filter(None, headers)),
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
        **({"CUDA_HOME": toolkit} if toolkit else {}),
    }


def _pip(python: Path, arguments: list[str], wheels: Path | None, environment: Mapping[str, str] | None = None) -> None:
    source = []
    if wheels is not None:
        folders = sorted({file.parent for kind in ("*.whl", "*.tar.gz") for file in wheels.rglob(kind)})
        source = ["--no-index", *(f"--find-links={folder.resolve()}" for folder in folders)]
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *source, *arguments]
    _run(command, environment)


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        lines = [line for line in done.stderr.splitlines() if "error:" in line.lower()] or ["see above"]
        raise UserError(f"{' '.join(command[1:4])}: {lines[0].strip()}")


def read_pins() -> dict[str, str]:
    """The versions in constraints-gpu.txt, by name."""
    lines = (line.split("#")[0].strip() for line in PINS.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if line)


def _table(found: Mapping[str, Any], no_engine: str | None) -> str:
    packages = found["packages"]
    driver = subprocess.run(
        ["sh", "-c", "nvidia-smi --query-gpu=driver_version --format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    names = ("megatron-core", "transformers", "datasets", "pydantic", "pytest")
    rows = {
        "GPU": found["gpu"] or "none",
        "driver": driver.stdout.split("\n")[0] or "none",
        "Python": found["python"],
        "torch": f"{found['torch']}, CUDA {found['cuda']}",
        **{name: packages.get(name, "absent") for name in names},
        "Transformer Engine": f"absent: {no_engine}" if no_engine else packages.get("transformer-engine", "present"),
    }
    return "\n".join(f"  {name:<20}{value}" for name, value in rows.items())


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(prog="tools.gpu_environment", description=(__doc__ or "").split("\n")[0])
        parser.add_argument(
            "folder", type=Path, nargs="?", default=Path(".venv-gpu"), help="environment (default: %(default)s)"
        )
        parser.add_argument("--wheels", type=Path, help="install from this folder instead of the package index")
        parser.add_argument("--no-transformer-engine", action="store_true", help="do not install Transformer Engine")
        arguments = parser.parse_args()
        gpu_environment(
            arguments.folder, wheels=arguments.wheels, transformer_engine=not arguments.no_transformer_engine
        )


if __name__ == "__main__":
    main()
