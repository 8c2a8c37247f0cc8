"""Run a function on several ranks and collect what the first rank returns.

    run_ranks("tests.support.head", "compare", 2)

Each rank is a process of its own. Where nothing else is asked for, it is forked from one that has imported torch and
Megatron, which takes most of a start; otherwise the product's own launcher starts it.
"""

from __future__ import annotations

import atexit
import functools
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
ROOT = Path(__file__).resolve().parents[2]


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
        run = _launched if environment or program != PROGRAM else _forked
        codes, said = run(program, request, world_size, {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})})
        assert not any(codes), said[-6000:]
        return json.loads(output.read_text())


def _launched(program: str, request: str, _: int, environment: Mapping[str, str]) -> tuple[list[int], str]:
    done = subprocess.run(
        [sys.executable, "-m", program, request],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return [done.returncode], done.stdout


def _forked(_: str, request: str, world_size: int, environment: Mapping[str, str]) -> tuple[list[int], str]:
    forge = _forge()
    assert forge.stdin is not None and forge.stdout is not None
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        job = {"arguments": [request], "size": world_size, "environment": dict(environment), "log": log.name}
        forge.stdin.write(json.dumps(job) + "\n")
        forge.stdin.flush()
        return json.loads(forge.stdout.readline()), log.read()


@functools.cache
def _forge() -> subprocess.Popen[str]:
    """This process's forge, which lives as long."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    forge = subprocess.Popen(
        [sys.executable, "-m", "tests.support.forge"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    atexit.register(forge.kill)
    return forge


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
