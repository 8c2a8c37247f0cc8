"""A conversion program with blocks and parts so small that a tiny model has hundreds, each finished in a moment.

python -m tests.support.small_parts tools.convert_hf_to_megatron HF_FOLDER MEGATRON_FOLDER …
"""

from __future__ import annotations

import importlib
import sys

from tgdpo_megatron.checkpoint import convert, jobs


def main() -> None:
    convert.BLOCK_BYTES, jobs.PART_ELEMENTS = 1000, 500
    module = sys.argv.pop(1)
    importlib.import_module(module).main()


if __name__ == "__main__":
    main()
