"""How a program ends when something goes wrong.

A wrong input, or a refusal of the operating system, is one sentence and exit code 2. Any other exception is one that
nobody expected: its traceback is shown, with the rank it happened on, and the exit code is 1. A rank that stops because
of another rank, and an interrupted program, have exit codes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Collection, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any, NoReturn

from tgdpo_megatron.commands import as_called
from tgdpo_megatron.platform.interrupts import asking
from tgdpo_megatron.platform.parents import end_with_parent
from tgdpo_megatron.quiet import debugging, quiet

UNEXPECTED, USER_ERROR, REQUEUE, INTERRUPTED = 1, 2, 75, 130
"""Exit codes of programs. REQUEUE asks a batch system to start the same command again: a signal or the clock ended the
work before it was done. INTERRUPTED: Ctrl-C did."""
RANK_DIED, RANK_SILENT = 3, 4
"""Exit codes with which a rank tells its launcher about another: that it ended, or that it stands still."""
SHOW_STACKS = signal.SIGUSR2
"""A process that gets this signal writes to stderr where each of its threads is, and goes on."""
_STDERR = 2


class UserError(Exception):
    """A mistake the user can mend.

    The message is one sentence: what is wrong, where (file and line, or key), and what to do.
    Programs print it without a traceback and exit with code 2.
    """


class NonFiniteError(UserError):
    """Training met a number that is not finite; nothing after the last good checkpoint was kept."""


class StoppedError(Exception):
    """A signal or the clock asked for the end of the work. The message says what is kept, and how to go on.

    Args:
        code: Exit code of the program, REQUEUE or INTERRUPTED.
    """

    def __init__(self, message: str, code: int = REQUEUE) -> None:
        super().__init__(message)
        self.code = code


class LostRankError(Exception):
    """Another rank failed. This rank did nothing wrong, but cannot go on."""


class CommandLine(argparse.ArgumentParser):
    """A parser whose complaint is a UserError, like every other mistake.

    Args:
        others: What other programs call an option -> our option, such as --max-tokens -> --max-new-tokens.
    """

    def __init__(self, *, others: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._others = others or {}

    def format_help(self) -> str:
        return as_called(super().format_help())

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            name = unknown[1].replace("_", "-")
            ours = self._others.get(name, name)
            if ours in self._option_string_actions and ours != unknown[1]:
                message = f"{unknown[1]} is called {ours} here"
        for pattern, words in _ARGPARSE.items():
            message = re.sub(pattern, words, message)
        raise UserError(f"command line: {message}; see {self.prog} --help.")


_ARGPARSE = {
    r"^argument (.*?): invalid int value: (.*)": r"\1 \2 is refused: it should be a whole number",
    r"^argument (.*?): invalid float value: (.*)": r"\1 \2 is refused: it should be a number",
    r"^argument (.*?): invalid choice: (.*) \(choose from (.*)\)": r"\1 \2 is refused: it should be one of \3",
    r"^argument (.*?): expected one argument": r"\1 needs a value",
    r"^argument (.*?): expected at least one argument": r"\1 needs a value",
    r"^argument (.*?): ignored explicit argument (.*)": r"\1 takes no value, but \2 was given",
    r"^the following arguments are required: (.*)": r"\1 must be given",
    r"^unrecognized arguments: (.*)": r"\1 is not known here",
}
"""What argparse says -> the same in plain words."""


def at_least(parsed: argparse.Namespace, **least: int) -> None:
    """Refuse numbers of a command line without meaning: option -> the smallest number that has one.

    Raises:
        UserError: A number is smaller.
    """
    for name, number in least.items():
        if getattr(parsed, name) < number:
            raise UserError(f"--{name.replace('_', '-')} {getattr(parsed, name)}: give {number} or more.")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory is left: torch's on a GPU or a CPU, Python's, or an NVIDIA library's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


_NO_MEMORY = (
    *("can't allocate memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory"),
    *("out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),  # NVIDIA's libraries
)


def refusal(error: BaseException) -> str | None:
    """The sentence for a wrong input or a refusal of the operating system; None for any other exception."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) or (type(error).__name__ == "SafetensorError" and "(os error " in str(error)):
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        why = (isinstance(error, OSError) and error.strerror) or in_short(error)
        return f"{where}the operating system refused with '{why}'; TGDPO_DEBUG=1 shows at which line of the program."
    if ran_out_of_memory(error):
        return f"memory ran out ({in_short(error)}); TGDPO_DEBUG=1 shows at which line of the program."
    return None


@contextlib.contextmanager
def smaller_batches(batch_tokens: int) -> Iterator[None]:
    """Say what helps where memory runs out inside the block: another --batch-tokens."""
    try:
        yield
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        raise UserError(
            f"memory ran out with --batch-tokens {batch_tokens}; give a smaller number, or a larger machine."
        ) from error


def lost_a_rank(error: BaseException) -> bool:
    """Whether an error is only the consequence of another rank's end: gloo's, NCCL's and torch's store's words."""
    if isinstance(error, LostRankError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_A_RANK)


_LOST_A_RANK = (
    *("Connection closed by peer", "Connection reset", "Broken pipe", "Connection was likely closed"),
    *("remote process exited", "NCCL communicator was aborted"),
)


def in_short(error: BaseException) -> str:
    """The first sentence of what an error says, in one short line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0][:160].strip()


@contextlib.contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Turn a refusal inside the block into one sentence on stderr and exit code 2, without a traceback.

    A rank that lost another one ends with a sentence as well; the launcher names the rank that failed. Any other
    exception keeps its traceback, each line of which names the rank if there are ranks, and the exit code is 1.
    Output that nobody reads any more, as after `| head`, is no error.
    Libraries are silenced. TGDPO_DEBUG=1 shows every traceback, and what libraries say. Stacks are shown on the signal
    SHOW_STACKS, and where the process crashes.
    """
    quiet()
    if "RANK" not in os.environ:
        os.environ.pop("TGDPO_LAUNCHED", None)  # inherited from a rank that started this program
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _Unread.instead_of(stream))
    faulthandler.enable(_STDERR)
    faulthandler.register(SHOW_STACKS, _STDERR)
    end_with_parent()
    before = {} if "TGDPO_LAUNCHED" in os.environ else {number: signal.signal(number, _stop) for number in asking()[1:]}
    try:
        yield
        return
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as caught:  # torch's CheckpointException is no Exception
        error = caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code, message = _verdict(error)
    message = as_called(message)
    in_a_rank, launched = "RANK" in os.environ, "TGDPO_LAUNCHED" in os.environ
    if code == UNEXPECTED and not in_a_rank:
        raise error
    if code == UNEXPECTED or debugging():
        _show_traceback(error)
    if code != UNEXPECTED and os.environ.get("RANK", "").lstrip("0").isdigit():
        # The first rank speaks for all and tidies up; then its launcher ends this one.
        time.sleep(1 if launched else 3)
    if not leave_word(message):
        print(message if isinstance(error, StoppedError) else f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if in_a_rank:
        os._exit(code)  # sys.exit would wait for collectives with ranks that are gone
    sys.exit(code)


def refuse_import(error: UserError) -> NoReturn:
    """Fail the import of this package.

    Whoever uses a part of the package, as in a notebook, gets an ImportError. Where nobody catches it, as where a
    program starts, it is one sentence and exit code 2, like every other mistake.

    Raises:
        ImportError: Always, with the sentence of the error.
    """
    refusal, before = ImportError(str(error)), sys.excepthook

    def show(kind: type[BaseException], shown: BaseException, trace: TracebackType | None) -> None:
        if shown is not refusal:
            before(kind, shown, trace)
            return
        print(f"error: {shown}", file=sys.stderr)
        sys.exit(USER_ERROR)

    sys.excepthook = show
    raise refusal from None


def _stop(number: int, _: FrameType | None) -> NoReturn:
    """End a program on a signal that ends programs, as Ctrl-C does: what is half-written is removed."""
    raise StoppedError(
        f"stopped by {signal.Signals(number).name} before the work was done; give the same command again (a training "
        "that has saved a checkpoint: with train.resume=true)."
    )


def code_of(asked: Collection[int]) -> int:
    """The exit code of a program that was asked to end by these signals, or by its own clock."""
    return INTERRUPTED if signal.SIGINT in asked else REQUEUE


class _Unread(io.FileIO):
    """A standard stream that goes on when nobody reads it any more, as after `| head`: what is written is dropped.

    What a program is for is in files, or was read before.
    """

    @classmethod
    def instead_of(cls, stream: io.TextIOWrapper | None) -> io.TextIOWrapper:
        """A stream that writes to the same place in the same way; to nowhere where the program was started without."""
        if stream is None:
            return open(os.devnull, "w", encoding="utf-8")
        stream.flush()
        return io.TextIOWrapper(
            io.BufferedWriter(cls(stream.fileno(), "w", closefd=False)),
            encoding=stream.encoding,
            errors="backslashreplace",  # an ASCII locale cannot show every name of a file
            line_buffering=stream.line_buffering or stream.write_through,
        )

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def _verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and sentence."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted."
    if isinstance(error, StoppedError):
        return error.code, str(error)
    if isinstance(error, LostRankError):
        return RANK_DIED, str(error)
    if lost_a_rank(error):
        return RANK_DIED, "another rank ended; this one stops too."
    if sentence := refusal(error):
        return USER_ERROR, sentence
    rank = f"rank {os.environ.get('RANK', 0)}"
    return UNEXPECTED, f"{rank} failed with {type(error).__name__}: {in_short(error)}"


def _show_traceback(error: BaseException) -> None:
    """Write an exception's traceback to stderr, with what led to it. In a rank, every line names the rank."""
    part: BaseException | None = error
    while debugging() and part is not None:
        part.__suppress_context__ = False  # what `raise … from None` left out
        part = part.__cause__ or part.__context__
    text = "".join(traceback.format_exception(error))
    if "RANK" in os.environ:
        text = "".join(f"[rank {os.environ['RANK']}] {line}\n" for line in text.splitlines())
    sys.stderr.write(text)  # at once, lest the lines of several ranks mix


def leave_word(message: str) -> bool:
    """Leave a rank's last words to its launcher. False where no launcher of ours started this process."""
    try:
        with open(os.environ["TGDPO_LAUNCHED"], "w", encoding="utf-8") as file:
            file.write(message)
    except (KeyError, OSError):
        return False
    return True
