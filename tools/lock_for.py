"""Print the name of the lock that pins megatron-core for the Python that runs this. `make` installs it.

Nothing but Python is needed for this.
"""

import sys

from tgdpo_megatron.errors import CommandLine, one_sentence_errors
from tgdpo_megatron.platform.versions import lock_for


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(prog="python -m tools.lock_for", description=__doc__)
        parser.add_argument("--megatron", default="", help="version of megatron-core; default: the newest checked one")
        print(lock_for(f"{sys.version_info.major}.{sys.version_info.minor}", parser.parse_args().megatron))


if __name__ == "__main__":
    main()
