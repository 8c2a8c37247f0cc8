"""From a file of answers to a file of scored pairs, some prompts at a time.

After each block of prompts, a report beside the file says how far it is and what was left out. A run that is started
again goes on from there: what was written after the last report is cut off and made again, from the same blocks, so
that an interrupted file has the same bytes as any other.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tgdpo_megatron.bounded import read_json, shown
from tgdpo_megatron.cache import sha256_of
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.reward_models.candidates import Candidates
from tgdpo_megatron.reward_models.pairing import NoPair, Rules, check_any, choose
from tgdpo_megatron.reward_models.scorer import Group, Scorer
from tgdpo_megatron.run_lock import alone, resumable, write_all

BLOCK = 256
"""Prompts after which the report is written."""
NAMED = 100
"""Prompts that the report names for each reason why prompts were left out: the first ones."""


@dataclass
class Report:
    """What was made so far, and of what.

    Attributes:
        settings: All that the pairs depend on.
        complete: Whether all prompts were read.
        bytes: Size of the file of pairs.
        prompts, answers, pairs: Their numbers. Answers are those of all prompts.
        tokens: What the reward model read, without padding.
        answers_left_out: Reason -> number of answers that took no part: `unfinished`, `empty`, `too_long`.
        prompts_left_out: Reason, as in LEFT_OUT -> `number` of prompts, and `first`, the ids of the first of them.
    """

    settings: dict[str, Any]
    complete: bool = False
    bytes: int = 0
    prompts: int = 0
    answers: int = 0
    pairs: int = 0
    tokens: int = 0
    answers_left_out: dict[str, int] = field(default_factory=lambda: {"unfinished": 0, "empty": 0, "too_long": 0})
    prompts_left_out: dict[str, dict[str, Any]] = field(default_factory=dict)

    def leave_out(self, prompt: str, reason: str) -> None:
        """Count a prompt that gives no pair, and name it if it is one of the first."""
        counted = self.prompts_left_out.setdefault(reason, {"number": 0, "first": []})
        counted["number"] += 1
        if len(counted["first"]) < NAMED:
            counted["first"].append(prompt)


def report_file(output: Path) -> Path:
    """The report of a file of pairs, beside it."""
    return output.with_suffix(".report.json")


def settings_of(scorer: dict[str, str], inputs: Sequence[Path], rules: Rules) -> dict[str, Any]:
    """All that the pairs depend on but for rounding, as the report keeps it.

    Args:
        scorer: Its name and fingerprint.
    """
    answers = [{"name": path.name, "sha256": sha256_of(path)} for path in inputs]
    return {"scorer": scorer, "answers": answers, **asdict(rules)}


def begun(output: Path, settings: dict[str, Any]) -> Report:
    """The report of a file that was begun with the same settings; a new one where there is no such file.

    Raises:
        UserError: The file was made in another way, or with other settings.
    """
    path = report_file(output)
    if not path.is_file():
        if output.exists() and output.stat().st_size:
            raise UserError(f"{output}: is there already, without {path.name}; choose another --output.")
        return Report(settings)
    try:
        report = Report(**read_json(path, what="report of an annotation"))
        old = report.settings
        names = [name for name in settings if old.get(name) != settings[name]]
        is_whole = output.is_file() and output.stat().st_size >= report.bytes
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path}: this report is damaged; delete it and {output.name}.") from error
    if names:
        was, now = shown(old.get(names[0])), shown(settings[names[0]])
        raise UserError(
            f"{output}: was begun with {names[0]} {was}, and now it is {now}; give the same again, or another --output."
        )
    if report.bytes and not is_whole:
        raise UserError(f"{output}: is shorter than {path.name} says; delete both.")
    return report


def annotate(
    candidates: Iterable[Candidates],
    scorer: Scorer,
    output: Path,
    settings: dict[str, Any],
    rules: Rules,
    *,
    block: int = BLOCK,
    told: Callable[[int, int], object] = lambda prompts, tokens: None,
) -> Report:
    """Write a line for each pair, and the report after each block of prompts. What is there already is kept.

    Args:
        candidates: All prompts of the files that the settings name.
        settings: All that the pairs depend on, as settings_of gives it.
        told: Called with how many more prompts were done in this run, and how many more tokens were read.

    Returns:
        The report of all that the file holds now.

    Raises:
        UserError: As begun; or another job writes the file, a line of the answers is damaged, a score is not finite, or
            the disk is full. What was made before is kept.
    """
    rest = iter(candidates)
    with alone(output) as file:
        report = begun(output, settings)  # only now: until the file was locked, another job may have added to it
        for _ in islice(rest, report.prompts):
            pass
        file.truncate(report.bytes)
        _keep(file, output, report, b"")
        while some := list(islice(rest, block)):
            _keep(file, output, report, b"".join(_pairs(some, scorer, report, rules, told)))
        report.complete = True
        _keep(file, output, report, b"")
    return report


def _keep(file: io.FileIO, output: Path, report: Report, lines: bytes) -> None:
    """Write some lines, so that they outlast a loss of power, and then the report, which is there whole or not at all.

    Raises:
        UserError: The disk is full, or refuses for another reason.
    """
    path = report_file(output)
    part = path.with_suffix(".part")
    with resumable(output, "pairs"):
        write_all(file, lines)
        os.fsync(file.fileno())
        report.bytes += len(lines)
        part.write_text(json.dumps(asdict(report), indent=2), encoding="utf-8")
        os.replace(part, path)


def _pairs(
    candidates: Sequence[Candidates], scorer: Scorer, report: Report, rules: Rules, told: Callable[[int, int], object]
) -> Iterator[bytes]:
    """The lines of some prompts."""
    before, refused = scorer.tokens, set[str]()
    asked = list(_asked(candidates, report, rules))
    told(len(candidates) - len(asked), 0)
    groups = [
        Group(one.messages, [one.answers[place] for place in places], one.fields.get("tools", ()), one.name)
        for one, places in asked
    ]
    scored = scorer.scores(groups, lambda tokens: told(0, tokens), lambda group: refused.add(group.name))
    for (one, places), found in zip(asked, scored, strict=True):
        told(1, 0)
        if one.name in refused:
            report.leave_out(one.id, "refused")
            continue
        report.answers_left_out["too_long"] += int(np.isnan(found).sum())
        scores = np.full(len(one.answers), np.nan)
        scores[places] = found
        try:
            chosen, rejected = choose(scores, one.id, rules)
        except NoPair as reason:
            report.leave_out(one.id, str(reason))
            continue
        report.pairs += 1
        yield _line(one, scores, chosen, rejected, scorer)
    report.tokens += scorer.tokens - before


def _asked(candidates: Sequence[Candidates], report: Report, rules: Rules) -> Iterator[tuple[Candidates, list[int]]]:
    """The prompts that may give a pair, each with the places of the answers to score."""
    for one in candidates:
        report.prompts += 1
        report.answers += len(one.answers)
        if one.is_repeated:
            report.leave_out(one.id, "repeated")
            continue
        usable = []
        for place, answer in enumerate(one.answers):
            is_finished = rules.keep_unfinished or one.is_finished(place)
            if is_finished and answer.strip():
                usable.append(place)
            else:
                report.answers_left_out["empty" if is_finished else "unfinished"] += 1
        try:
            check_any(one.answers, usable)
        except NoPair as reason:
            report.leave_out(one.id, str(reason))
        else:
            yield one, usable


def _line(one: Candidates, scores: np.ndarray, chosen: int, rejected: int, scorer: Scorer) -> bytes:
    """What the file of answers said, with the scores and the pair, as SimPO's scripts write them."""
    chosen_turn, rejected_turn = ({"role": "assistant", "content": one.answers[place]} for place in (chosen, rejected))
    content = one.fields | {
        "all_rm_scores": [None if np.isnan(score) else score for score in scores.tolist()],
        "chosen": [*one.messages, chosen_turn],
        "rejected": [*one.messages, rejected_turn],
        "score_chosen": float(scores[chosen]),
        "score_rejected": float(scores[rejected]),
        "scorer": {"name": scorer.name, "fingerprint": scorer.fingerprint},
    }
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()
