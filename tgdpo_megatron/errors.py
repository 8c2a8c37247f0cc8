"""What a user can get wrong is one exception type: a sentence, and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import NoReturn

USER_ERROR, RANK_DIED, INTERRUPTED = 2, 3, 130
"""Exit codes."""


class UserError(Exception):
    """A mistake the user can mend.

    The message is one sentence: what is wrong, where (file and line, or key), and what to do.
    Programs print it without a traceback and exit with code 2.
    """


class NonFiniteError(UserError):
    """Training met a number that is not finite; nothing after the last good checkpoint was kept."""


class CommandLine(argparse.ArgumentParser):
    """A parser whose complaint is a UserError, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see {self.prog} --help.")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory is left: torch's on a GPU or a CPU, Python's, or an NVIDIA library's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


_NO_MEMORY = (
    *("can't allocate memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory"),
    *("out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),  # NVIDIA's libraries
)


@contextlib.contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Turn a user's mistake inside the block into one sentence on stderr and exit code 2, without a traceback.

    A lost peer ends this rank as well, quietly: the launcher names the rank that died. Libraries' warnings are
    not shown, unless Python was started with -W.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    try:
        yield
        return
    except UserError as error:
        message, code = str(error), USER_ERROR
    except KeyboardInterrupt:
        message, code = "interrupted.", INTERRUPTED
    except RuntimeError as error:
        if not _lost_a_peer(error):
            raise
        message, code = "another rank ended; this one stops too.", RANK_DIED
    watched = "TGDPO_LAUNCHED" in os.environ
    if int(os.environ.get("RANK", 0)) > 0:
        # The first rank speaks for all and tidies up; then its launcher ends this one.
        time.sleep(1 if watched else 3)
    if watched:
        _leave_message(message)
    else:
        print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(code)  # sys.exit would wait for collectives with ranks that are gone
    sys.exit(code)


_LOST_A_PEER = (
    *("Connection closed by peer", "Connection reset", "Broken pipe"),  # gloo, and torch's store
    *("remote process exited", "NCCL communicator was aborted"),  # NCCL
)


def _lost_a_peer(error: RuntimeError) -> bool:
    return any(sign in str(error) for sign in _LOST_A_PEER)


def _leave_message(message: str) -> None:
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        json.dump({"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}, file)
