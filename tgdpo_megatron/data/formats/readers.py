"""One function for each way to write a preference pair in a row."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from tgdpo_megatron.data.formats.turns import only_answer, read_answer, read_prompt, read_turns
from tgdpo_megatron.data.formats.values import (
    Answer,
    Malformed,
    Row,
    Turn,
    Unusable,
    number,
    read_optional,
    read_text,
    shared_length,
    split_transcript,
)

Conversation = tuple[list[Turn], Answer, Answer]
"""Turns before the answers, chosen, rejected."""


# ---------------------------------------------------------------- a chosen and a rejected answer


def explicit(row: Row, *, prompt: str = "prompt", chosen: str = "chosen", rejected: str = "rejected") -> Conversation:
    """The prompt has a column of its own."""
    turns = read_prompt(prompt, row[prompt])
    return turns, read_answer(chosen, row[chosen], turns), read_answer(rejected, row[rejected], turns)


def explicit_after_history(row: Row, *, prompt: str, chosen: str, rejected: str) -> Conversation:
    """The prompt has a column of its own, and `history` may hold earlier exchanges: ms-swift's rule."""
    alone = prompt == "instruction" and isinstance(row[prompt], str)
    turns = instruction(row) if alone else [*_history(row), *read_prompt(prompt, row[prompt])]
    return turns, read_answer(chosen, row[chosen], turns), read_answer(rejected, row[rejected], turns)


def implicit_turns(row: Row, *, chosen: str = "chosen", rejected: str = "rejected") -> Conversation:
    """The prompt is the turns with which both conversations begin: TRL's rule."""
    return _shared_turns(read_turns(chosen, row[chosen]), read_turns(rejected, row[rejected]))


def implicit_string(row: Row) -> Conversation:
    """The prompt is what both texts begin with, but a space before the answers belongs to the answers: TRL's rule."""
    chosen, rejected = row["chosen"], row["rejected"]
    shared = shared_length(chosen, rejected)
    if shared and chosen[shared] != rejected[shared] and chosen[shared - 1] == " ":
        shared -= 1
    if not chosen[:shared].strip():
        raise Unusable("chosen and rejected share no prompt")
    return read_prompt("chosen", chosen[:shared]), chosen[shared:], rejected[shared:]


def transcripts(row: Row) -> Conversation:
    """Each conversation is one text, as in Anthropic's HH-RLHF."""
    return _shared_turns(split_transcript(row["chosen"]), split_transcript(row["rejected"]))


def transcript_prompt(row: Row) -> Conversation:
    """The prompt is one text of `Human:` and `Assistant:` turns. The answers stand alone, or both repeat it."""
    prompt, answers = row["prompt"], (row["chosen"], row["rejected"])
    if all(answer.startswith(prompt) for answer in answers):
        answers = answers[0].removeprefix(prompt), answers[1].removeprefix(prompt)
    return _opened(split_transcript(prompt)), answers[0].strip(), answers[1].strip()


def ultrafeedback_binarized(row: Row) -> Conversation:
    """The conversations repeat the prompt. Where they hold only the answers, the prompt's own column is read."""
    return explicit(row) if len(row["chosen"]) == len(row["rejected"]) == 1 else implicit_turns(row)


def alpaca(row: Row) -> Conversation:
    """`instruction` and `input`, joined by a newline, after the exchanges of `history`: LLaMA-Factory's rule."""
    return instruction(row), row["chosen"], row["rejected"]


def alpaca_output(row: Row) -> Conversation:
    """As alpaca, with both answers in `output`, the chosen one first."""
    return instruction(row), *row["output"]


def rejected_beside_messages(row: Row, *, rejected: str) -> Conversation:
    """`messages` end in the chosen answer, and the rejected one has a column of its own: ms-swift's rule."""
    turns = read_turns("messages", row["messages"])
    return turns[:-1], only_answer(turns[-1:]), read_answer(rejected, row[rejected], turns[:-1])


def openai_preference(row: Row) -> Conversation:
    """OpenAI's format for preference fine-tuning."""
    turns = read_turns("input", row["input"]["messages"])
    chosen, rejected = (read_answer(name, row[name], turns) for name in ("preferred_output", "non_preferred_output"))
    return turns, chosen, rejected


def lmflow(row: Row) -> Conversation:
    """Each conversation is an object with `messages`, and perhaps a `system` text and `tools`."""
    if row["chosen"].get("tools") != row["rejected"].get("tools"):
        raise Unusable("the two conversations have different tools")
    conversations = []
    for column in ("chosen", "rejected"):
        conversations.append([*_system_turn(row[column].get("system")), *read_turns(column, row[column]["messages"])])
    return _shared_turns(*conversations)


def amazon_nova(row: Row) -> Conversation:
    """The last turn holds both answers, labelled `preferred` and `non-preferred`."""
    *before, last = row["messages"]
    answers = {candidate["preferenceLabel"]: candidate.get("content") for candidate in last["candidates"]}
    if answers.keys() != {"preferred", "non-preferred"}:
        raise Malformed("the last turn of 'messages' must hold one preferred and one non-preferred candidate")
    chosen, rejected = (read_text("a candidate", answers[label]) for label in ("preferred", "non-preferred"))
    return [*_system_turn(row.get("system")), *read_turns("messages", before)], chosen, rejected


# ---------------------------------------------------------------- two answers and a verdict


Verdict = Callable[[Row], int | None]
"""Which of two answers was preferred, 0 or 1; None for a tie."""


def judged(row: Row, *, prompt: str, answers: tuple[str, str], verdict: Verdict) -> Conversation:
    """Two answers to one prompt."""
    turns = read_prompt(prompt, row[prompt])
    first, second = (read_answer(column, row[column], turns) for column in answers)
    return turns, *_in_order(first, second, verdict(row))


def judged_alpaca(row: Row, *, answers: tuple[str, str], verdict: Verdict) -> Conversation:
    """Two answers to an instruction with an optional `input`: AlpacaFarm's comparisons."""
    return instruction(row), *_in_order(row[answers[0]], row[answers[1]], verdict(row))


def judged_conversations(row: Row, *, answers: tuple[str, str], verdict: Verdict) -> Conversation:
    """Two whole conversations, as in Chatbot Arena."""
    first, second = (read_turns(column, row[column]) for column in answers)
    return _shared_turns(*_in_order(first, second, verdict(row)))


def arena_table(row: Row, *, verdict: Verdict) -> Conversation:
    """Prompts and answers are lists written as text, one element for each round of the battle."""
    prompts = _listed("prompt", row["prompt"])
    conversations = []
    for column in ("response_a", "response_b"):
        said = _listed(column, row[column])
        if len(said) != len(prompts):
            raise Malformed(f"'{column}' must hold as many texts as 'prompt'")
        conversations.append(_exchanges(zip(prompts, said, strict=True)))
    return _shared_turns(*_in_order(conversations[0], conversations[1], verdict(row)))


def webgpt(row: Row, *, verdict: Verdict) -> Conversation:
    """OpenAI's WebGPT comparisons: the question is an object."""
    turns = read_prompt("question", row["question"]["full_text"])
    return turns, *_in_order(row["answer_0"], row["answer_1"], verdict(row))


def summaries(row: Row, *, verdict: Verdict) -> Conversation:
    """OpenAI's comparisons of summaries. The post is written as OpenAI's models read it."""
    info, texts = row["info"], [summary["text"] for summary in row["summaries"]]
    if len(texts) != 2:
        raise Unusable("there are not two summaries")
    if post := info.get("post"):
        asked = f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}\n\nPOST: {post}\n\nTL;DR:"
    else:
        asked = f"{info.get('article')}\n\nTL;DR:"
    return read_prompt("info", asked), *_in_order(texts[0].strip(), texts[1].strip(), verdict(row))


def by_value(column: str, first: Any, second: Any, *, ties: Sequence[str] = ()) -> Verdict:
    """The column says `first` or `second`, or names a tie."""

    def verdict(row: Row) -> int | None:
        told = row[column]
        for winner, value in enumerate((first, second)):
            if told == value or (isinstance(value, int) and number(told) == value):
                return winner
        if told in ties:
            return None
        raise Malformed(f"'{column}' must be {', '.join(map(str, (first, second, *ties)))}, found {told!r}")

    return verdict


def by_sign(column: str) -> Verdict:
    """A negative number prefers the first answer, a positive one the second."""

    def verdict(row: Row) -> int | None:
        strength = number(row[column])
        return None if not strength else int(strength > 0)

    return verdict


def by_score(first: str, second: str) -> Verdict:
    """Each answer has a score, and the higher one is preferred."""

    def verdict(row: Row) -> int | None:
        scores = number(row[first]), number(row[second])
        return None if scores[0] == scores[1] else int(scores[0] < scores[1])  # type: ignore[operator]

    return verdict


def _in_order(first: Any, second: Any, winner: int | None) -> tuple[Any, Any]:
    """The chosen and the rejected one."""
    if winner is None:
        raise Unusable("neither answer was preferred")
    return (second, first) if winner else (first, second)


# ---------------------------------------------------------------- several answers with ranks or scores


def ranked_completions(row: Row) -> Conversation:
    """Chosen is the completion with the lowest rank, which is the best, and rejected the one with the highest."""
    prompt = read_prompt("context", row["context"])
    ranked = [(completion["completion"], -_number(completion["rank"])) for completion in row["completions"]]
    best, worst = best_and_worst(ranked, what="completions", by="rank")
    return prompt, read_answer("completions", best, prompt), read_answer("completions", worst, prompt)


def ranked_answers(row: Row) -> Conversation:
    """Nectar: a prompt in HH-RLHF's writing, and answers of which rank 1 is the best."""
    ranked = [(answer["answer"], -_number(answer["rank"])) for answer in row["answers"]]
    return _opened(split_transcript(row["prompt"])), *best_and_worst(ranked, what="answers", by="rank")


def scored_completions(row: Row) -> Conversation:
    """UltraFeedback: completions with an overall score, or, where that is missing, a fine-grained one."""
    scored = []
    for completion in row["completions"]:
        score = number(completion.get("overall_score"))
        score = number(completion.get("fine-grained_score")) if score is None else score
        scored.append((completion["response"], score))
    return read_prompt("instruction", row["instruction"]), *best_and_worst(scored, what="completions", by="score")


def scored_lists(row: Row, *, prompt: str, answers: str, scores: str) -> Conversation:
    """A list of answers, and a list of as many scores, of which the highest is the best."""
    if len(row[answers]) != len(row[scores]):
        raise Malformed(f"'{answers}' holds {len(row[answers])} answers and '{scores}' {len(row[scores])} scores")
    scored = [(text, number(score)) for text, score in zip(row[answers], row[scores], strict=True)]
    return read_prompt(prompt, row[prompt]), *best_and_worst(scored, what="answers", by="score")


def vertex_gemini(row: Row) -> Conversation:
    """Google's format for preference tuning: completions with score 1 and 0."""
    system = row.get("system_instruction") or {}
    turns = [*_system_turn(system.get("parts")), *read_turns("contents", row["contents"])]
    scored = [
        (only_answer(read_turns("completions", [one["completion"]])), number(one["score"]))
        for one in row["completions"]
    ]
    return turns, *best_and_worst(scored, what="completions", by="score")


def sorted_responses(row: Row) -> Conversation:
    """PaddleNLP: the user's turns, the assistant's earlier ones, and responses of which the higher `sort` is better."""
    asked, said = ([value] if isinstance(value, str) else value for value in (row["src"], row["tgt"]))
    if len(asked) != len(said) + 1:
        raise Malformed(f"'src' must hold one text more than 'tgt', found {len(asked)} and {len(said)}")
    before = _exchanges(zip(asked, said, strict=False))
    turns = [*before, *read_prompt("src", asked[-1])]
    scored = [(text, number(rank)) for text, rank in zip(row["response"], row["sort"], strict=False)]
    return turns, *best_and_worst(scored, what="responses", by="sort")


def best_and_worst(scored: Sequence[tuple[Any, float | None]], *, what: str, by: str) -> tuple[Any, Any]:
    """Of several answers the one with the highest and the one with the lowest score; of equals the first.

    Answers without a score are passed over.
    """
    known = [(answer, score) for answer, score in scored if score is not None]
    if len(known) < 2:
        raise Unusable(f"fewer than two {what}")
    best, worst = max(known, key=lambda one: one[1]), min(known, key=lambda one: one[1])
    if best[1] == worst[1]:
        raise Unusable(f"all {what} have the same {by}")
    return best[0], worst[0]


# ---------------------------------------------------------------- parts of a conversation


def _shared_turns(chosen: list[Turn], rejected: list[Turn]) -> Conversation:
    shared = shared_length(chosen, rejected)
    return chosen[:shared], only_answer(chosen[shared:]), only_answer(rejected[shared:])


def _opened(turns: list[Turn]) -> list[Turn]:
    """The turns of a prompt, without an assistant turn at its end that says nothing yet."""
    return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else turns


def instruction(row: Row) -> list[Turn]:
    """The turns of an instruction with its optional `input`, after the exchanges of `history`."""
    asked = [text for text in (row["instruction"], read_optional(row, "input")) if text]
    return [*_history(row), *read_prompt("instruction", "\n".join(asked))]


def _history(row: Row) -> list[Turn]:
    history = row.get("history") or []
    exchanges = history if isinstance(history, list) else [history]
    for exchange in exchanges:
        if not (isinstance(exchange, list) and [type(text) for text in exchange] == [str, str]):
            raise Malformed("'history' must be a list of [question, answer] strings")
    return _exchanges(exchanges)


def _exchanges(exchanges: Any) -> list[Turn]:
    """Turns of the user and the assistant, from (asked, said) pairs."""
    return [
        {"role": role, "content": text}
        for exchange in exchanges
        for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]


def _system_turn(content: Any) -> list[Turn]:
    """A system turn with this text or these parts of text; no turn where there are none."""
    text = read_text("'system'", content or "")
    return [{"role": "system", "content": text}] if text else []


def _listed(column: str, text: str) -> list[str]:
    """The texts of a list that is written as JSON."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not found:
        raise Malformed(f"'{column}' must be a list of texts written as JSON")
    if not all(isinstance(said, str) for said in found):
        raise Unusable("a model gave no answer")
    return found


def _number(value: Any) -> float:
    found = number(value)
    assert found is not None, "the kind of the column was checked"
    return found
