"""The locks hold exactly what is needed: to run, beside that to test, and for each megatron-core."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tgdpo_megatron.errors import UserError
from tgdpo_megatron.platform.versions import MEGATRON, PYTHONS, lock_for

ROOT = Path(__file__).resolve().parents[2]
FROM_PYTHON = {"pip"} | ({"setuptools"} if sys.version_info < (3, 12) else set())
"""In every virtual environment of this Python."""
OF_CUDA = re.compile("nvidia-|cuda-|triton$")
"""What torch's CUDA build brings, in versions that it pins itself, and its CPU build does not."""
MEGATRON_LOCKS = sorted(path.name for path in ROOT.glob("requirements-megatron-*.lock"))


NOT_LOCKED = ("wandb", "mlflow", "judges")


def project() -> dict[str, list[str]]:
    """What pyproject.toml asks for: to run, and with each extra that the locks hold."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = content["optional-dependencies"]
    return {"run": content["dependencies"], **{name: extras[name] for name in extras if name not in NOT_LOCKED}}


def lock(name: str) -> dict[str, str]:
    """Package -> version, of the packages that this Python gets."""
    lines = (ROOT / name).read_text().splitlines()
    pinned = map(Requirement, (line for line in lines if not line.startswith(("#", "-r "))))
    here = [one for one in pinned if one.marker is None or one.marker.evaluate()]
    assert all(str(one.specifier).startswith("==") for one in here), name
    return {canonicalize_name(one.name): str(one.specifier)[2:] for one in here}


def running() -> dict[str, str]:
    """Both locks of the environment that runs this."""
    return lock("requirements.lock") | lock(f"requirements-megatron-{metadata.version('megatron-core')}.lock")


def needed(asked: list[str]) -> set[str]:
    """Everything that is installed because of some requirements, by what the installed packages say of themselves."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in asked]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        package = canonicalize_name(requirement.name)
        if OF_CUDA.match(package):
            continue
        for wanted in ("", *requirement.extras):
            if (package, wanted) in seen:
                continue
            seen.add((package, wanted))
            try:
                waiting += [(Requirement(text), wanted) for text in distribution(package).requires or []]
            except PackageNotFoundError:
                pytest.skip(f"{package} is not installed here, so what it needs is unknown")
        found.add(package)
    return found - FROM_PYTHON


def test_the_locks_hold_what_running_needs() -> None:
    assert {name for name in running() if not OF_CUDA.match(name)} == needed(project()["run"])


def test_there_is_a_lock_for_each_checked_megatron_core_and_it_pins_that_one() -> None:
    assert sorted(f"requirements-megatron-{version}.lock" for version in MEGATRON) == MEGATRON_LOCKS
    for version in MEGATRON:
        assert lock(f"requirements-megatron-{version}.lock")["megatron-core"] == version


def test_triton_is_pinned_where_megatron_needs_it_as_torchs_own_build_pins_it() -> None:
    """So that the CPU build of torch gets the same."""
    pinned = {version: lock(f"requirements-megatron-{version}.lock").get("triton") for version in MEGATRON}
    assert [version for version in MEGATRON if pinned[version]] == ["0.18.2", "0.19.2"]
    of_torch = {Requirement(text).name: str(Requirement(text).specifier)[2:] for text in requires("torch") or ()}
    if "triton" not in of_torch:
        pytest.skip("the CPU build of torch does not name a Triton")
    assert {found for found in pinned.values() if found} == {of_torch["triton"]}


@pytest.mark.parametrize("python", PYTHONS)
def test_a_python_gets_the_newest_megatron_core_that_it_can_have(python: str) -> None:
    newest = "0.16.1" if python == "3.11" else "0.19.2"
    assert lock_for(python) == f"requirements-megatron-{newest}.lock"


def test_the_other_lock_adds_what_tests_and_tensorboard_need() -> None:
    lines = (ROOT / "requirements-dev.lock").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")][0] == "-r requirements.lock"
    asked = project()
    both = needed([text for extra in asked.values() for text in extra])
    assert set(lock("requirements-dev.lock")) == both - set(running())


def test_the_versions_are_those_that_are_asked_for() -> None:
    pinned = running() | lock("requirements-dev.lock")
    for text in (text for extra in project().values() for text in extra):
        requirement = Requirement(text)
        if OF_CUDA.match(requirement.name) and requirement.name not in pinned:
            continue  # only some of the megatron-cores need it, which pyproject.toml has no way to say
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text


def test_the_environment_is_made_again_when_a_lock_changes() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "\n$(STAMP): $(wildcard requirements*.lock)\n" in makefile


@pytest.mark.parametrize(("target", "name"), [("setup", "requirements-dev.lock"), ("runtime", "requirements.lock")])
def test_torch_comes_first_where_its_build_is_asked_for(target: str, name: str) -> None:
    """pip then keeps it. Otherwise the package index decides."""
    _, _, torch, locked, *_ = steps(target, "TORCH=cpu")
    assert "--no-deps --torch-backend cpu " in torch and "torch= requirements.lock" in torch
    assert f"-r {name} -r $(" in locked and "tools.lock_for" in locked
    assert not any("--torch-backend" in step for step in steps(target))


def make(target: str, *variables: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    """Ask make what it would run."""
    command = [str(shutil.which("make")), "--no-print-directory", "-n", target, "VENV=/nowhere", *variables]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # `make test`
    return subprocess.run(command, cwd=ROOT, env=outside | {"PATH": path}, capture_output=True, text=True, check=False)


def steps(target: str, *variables: str) -> list[str]:
    """The commands that make would run, with this Python in the place of all that it looks for."""
    done = make(target, f"PYTHONS={sys.executable}", *variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def refused(*variables: str, path: str = os.environ["PATH"]) -> str:
    """What make says before it ends without having done anything."""
    done = make("setup", *variables, path=path)
    assert (done.returncode, done.stdout) == (2, "")
    return re.sub(r"^Makefile:\d+: \*\*\* ", "", done.stderr)


def test_the_first_python_that_starts_and_has_that_megatron_core_is_taken(tmp_path: Path) -> None:
    broken = tmp_path / "python3.11"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    said, made, *_ = steps("setup", f"PYTHONS={broken} {sys.executable}")
    assert made == f"{sys.executable} -m venv /nowhere" and "echo" in said and "--version" in said
    assert refused(f"PYTHONS={broken}").startswith(f"none of {broken} is on the PATH with its module ensurepip")


def test_make_without_a_python_says_what_to_do(tmp_path: Path) -> None:
    assert refused(path=str(tmp_path)) == (
        "none of python3.11 python3.12 python3.13 is on the PATH with its module ensurepip (Debian: python3-venv): "
        "install one, or say where one is with PYTHON=.  Stop.\n"
    )


def test_make_refuses_a_megatron_core_that_was_not_checked_with_those_that_were() -> None:
    assert refused("MEGATRON=0.18.1", f"PYTHONS={sys.executable}") == (
        f"MEGATRON=0.18.1: this version was not checked; give one of {', '.join(MEGATRON)}.  Stop.\n"
    )


@pytest.mark.parametrize("target", ["demo", "test"])
def test_each_start_says_which_python_and_megatron_core_it_runs_on(target: str) -> None:
    before_last, _ = steps(target, f"VENV={sys.prefix}")[-2:]
    done = subprocess.run(["sh", "-c", before_last], capture_output=True, text=True, check=True)
    versions = f"Python {platform.python_version()}, megatron-core {metadata.version('megatron-core')}"
    assert done.stdout == f"{sys.prefix}: {versions}\n"


def test_the_lock_is_named_by_any_python_that_can_run_the_project_and_refused_by_others() -> None:
    def said(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "tools.lock_for", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert said() == (0, f"{lock_for(here)}\n")
    checked = ", ".join(MEGATRON)
    assert said("--megatron", "0.18.1") == (
        2,
        f"error: MEGATRON=0.18.1: this version was not checked; give one of {checked}.\n",
    )
    with pytest.raises(UserError, match=re.escape("MEGATRON=0.19.2 needs one of Python 3.12, 3.13, and this is 3.11.")):
        lock_for("3.11", "0.19.2")
    with pytest.raises(UserError, match=re.escape("Python 3.14: this project needs one of 3.11, 3.12, 3.13")):
        lock_for("3.14")
