"""Sample answers to prompts into a file that goes on where it was stopped.

Answers are written in the order of the prompts, and the file itself says how far a run came: each line has the prompt
and the settings that it was made with. Nothing else is kept, and no answer stays in memory.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tgdpo_megatron.bounded import LIMIT, decoded, parse_json
from tgdpo_megatron.data.tokenizer import template_hash
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.run_lock import alone, resumable, write_all
from tgdpo_megatron.sampling.answers import Answered, as_line, from_json
from tgdpo_megatron.sampling.engine import Answer, Engine, Request, Sampling
from tgdpo_megatron.sampling.prompts import Prompt


@dataclass
class Tally:
    """What a file of answers holds.

    Attributes:
        prompts: Number of lines.
        tokens: Of all answers.
        unfinished: Answers that had no room left.
    """

    prompts: int = 0
    answers: int = 0
    tokens: int = 0
    unfinished: int = 0

    def add(self, answered: Answered) -> None:
        """Count the answers to one more prompt."""
        self.prompts += 1
        self.answers += len(answered.num_tokens)
        self.tokens += sum(answered.num_tokens)
        self.unfinished += answered.finish_reasons.count("length")


def sample(
    engine: Engine, prompts: Sequence[Prompt], output: Path, *, settings: Sampling, n: int, seed: int
) -> tuple[Tally, Tally]:
    """Sample n answers to each prompt into a file. What is there of them already is kept.

    Returns:
        What the file holds now, and what of it was there before.

    Raises:
        UserError: Another job writes the file, it holds other answers, the disk is full, or the engine fails.
    """
    identity: dict[str, Any] = {
        "sampling": {
            "engine": engine.name,
            "n": n,
            **asdict(settings),
            "seed": seed,
            "template": template_hash(engine.tokenizer),
        },
        "model": engine.model,
    }

    def requests(prompt: Prompt) -> list[Request]:
        ids = tuple(prompt.ids.tolist())
        return [Request(ids, number, seed, settings) for number in range(n)]

    with alone(output) as file:
        before = _keep(file, output, prompts, identity, engine.block)
        tally, rest = replace(before), prompts[before.prompts :]
        with _bar(before.prompts, len(prompts)) as bar:
            answers = engine.answers(chain.from_iterable(map(requests, rest)), _tokens_of(bar))
            for prompt in rest:
                seeds = [request.own_seed for request in requests(prompt)]
                answered = _answered(prompt, list(islice(answers, n)), seeds, identity)
                with resumable(output, "answers"):
                    write_all(file, as_line(answered))
                tally.add(answered)
                bar.update()
    return tally, before


def _bar(done: int, prompts: int) -> Any:
    """A bar of prompts. They come in blocks that may take minutes: the bar is also drawn where none is done, and the
    time left follows from the mean since the start."""
    return tqdm(initial=done, total=prompts, desc="sampling", unit="prompt", mininterval=1, miniters=0, smoothing=0)


def _tokens_of(bar: Any) -> Callable[[int], None]:
    """Shows in a bar how many tokens come per second, when it is told of them."""
    tokens = 0

    def told(more: int) -> None:
        nonlocal tokens
        tokens += more
        bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False)
        bar.update(0)

    return told


def _answered(prompt: Prompt, answers: Sequence[Answer], seeds: list[int], identity: dict[str, Any]) -> Answered:
    """The line of a prompt."""
    return Answered(
        prompt=prompt.written,
        format_prompt=prompt.text,
        prompt_id=prompt.id,
        all_generated_responses=[answer.text for answer in answers],
        finish_reasons=[answer.finish_reason for answer in answers],
        num_tokens=[answer.num_tokens for answer in answers],
        seeds=seeds,
        source=prompt.source,
        tools=list(prompt.asked.tools),
        **identity,
    )


def _keep(file: io.FileIO, output: Path, prompts: Sequence[Prompt], identity: dict[str, Any], block: int) -> Tally:
    """Cut a file to whole blocks of answers, and leave it open at its end. One line is in memory at a time.

    Returns:
        What is kept.

    Raises:
        UserError: The file holds something else than these answers.
    """
    reader = io.BufferedReader(file)
    tally, kept, end = Tally(), Tally(), 0
    reader.seek(0)
    while (line := reader.readline(LIMIT)).endswith(b"\n"):
        number = tally.prompts + 1
        content = parse_json(decoded(line, output, number), where=str(output), line=number)
        answered = from_json(content, where=f"{output} line {number}")
        _check(answered, output, number, prompts, identity)
        tally.add(answered)
        if tally.prompts % block == 0 or tally.prompts == len(prompts):
            kept, end = replace(tally), reader.tell()
    if len(line) == LIMIT:
        raise UserError(f"{output} line {tally.prompts + 1}: too long for an answer; give another --output.")
    reader.detach()
    file.truncate(end)
    return kept


_OF_MODELS = {
    "name": "the model's name",
    "fingerprint": "the model's fingerprint",
    "served": "the server's model",
}
"""What a field of a line's `model` is called in a sentence."""


def _check(answered: Answered, output: Path, number: int, prompts: Sequence[Prompt], identity: dict[str, Any]) -> None:
    """Refuse a line that this run would not have written."""
    for group, now in identity.items():
        was = getattr(answered, group)
        if other := next((name for name, value in now.items() if was.get(name) != value), None):
            what = _OF_MODELS.get(other, other)
            raise UserError(
                f"{output} line {number}: was sampled with {what} {was.get(other)}, and this run has "
                f"{now[other]}; go on with the old one, or give another --output."
            )
    part, part_now = answered.source.get("shard"), prompts[0].source.get("shard", "1/1")
    if part not in (None, part_now):  # None: all prompts, or a part that an earlier version sampled
        raise UserError(
            f"{output} line {number}: was sampled with --shard {part}, and this run has {part_now}; go on with the old "
            "one, or give another --output."
        )
    if number > len(prompts):
        raise UserError(
            f"{output}: holds answers to more than these {len(prompts)} prompts; give the prompts that it was begun "
            "with, or another --output."
        )
    if answered.prompt_id != prompts[number - 1].id:
        raise UserError(
            f"{output} line {number}: answers another prompt than row {prompts[number - 1].source['row']} of the "
            "prompts now; give those that it was begun with, in their order, or another --output."
        )
