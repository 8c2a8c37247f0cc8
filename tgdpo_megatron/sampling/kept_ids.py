"""The token ids of sampled answers, kept beside the file of their texts.

A text does not tell in which pieces the model wrote it: its tokenizer may cut the same text otherwise, and log-probs
are of tokens. A model that is sure of its words rarely differs from its tokenizer, one that is not nearly always does.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tgdpo_megatron.sampling.engine import Answer, Engine, Request, nobody, prompt_id

Ids = dict[tuple[str, int], list[int]]
"""SHA-256 of a prompt's ids and number of the answer -> the answer's ids, with the one that closed the turn."""


def ids_file(answers: Path) -> Path:
    """The file beside a file of answers. It holds JSON lines, but no pattern such as `answers-*.jsonl` takes it."""
    return answers.with_suffix(".ids")


class KeepsIds:
    """An engine that writes down the token ids of its answers as it gives them. Attributes as Engine's.

    Args:
        file: Is added to, where the engine tells the ids. An answer that is there twice, because a run was interrupted,
            counts as it was last.
    """

    def __init__(self, engine: Engine, file: Path) -> None:
        self.name, self.model, self.tokenizer = engine.name, engine.model, engine.tokenizer
        self.max_length, self.block = engine.max_length, engine.block
        self._engine, self._file = engine, file

    def answers(self, requests: Iterable[Request], told: Callable[[int], object] = nobody) -> Iterator[Answer]:
        """As Engine.answers."""
        asked: deque[Request] = deque()

        def remembered() -> Iterator[Request]:
            for request in requests:
                asked.append(request)
                yield request

        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", buffering=1, encoding="utf-8") as file:  # line by line, so none is behind its text
            file.write("\n")  # the last line of an interrupted run may have no end
            for answer in self._engine.answers(remembered(), told):
                request = asked.popleft()
                if answer.ids is not None:
                    file.write(json.dumps([prompt_id(request.ids), request.sample, answer.ids]) + "\n")
                yield answer


def read_ids(file: Path) -> Ids:
    """The ids in a file; none where there is no file."""
    found: Ids = {}
    if file.is_file():
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # the line at which a run was interrupted
                    prompt, sample, ids = json.loads(line)
                    found[prompt, sample] = ids
    return found
