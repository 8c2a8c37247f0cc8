"""The next step's work on the host, done by a thread of its own while the host waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Makes what each step needs, and the next step's in a thread while this one is under way.

    Leave its `with` block to end the thread. What is made depends on the step alone.

    Args:
        make: Makes what a step needs. In the thread it works on the host alone, draws no random numbers that others
            draw, and calls no collective.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._begun: tuple[int, Future[T]] | None = None

    def begin(self, step: int) -> None:
        """Begin with what a step needs, in the thread. A step that was begun before is given up."""
        self._begun = step, self._thread.submit(self._make, step)

    def get(self, step: int) -> T:
        """What a step needs. Waits until it is made, and makes it if it was not begun.

        Raises:
            Exception: What `make` raised for this step, also where it did so while an earlier step was under way.
        """
        begun, self._begun = self._begun, None
        if begun is None or begun[0] != step:
            return self._make(step)
        return begun[1].result()

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
