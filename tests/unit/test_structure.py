"""How the code hangs together: imports run one way, and the formula is near the command line."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("tgdpo_megatron", "recipes", "tools", "bench")


def module_imports() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports when it is imported itself."""
    files = {_module(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    return {name: _imported(path, files) - {name} for name, path in files.items()}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path, files: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text()).body:  # module level only; TYPE_CHECKING blocks are not run
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(files)


def test_the_library_knows_nothing_of_what_is_built_on_it() -> None:
    """Not inside functions either."""
    for path in (ROOT / "tgdpo_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in named:
                assert name.partition(".")[0] not in ("recipes", "tools", "bench", "tests"), f"{path}: {name}"


def test_no_module_imports_itself_through_others() -> None:
    imports = module_imports()
    reached: dict[str, set[str]] = {name: set(direct) for name, direct in imports.items()}
    changed = True
    while changed:
        changed = False
        for name, modules in reached.items():
            further = set().union(*(reached[module] for module in modules)) | modules
            changed |= further != modules
            reached[name] = further
    assert [name for name, modules in reached.items() if name in modules] == []


def test_the_library_imports_neither_recipes_nor_tools() -> None:
    upward = {
        name: {module for module in modules if not module.startswith("tgdpo_megatron")}
        for name, modules in module_imports().items()
        if name.startswith("tgdpo_megatron")
    }
    assert {name: modules for name, modules in upward.items() if modules} == {}


def test_formula_is_at_most_five_frames_and_four_files_from_the_command_line(
    tmp_path: Path, checkpoint: Path, pairs_file: Path
) -> None:
    program = """
import json, runpy, sys, traceback
from tgdpo_megatron.losses import tgdpo as module
module = sys.modules["tgdpo_megatron.losses.tgdpo"]
real = module.logsigmoid
def seen(margin):
    print("STACK", json.dumps([(frame.filename, frame.name) for frame in traceback.extract_stack()[:-1]]), flush=True)
    return real(margin)
module.logsigmoid = seen
sys.argv[0] = "recipes.train"
runpy.run_module("recipes.train", run_name="__main__")
"""
    arguments = [
        f"model.checkpoint={checkpoint}",
        f"model.guidance={checkpoint}",
        f"data.train={pairs_file}",
        f"train.output={tmp_path / 'run'}",
        "train.train_iters=1",
        "train.global_batch_size=1",
        "train.micro_batch_size=1",
        "optimizer.lr_warmup_iters=0",
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    stack = next((line for line in done.stdout.splitlines() if line.startswith("STACK")), None)
    assert stack, done.stderr
    folders = tuple(str(ROOT / package) for package in PACKAGES)  # not a virtual environment below ROOT
    ours = [(name, file) for file, name in json.loads(stack.removeprefix("STACK ")) if file.startswith(folders)]
    assert ours[-1][0] == "tgdpo"
    assert len(ours) <= 5, ours
    assert len({file for _, file in ours}) <= 4, ours
