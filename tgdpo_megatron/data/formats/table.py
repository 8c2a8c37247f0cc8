"""The formats of preference data: which columns each has, and what reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import tgdpo_megatron.data.formats.readers as readers
from tgdpo_megatron.config import FormatName
from tgdpo_megatron.data.formats.readers import Conversation, by_score, by_sign, by_value
from tgdpo_megatron.data.formats.values import KINDS, Row


@dataclass(frozen=True)
class Format:
    """One way preference pairs are written down.

    Attributes:
        columns: Column -> kind of its values, one of KINDS.
        read: Makes a conversation of a row whose columns are of these kinds.
        optional: Columns that are read if the row has them.
        tools: Where the row has the tools that the model may call.
        lacks_prompt: Whether a row shows no prompt. Where another column might be the prompt, such a row is not
            recognised.
    """

    columns: dict[str, str]
    read: Callable[[Row], Conversation]
    optional: tuple[str, ...] = ("system", "system_prompt")
    lacks_prompt: Callable[[Row], bool] = lambda row: False
    tools: Callable[[Row], Any] = lambda row: row.get("tools")

    def fits(self, row: Row) -> bool:
        """Whether the row has every column, with a value of its kind."""
        return all(KINDS[kind](row.get(column)) for column, kind in self.columns.items())

    def recognises(self, row: Row) -> bool:
        """Whether the row fits, and nothing speaks against taking it for this format."""
        return self.fits(row) and not (self.lacks_prompt(row) and self._has_others(row))

    def _has_others(self, row: Row) -> bool:
        """Whether the row has another column that holds text, turns or null and might be the prompt."""
        others = [value for column, value in row.items() if column not in (*self.columns, *self.optional)]
        return any(value is None or KINDS["string or turns"](value) for value in others)

    @property
    def first(self) -> str:
        """The column that is named first: the prompt's, where the prompt has a column."""
        return next(iter(self.columns))

    def __str__(self) -> str:
        return ", ".join(f"{column} ({kind})" for column, kind in self.columns.items())


# ---------------------------------------------------------------- formats with columns of many names


PROMPTS = (
    *("prompt", "question", "query", "instruction", "input", "context"),
    *("messages", "conversations", "conversation", "trajectory"),
)
"""Names of the column with the prompt."""
ANSWERS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("chosen_messages", "rejected_messages"),
    ("chosen_conversations", "rejected_conversations"),
    ("response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
    ("answer_winning", "answer_losing"),
    ("response_j", "response_k"),
)
"""Names of the columns with the chosen and the rejected answer."""
SCORED = (
    ("generations", "ratings"),
    ("generations", "rating"),
    ("all_generated_responses", "all_rm_scores"),
    ("responses", "scores"),
)
"""Names of the columns with a list of answers and the list of their scores."""
SYSTEM = ("system", "system_prompt")


def _pairs(prompt: str, chosen: str, rejected: str) -> Format:
    kind = "string, turn or turns"
    read = partial(readers.explicit_after_history, prompt=prompt, chosen=chosen, rejected=rejected)
    more = ("input",) if prompt == "instruction" else ()
    columns = {prompt: "string or turns", chosen: kind, rejected: kind}
    return Format(columns, read, optional=(*more, "history", *SYSTEM))


def _pairs_of_conversations(chosen: str, rejected: str) -> Format:
    read = partial(readers.implicit_turns, chosen=chosen, rejected=rejected)
    return Format({chosen: "turns", rejected: "turns"}, read, lacks_prompt=_single_turns(chosen, rejected))


def _single_turns(*columns: str) -> Callable[[Row], bool]:
    return lambda row: all(len(row[column]) == 1 for column in columns)


def _scored_lists(prompt: str, answers: str, scores: str) -> Format:
    read = partial(readers.scored_lists, prompt=prompt, answers=answers, scores=scores)
    return Format({prompt: "string or turns", answers: "strings", scores: "scores"}, read, optional=SYSTEM)


# ---------------------------------------------------------------- the table


def _answers(kind: str) -> dict[str, str]:
    return {"chosen": kind, "rejected": kind}


def _judged(prompt: str, answers: tuple[str, str], verdict: readers.Verdict, *columns: str, kind: str) -> Format:
    """Two answers to a prompt, and the columns that say which one was preferred."""
    read = partial(readers.judged, prompt=prompt, answers=answers, verdict=verdict)
    said = dict.fromkeys((prompt, *answers), "string or turns")
    return Format(said | dict.fromkeys(columns, kind), read)


ARENA_TIES = ("tie", "tie (bothbad)", "both_bad")

FORMATS: dict[FormatName, Sequence[Format]] = {
    "hh_rlhf_prompt": [Format({"prompt": "open transcript", **_answers("string")}, readers.transcript_prompt)],
    "trl": [Format({"prompt": "string", **_answers("string")}, readers.explicit)],
    "ultrafeedback_binarized": [
        # Scored samples: a file may have prompts of one turn and of several.
        Format(
            {"prompt": "string or turns", **_answers("turns"), "all_generated_responses": "strings"},
            readers.ultrafeedback_binarized,
        ),
        Format({"prompt": "string", **_answers("turns")}, readers.ultrafeedback_binarized),
    ],
    "trl_messages": [Format({"prompt": "turns", **_answers("turns")}, readers.explicit)],
    "llama_factory": [
        Format({"instruction": "string", **_answers("string")}, readers.alpaca, optional=("input", "history", *SYSTEM)),
    ],
    "llama_factory_sharegpt": [
        Format({"conversations": "turns", **_answers("turn")}, partial(readers.explicit, prompt="conversations")),
    ],
    "llama_factory_openai": [
        Format({"messages": "turns", **_answers("turn")}, partial(readers.explicit, prompt="messages")),
    ],
    "nemo_rl": [
        Format({"context": "string or turns", "completions": "ranked completions"}, readers.ranked_completions),
    ],
    "nemo_rl_binary": [Format({"prompt": "turns", **_answers("string")}, readers.explicit)],
    "hh_rlhf": [Format(_answers("transcript"), readers.transcripts)],
    "trl_implicit_prompt": [Format(_answers("string"), readers.implicit_string, lacks_prompt=lambda row: True)],
    "trl_implicit_prompt_messages": [
        Format(_answers("turns"), readers.implicit_turns, lacks_prompt=_single_turns("chosen", "rejected")),
    ],
    "pairs": [_pairs(prompt, *answers) for prompt in PROMPTS for answers in ANSWERS],
    "llama_factory_output": [
        Format(
            {"instruction": "string", "output": "two strings"},
            readers.alpaca_output,
            optional=("input", "history", *SYSTEM),
        ),
    ],
    "swift_messages": [
        Format(
            {"messages": "turns", "rejected_response": "string, turn or turns"},
            partial(readers.rejected_beside_messages, rejected="rejected_response"),
        ),
    ],
    "swift_rejected_messages": [
        Format(
            {"messages": "turns", "rejected_messages": "turns"},
            partial(readers.rejected_beside_messages, rejected="rejected_messages"),
        ),
    ],
    "openai_preference": [
        Format(
            {"input": "conversation", "preferred_output": "turns", "non_preferred_output": "turns"},
            readers.openai_preference,
            optional=(),
            tools=lambda row: row["input"].get("tools"),
        ),
    ],
    "lmflow": [
        Format(_answers("conversation"), readers.lmflow, optional=(), tools=lambda row: row["chosen"].get("tools")),
    ],
    "vertex_gemini": [
        Format(
            {"contents": "turns", "completions": "scored turns"},
            readers.vertex_gemini,
            optional=("system_instruction",),
        ),
    ],
    "amazon_nova": [Format({"messages": "turns that end in candidates"}, readers.amazon_nova, optional=())],
    "paddlenlp": [
        Format(
            {"src": "string or strings", "tgt": "string or strings", "response": "strings", "sort": "scores"},
            readers.sorted_responses,
        ),
    ],
    "helpsteer2_preference": [
        _judged(
            "prompt",
            ("response_1", "response_2"),
            by_sign("preference_strength"),
            "preference_strength",
            kind="number",
        ),
    ],
    "helpsteer3_preference": [
        _judged(
            "context",
            ("response1", "response2"),
            by_sign("overall_preference"),
            "overall_preference",
            kind="number",
        ),
    ],
    "pku_saferlhf": [
        _judged(
            "prompt",
            ("response_0", "response_1"),
            by_value("better_response_id", 0, 1),
            "better_response_id",
            kind="number",
        ),
    ],
    "shp": [_judged("history", ("human_ref_A", "human_ref_B"), by_value("labels", 1, 0), "labels", kind="number")],
    "halos": [_judged("prompt", ("output_A", "output_B"), by_value("label", 1, 0), "label", kind="number")],
    "webgpt": [
        Format(
            {
                "question": "question",
                **dict.fromkeys(("answer_0", "answer_1"), "string"),
                **dict.fromkeys(("score_0", "score_1"), "number"),
            },
            partial(readers.webgpt, verdict=by_score("score_0", "score_1")),
        ),
    ],
    "summarize_from_feedback": [
        Format(
            {"info": "post", "summaries": "summaries", "choice": "number"},
            partial(readers.summaries, verdict=by_value("choice", 0, 1)),
        ),
    ],
    "alpaca_farm": [
        Format(
            {"instruction": "string", "output_1": "string", "output_2": "string", "preference": "number"},
            partial(readers.judged_alpaca, answers=("output_1", "output_2"), verdict=by_value("preference", 1, 2)),
            optional=("input", *SYSTEM),
        ),
    ],
    "arena": [
        Format(
            {"conversation_a": "turns", "conversation_b": "turns", "winner": "string"},
            partial(
                readers.judged_conversations,
                answers=("conversation_a", "conversation_b"),
                verdict=by_value("winner", "model_a", "model_b", ties=ARENA_TIES),
            ),
        ),
    ],
    "arena_table": [
        Format(
            {
                **dict.fromkeys(("prompt", "response_a", "response_b"), "string"),
                **dict.fromkeys(("winner_model_a", "winner_model_b"), "number"),
            },
            partial(readers.arena_table, verdict=by_score("winner_model_a", "winner_model_b")),
        ),
    ],
    "ultrafeedback": [
        Format({"instruction": "string", "completions": "scored completions"}, readers.scored_completions),
    ],
    "nectar": [Format({"prompt": "transcript", "answers": "ranked answers"}, readers.ranked_answers)],
    "pairs_of_conversations": [_pairs_of_conversations(*answers) for answers in ANSWERS[1:]],
    "scored_lists": [_scored_lists(prompt, *scored) for prompt in PROMPTS for scored in SCORED],
}
"""Formats in the order in which they are tried: first those in which the prompt has a column of its own. A format that
goes by several sets of column names has a Format for each."""
