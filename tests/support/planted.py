"""Mistakes planted in the real programs: code that every rank runs before the program's own.

    say("recipes.train", …, **planted(tmp_path, "import tgdpo_megatron.data.prepare as prepare; …"))

Python imports `sitecustomize` before anything else, from any folder of PYTHONPATH.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def planted(folder: Path, code: str, *, launched: bool) -> dict[str, str]:
    """Environment variables that plant `code` in a program.

    Args:
        folder: Where to write it.
        launched: Plant in the ranks that a launcher starts, and not in the launcher.
    """
    where = '"RANK" in os.environ' if launched else "True"
    (folder / "sitecustomize.py").write_text(f"import os\nif {where}:\n{textwrap.indent(code, '    ')}")
    return {"PYTHONPATH": f"{folder}:{ROOT}"}
