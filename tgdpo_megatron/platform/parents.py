"""A process that this program starts ends with the process that started it, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

PARENT = "TGDPO_PARENT"
"""Set by a process for those that it starts: its id."""
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends, if that one wished so.

    On Linux alone. Elsewhere ranks notice it by their signs of life (life.py), and other programs end by themselves.
    """
    parent = os.environ.pop(PARENT, None)  # those that this process starts have another parent
    # torchrun does not wish it; but a rank without its agent can only fail, and that late.
    if parent is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if sys.platform == "linux":
        _end_by_signal()
        # The child of a fork has to ask again. The signal comes when the *thread* that forked ends, so that a child
        # is only bound to a thread that lives as long as the process.
        os.register_at_fork(before=_note_thread, after_in_child=_end_by_signal_if_forked_by_main)
    if parent is not None and os.getppid() != int(parent):  # it ended before it could be heard of
        os._exit(1)


def _end_by_signal() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_forked_by_main = False


def _note_thread() -> None:
    global _forked_by_main
    _forked_by_main = threading.current_thread() is threading.main_thread()


def _end_by_signal_if_forked_by_main() -> None:
    if _forked_by_main:
        _end_by_signal()
