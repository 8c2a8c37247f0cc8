"""Token-level guided preference optimisation on Megatron-Core."""

import sys

from tgdpo_megatron.errors import USER_ERROR, UserError
from tgdpo_megatron.platform.versions import check_python

__version__ = "0.1.0"

try:
    check_python()
except UserError as error:  # said here, because no program of ours starts on a Python that is too old
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(USER_ERROR) from None
