"""How programs are started and called: `python -m recipes.train` in the repository, `tgdpo-train` once it is installed.

recipes, tools, conf and slurm are folders of the repository beside this package. Names as common as these must not lie
in an environment that others share, so the wheel holds them inside of this package, in the folder `repository`. A
console script puts that folder on the path of its own process, and of no other: variables such as PYTHONPATH would
reach every Python that comes after it, also another one, such as that of a job.

    python -m tgdpo_megatron MODULE [ARGUMENTS]    # the same for any of the programs, as jobs of Slurm do it
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
INSTALLED = (_PACKAGE / "repository").is_dir()
"""Whether this is the wheel's package, and not the repository's."""
ROOT = _PACKAGE / "repository" if INSTALLED else _PACKAGE.parent
"""The folder that holds recipes, tools, conf and slurm."""
PYTHON = (sys.executable, *(("-P", "-m", "tgdpo_megatron") if INSTALLED else ("-m",)))
"""How a program starts another one: its module and arguments follow. -P: the user's folder is not searched for ours."""

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

WITHOUT_SCRIPT = ("recipes.convert", "tools.marked_pairs")
"""Programs that only others start: the jobs of tools.submit, and tools.demo."""
_SCRIPTS = {module: script for script, module in PROGRAMS.items()}
_MODULE = re.compile(r"(?<![\w./-])(?:python -m )?((?:recipes|tools)\.[a-z_]+)\b(?!\.\w)")


def as_called(text: str) -> str:
    """A text for the user, in which programs have the names that they have here.

    Our texts are written for the repository. In the wheel, `python -m recipes.train`, or recipes.train for short,
    becomes `tgdpo-train`.
    """
    return _MODULE.sub(_called, text) if INSTALLED else text


def _called(named: re.Match[str]) -> str:
    words, module = named[0], named[1]
    return _SCRIPTS.get(module) or words.replace("python -m", "python -m tgdpo_megatron")


def main() -> None:
    """Run a program in this process, as `python -m MODULE` does."""
    name, *arguments = sys.argv
    module = PROGRAMS.get(Path(name).name)
    if module is None:
        module, *arguments = arguments or [""]
        if module not in (known := sorted((*_SCRIPTS, *WITHOUT_SCRIPT))):
            what = f"'{module}' is no program" if module else "no program is named"
            print(f"error: {what}; name one of {', '.join(known)}.", file=sys.stderr)
            sys.exit(2)
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder of the script, or the user's: a folder `recipes` there is not ours
    sys.path.insert(0, str(ROOT))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
