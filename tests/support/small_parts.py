"""A conversion program with blocks and parts so small that a tiny model has hundreds, each finished in a moment.

STOP_AFTER=3 python -m tests.support.small_parts tools.convert_hf_to_megatron HF_FOLDER MEGATRON_FOLDER …

With STOP_AFTER, the program stops itself as soon as so many parts are finished, until it is sent SIGCONT.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

from tgdpo_megatron.checkpoint import convert, jobs
from tgdpo_megatron.checkpoint.work import Work


def main() -> None:
    convert.BLOCK_BYTES, jobs.PART_ELEMENTS = 1000, 500
    if parts := os.environ.get("STOP_AFTER"):
        stop_after(int(parts))
    module = sys.argv.pop(1)
    importlib.import_module(module).main()


def stop_after(parts: int) -> None:
    keep = Work._keep

    def keep_and_stop(self: Work, part: int, record: dict[str, Any]) -> None:
        keep(self, part, record)
        if len(self.finished()) == parts:
            os.kill(os.getpid(), signal.SIGSTOP)

    Work._keep = keep_and_stop  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
