"""Rows to pairs: each format is recognised, read as its own users mean it, and refused by name where it is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from tgdpo_megatron.config import FormatName
from tgdpo_megatron.data.formats import FORMATS, TextPairs, read_pairs
from tgdpo_megatron.errors import UserError

Write = Callable[..., Path]


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def said(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


QUESTION, BLUE, GREEN = turn("user", "Colour of the sky?"), turn("assistant", "Blue."), turn("assistant", "Green.")
EARLIER = [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello")]
SHAREGPT = [said("system", "Be brief."), said("human", "Hi"), said("gpt", "Hello"), said("human", "Colour of the sky?")]

SAME_PAIR: dict[FormatName, dict[str, Any]] = {
    "trl": {"prompt": QUESTION["content"], "chosen": "Blue.", "rejected": "Green."},
    "trl_messages": {"prompt": [*EARLIER, QUESTION], "chosen": [BLUE], "rejected": [GREEN]},
    "trl_implicit_prompt_messages": {"chosen": [*EARLIER, QUESTION, BLUE], "rejected": [*EARLIER, QUESTION, GREEN]},
    "ultrafeedback_binarized": {
        "prompt": QUESTION["content"],
        "prompt_id": "f0e1",
        "chosen": [QUESTION, BLUE],
        "rejected": [QUESTION, GREEN],
        "messages": [QUESTION, BLUE],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    },
    "llama_factory": {
        "instruction": "Colour",
        "input": "of the sky?",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
        "chosen": "Blue.",
        "rejected": "Green.",
    },
    "llama_factory_sharegpt": {
        "conversations": SHAREGPT,
        "chosen": said("gpt", "Blue."),
        "rejected": said("gpt", "Green."),
    },
    "llama_factory_openai": {"messages": [*EARLIER, QUESTION], "chosen": BLUE, "rejected": GREEN},
    "nemo_rl": {
        "context": [*EARLIER, QUESTION],
        "completions": [
            {"rank": 1, "completion": [turn("assistant", "Blue-ish.")]},
            {"rank": 2, "completion": [GREEN]},
            {"rank": 0, "completion": [BLUE]},
        ],
    },
    "nemo_rl_binary": {"prompt": [*EARLIER, QUESTION], "chosen": "Blue.", "rejected": "Green."},
    "hh_rlhf": {
        "chosen": "\n\nHuman: Colour of the sky?\n\nAssistant: Blue.",
        "rejected": "\n\nHuman: Colour of the sky?\n\nAssistant: Green.",
    },
}
"""One question in every format that can hold it; with a system turn and an earlier exchange where the format can."""
SINGLE_TURN = ("trl", "ultrafeedback_binarized", "hh_rlhf")


@pytest.fixture
def read(write_pairs: Write, tmp_path: Path) -> Callable[..., TextPairs]:
    """A function that writes rows and reads them as pairs."""

    def run(
        rows: Sequence[Any], format: FormatName | None = None, columns: Mapping[str, str] | None = None
    ) -> TextPairs:
        return read_pairs(write_pairs(tmp_path / "pairs.jsonl", rows), format, columns)

    return run


@pytest.fixture
def refusal(read: Callable[..., TextPairs]) -> Callable[..., str]:
    """A function that returns the one sentence with which rows are refused."""

    def run(rows: Sequence[Any], format: FormatName | None = None, columns: Mapping[str, str] | None = None) -> str:
        with pytest.raises(UserError) as refused:
            read(rows, format, columns)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    return run


def test_the_settings_know_every_layout_and_no_other() -> None:
    assert set(get_args(FormatName)) == set(FORMATS)


@pytest.mark.parametrize("format", SAME_PAIR)
def test_a_layout_is_recognised_and_gives_the_same_pair_as_the_others(
    format: FormatName, read: Callable[..., TextPairs]
) -> None:
    found = read([SAME_PAIR[format]])
    (pair,) = found.pairs
    expected = [QUESTION] if format in SINGLE_TURN else [*EARLIER, QUESTION]
    if format == "llama_factory":  # instruction and input are joined by a newline
        expected = [*EARLIER, turn("user", "Colour\nof the sky?")]
    assert found.format == format
    assert list(pair.messages) == expected
    assert (pair.chosen, pair.rejected, pair.row) == ("Blue.", "Green.", 1)


@pytest.mark.parametrize("format", SAME_PAIR)
def test_a_layout_reads_the_same_from_a_saved_folder(
    format: FormatName, read: Callable[..., TextPairs], tmp_path: Path
) -> None:
    """Arrow fills what a row does not have with nulls, which must change nothing."""
    from datasets import Dataset

    rows = [SAME_PAIR[format]]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert read_pairs(tmp_path / "saved") == read(rows)


def test_the_columns_that_were_read_are_told(read: Callable[..., TextPairs]) -> None:
    assert read([SAME_PAIR["ultrafeedback_binarized"]]).columns == ("prompt", "chosen", "rejected")
    assert read([SAME_PAIR["llama_factory"]]).columns == (
        *("instruction", "chosen", "rejected"),
        *("input", "history", "system"),
    )


# ---------------------------------------------------------------- implicit prompts


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        # TRL's documented example: the space belongs to the answers.
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("Is it? Yes", "Is it? No", ("Is it?", " Yes", " No")),
        ("The sky is\nblue.", "The sky is\ngreen.", ("The sky is\n", "blue.", "green.")),
        # Where one text is the start of the other, its last character is its answer.
        ("It is", "It is no", ("It i", "s", "s no")),
        ("I s", "I so", ("I ", "s", "so")),
    ],
)
def test_an_implicit_string_prompt_is_the_common_start(
    chosen: str, rejected: str, expected: tuple[str, ...], read: Callable[..., TextPairs]
) -> None:
    found = read([{"chosen": chosen, "rejected": rejected}])
    assert found.format == "trl_implicit_prompt"
    assert tuple(found.pairs[0].texts) == expected
    assert found.pairs[0].messages[0]["role"] == "user"


def test_texts_with_no_common_start_have_no_prompt(read: Callable[..., TextPairs]) -> None:
    rows = [{"chosen": "A b", "rejected": "A c"}, {"chosen": "Yes", "rejected": "No"}, {"chosen": "", "rejected": "c"}]
    assert read(rows).dropped == {"chosen and rejected share no prompt": [2, 3]}


def test_two_texts_beside_a_column_that_may_be_the_prompt_are_not_taken_for_an_implicit_one(
    refusal: Callable[..., str], read: Callable[..., TextPairs]
) -> None:
    for other in ({"about": "Why?"}, {"prompt": None}):
        rows = [{**other, "chosen": "It is so", "rejected": "It is no"}]
        assert "not a known format" in refusal(rows)
        assert read(rows, "trl_implicit_prompt").pairs[0].texts == ["It is", " so", " no"]


def test_an_implicit_prompt_of_messages_is_the_turns_both_share(read: Callable[..., TextPairs]) -> None:
    """Also where the answers are the same: the last turn is always the answer."""
    more = [QUESTION, BLUE, turn("user", "And grass?")]
    rows = [
        {"chosen": [*more, GREEN], "rejected": [*more, BLUE]},
        {"chosen": [*more, GREEN], "rejected": [*more, GREEN]},
    ]
    for pair in read(rows).pairs:
        assert list(pair.messages) == more and pair.chosen == "Green."


def test_answers_that_part_before_the_last_turn_are_left_out_and_counted(read: Callable[..., TextPairs]) -> None:
    parted = {"chosen": [QUESTION, BLUE, QUESTION, BLUE], "rejected": [QUESTION, GREEN, QUESTION, GREEN]}
    longer = {"chosen": [QUESTION, BLUE], "rejected": [QUESTION, BLUE, QUESTION, GREEN]}
    found = read([{"chosen": [QUESTION, BLUE], "rejected": [QUESTION, GREEN]}, parted, longer])
    assert found.dropped == {"an answer is not one assistant turn after the shared prompt": [2, 3]}
    assert (len(found.pairs), found.rows) == (1, 3)


def test_a_transcript_keeps_its_earlier_exchanges(read: Callable[..., TextPairs]) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Colour of the sky?\n\nAssistant:"
    (pair,) = read([{"chosen": f"{start} Blue.\n\nOr so.", "rejected": f"{start} Blue?"}]).pairs
    assert list(pair.messages) == [turn("user", "Hi"), turn("assistant", "Hello"), QUESTION]
    assert (pair.chosen, pair.rejected) == ("Blue.\n\nOr so.", "Blue?")


# ---------------------------------------------------------------- rules of one format


@pytest.mark.parametrize("empty", [{}, {"input": "", "history": [], "system": ""}, {"input": None, "history": None}])
def test_llama_factorys_optional_columns_may_be_empty(empty: dict[str, Any], read: Callable[..., TextPairs]) -> None:
    (pair,) = read([{"instruction": "Why?", "chosen": "a", "rejected": "b", **empty}]).pairs
    assert list(pair.messages) == [turn("user", "Why?")]


def test_a_system_turn_of_the_conversation_comes_before_the_system_column(read: Callable[..., TextPairs]) -> None:
    row = SAME_PAIR["llama_factory_sharegpt"] | {"system": "Be long."}
    without = row | {"conversations": SHAREGPT[1:]}
    first, second = read([row, without]).pairs
    assert first.messages[0] == turn("system", "Be brief.")
    assert second.messages[0] == turn("system", "Be long.") and first.messages[1:] == second.messages[1:]


def test_the_best_completion_is_compared_with_the_worst(read: Callable[..., TextPairs]) -> None:
    def row(*ranked: tuple[float, str]) -> dict[str, Any]:
        completions = [{"rank": rank, "completion": [turn("assistant", text)]} for rank, text in ranked]
        return {"context": [QUESTION], "completions": completions}

    found = read(
        [
            row((3, "c"), (1, "a"), (2, "b")),
            row((1, "a"), (1, "b")),
            row((1, "a")),
            row(),
            row((0.5, "a"), (0.25, "b"), (0.5, "c")),
        ]
    )
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [("a", "c"), ("b", "a")]
    assert found.dropped == {"all completions have the same rank": [2], "fewer than two completions": [3, 4]}


@pytest.mark.parametrize(
    ("row", "first", "second", "tie"),
    [
        ({"prompt": "Q", "response_1": "a", "response_2": "b"}, {"preference_strength": -3}, {"preference_strength": 1},
         {"preference_strength": 0}),
        ({"context": "Q", "response1": "a", "response2": "b"}, {"overall_preference": -1}, {"overall_preference": 2},
         {"overall_preference": 0}),
        ({"prompt": "Q", "response_0": "a", "response_1": "b"}, {"better_response_id": 0}, {"better_response_id": 1},
         None),
        ({"history": "Q", "human_ref_A": "a", "human_ref_B": "b"}, {"labels": 1}, {"labels": 0}, None),
        ({"prompt": "Q", "output_A": [turn("assistant", "a")], "output_B": [turn("assistant", "b")]}, {"label": 1},
         {"label": 0}, None),
        ({"question": {"full_text": "Q"}, "answer_0": "a", "answer_1": "b"}, {"score_0": 0.5, "score_1": -0.5},
         {"score_0": -1, "score_1": 1}, {"score_0": 0.0, "score_1": 0.0}),
        ({"info": {"article": "Q"}, "summaries": [{"text": "a"}, {"text": "b"}]}, {"choice": 0}, {"choice": 1}, None),
        ({"instruction": "Q", "output_1": "a", "output_2": "b"}, {"preference": 1}, {"preference": 2}, None),
        ({"conversation_a": [turn("user", "Q"), turn("assistant", "a")],
          "conversation_b": [turn("user", "Q"), turn("assistant", "b")]}, {"winner": "model_a"}, {"winner": "model_b"},
         {"winner": "tie (bothbad)"}),
        ({"prompt": '["Q"]', "response_a": '["a"]', "response_b": '["b"]'}, {"winner_model_a": 1, "winner_model_b": 0},
         {"winner_model_a": 0, "winner_model_b": 1}, {"winner_model_a": 0, "winner_model_b": 0}),
    ],
)  # fmt: skip
def test_of_two_answers_the_preferred_one_is_chosen_and_a_tie_is_left_out(
    row: dict[str, Any], first: dict[str, Any], second: dict[str, Any], tie: Any, read: Callable[..., TextPairs]
) -> None:
    found = read([row | first, row | second, *([row | tie] if tie else [])])
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [("a", "b"), ("b", "a")]
    assert found.dropped == ({"neither answer was preferred": [3]} if tie else {})


def test_a_verdict_that_nobody_gives_is_malformed(refusal: Callable[..., str]) -> None:
    row = {"prompt": "Q", "response_0": "a", "response_1": "b", "better_response_id": 1}
    assert "line 2: 'better_response_id' must be 0, 1, found 2" in refusal([row, row | {"better_response_id": 2}])


@pytest.mark.parametrize("round", [["Q", "More?"], ["Q"]])
def test_rounds_after_the_first_answers_part_the_conversations(
    round: list[str], read: Callable[..., TextPairs]
) -> None:
    answers = {name: json.dumps([f"{name}{asked}" for asked in round]) for name in ("response_a", "response_b")}
    found = read([{"prompt": json.dumps(round), **answers, "winner_model_a": 1, "winner_model_b": 0}])
    assert len(found.pairs) == (len(round) == 1)


def test_the_highest_score_is_compared_with_the_lowest(read: Callable[..., TextPairs]) -> None:
    def row(*scores: float | None) -> dict[str, Any]:
        return {"instruction": "Q", "generations": list("abcd"[: len(scores)]), "ratings": list(scores)}

    found = read([row(2, 5, 1, 5), row(None, 3, 4), row(3, 3), row(None, 3), row(4, None)])
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [("b", "c"), ("c", "b")]
    assert found.dropped == {"all answers have the same score": [3], "fewer than two answers": [4, 5]}


def test_as_many_scores_as_answers_are_needed(refusal: Callable[..., str]) -> None:
    row = {"instruction": "Q", "generations": ["a", "b"], "ratings": [1]}
    assert "'generations' holds 2 answers and 'ratings' 1 scores; the data is read as scored_lists" in refusal([row])


def test_a_fine_grained_score_counts_where_the_overall_score_is_missing(read: Callable[..., TextPairs]) -> None:
    completions = [
        {"response": "a", "overall_score": None, "fine-grained_score": 4.5},
        {"response": "b", "overall_score": 9, "fine-grained_score": 1},
        {"response": "c", "overall_score": "N/A", "fine-grained_score": 2},
    ]
    (pair,) = read([{"instruction": "Q", "completions": completions}]).pairs
    assert (pair.chosen, pair.rejected) == ("b", "c")


def test_swifts_history_and_system_come_before_the_query(read: Callable[..., TextPairs]) -> None:
    row = {"query": "Colour of the sky?", "response": "Blue.", "rejected_response": "Green."}
    (pair,) = read([row | {"system": "Be brief.", "history": [["Hi", "Hello"]]}]).pairs
    assert list(pair.messages) == [*EARLIER, QUESTION]


def test_rejected_messages_may_hold_the_answer_alone(read: Callable[..., TextPairs]) -> None:
    (pair,) = read([{"messages": [*EARLIER, QUESTION, BLUE], "rejected_messages": [GREEN]}]).pairs
    assert (list(pair.messages), pair.rejected) == ([*EARLIER, QUESTION], "Green.")


def test_an_instruction_takes_its_input_under_any_names_of_the_answers(read: Callable[..., TextPairs]) -> None:
    row = {"instruction": "Add.", "input": "2 and 3", "chosen_response": "5", "rejected_response": "6"}
    assert read([row]).pairs[0].texts == ["Add.\n2 and 3", "5", "6"]


def test_a_prompt_in_hh_rlhfs_writing_becomes_turns(read: Callable[..., TextPairs]) -> None:
    row = {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Colour of the sky?\n\nAssistant:"}
    (pair,) = read([row | {"chosen": " Blue.", "rejected": " Green."}]).pairs
    assert list(pair.messages) == [turn("user", "Hi"), turn("assistant", "Hello"), QUESTION]


def test_tools_inside_openais_input_belong_to_the_pair(read: Callable[..., TextPairs]) -> None:
    tool = {"type": "function", "function": {"name": "look"}}
    row = {
        "input": {"messages": [QUESTION], "tools": [tool]},
        "preferred_output": [BLUE],
        "non_preferred_output": [GREEN],
    }
    assert read([row]).pairs[0].tools == (tool,)


def test_answers_that_repeat_the_prompt_are_taken_without_it(read: Callable[..., TextPairs]) -> None:
    row = {"prompt": [QUESTION], "chosen": [QUESTION, BLUE], "rejected": [QUESTION, GREEN]}
    (pair,) = read([row]).pairs
    assert pair.texts == [QUESTION["content"], "Blue.", "Green."]


def test_ultrafeedbacks_prompt_counts_where_the_answers_stand_alone(read: Callable[..., TextPairs]) -> None:
    (pair,) = read([{"prompt": "Why?", "chosen": [BLUE], "rejected": [GREEN]}]).pairs
    assert pair.texts == ["Why?", "Blue.", "Green."]


def test_parts_that_are_text_are_joined(read: Callable[..., TextPairs]) -> None:
    parts = [{"type": "text", "text": "Colour of "}, {"type": "text", "text": "the sky?"}]
    (pair,) = read([{"prompt": [turn("user", parts)], "chosen": [BLUE], "rejected": [GREEN]}]).pairs
    assert list(pair.messages) == [QUESTION]


# ---------------------------------------------------------------- well formed, but nothing to train on

GOOD = SAME_PAIR["trl_messages"]
IMAGE = turn("user", [{"type": "image"}, {"type": "text", "text": "What is this?"}])
CALL = turn("assistant", None, tool_calls=[{"function": {"name": "look"}}])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": [IMAGE]}, "a turn holds more than text"),
        ({"chosen": [turn("assistant", None, tool_calls=[{"name": 1}])]}, "a turn calls a tool in a form that is not"),
        ({"chosen": [turn("assistant", None, tool_calls=True)]}, "a turn calls a tool in a form that is not known"),
        ({"chosen": [turn("assistant", None, tool_calls=3)]}, "a turn calls a tool in a form that is not known"),
        ({"chosen": [turn("assistant", None, function_call=3)]}, "a turn calls a tool in a form that is not known"),
        ({"prompt": [QUESTION, turn("tool_call", "look!")]}, "a turn calls a tool in a form that is not known"),
        (
            {"prompt": [turn("user", "Look.", tool_calls=CALL["tool_calls"])]},
            "a turn that is not the assistant's calls",
        ),
        ({"prompt": [turn("system", "Be brief."), turn("tool", "blue")]}, "the user says nothing"),
        ({"prompt": [QUESTION, BLUE]}, "the turn before the answers is not the user's"),
        ({"prompt": []}, "the turn before the answers is not the user's"),
        ({"prompt": [QUESTION, *EARLIER, QUESTION]}, "a system turn is not the first"),
        ({"chosen": [BLUE, QUESTION, BLUE]}, "an answer is not one assistant turn after the shared prompt"),
        ({"rejected": [QUESTION]}, "an answer is not one assistant turn after the shared prompt"),
        ({"rejected": []}, "an answer is not one assistant turn after the shared prompt"),
        ({"images": ["sky.png"]}, "images, videos or sound belong to the row"),
        ({"tools": ["look"]}, "tools belong to the row, in a form that is not known"),
        ({"tools": [{"title": "look"}]}, "tools belong to the row, in a form that is not known"),
        ({"chosen": [turn("assistant", "\ud83d")]}, "the text holds an incomplete character"),
    ],
)
def test_what_cannot_be_trained_on_is_left_out_and_counted(
    change: dict[str, Any], reason: str, read: Callable[..., TextPairs]
) -> None:
    found = read([GOOD, GOOD | change, GOOD])
    ((said, rows),) = found.dropped.items()
    assert said.startswith(reason) and rows == [2]
    assert [pair.row for pair in found.pairs] == [1, 3]


LOOK = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
SCHEMA = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("calling", "result"),
    [
        (turn("assistant", None, tool_calls=[{"id": "c1", **LOOK}]), turn("tool", "blue", tool_call_id="c1")),
        ({"role": "assistant", "tool_calls": [LOOK]}, turn("tool", "blue")),
        (turn("assistant", "", tool_calls=[{"function": LOOK["function"]}]), turn("ipython", "blue")),
        (
            turn("assistant", "", tool_calls=[{"function": {"name": "look", "arguments": '{"at": "sky"}'}}]),
            turn("function", "blue", name="look"),
        ),
        (turn("assistant", "", function_call=LOOK["function"]), turn("tool", {"colour": "blue"})),
        (said("function_call", '{"name": "look", "arguments": {"at": "sky"}}'), said("observation", "blue")),
        (turn("tool_call", '{"name": "look", "arguments": "{\\"at\\": \\"sky\\"}"}'), turn("tool_response", "blue")),
    ],
    ids=["OpenAI", "no content", "no type", "arguments as text", "function_call", "LLaMA-Factory", "ms-swift"],
)
def test_calls_and_results_are_read_in_the_forms_that_people_write(
    calling: dict[str, Any], result: dict[str, Any], read: Callable[..., TextPairs]
) -> None:
    (pair,) = read([GOOD | {"prompt": [QUESTION, calling, result]}]).pairs
    asked, called, told = pair.messages
    assert (asked, called["role"], called["content"], told["role"]) == (QUESTION, "assistant", "", "tool")
    assert [{key: call[key] for key in ("type", "function")} for call in called["tool_calls"]] == [LOOK]
    assert told["content"] == ("blue" if result.get("content") != {"colour": "blue"} else '{"colour": "blue"}')


def test_calls_that_follow_each_other_are_one_turn(read: Callable[..., TextPairs]) -> None:
    """As ms-swift writes calls that are made at once."""
    calls = [turn("tool_call", json.dumps({"name": "look", "arguments": {"at": at}})) for at in ("sky", "sea")]
    (pair,) = read([GOOD | {"prompt": [QUESTION, *calls, turn("tool", "blue"), turn("tool", "green")]}]).pairs
    assert [len(one.get("tool_calls", [])) for one in pair.messages] == [0, 2, 0, 0]


@pytest.mark.parametrize("written", [[SCHEMA], json.dumps([SCHEMA]), [SCHEMA["function"]], [json.dumps(SCHEMA)]])
def test_tools_are_read_as_schemas(written: Any, read: Callable[..., TextPairs]) -> None:
    assert read([GOOD | {"tools": written}]).pairs[0].tools == (SCHEMA,)


def test_an_answer_may_end_in_a_call_and_have_a_thought(read: Callable[..., TextPairs]) -> None:
    chosen = turn("assistant", "Let me look.", tool_calls=[LOOK], reasoning_content="I cannot see.")
    (pair,) = read([GOOD | {"chosen": [chosen]}]).pairs
    assert pair.answers == (chosen, GREEN)
    assert {"look", "sky", "I cannot see."} <= set(pair.texts)


def test_conversations_with_calls_share_their_prompt(read: Callable[..., TextPairs]) -> None:
    before = [QUESTION, turn("assistant", "", tool_calls=[LOOK]), turn("tool", "blue")]
    (pair,) = read([{"chosen": [*before, BLUE], "rejected": [*before, GREEN]}]).pairs
    assert (len(pair.messages), pair.chosen, pair.rejected) == (3, "Blue.", "Green.")


def test_a_table_that_fills_calls_with_nulls_gives_the_same_pairs(
    read: Callable[..., TextPairs], tmp_path: Path
) -> None:
    """Arrow gives every call the arguments of all others, and every turn the fields of all others."""
    import pyarrow
    from pyarrow import parquet

    other = {"type": "function", "function": {"name": "listen", "arguments": {"to": "rain"}}}
    prompts = [[QUESTION, turn("assistant", "", tool_calls=[call]), turn("tool", "blue")] for call in (LOOK, other)]
    rows = [GOOD | {"prompt": prompt, "tools": [SCHEMA]} for prompt in prompts]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    assert read_pairs(tmp_path / "pairs.parquet").pairs == read(rows).pairs


def test_empty_columns_for_images_and_tools_change_nothing(read: Callable[..., TextPairs]) -> None:
    assert not read([GOOD | {"images": [], "tools": "[]"}, GOOD | {"images": None, "tools": None}]).dropped


# ---------------------------------------------------------------- refused


def test_names_that_tell_what_columns_hold_give_the_mapping_that_reads_them(
    refusal: Callable[..., str], read: Callable[..., TextPairs]
) -> None:
    """Also where YAML would read a name as something else: `no` as false."""
    row = {"no": "Why?", "good_answer": "a", "bad answer": "b", "id": 7}
    sentence = refusal([row])
    assert "the first row has no (string), good_answer (string), bad answer (string), id (int)" in sentence
    setting = """'data.columns={prompt: "no", chosen: good_answer, rejected: "bad answer"}'"""
    assert f"with {setting} it is read as trl" in sentence
    columns = yaml.safe_load(setting.strip("'").partition("=")[2])
    assert read([row], None, columns).pairs[0].texts == ["Why?", "a", "b"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "response_0": "b", "response_1": "c"}, "nearest is pku_saferlhf, which also needs better_"),
        ({"instruction": "a", "generations": ["b", "c"]}, "nearest is scored_lists, which also needs ratings (scores)"),
        ({"prompt": "a", "chosen": 7, "rejected": "c"}, "nearest is trl, which also needs chosen (string); the first"),
        ({"foo": 1}, "give it with 'data.columns={prompt: NAME, chosen: NAME, rejected: NAME}'"),
    ],
)
def test_the_nearest_format_is_named_with_what_is_missing(
    row: dict[str, Any], words: str, refusal: Callable[..., str]
) -> None:
    assert words in refusal([row])


def test_a_label_of_another_tool_is_never_guessed(refusal: Callable[..., str]) -> None:
    """Its numbers may mean the opposite: HelpSteer2's positive numbers prefer the second answer."""
    sentence = refusal([{"prompt": "a", "response_1": "b", "response_2": "c", "preference": 1}])
    assert "preference_strength (number)" in sentence and "preference_strength: preference" not in sentence


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": [QUESTION, BLUE], "label": True}, "single answers marked good or bad (data for KTO)"),
        ({"instruction": "a", "output": "b", "kto_tag": False}, "single answers marked good or bad (data for KTO)"),
        ({"context": [QUESTION], "answer": BLUE, "is_desirable": True}, "single answers marked good or bad"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "answers marked step by step"),
        ({"message_id": "1", "parent_id": "0", "text": "a", "role": "prompter"}, "the messages of a tree"),
        ({"prompt": "a", "response": "b", "score": 3}, "single answers with ratings"),
        ({"instruction": "a", "input": "", "output": "b"}, "one answer to each prompt (data for supervised"),
        ({"conversations": SHAREGPT}, "one answer to each prompt (data for supervised"),
        ({"prompt": [QUESTION], "reward_model": {"ground_truth": "72"}}, "prompts with a reference to check answers"),
        ({"question": "a", "id": 1}, "prompts without answers"),
        ({"text": "a"}, "plain text"),
    ],
)
def test_data_that_are_not_pairs_are_called_by_their_name(
    row: dict[str, Any], what: str, refusal: Callable[..., str]
) -> None:
    assert f"pairs.jsonl: holds {what}" in refusal([row])


def test_two_columns_that_may_be_the_prompt_are_not_chosen_between(
    refusal: Callable[..., str], read: Callable[..., TextPairs]
) -> None:
    row = {"question": "Why?", "context": "Because.", "chosen": "a", "rejected": "b"}
    assert "question and context may both be the prompt; say which with 'data.columns={prompt: question}'" in refusal(
        [row]
    )
    assert read([row], None, {"prompt": "question"}).pairs[0].texts == ["Why?", "a", "b"]


# ---------------------------------------------------------------- renamed columns


ODD = {"ask": "Why?", "yes": "a", "no": "b"}
MAPPING = {"prompt": "ask", "chosen": "yes", "rejected": "no"}


def test_renamed_columns_are_read_and_told(read: Callable[..., TextPairs]) -> None:
    found = read([ODD], None, MAPPING)
    assert found.columns == ("ask as prompt", "yes as chosen", "no as rejected")
    assert found.format == "trl" and found.pairs[0].texts == ["Why?", "a", "b"]


def test_a_renamed_column_comes_before_one_of_that_name(read: Callable[..., TextPairs]) -> None:
    found = read([ODD | {"prompt": "Not this?"}], None, MAPPING)
    assert found.pairs[0].texts == ["Why?", "a", "b"]


def test_a_mapping_to_a_column_that_is_not_there_names_the_nearest(refusal: Callable[..., str]) -> None:
    assert "column 'yess', which no row has; did you mean 'yes'" in refusal([ODD], None, MAPPING | {"chosen": "yess"})
    assert "which no row has; known are ask, yes, no" in refusal([ODD], None, MAPPING | {"chosen": "7"})


def test_a_mapping_of_a_name_that_no_format_has_names_the_nearest(refusal: Callable[..., str]) -> None:
    assert "no format has a column 'promt'; did you mean 'prompt'" in refusal([ODD], None, {"promt": "ask"})


def test_a_row_without_the_renamed_column_is_named(refusal: Callable[..., str]) -> None:
    assert "line 2: rejected missing" in refusal([ODD, {"ask": "Why?", "yes": "a"}], None, MAPPING)


# ---------------------------------------------------------------- forced formats


def test_a_forced_layout_whose_columns_are_not_there_is_refused(refusal: Callable[..., str]) -> None:
    sentence = refusal([SAME_PAIR["trl"]], "llama_factory_sharegpt")
    assert "data.format=llama_factory_sharegpt needs conversations (turns), chosen (turn), rejected (turn);" in sentence
    assert "the first row has prompt (string), chosen (string), rejected (string)" in sentence


def test_a_forced_layout_is_taken_over_the_one_that_would_be_recognised(read: Callable[..., TextPairs]) -> None:
    row = SAME_PAIR["trl"] | {"instruction": "Which colour?"}
    assert read([row]).pairs[0].texts[0] == QUESTION["content"]
    forced = read([row], "llama_factory")
    assert forced.pairs[0].texts[0] == "Which colour?" and forced.format == "llama_factory"


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("null", [False, True])
def test_a_row_without_a_column_is_named(column: str, null: bool, refusal: Callable[..., str]) -> None:
    bad: dict[str, Any] = {name: value for name, value in SAME_PAIR["trl"].items() if name != column}
    if null:
        bad[column] = None
    assert f"line 2: {column} missing; the row has " in refusal([SAME_PAIR["trl"], bad])


@pytest.mark.parametrize(("value", "kind"), [(7, "int"), (BLUE, "turn"), ([BLUE], "turns"), (["Blue"], "list")])
def test_an_answer_of_another_kind_among_many_is_named(value: Any, kind: str, refusal: Callable[..., str]) -> None:
    good = SAME_PAIR["trl"]
    sentence = refusal([good, good, good | {"rejected": value}])
    assert f"line 3: 'rejected' must hold string, found {kind}; the data is read as trl." in sentence


@pytest.mark.parametrize(
    ("format", "change", "words"),
    [
        ("trl_messages", {"prompt": [turn("wizard", "Hi")]}, "'prompt' has a turn of role 'wizard'; known are system"),
        ("trl_messages", {"prompt": [turn("user", None)]}, "'prompt' has a turn whose content must be a string"),
        ("trl_messages", {"prompt": [turn("user", ["Hi"])]}, "'prompt' has a turn whose content must be a string"),
        ("trl_messages", {"prompt": [turn(["user"], "Hi")]}, "'prompt' has a turn of role ['user']"),
        ("trl_messages", {"prompt": [{"text": "Hi"}]}, "'prompt' must hold turns, found list"),
        ("llama_factory", {"history": [["Hi"]]}, "'history' must be a list of [question, answer] strings"),
        ("llama_factory", {"history": "Hi"}, "'history' must be a list of [question, answer] strings"),
        ("llama_factory", {"input": 7}, "'input' must be a string, found int"),
        ("llama_factory", {"system": ["a"]}, "'system' must be a string, found list"),
        ("llama_factory_sharegpt", {"chosen": "Blue."}, "'chosen' must hold turn, found string"),
        ("nemo_rl", {"completions": [{"completion": [BLUE]}]}, "'completions' must hold ranked completions"),
        ("nemo_rl", {"context": 7}, "'context' must hold string or turns, found int"),
        ("hh_rlhf", {"chosen": "Hello"}, "'chosen' must hold transcript, found string"),
    ],
)
def test_a_malformed_row_is_named_with_what_is_wrong(
    format: FormatName, change: dict[str, Any], words: str, refusal: Callable[..., str]
) -> None:
    good = SAME_PAIR[format]
    sentence = refusal([good, good | change])
    assert f"pairs.jsonl line 2: {words}" in sentence
    assert sentence.endswith(f"; the data is read as {format}.")


@pytest.mark.parametrize("rows", [["a", "b"], [[1, 2]], [None]])
def test_rows_that_are_no_objects_are_named(rows: list[Any], refusal: Callable[..., str]) -> None:
    assert "line 1: expected an object with named columns, found " in refusal(rows)


def test_all_malformed_rows_are_numbered(refusal: Callable[..., str]) -> None:
    bad = GOOD | {"chosen": 7}
    sentence = refusal([GOOD, bad, GOOD, bad, {}])
    assert "line 2: 'chosen' must hold turns, found int; the data is read as trl_messages" in sentence
    assert sentence.endswith("; 2 more malformed: 4, 5.")


@pytest.mark.parametrize("other", ["nemo_rl", "llama_factory", "trl_messages"])
def test_a_row_of_another_format_is_named_with_both(other: FormatName, refusal: Callable[..., str]) -> None:
    assert refusal([SAME_PAIR["trl"], SAME_PAIR[other]]).endswith(
        f"line 2: the row is of the format {other}, the first row of trl; keep each format in a file of its own."
    )


def test_a_later_row_that_is_no_object_is_named(refusal: Callable[..., str]) -> None:
    assert "line 2: expected an object with named columns, found int" in refusal([GOOD, 7])


# ---------------------------------------------------------------- real rows


def test_real_instruction_pairs_read(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("preferences_instruction.json")
    rows = json.loads(path.read_text())
    found = read_pairs(path)
    assert found.format == "llama_factory" and not found.dropped
    assert [pair.texts for pair in found.pairs] == [
        [row["instruction"], row["chosen"], row["rejected"]] for row in rows
    ]


def test_real_sharegpt_pairs_read_with_their_system_and_earlier_turns(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("preferences_sharegpt.json")
    rows = json.loads(path.read_text())
    found = read_pairs(path)
    assert found.format == "llama_factory_sharegpt" and not found.dropped
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    assert len(rows) == len(found.pairs) and max(len(pair.messages) for pair in found.pairs) > 3
    for row, pair in zip(rows, found.pairs, strict=True):
        expected = [turn(roles[message["from"]], message["value"]) for message in row["conversations"]]
        assert list(pair.messages) == expected
        assert (pair.chosen, pair.rejected) == (row["chosen"]["value"], row["rejected"]["value"])


def test_a_stray_role_beside_from_and_value_is_passed_over(read: Callable[..., TextPairs]) -> None:
    question = said("human", "Colour of the sky?") | {"role": "anything"}
    row = {"conversations": [question], "chosen": said("gpt", "Blue."), "rejected": said("gpt", "Green.")}
    (pair,) = read([row]).pairs
    assert list(pair.messages) == [QUESTION]


# ---------------------------------------------------------------- what would be misread


def test_turns_written_into_the_cells_of_a_table_are_refused(tmp_path: Path) -> None:
    """As `Dataset.to_csv` writes them: the cell is text, and would be trained on as such."""
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\nHi,\"[{'role': 'assistant', 'content': 'Hello'}]\",No\n")
    with pytest.raises(UserError, match=r"row 1: 'chosen' holds turns written as text.*\.jsonl or \.parquet"):
        read_pairs(path)


def test_a_system_prompt_is_read_beside_any_prompt_column(tmp_path: Path) -> None:
    for prompt in ("prompt", "question", "instruction"):
        path = tmp_path / f"{prompt}.jsonl"
        path.write_text(json.dumps({"system_prompt": "Be brief.", prompt: "Hi?", "chosen": "Yes.", "rejected": "No."}))
        (pair,) = read_pairs(path).pairs
        assert pair.messages[0] == {"role": "system", "content": "Be brief."}, prompt


def test_answers_that_repeat_a_transcripts_prompt_lose_it(tmp_path: Path) -> None:
    prompt = "\n\nHuman: A colour?\n\nAssistant:"
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "chosen": f"{prompt} Blue.", "rejected": f"{prompt} A stone."}))
    (pair,) = read_pairs(path).pairs
    assert (pair.messages, pair.chosen, pair.rejected) == (
        ({"role": "user", "content": "A colour?"},),
        "Blue.",
        "A stone.",
    )


def test_a_column_of_ids_is_not_proposed_as_the_prompt(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"id": "abc", "chosen": "A colour? Blue", "rejected": "A colour? Green"}))
    with pytest.raises(UserError) as refused:
        read_pairs(path)
    assert "prompt: id" not in str(refused.value)
