"""Packages travel to a GPU machine whole or not at all, and machines without a GPU are told so."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tgdpo_megatron.errors import UserError
from tgdpo_megatron.platform.versions import MEGATRON
from tools.file_parts import cut, join
from tools.gpu_environment import _requirements, read_pins
from tools.gpu_wheels import _lacking, pack, read_have

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def a_file(path: Path, size: int) -> bytes:
    content = os.urandom(size)
    path.write_bytes(content)
    return content


def cut_away(folder: Path) -> bytes:
    content = a_file(folder / "core.whl", 10_007)
    assert len(cut(folder / "core.whl", folder, size=1000)) == 11
    (folder / "core.whl").unlink()
    return content


def test_parts_make_the_file_again_byte_for_byte(tmp_path: Path) -> None:
    content = cut_away(tmp_path)
    for place in range(2):  # a second time nothing is left to do
        assert join(tmp_path) == [tmp_path / "core.whl"], place
        assert (tmp_path / "core.whl").read_bytes() == content


def test_sha256sum_accepts_the_joined_file(tmp_path: Path) -> None:
    cut_away(tmp_path)
    join(tmp_path)
    checked = subprocess.run(["sha256sum", "-c", "core.whl.sha256"], cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("harm", ["flip a bit", "lose the first", "lose the last", "swap two"])
def test_harmed_parts_are_refused_and_leave_no_file(tmp_path: Path, harm: str) -> None:
    cut_away(tmp_path)
    first, second, last = (tmp_path / f"core.whl.part-{number:03d}" for number in (0, 1, 10))
    if harm == "flip a bit":
        second.write_bytes(bytes([second.read_bytes()[0] ^ 1]) + second.read_bytes()[1:])
    elif harm == "swap two":
        one, other = first.read_bytes(), second.read_bytes()
        first.write_bytes(other)
        second.write_bytes(one)
    else:
        (first if harm == "lose the first" else last).unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        join(tmp_path)
    assert not list(tmp_path.glob("core.whl")) and not list(tmp_path.glob("*.tmp"))


def test_packed_folders_keep_to_the_size_and_hold_every_file(tmp_path: Path) -> None:
    sizes = {"a.whl": 700_000, "b.whl": 900_000, "c.whl": 5 * MIB + 3, "d.tar.gz": 10}
    contents = {name: a_file(tmp_path / name, size) for name, size in sizes.items()}
    folders = pack([tmp_path / name for name in sizes], tmp_path, mib=3)
    assert all(sum(file.stat().st_size for file in folder.iterdir()) <= 3 * MIB for folder in folders)
    join(tmp_path)
    assert {name: next(tmp_path.rglob(name)).read_bytes() for name in sizes} == contents


def a_wheel(folder: Path, name: str, version: str, needs: str = "") -> Path:
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        requires = f"Requires-Dist: {needs}\n" if needs else ""
        archive.writestr(f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n{requires}")
    return wheel


def test_what_the_machine_has_travels_only_where_a_package_that_travels_refuses_its_version(tmp_path: Path) -> None:
    wheels = {
        "new": a_wheel(tmp_path, "new", "1.0", "middle>=2"),
        "middle": a_wheel(tmp_path, "middle", "2.5", 'base<3; python_version >= "3.12"'),
        "base": a_wheel(tmp_path, "base", "2.0"),
        "idle": a_wheel(tmp_path, "idle", "4.0"),
    }
    old = {"middle": Version("1.9"), "base": Version("3.1"), "idle": Version("1.0")}
    assert _lacking(wheels, old, "3.12") == [wheels["base"], wheels["middle"], wheels["new"]]
    assert _lacking(wheels, old, "3.11") == [wheels["middle"], wheels["new"]]
    assert _lacking(wheels, {**old, "middle": Version("2.0")}, "3.12") == [wheels["new"]]


def test_a_list_of_packages_is_read_and_a_wrong_line_named(tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("PyYAML==6.0.3\ntyping_extensions\n")
    assert read_have(listed) == {"pyyaml": Version("6.0.3"), "typing-extensions": None}
    listed.write_text("numpy==2.4.6\nPackage  Version\n")
    with pytest.raises(UserError, match="list.txt:2"):
        read_have(listed)


def test_pins_fit_the_projects_ranges_and_leave_torch_to_the_machine() -> None:
    pins = read_pins()
    ranges = [
        Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    others = {canonicalize_name(need.name): need for need in ranges if need.name != "torch"}
    assert {name for name, need in others.items() if pins.get(name) not in need.specifier} == set()
    assert [name for name in pins if name in {"torch", "triton", "apex"} or name.startswith("nvidia")] == []


def test_the_newest_checked_megatron_core_is_pinned() -> None:
    """NVIDIA's containers have a Transformer Engine that the oldest one is not accepted with."""
    assert read_pins()["megatron-core"] == list(MEGATRON)[-1] and "3.12" in MEGATRON[read_pins()["megatron-core"]]


def a_machines_python(folder: Path, megatron: str) -> Path:
    """A Python with a torch for CUDA, as far as it is looked at, and a megatron-core."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    (packages / "torch").mkdir()
    (packages / "torch" / "__init__.py").write_text(
        "__version__ = '2.11.0'\n\nclass version:\n    cuda = '13.0'\n\n"
        "class cuda:\n    is_available = staticmethod(lambda: False)\n"
    )
    info = packages / f"megatron_core-{megatron}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {megatron}\n")
    return folder / "bin" / "python"


@pytest.mark.parametrize("megatron", ["0.16.0rc0", "0.20.0"])
def test_a_machines_megatron_core_that_is_not_accepted_is_one_sentence_and_nothing_is_installed(
    megatron: str, tmp_path: Path
) -> None:
    """Another one beside it would be refused at every start."""
    python = a_machines_python(tmp_path / "machine", megatron)
    command = [str(python), "-m", "tools.gpu_environment", str(tmp_path / "environment")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: megatron-core {megatron} was not checked with this project; install one of {', '.join(MEGATRON)}, or "
        "set TGDPO_UNCHECKED_VERSIONS=1 to use it all the same.\n",
    )
    assert "packages from" not in done.stdout


def test_a_machines_megatron_core_stays_alone() -> None:
    """pip is not asked for one: it would put another over a pre-release that a container carries."""
    here, missing = (
        {one for one in _requirements(packages) if one.startswith("megatron")}
        for packages in ({"megatron-core": "0.18.0rc1"}, {})
    )
    assert (len(here), len(missing)) == (0, 1)


def test_make_gpu_without_a_gpu_says_why_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    (work / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # not as part of a make
    environment = {**own, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["make", "gpu"], cwd=work, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    assert "skipped, because nvidia-smi finds no GPU" in done.stdout
    assert [path.name for path in work.iterdir()] == ["Makefile"]


def test_an_environment_on_a_python_without_torch_is_refused_in_a_sentence(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    command = [str(bare / "bin" / "python"), "-m", "tools.gpu_environment", str(tmp_path / "environment")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "run this with the Python that has torch" in done.stderr


def test_an_environment_made_from_a_virtual_environment_sees_its_packages_and_cuda_libraries(tmp_path: Path) -> None:
    below, above = tmp_path / "below", tmp_path / "above"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(below)], check=True)
    packages = next((below / "lib").glob("python*")) / "site-packages"
    (packages / "only_below.py").write_text("answer = 42\n")
    (packages / "nvidia" / "cudnn" / "lib").mkdir(parents=True)
    (packages / "nvidia" / "cudnn" / "lib" / "libcudnn.so.9").touch()
    make = f"from pathlib import Path; from tools.gpu_environment import _make; _make(Path({str(above)!r}))"
    for _ in range(2):  # again changes nothing
        subprocess.run([str(below / "bin" / "python"), "-c", make], cwd=ROOT, check=True)
    ask = (
        "import only_below, os, sysconfig; print(only_below.answer, "
        "os.path.exists(sysconfig.get_path('purelib') + '/nvidia/cudnn/lib/libcudnn.so.9'))"
    )
    done = subprocess.run([str(above / "bin" / "python"), "-c", ask], capture_output=True, text=True)
    assert done.stdout == "42 True\n", done.stderr
