"""A model's answers to the questions of a benchmark: asked turn by turn, kept on the way, written in its form."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tgdpo_megatron.bounded import decoded, parse_json, read_json
from tgdpo_megatron.data.tokenizer import encode_prompt, template_hash
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.evaluation.answer_files import Form, Said, check_written, written
from tgdpo_megatron.evaluation.questions import Question
from tgdpo_megatron.run_lock import alone, resumable, write_all
from tgdpo_megatron.sampling.engine import Answer, Engine, Request, Sampling

AT_ONCE = 64
"""Questions, about, that are asked together: the first turn of all, then the second."""


def answer(
    engine: Engine,
    questions: Sequence[Question],
    form: Form,
    settings: Callable[[Question], Sampling],
    *,
    seed: int,
    model: str,
    file: Path,
    about: dict[str, Any],
) -> int:
    """Ask all questions, and write the file of answers and what they were made with.

    Beside the file are FILE.decoding.json and, until all is done, FILE.part, from which an interrupted command goes on.

    Args:
        settings: The sampling settings of a question.
        model: The name that the file gives the model.
        about: What decoding.json says beside the model and the sampling.

    Returns:
        The number of answers that are unfinished.

    Raises:
        UserError: Another job answers them, what is there was made in another way or lacks questions, a prompt is too
            long, or the engine failed.
    """
    made_with = _made_with(engine, questions, settings, seed, model, about)
    beside, part = file.with_suffix(".decoding.json"), file.with_suffix(".part")
    with alone(part) as kept:
        try:
            if beside.is_file():
                _check_same(beside, made_with)
            if file.is_file():
                check_written(form, file, questions)
                return int(read_json(beside, what="description of answers").get("unfinished", 0))
            _describe(beside, made_with)
            said = _asked(engine, questions, settings, seed, kept, part)
            unfinished = sum(reason == "length" for one in said for reason in one.finish_reasons)
            _describe(beside, {**made_with, "unfinished": unfinished})
            _write(file, written(form, questions, said, model))
            return unfinished
        finally:
            if file.is_file() or not os.fstat(kept.fileno()).st_size:
                part.unlink(missing_ok=True)


def _made_with(
    engine: Engine,
    questions: Sequence[Question],
    settings: Callable[[Question], Sampling],
    seed: int,
    model: str,
    about: dict[str, Any],
) -> dict[str, Any]:
    """What decides the answers."""
    asked = hashlib.sha256(json.dumps([[question.id, question.turns] for question in questions]).encode())
    by_category = {question.category: settings(question).temperature for question in questions}
    same = len(set(by_category.values())) == 1
    sampling = {
        **asdict(settings(questions[0])),
        "temperature": next(iter(by_category.values())) if same else by_category,
        "seed": seed,
    }
    return {
        **about,
        "model_id": model,
        "model": engine.model,
        "engine": engine.name,
        "template": template_hash(engine.tokenizer),
        "sampling": sampling,
        "questions": {"number": len(questions), "sha256": asked.hexdigest()},
    }


def _check_same(beside: Path, made_with: dict[str, Any]) -> None:
    """Refuse to go on with answers that were made in another way.

    Raises:
        UserError: Something differs; it is named.
    """
    kept = read_json(beside, what="description of answers")
    kept = kept if isinstance(kept, dict) else {}
    differs = [name for name, value in made_with.items() if kept.get(name) != value]
    if "sampling" in differs and isinstance(kept.get("sampling"), dict):
        names = [name for name, value in made_with["sampling"].items() if kept["sampling"].get(name) != value]
        differs[differs.index("sampling")] = ", ".join(names) or "sampling"
    if differs:
        raise UserError(
            f"{beside}: the answers there were made with another {', '.join(differs)}; give what they were made with, "
            "or another --output or --model-id."
        )


def _asked(
    engine: Engine,
    questions: Sequence[Question],
    settings: Callable[[Question], Sampling],
    seed: int,
    file: io.FileIO,
    part: Path,
) -> list[Said]:
    """The answers to all questions, those in `file` first, which is `part` and gets new ones."""
    together = engine.block * -(-AT_ONCE // engine.block)
    said = _kept(file, part, questions, 1 if engine.block == 1 else together)
    # Tokens are counted as they come, since some questions together may take minutes.
    with tqdm(desc="answering", unit=" tokens", unit_scale=True) as bar:
        for first in range(len(said), len(questions), together):
            asked = questions[first : first + together]
            for question, one in zip(asked, _conversations(engine, asked, settings, seed, bar.update), strict=True):
                line = json.dumps({"question": question.id, **asdict(one)}, ensure_ascii=False) + "\n"
                with resumable(part, "answers"):
                    write_all(file, line.encode())
                said.append(one)
                bar.set_postfix_str(f"{len(said)}/{len(questions)} questions", refresh=False)
    return said


def _kept(file: io.FileIO, part: Path, questions: Sequence[Question], together: int) -> list[Said]:
    """The answers of an interrupted command, in whole groups of those that have the same bits only together; the file
    keeps only those.

    Raises:
        UserError: The file holds something else than the answers to the first questions.
    """
    file.seek(0)
    lines = file.readall().split(b"\n")[:-1]  # a line without an end is half a line
    if len(lines) != len(questions):
        lines = lines[: len(lines) // together * together]
    said = []
    for number, line in enumerate(lines, start=1):
        row = parse_json(decoded(line, part, number), where=str(part), line=number)
        if number > len(questions) or not isinstance(row, dict) or row.get("question") != questions[number - 1].id:
            raise UserError(
                f"{part} line {number}: answers another question than the one that is asked there; delete the file, "
                "and give the same command again."
            )
        lists = {name: tuple(row[name]) for name in ("texts", "tokens", "finish_reasons")}
        said.append(Said(**lists, seconds=row["seconds"]))
    file.truncate(sum(len(line) + 1 for line in lines))
    return said


def _conversations(
    engine: Engine,
    questions: Sequence[Question],
    settings: Callable[[Question], Sampling],
    seed: int,
    told: Callable[[int], object],
) -> Iterator[Said]:
    """All turns of some questions, which have as many: the first of all, then the second.

    Args:
        told: Called with numbers of new tokens, as they come.

    Yields:
        The answers to each question, as soon as it has the last.
    """
    said: Iterable[Said] = [Said((), (), (), 0.0)] * len(questions)
    for _ in questions[0].turns:
        before = list(said)
        requests = [
            Request(_prompt(engine, question, one), 0, seed, settings(question))
            for question, one in zip(questions, before, strict=True)
        ]
        answers = engine.answers(requests, told)
        said = (_with(one, found, engine.tokenizer) for one, found in zip(before, answers, strict=True))
    yield from said


def _prompt(engine: Engine, question: Question, said: Said) -> tuple[int, ...]:
    """The token ids of the conversation up to the next answer.

    Raises:
        UserError: It is longer than the model.
    """
    messages = []
    for asked, answered in zip(question.turns, said.texts, strict=False):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": question.turns[len(said.texts)]})
    _, ids = encode_prompt(engine.tokenizer, messages)
    if len(ids) >= engine.max_length:
        raise UserError(
            f"question {question.id}, turn {len(said.texts) + 1}: the prompt has {len(ids):,} tokens, and the model "
            f"takes {engine.max_length:,} together with its answer; leave the question out."
        )
    return tuple(ids)


def _with(said: Said, found: Answer, tokenizer: Any) -> Said:
    """The answers so far with one more."""
    text = found.text.strip()
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return replace(
        said,
        texts=(*said.texts, text),
        tokens=(*said.tokens, tokens),
        finish_reasons=(*said.finish_reasons, found.finish_reason),
        seconds=time.time(),
    )


def _describe(beside: Path, made_with: dict[str, Any]) -> None:
    """Write what answers were made with."""
    _write(beside, json.dumps(made_with, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a file at once: it is there as a whole, or not at all."""
    half = path.with_name(f"{path.name}.tmp")
    half.write_text(text, encoding="utf-8")
    os.replace(half, path)
