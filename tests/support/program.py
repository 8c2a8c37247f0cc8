"""Run a function on several ranks and collect what the first rank returns.

    run_ranks("tests.support.head", "compare", 2)

Each rank is a fresh Python process joined by the product's own launcher code.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROGRAM = "tests.support.program"


def run_ranks(
    module: str,
    function: str,
    world_size: int,
    *,
    program: str = PROGRAM,
    environment: Mapping[str, str] | None = None,
    timeout_minutes: float = 2,
    **arguments: Any,
) -> Any:
    """Call module.function(ranks, **arguments) on every rank; return the first rank's result (JSON types).

    Args:
        program: A module that calls `main` below, where something is to be done before the ranks are joined.
        environment: Variables that differ from this process's.
        timeout_minutes: A collective that takes longer ends the job.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        request = json.dumps([module, function, world_size, timeout_minutes, arguments, str(output)])
        done = subprocess.run(
            [sys.executable, "-m", program, request],
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(output.read_text())


def main(program: str = PROGRAM) -> None:
    module, function, world_size, timeout_minutes, arguments, output = json.loads(sys.argv[1])
    from tgdpo_megatron.errors import one_sentence_errors

    with one_sentence_errors():
        from tgdpo_megatron.platform.processes import job

        with job(program, processes=world_size, timeout_minutes=timeout_minutes) as ranks:
            result = getattr(importlib.import_module(module), function)(ranks, **arguments)
            if ranks.is_first:
                Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
