"""Programs in forks of a process that has loaded torch and Megatron once: each takes milliseconds to start.

Everything else is as a shell starts them: a process, its command line, its environment, its exit code. The module
itself is the process that forks; it reads commands as lines of JSON.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.faults.inputs.entry import BadInput
from tests.faults.inputs.run import MARK, ROOT, SECONDS_TO_START, Programs, limit
from tests.support.forked import fork

READY = "ready\n"


class ForkedPrograms(Programs):
    """Programs that start at once, but for entries that need a fresh Python."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.inputs.forked"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout and self._server.stdout.readline() == READY

    def run(self, entry: BadInput, folder: Path, environment: dict[str, str]) -> tuple[int | None, str, str]:
        if entry.fresh:
            return super().run(entry, folder, environment)
        return self.ask(
            entry.command,
            folder,
            environment,
            scratch=Path(environment["TMPDIR"]).parent,
            seconds=entry.seconds + SECONDS_TO_START,
            limits=entry.limits,
            obeys=entry.obeys,
        )

    def ask(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        *,
        scratch: Path,
        seconds: float,
        limits: Mapping[str, int] = MappingProxyType({}),
        obeys: bool = False,
    ) -> tuple[int | None, str, str]:
        """Exit code, standard output and standard error of `python -m COMMAND` in a folder. None where it was killed.

        Args:
            scratch: Folder for what it says.
            limits, obeys: As run.limit takes them.
        """
        assert self._server.stdin and self._server.stdout
        out, err = (scratch / name for name in ("out", "err"))
        request = {
            "command": [*command],
            "folder": str(folder),
            "environment": {**environment},
            "limits": {**limits},
            "obeys": obeys,
            "out": str(out),
            "err": str(err),
            "seconds": seconds,
        }
        print(json.dumps(request), file=self._server.stdin, flush=True)
        code = json.loads(self._server.stdout.readline())
        return code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")

    def close(self) -> None:
        """End the process that forks."""
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(timeout=60)


def serve() -> None:
    """Fork for each line of standard input, and answer with the exit code."""
    _load()
    print(READY, end="", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = fork(lambda request=request: _be(request))
        print(json.dumps(_code_of(child, request["seconds"])), flush=True)


def _load() -> None:
    """Import what the programs import, and nothing of which they check first whether it may be imported."""
    from tgdpo_megatron.quiet import quiet

    quiet()

    import tgdpo_megatron.checkpoint.convert
    import tgdpo_megatron.score
    import tgdpo_megatron.train  # noqa: F401


def _be(request: dict[str, Any]) -> None:
    """Become the program."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(name, flags, 0o666), number)
    limit(request["limits"], obeys=request["obeys"])
    module, *arguments = request["command"]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _code_of(child: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    assert MARK not in os.environ
    serve()
