"""A model's answers to the questions of a benchmark: asked turn by turn, kept on the way, written in its form."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tgdpo_megatron.bounded import parse_json, read_json
from tgdpo_megatron.data.tokenizer import encode_prompt, template_hash
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.evaluation.answer_files import Form, Said, check_written, written
from tgdpo_megatron.evaluation.questions import Question
from tgdpo_megatron.sampling.engine import Answer, Engine, Request, Sampling

AT_ONCE = 64
"""Questions, about, that are asked together and kept together."""


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
        UserError: What is there was made in another way or lacks questions, a prompt is too long, or the engine failed.
    """
    made_with = _made_with(engine, questions, settings, seed, model, about)
    beside, part = file.with_suffix(".decoding.json"), file.with_suffix(".part")
    if beside.is_file():
        _check_same(beside, made_with)
    if file.is_file():
        check_written(form, file, questions)
        return int(read_json(beside, what="description of answers").get("unfinished", 0))
    _write(beside, json.dumps(made_with, indent=2, ensure_ascii=False) + "\n")
    said = _asked(engine, questions, settings, seed, part)
    unfinished = sum(reason == "length" for one in said for reason in one.finish_reasons)
    _write(file, written(form, questions, said, model))
    _write(beside, json.dumps({**made_with, "unfinished": unfinished}, indent=2, ensure_ascii=False) + "\n")
    part.unlink()
    return unfinished


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
    engine: Engine, questions: Sequence[Question], settings: Callable[[Question], Sampling], seed: int, part: Path
) -> list[Said]:
    """The answers to all questions, those in `part` first. New ones are added there."""
    together = engine.block * -(-AT_ONCE // engine.block)
    said = _kept(part, together)
    # Tokens are counted as they come, since some questions together may take minutes.
    with part.open("a", encoding="utf-8") as file, tqdm(desc="answering", unit=" tokens", unit_scale=True) as bar:
        for first in range(len(said), len(questions), together):
            some = _conversations(engine, questions[first : first + together], settings, seed, bar.update)
            file.write("".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in some))
            file.flush()
            said += some
            bar.set_postfix_str(f"{len(said)}/{len(questions)} questions")
    return said


def _kept(part: Path, together: int) -> list[Said]:
    """The answers of an interrupted command, as many as were asked and written together; the file keeps only those."""
    lines = part.read_text(encoding="utf-8").split("\n")[:-1] if part.is_file() else []
    lines = lines[: len(lines) // together * together]
    rows = [parse_json(line, where=f"{part} line {number}") for number, line in enumerate(lines, 1)]
    _write(part, "".join(f"{line}\n" for line in lines))
    lists = ("texts", "tokens", "finish_reasons")
    return [Said(**{name: tuple(row[name]) for name in lists}, seconds=row["seconds"]) for row in rows]


def _conversations(
    engine: Engine,
    questions: Sequence[Question],
    settings: Callable[[Question], Sampling],
    seed: int,
    told: Callable[[int], object],
) -> list[Said]:
    """All turns of some questions: the first of all, then the second of those that have one.

    Args:
        told: Called with numbers of new tokens, as they come.
    """
    said = [Said((), (), (), 0.0)] * len(questions)
    for turn in range(max(len(question.turns) for question in questions)):
        places = [place for place, question in enumerate(questions) if len(question.turns) > turn]
        requests = [
            Request(_prompt(engine, questions[place], said[place]), 0, seed, settings(questions[place]))
            for place in places
        ]
        for place, found in zip(places, engine.answers(requests, told), strict=True):
            said[place] = _with(said[place], found, engine.tokenizer)
    return said


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


def _write(path: Path, text: str) -> None:
    """Write a file at once: it is there as a whole, or not at all."""
    half = path.with_name(f"{path.name}.tmp")
    half.write_text(text, encoding="utf-8")
    os.replace(half, path)
