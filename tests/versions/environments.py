"""Environments made by uv, of the locks and of `pip install .`: hard links of one copy of each package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tgdpo_megatron.platform.versions import MEGATRON, PYTHONS, lock_for

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / ".venv-versions"
_UV = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "cert": "SSL_CERT_FILE",
}
"""A setting of pip -> the variable that says the same to uv, which does not read pip's settings."""


class NoEnvironmentError(Exception):
    """It could not be made. The message says why."""


@dataclass(frozen=True)
class Environment:
    """A Python and a megatron-core."""

    python: str
    megatron: str

    @property
    def name(self) -> str:
        return f"Python {self.python}, megatron-core {self.megatron}"

    @property
    def short(self) -> str:
        """The name of a folder."""
        return f"python-{self.python}-megatron-{self.megatron}"

    @property
    def folder(self) -> Path:
        return PLACE / self.short

    @property
    def program(self) -> Path:
        """Its Python."""
        return self.folder / "bin" / "python"

    def make(self) -> None:
        """Install what the locks pin, with what torch's build brings, and remove all else.

        Raises:
            NoEnvironmentError: There is no such Python, or a package cannot be installed.
        """
        if not self.program.exists():
            _uv("venv", "--seed", "--python", self.python, "--no-python-downloads", str(self.folder))
        all_of_it = str(self.folder / "packages.txt")
        Path(all_of_it).unlink(missing_ok=True)  # uv prefers what it wrote there before, and may then find no wheels
        locks = ("requirements-dev.lock", lock_for(self.python, self.megatron))
        _uv("pip", "compile", "--python", str(self.program), "--output-file", all_of_it, *locks)
        _uv("pip", "sync", "--python", str(self.program), all_of_it)

    def install(self, folder: Path) -> Path:
        """Make a clean environment of what the project itself asks for, with this megatron-core and the locks' torch.

        Args:
            folder: It is emptied first.

        Returns:
            Where its console scripts are.

        Raises:
            NoEnvironmentError: As make.
        """
        _uv("venv", "--clear", "--python", str(self.program), str(folder))
        (torch,) = re.findall(r"^torch==.*", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
        beside = (torch, f"megatron-core=={self.megatron}")
        with tempfile.TemporaryDirectory() as place:  # setuptools leaves files among the sources that it builds from
            source = Path(place) / "source"
            shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info"))
            _uv("pip", "install", "--python", str(folder / "bin" / "python"), str(source), *beside)
        return folder / "bin"


ENVIRONMENTS = [
    *(Environment(pythons[0], version) for version, pythons in MEGATRON.items()),
    Environment(PYTHONS[-1], list(MEGATRON)[-1]),
]
"""Each megatron-core with the oldest Python that it has packages for, and the newest with the newest."""


def _uv(*arguments: str) -> None:
    uv = PLACE / "uv" / "bin" / "uv"
    if not uv.exists():
        _run(sys.executable, "-m", "venv", str(PLACE / "uv"))
        _run(str(PLACE / "uv" / "bin" / "python"), "-m", "pip", "install", "--quiet", "uv")
    _run(str(uv), *arguments, "--quiet")


def _run(*command: str) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | _settings_of_uv(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise NoEnvironmentError(" ".join(done.stderr.split())[-400:])


def _settings_of_uv() -> dict[str, str]:
    """Where packages are looked for, as pip does it."""
    said = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    settings = dict(re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", said, flags=re.MULTILINE))
    separator = {"find-links": ","}
    found = {
        theirs: separator.get(ours, " ").join(settings[ours].split())
        for ours, theirs in _UV.items()
        if ours in settings
    }
    return found | {"UV_INDEX_STRATEGY": "unsafe-best-match"}
