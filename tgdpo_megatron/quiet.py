"""What libraries say on the way: silenced in one place, and heard again with TGDPO_DEBUG=1.

Nothing here imports torch: libraries read some of these switches only once, while they are imported.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

_PROGRESS_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")  # the first: transformers' too


def debugging() -> bool:
    """Whether TGDPO_DEBUG=1 asks for all that can be said."""
    return os.environ.get("TGDPO_DEBUG", "") not in ("", "0")


def quiet() -> None:
    """Show a user what this program says, and not the warnings, logs and progress bars of its libraries.

    Holds for the processes that this one starts as well. Every program calls this first. Does nothing under
    TGDPO_DEBUG=1; warnings that were asked for with python -W or PYTHONWARNINGS stay as they were asked for.
    """
    if debugging():
        return
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        os.environ["PYTHONWARNINGS"] = "ignore"
    logging.disable(logging.ERROR)  # a level would not do: some libraries give each of their loggers its own
    for switch in _PROGRESS_BARS:
        os.environ.setdefault(switch, "1")
