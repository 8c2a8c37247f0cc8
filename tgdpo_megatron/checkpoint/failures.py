"""What torch and Megatron raise about checkpoint files, made plain: whose fault it is, and the cause beneath."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.distributed.checkpoint.api import CheckpointException

from tgdpo_megatron.errors import LostRankError, UserError, in_short, lost_a_rank, ran_out_of_memory


class InterruptedWorkError(UserError):
    """Something outside ended the work. What was finished before may be of use."""


class NotWrittenError(InterruptedWorkError):
    """The operating system refuses what is written."""


class NotReadError(InterruptedWorkError):
    """The operating system cannot read a file, though the file may be whole: a disk or a network that fails."""


def cause(error: BaseException) -> BaseException:
    """The exception beneath torch's CheckpointException, which collects one entry for each rank."""
    if isinstance(error, CheckpointException) and error.failures:
        return cause(next(iter(error.failures.values()))[0])
    return error


@contextlib.contextmanager
def plain_causes() -> Iterator[None]:
    """Raise what is beneath a CheckpointException, which is no Exception, instead of it."""
    try:
        yield
    except CheckpointException as error:
        if not error.failures:  # Megatron tells the others no more than that there was one
            raise LostRankError("another rank could not write its part of a checkpoint; this one stops too.") from error
        raise cause(error) from error


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Say in a sentence that a file read inside the block is damaged.

    Our own mistakes, the end of memory and the end of another rank stay what they are.

    Args:
        what: The file, and what of it is read.

    Raises:
        UserError: The file is missing, truncated or altered.
    """
    with plain_causes():
        try:
            yield
        except (Exception, CheckpointException) as error:
            beneath = cause(error)
            if not _is_of_the_file(beneath) or ran_out_of_memory(beneath) or lost_a_rank(beneath):
                raise
            kind = NotReadError if isinstance(beneath, OSError) else UserError
            raise kind(f"{what} cannot be read ({in_short(beneath)}).") from error


@contextlib.contextmanager
def writable(what: str) -> Iterator[None]:
    """Say in a sentence that the operating system refuses what is written inside the block.

    Args:
        what: What is written, and where.

    Raises:
        NotWrittenError: No space left, or the like.
    """
    with plain_causes():
        try:
            yield
        except (Exception, CheckpointException) as error:
            beneath = cause(error)
            before = list(_before(beneath))
            if interrupted := next((one for one in before if isinstance(one, KeyboardInterrupt)), None):
                raise interrupted from None
            beneath = next((one for one in before if isinstance(one, OSError)), beneath)
            if not _is_of_the_system(beneath):
                raise
            why = f"{what} cannot be written ({in_short(beneath)})"
            raise NotWrittenError(f"{why}; look at the space left there, and at the permissions.") from error


def _before(error: BaseException) -> Iterator[BaseException]:
    """What went before a RuntimeError: torch's zip writer complains of its unfinished file, whatever stopped it."""
    part: BaseException | None = error if isinstance(error, RuntimeError) else None
    while part is not None:
        yield part
        part = part.__cause__ or part.__context__


def _is_of_the_system(error: BaseException) -> bool:
    """Whether the operating system said this. Megatron's and torch's writers keep its words at best."""
    signs = ("[Errno ", "inline_container.cc", "PytorchStreamWriter")
    return isinstance(error, OSError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs) and not ran_out_of_memory(error)
    )


def _is_of_the_file(error: BaseException) -> bool:
    """Whether a reader said this of the bytes it was given. Found by damaging every file of checkpoints at random."""
    return isinstance(error, OSError | EOFError | ValueError)
