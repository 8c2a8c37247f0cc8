"""Forks of tests end as programs do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
FORKED = """
import os, sys
from tests.support.forked import fork
child = fork(lambda: exec(sys.argv[1]))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(
    "program", ["1", "sys.exit()", "sys.exit(None)", "sys.exit(True)", "sys.exit(7)", "sys.exit('words')", "1 / 0"]
)
def test_a_fork_ends_with_the_exit_code_and_the_last_words_of_pythons_own(program: str) -> None:
    fork, own = (
        subprocess.run([sys.executable, "-c", *command], cwd=ROOT, capture_output=True, text=True, check=False)
        for command in ([FORKED, program], [f"import sys\n{program}"])
    )
    assert fork.returncode == own.returncode
    assert fork.stderr.splitlines()[-1:] == own.stderr.splitlines()[-1:]


def test_a_free_port_is_below_those_that_connections_get_and_is_not_given_twice() -> None:
    ports = [free_port() for _ in range(5)]
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len({*ports}) == 5 and min(ports) >= 1024 and max(ports) < first, os.getpid()
