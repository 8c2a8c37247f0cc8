"""How programs are started and called: `python -m recipes.train` in the repository, `tgdpo-train` once it is installed.

recipes, tools, conf and slurm are folders of the repository beside this package. Names as common as these must not lie
in an environment that others share, so the wheel holds them inside of this package, in the folder `repository`. A
console script puts that folder on Python's path, for itself and for the processes that it starts, and for nobody else.

    python -m tgdpo_megatron MODULE [ARGUMENTS]    # the same for any of the programs, as jobs of Slurm do it
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import NoReturn

_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE / "repository" if (_PACKAGE / "repository").is_dir() else _PACKAGE.parent
"""The folder that holds recipes, tools, conf and slurm."""

PROGRAMS = {
    "tgdpo-align": "recipes.align",
    "tgdpo-annotate": "tools.annotate",
    "tgdpo-answers": "tools.answers",
    "tgdpo-certify": "tools.certify",
    "tgdpo-compare": "tools.compare",
    "tgdpo-convert": "tools.convert_hf_to_megatron",
    "tgdpo-demo": "tools.demo",
    "tgdpo-export": "tools.convert_megatron_to_hf",
    "tgdpo-plan": "tools.plan",
    "tgdpo-prepare": "tools.prepare_pairs",
    "tgdpo-runs": "tools.runs",
    "tgdpo-sample": "tools.sample",
    "tgdpo-score": "recipes.score",
    "tgdpo-submit": "tools.submit",
    "tgdpo-tiny-model": "tools.make_tiny_model",
    "tgdpo-to-bridge": "tools.convert_hf_to_bridge",
    "tgdpo-tokens": "tools.tokens",
    "tgdpo-train": "recipes.train",
    "tgdpo-view": "tools.view",
}
"""Console script -> the module that it runs. pyproject.toml lists the scripts as well."""

BY_SCRIPT = "TGDPO_BY_SCRIPT"
"""Set by a console script for all processes of its program."""
_SCRIPTS = {module: script for script, module in PROGRAMS.items()}
_MODULE = re.compile(r"(?<![\w./-])(?:python -m )?((?:recipes|tools)\.[a-z_]+)\b(?!\.\w)")


def as_called(text: str) -> str:
    """A text for the user, in which programs have the names by which this one was started.

    Our texts are written for the repository. Where a console script runs, `python -m recipes.train`, or recipes.train
    for short, becomes `tgdpo-train`.
    """
    return _MODULE.sub(_called, text) if BY_SCRIPT in os.environ else text


def _called(named: re.Match[str]) -> str:
    words, module = named[0], named[1]
    return _SCRIPTS.get(module) or words.replace("python -m", "python -m tgdpo_megatron")


def main() -> NoReturn:
    """Become `python -m MODULE`, which is what ranks are, too: signals, tracebacks and workers are then the same."""
    name, *arguments = sys.argv
    by_script = {BY_SCRIPT: "1"} if (module := PROGRAMS.get(Path(name).name)) else {}
    if module is None:
        if not arguments:
            print(f"error: name a program: {', '.join(sorted(_SCRIPTS))}.", file=sys.stderr)
            sys.exit(2)
        module, *arguments = arguments
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # PYTHONSAFEPATH: a folder `recipes` where the user stands is not ours.
    environment = {**os.environ, **by_script, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)
