"""Answers to annotate: files of tools.sample, and SimPO's, whether they are parts of a job or several runs of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from tgdpo_megatron.bounded import shown
from tgdpo_megatron.data.read import place, read_rows
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.sampling.answers import Answered, read_answers, whole_characters

PER_ANSWER = ("all_generated_responses", "finish_reasons", "num_tokens", "seeds")
"""Fields with a value for each answer."""
_OF_A_RUN = ("n", "seed")
"""Settings of the sampling in which runs over the same prompts may differ."""


@dataclass(frozen=True)
class Candidates:
    """A prompt and the answers of which two may become a pair.

    Attributes:
        fields: What the file says of them, which the file of pairs repeats.
        id: Hash of the prompt, as hex.
        name: What error messages call the prompt.
        is_repeated: Whether the prompt was there before.
    """

    fields: dict[str, Any]
    id: str
    name: str
    is_repeated: bool = False

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The turns before the answers."""
        prompt = self.fields["prompt"]
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

    @property
    def answers(self) -> list[str]:
        """Texts of the answers."""
        answers: list[str] = self.fields["all_generated_responses"]
        return answers

    @property
    def sampling(self) -> dict[str, Any]:
        """How the answers were sampled. SimPO's files do not tell."""
        sampling = self.fields.get("sampling")
        return sampling if isinstance(sampling, dict) else {}

    def is_finished(self, answer: int) -> bool:
        """Whether the model closed its turn. SimPO's files do not tell, and their answers count as finished."""
        reasons = self.fields.get("finish_reasons")
        return reasons is None or reasons[answer] == "stop"


def read_candidates(paths: Sequence[Path]) -> Iterator[Candidates]:
    """The prompts of some files, one after another. Of files of JSON lines, one line each is in memory at a time, and
    about 100 bytes for each prompt, by which those are known that were there before.

    Where all files begin with the same prompt, they are runs over the same prompts, and the answers to a prompt are put
    together. Otherwise they are parts, and follow each other.

    Raises:
        UserError: A file that cannot be read, holds no prompts or is damaged, or runs that do not have the same prompts
            in the same order.
    """
    before = set[int]()
    for one in _in_order(paths):
        known = hash(one.id)  # 64 bits: among a million prompts, two have the same by a chance of 3e-8
        yield replace(one, is_repeated=True) if known in before else one
        before.add(known)


def _in_order(paths: Sequence[Path]) -> Iterator[Candidates]:
    """The prompts as the files have them."""
    files = [_of_file(path) for path in paths]
    firsts = []
    for path, file in zip(paths, files, strict=True):
        first = next(file, None)
        if first is None:
            raise UserError(f"{path}: the file holds no answers.")
        firsts.append(first)
    whole = [chain([first], rest) for first, rest in zip(firsts, files, strict=True)]
    if len({first.id for first in firsts}) > 1 or len(paths) == 1:
        yield from chain.from_iterable(whole)
        return
    for runs in zip_longest(*whole):
        yield _together(paths, runs)


def _of_file(path: Path) -> Iterator[Candidates]:
    if path.suffix == ".json":
        rows = read_rows(path)
        return (_of_simpo(row, place(path, number)) for number, row in rows)
    numbered = enumerate(read_answers(path), start=1)
    return (_of_line(answered, f"{path} prompt {number}") for number, answered in numbered)


def _of_line(answered: Answered, name: str) -> Candidates:
    fields = asdict(answered)
    if not answered.tools:
        del fields["tools"]
    return Candidates(fields, answered.prompt_id, name)


def _of_simpo(row: Any, name: str) -> Candidates:
    """A row of SimPO's all_outputs.json, or of its output_SEED.json, which holds one answer to each prompt."""
    fields = whole_characters(dict(row)) if isinstance(row, dict) else {}
    if isinstance(text := fields.pop("generated_text", None), str):
        fields["all_generated_responses"] = [text]
    answers = fields.get("all_generated_responses")
    is_list = isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
    if not isinstance(fields.get("prompt"), str) or not is_list:
        raise UserError(
            f"{name}: expected a text as 'prompt', and texts as 'all_generated_responses' or one as 'generated_text', "
            "as SimPO's scripts write them; give a file that tools.sample wrote, or one of SimPO's."
        )
    return Candidates(fields, hashlib.sha256(fields["prompt"].encode()).hexdigest(), name)


def _together(paths: Sequence[Path], runs: Sequence[Candidates | None]) -> Candidates:
    """One prompt with the answers of all runs, which differ in nothing but their seeds."""
    if None in runs:
        ended = paths[list(runs).index(None)]
        raise UserError(f"{ended}: ends before the other files; files of the same prompts must have all of them.")
    first, *others = [run for run in runs if run is not None]
    for other in others:
        if other.id != first.id:
            raise UserError(
                f"{other.name}: is another prompt than {first.name}; files of the same prompts must have them in the "
                "same order."
            )
        if other.fields.get("model") != first.fields.get("model"):
            raise UserError(
                f"{other.name}: the answers are another model's than those of {first.name}; annotate them apart."
            )
        was, now = first.sampling, other.sampling
        if differs := [name for name in was | now if name not in _OF_A_RUN and was.get(name) != now.get(name)]:
            raise UserError(
                f"{other.name}: was sampled with {differs[0]} {shown(now.get(differs[0]))}, and {first.name} with "
                f"{shown(was.get(differs[0]))}; annotate them apart."
            )
    joined = {
        field: list(chain.from_iterable(run.fields[field] for run in (first, *others)))
        for field in PER_ANSWER
        if field in first.fields
    }
    fields = first.fields | joined
    if first.sampling:
        seeds = [run.sampling.get("seed") for run in (first, *others)]
        fields["sampling"] = first.sampling | {"n": len(fields["all_generated_responses"]), "seed": seeds}
    return Candidates(fields, first.id, first.name)
