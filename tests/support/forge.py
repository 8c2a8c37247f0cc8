"""A process that forks ranks on request, so that jobs of tests start in a second.

It reads a request a line from stdin, {"arguments", "size", "environment", "log"}, runs a job of tests.support.program,
and answers a line with the exit codes. It ends when nobody can send a request any more.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.support.forked import Job, import_everything

_PATIENCE = 2.0
"""Seconds that ranks have to end once one of them has failed, as under the product's launcher."""


def main() -> None:
    import_everything()
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.clear()
        os.environ.update(request["environment"])
        job = Job("tests.support.program", request["arguments"], Path(request["log"]), request["size"])
        print(json.dumps(job.finish(_PATIENCE)), flush=True)


if __name__ == "__main__":
    main()
