"""The commands of docs/containers.md and of the Dockerfile, which install the project beside what a container has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PAGE = (ROOT / "docs" / "containers.md").read_text()


def joined(text: str) -> str:
    """Commands that are continued on another line, on one."""
    return re.sub(r"\s*\\\n\s*", " ", text)


def test_the_page_and_the_dockerfile_install_in_the_same_way() -> None:
    for command in (
        "python -m pip list .* > kept.txt",
        r"PIP_CONSTRAINT=kept.txt .* install \.$",
        "python -m pip list .* > now.txt",
    ):
        (page,), (dockerfile,) = (
            re.findall(rf"^(?:RUN )?({command})", joined(text).replace("--no-cache-dir ", ""), flags=re.MULTILINE)
            for text in (PAGE, DOCKERFILE)
        )
        assert page == dockerfile


def test_what_was_built_together_is_kept_and_what_this_project_needs_newer_is_not() -> None:
    (pattern,) = set(re.findall(r"grep -iE '(.*)'", PAGE + DOCKERFILE))
    kept = [
        *("torch==2.13.0a0+8145d630e8.nv26.6", "torchvision==0.28", "torch_tensorrt==2.13", "triton==3.7.1+git.nv26.6"),
        *("transformer_engine==2.16.0+70f53666", "transformer-engine-cu13==2.16.0", "megatron-core==0.18.2"),
        *("megatron_bridge==0.5.1", "flash_attn==2.7.4.post1", "apex==0.1", "nvidia-nccl-cu13==2.30", "numpy==1.26.4"),
    ]
    others = ["transformers==4.57.6", "huggingface-hub==0.36.0", "packaging==23.2", "pytorch-lightning==2.5", "pip==26"]
    done = subprocess.run(["grep", "-iE", pattern], input="\n".join([*others, *kept]), capture_output=True, text=True)
    assert done.stdout.splitlines() == kept


def test_the_dockerfile_refuses_packages_as_a_program_does(tmp_path: Path) -> None:
    (code,) = re.findall(r'python -P -c "(.*?)"', DOCKERFILE)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    accepted, refused = (
        subprocess.run(
            [sys.executable, "-P", "-c", code],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, *others]))},
            capture_output=True,
            text=True,
        )
        for others in ([], [tmp_path])
    )
    assert accepted.returncode == 0, accepted.stderr
    assert refused.returncode != 0 and "is not NVIDIA's apex" in refused.stderr


def test_every_version_of_a_container_has_an_address_to_look_it_up() -> None:
    (carried,) = re.findall(r"^## What the containers carry$(.*?)^## ", PAGE, flags=re.MULTILINE | re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in carried.splitlines() if line[:1] == "|"]
    tags = [row for row in rows if re.match(r"v?\d", row[0])]
    assert len(tags) > 15
    assert [row[0] for row in tags if "](https://" not in row[-1] and row[-1] != "the same"] == []


def test_the_dockerfile_is_short_and_its_folder_holds_what_the_wheel_is_made_of() -> None:
    assert len(DOCKERFILE.splitlines()) <= 25
    everything, *admitted = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith(("#", "**"))
    ]
    assert everything == "*" and all((ROOT / name.removeprefix("!")).exists() for name in admitted)
    needed = {
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
        "tgdpo_megatron",
        "recipes",
        "tools",
        "conf",
        "slurm",
    }
    assert {name.removeprefix("!") for name in admitted} == needed
