"""Chat templates of today: their arguments, thinking blocks, tools, and templates that mean harm.

The oracles are texts written by hand: what the model saw before an answer, and what it wrote itself.
"""

from __future__ import annotations

import inspect
import json
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes.settings import changed
from tests.support.chat_templates import LLAMA31, QWEN3, TEMPLATES, tokenizer_of
from tgdpo_megatron.config import Config, DataConfig, complete
from tgdpo_megatron.config.settings import GIVEN_ANYWAY
from tgdpo_megatron.data import rendering
from tgdpo_megatron.data.prepare import PreparedPairs, prepare_pairs, source_hash
from tgdpo_megatron.data.tokenizer import load_tokenizer, render, special_ids, template_hash, tokenizer_for
from tgdpo_megatron.errors import UserError

ASKED = "What is the weather in Paris?"
THOUGHT = "<think>\nParis is in France.\n</think>\n\nIt is warm."
THOUGHT_ELSE = "<think>\nLet me guess.\n</think>\n\nIt is cold."


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def spoken(chosen: Any, rejected: Any, prompt: Sequence[Any] = (turn("user", ASKED),), **more: Any) -> dict[str, Any]:
    """A row; an answer is a text or a turn."""
    answers = {
        name: [turn("assistant", answer) if isinstance(answer, str) else answer]
        for name, answer in (("chosen", chosen), ("rejected", rejected))
    }
    return {"prompt": list(prompt), **answers, **more}


@pytest.fixture
def prepare(write_pairs: Callable[..., Path], tmp_path: Path) -> Callable[..., PreparedPairs]:
    def run(using: Any, *rows: Any, **settings: Any) -> PreparedPairs:
        config = DataConfig(**{"max_length": 2048, **settings})
        return prepare_pairs(config, write_pairs(tmp_path / "pairs.jsonl", rows), using, tmp_path / "prepared")

    return run


def texts(using: Any, data: PreparedPairs, pair: int = 0) -> tuple[str, str, str]:
    """The prompt and both responses of a pair."""
    length = int(data.prompt_lengths[pair])
    both = [data.sequence(pair, side).tolist() for side in (0, 1)]
    prompt, *responses = (using.decode(ids) for ids in (both[0][:length], both[0][length:], both[1][length:]))
    return prompt, responses[0], responses[1]


def given(using: Any, **kwargs: Any) -> Any:
    using.chat_template_kwargs = kwargs
    return using


# ---------------------------------------------------------------- thinking blocks


def test_qwen3_thinks_after_its_prompt(prepare: Callable[..., PreparedPairs]) -> None:
    using = tokenizer_of("Qwen3")
    prompt, chosen, rejected = texts(using, prepare(using, spoken(THOUGHT, THOUGHT_ELSE)))
    assert prompt == f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n"
    assert (chosen, rejected) == (f"{THOUGHT}<|im_end|>", f"{THOUGHT_ELSE}<|im_end|>")


def test_an_answer_of_qwen3_without_thoughts_has_the_empty_block_that_the_template_writes(
    prepare: Callable[..., PreparedPairs],
) -> None:
    using = tokenizer_of("Qwen3")
    _, chosen, _ = texts(using, prepare(using, spoken("It is warm.", "It is cold.")))
    assert chosen == "<think>\n\n</think>\n\nIt is warm.<|im_end|>"


def test_enable_thinking_false_puts_the_empty_block_into_the_prompt(prepare: Callable[..., PreparedPairs]) -> None:
    using = given(tokenizer_of("Qwen3"), enable_thinking=False)
    prompt, chosen, rejected = texts(using, prepare(using, spoken("It is warm.", "It is cold.")))
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert (chosen, rejected) == ("It is warm.<|im_end|>", "It is cold.<|im_end|>")


def test_a_thought_after_a_closed_block_is_left_out_and_counted(prepare: Callable[..., PreparedPairs]) -> None:
    using = given(tokenizer_of("Qwen3"), enable_thinking=False)
    data = prepare(using, spoken("It is warm.", "It is cold."), spoken("It is warm.", THOUGHT))
    assert data.summary.dropped == {"an answer has a thinking block, and the prompt ends with a closed one": [2]}


def test_earlier_thoughts_are_dropped_as_in_a_conversation_with_the_model(
    prepare: Callable[..., PreparedPairs],
) -> None:
    using = tokenizer_of("Qwen3")
    before = [turn("user", "Hi"), turn("assistant", "<think>\nA greeting.\n</think>\n\nHello!"), turn("user", ASKED)]
    prompt, chosen, _ = texts(using, prepare(using, spoken(THOUGHT, "No.", before)))
    assert "<|im_start|>assistant\nHello!<|im_end|>" in prompt and "greeting" not in prompt
    assert chosen == f"{THOUGHT}<|im_end|>"


@pytest.mark.parametrize("written", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_in_a_field_of_its_own_is_written_by_the_template(
    written: str, prepare: Callable[..., PreparedPairs]
) -> None:
    using = tokenizer_of("Qwen3")
    answer = turn("assistant", "It is warm.", **{written: "Paris is in France."})
    assert texts(using, prepare(using, spoken(answer, "No.")))[1] == f"{THOUGHT}<|im_end|>"


@pytest.mark.parametrize(
    "chosen",
    [
        THOUGHT,
        THOUGHT.removeprefix("<think>\n"),
        turn("assistant", "It is warm.", reasoning_content="Paris is in France."),
    ],
    ids=["whole block", "as the model writes it", "a field of its own"],
)
def test_deepseeks_distillations_think_on_from_the_prompt(chosen: Any, prepare: Callable[..., PreparedPairs]) -> None:
    """The template would drop the thought from the answer, and has opened the block in the prompt."""
    using = tokenizer_of("DeepSeek-R1-Distill")
    prompt, first, second = texts(using, prepare(using, spoken(chosen, THOUGHT_ELSE)))
    assert prompt == f"<|begin|><｜User｜>{ASKED}<｜Assistant｜><think>\n"
    assert first == "Paris is in France.\n</think>\n\nIt is warm.<｜end▁of▁sentence｜>"
    assert second == "Let me guess.\n</think>\n\nIt is cold.<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("thinks", [True, False])
def test_a_template_that_closes_the_block_of_plain_answers_opens_it_when_it_is_to_think(
    thinks: bool, prepare: Callable[..., PreparedPairs]
) -> None:
    """As DeepSeek-V3.1's: `thinking` decides how the prompt ends, and rendered answers always begin with `</think>`."""
    using = given(tokenizer_of("DeepSeek-R1-Distill"), thinking=thinks)
    using.chat_template = using.chat_template.replace(
        "'<｜Assistant｜>' + content", "'<｜Assistant｜></think>' + content"
    )
    opens = "{{ '<｜Assistant｜><think>' if thinking else '<｜Assistant｜></think>' }}"
    using.chat_template = using.chat_template.replace("{{ '<｜Assistant｜><think>\\n' }}", opens)
    answers = (THOUGHT, THOUGHT_ELSE) if thinks else ("It is warm.", "It is cold.")
    prompt, chosen, _ = texts(using, prepare(using, spoken(*answers)))
    assert prompt.endswith("<｜Assistant｜><think>" if thinks else "<｜Assistant｜></think>")
    assert chosen == f"{THOUGHT.removeprefix('<think>') if thinks else 'It is warm.'}<｜end▁of▁sentence｜>"


def test_an_answer_that_does_not_close_the_block_of_the_prompt_is_left_out(
    prepare: Callable[..., PreparedPairs],
) -> None:
    using = tokenizer_of("DeepSeek-R1-Distill")
    data = prepare(using, spoken(THOUGHT, "It is cold."), spoken(THOUGHT, THOUGHT_ELSE))
    assert data.summary.dropped == {"the prompt opens a thinking block, and an answer does not close it": [1]}


def test_a_template_that_drops_thoughts_without_opening_a_block_trains_on_the_answer_as_it_stands(
    prepare: Callable[..., PreparedPairs],
) -> None:
    """As DeepSeek-R1's first template: the model wrote `<think>` itself."""
    using = tokenizer_of("DeepSeek-R1-Distill")
    using.chat_template = using.chat_template.replace("<think>\\n", "")
    prompt, chosen, _ = texts(using, prepare(using, spoken(THOUGHT, THOUGHT_ELSE)))
    assert prompt.endswith("<｜Assistant｜>") and chosen == f"{THOUGHT}<｜end▁of▁sentence｜>"


def test_a_thought_that_the_template_has_no_place_for_is_counted(prepare: Callable[..., PreparedPairs]) -> None:
    using = tokenizer_of("Llama-3.1")
    thinking = turn("assistant", "It is warm.", reasoning_content="Paris is in France.")
    data = prepare(using, spoken("It is warm.", "No."), spoken(thinking, "No."), spoken(THOUGHT, "No."))
    assert data.summary.dropped == {"the chat template drops the thinking block of an answer": [2]}
    assert texts(using, data, 1)[1] == f"{THOUGHT}<|eot_id|>"


def test_special_thinking_tokens_are_part_of_an_answer(prepare: Callable[..., PreparedPairs]) -> None:
    """They neither refuse the file, nor end an answer, nor look like a header."""
    using = tokenizer_of("Qwen3", thinking_is_special=True)
    assert texts(using, prepare(using, spoken(THOUGHT, "No.")))[1] == f"{THOUGHT}<|im_end|>"
    assert not set(using.convert_tokens_to_ids(["<think>", "</think>"])) & special_ids(using)


def test_gemma_has_no_system_turn_and_calls_the_assistant_model(prepare: Callable[..., PreparedPairs]) -> None:
    using = tokenizer_of("Gemma")
    system = [turn("system", "Be brief."), turn("user", ASKED)]
    data = prepare(using, spoken("It is warm.", "No.", system), spoken("It is warm.", "No."))
    assert data.summary.dropped == {"the chat template refuses the conversation (System role not supported)": [1]}
    prompt, chosen, _ = texts(using, data)
    assert prompt == f"<|begin|><start_of_turn>user\n{ASKED}<end_of_turn>\n<start_of_turn>model\n"
    assert chosen == "It is warm.<end_of_turn>"


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_conversation_is_rendered_as_transformers_renders_it(family: str) -> None:
    using = tokenizer_of(family)
    turns = [turn("user", "Hi"), turn("assistant", "Hello!"), turn("user", ASKED)]
    expected = using.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert render(using, turns, add_generation_prompt=True) == expected


def test_rewards_of_spans_count_the_answer_and_not_the_block_before_it(
    prepare: Callable[..., PreparedPairs], tmp_path: Path
) -> None:
    from tgdpo_megatron.scores.reward_file import read_reward_file

    using = tokenizer_of("Qwen3")
    data = prepare(using, spoken("It is warm.", THOUGHT))
    path = tmp_path / "rewards.jsonl"
    path.write_text(json.dumps({"row": 1, "chosen": [[0, 5, 2.0]], "rejected": [[0, 7, 1.0]]}))
    rewards = read_reward_file(path, data, using)
    start, length = int(data.prompt_lengths[0]), data.response_length(0, 0)
    rewarded = [using.decode([token]) for token in data.sequence(0, 0)[start:][rewards[:length] == 2.0]]
    assert "".join(rewarded) == "It is"
    assert data.sequence(0, 1)[start:][rewards[length:] == 1.0].tolist() == [using.convert_tokens_to_ids("<think>")]


# ---------------------------------------------------------------- tools

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Today's weather.", "parameters": {"type": "object"}},
}
CALL = turn(
    "assistant", "", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {"c": "Paris"}}}]
)
RESULT = turn("tool", '{"degrees": 21}')
WITH_RESULT = [turn("user", ASKED), CALL, RESULT]


def test_qwen3_writes_tools_calls_and_results(prepare: Callable[..., PreparedPairs]) -> None:
    using = tokenizer_of("Qwen3")
    data = prepare(using, spoken("It is warm.", "No.", WITH_RESULT, tools=[WEATHER]))
    prompt, chosen, _ = texts(using, data)
    assert prompt == (
        f"<|im_start|>system\n# Tools\n\n<tools>\n{json.dumps(WEATHER)}\n</tools><|im_end|>\n"
        f"<|im_start|>user\n{ASKED}<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"c": "Paris"}}\n</tool_call><|im_end|>\n'
        '<|im_start|>user\n<tool_response>\n{"degrees": 21}\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
    )
    assert chosen == "<think>\n\n</think>\n\nIt is warm.<|im_end|>"


def test_an_answer_may_be_a_call(prepare: Callable[..., PreparedPairs]) -> None:
    called = '<tool_call>\n{"name": "weather", "arguments": {"c": "Paris"}}\n</tool_call><|im_end|>'
    using = tokenizer_of("Qwen3")
    data = prepare(using, spoken(CALL, "I cannot know.", tools=[WEATHER]))
    assert texts(using, data)[1] == f"<think>\n\n</think>\n\n{called}"
    thinking = CALL | {"content": "<think>\nI must ask.\n</think>\n\nLet me see."}
    data = prepare(using, spoken(thinking, "I cannot know.", tools=[WEATHER]))
    assert texts(using, data)[1] == f"<think>\nI must ask.\n</think>\n\nLet me see.\n{called}"


def test_llama_writes_tools_into_the_first_question(prepare: Callable[..., PreparedPairs]) -> None:
    using = tokenizer_of("Llama-3.1")
    data = prepare(
        using,
        spoken(CALL, "I cannot know.", tools=[WEATHER]),
        spoken("It is warm.", "No.", WITH_RESULT, tools=[WEATHER]),
    )
    prompt, chosen, _ = texts(using, data)
    assert f"{json.dumps(WEATHER, indent=4)}\n\n{ASKED}<|eot_id|>" in prompt
    assert chosen == '{"name": "weather", "parameters": {"c": "Paris"}}<|eot_id|>'
    assert '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"degrees\\": 21}"<|eot_id|>' in texts(using, data, 1)[0]


def test_what_a_template_has_no_form_for_is_left_out_and_counted(prepare: Callable[..., PreparedPairs]) -> None:
    """Also where the words are in the text by chance: the tool is named in the question, and so is its argument."""
    using = tokenizer_of("Llama-3.1")
    twice = CALL | {"tool_calls": CALL["tool_calls"] * 2}
    data = prepare(
        using,
        spoken("It is warm.", "No."),
        spoken(twice, "No.", tools=[WEATHER]),
        spoken(CALL | {"content": "Let me see."}, "No.", tools=[WEATHER]),
    )
    assert data.summary.dropped == {
        "the chat template refuses the conversation (This model only supports single tool-calls at once!)": [2],
        "the chat template has no form for an answer's text beside calls of tools": [3],
    }
    plain = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    using = tokenizer_of("Qwen3")
    using.chat_template = plain + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    data = prepare(
        using,
        spoken("It is warm.", "No."),
        spoken("It is warm.", "No.", tools=[WEATHER]),
        spoken("It is warm.", "No.", WITH_RESULT),
        spoken(CALL, "No."),
    )
    assert data.summary.dropped == {
        "the chat template has no form for tools": [2],
        "the chat template has no form for calls of tools": [3, 4],
    }
    data = prepare(tokenizer_of("Gemma"), spoken("It is warm.", "No."), spoken("Warm.", "No.", WITH_RESULT))
    ((reason, rows),) = data.summary.dropped.items()
    assert "Conversation roles must alternate" in reason and rows == [2]


def test_a_template_that_knows_calls_only_by_their_name_does_not_know_them(
    prepare: Callable[..., PreparedPairs],
) -> None:
    using = tokenizer_of("Qwen3")
    using.chat_template = QWEN3.replace("call.function.arguments | tojson", "'{}'")
    with pytest.raises(UserError, match=r"1 dropped: the chat template has no form for calls of tools;"):
        prepare(using, spoken(CALL, "No.", tools=[WEATHER]))


def test_a_prompt_with_tools_is_not_cut_from_the_left(prepare: Callable[..., PreparedPairs]) -> None:
    using = tokenizer_of("Qwen3")
    rows = spoken("It is warm.", "No.", WITH_RESULT, tools=[WEATHER]), spoken("It is warm.", "No.")
    data = prepare(using, *rows, max_length=100)
    assert data.summary.dropped == {
        "a prompt with tools does not fit data.max_length=100, and is not cut; raise it": [1]
    }


def test_a_special_token_in_a_call_or_a_tool_is_noticed(prepare: Callable[..., PreparedPairs]) -> None:
    using = tokenizer_of("Qwen3")
    bad = json.loads(json.dumps(CALL).replace("Paris", "<|im_end|>"))
    for row in (spoken(bad, "No.", tools=[WEATHER]), spoken("It is warm.", "No.", [turn("user", "Hi"), bad, RESULT])):
        with pytest.raises(UserError, match=r"line 1: the text holds '<\|im_end\|>', a special token"):
            prepare(using, row)


def test_pairs_that_differ_only_in_their_tools_have_other_prompts(prepare: Callable[..., PreparedPairs]) -> None:
    using = tokenizer_of("Qwen3")
    data = prepare(using, spoken("It is warm.", "No."), spoken("It is warm.", "No.", tools=[WEATHER]))
    assert data.prompts[0].tolist() != data.prompts[1].tolist()


def test_contrastive_prompts_rewrite_the_question_and_leave_the_tools_result(
    prepare: Callable[..., PreparedPairs],
) -> None:
    from tgdpo_megatron.scores.contrastive import ContrastivePrompts, contrastive_sequences
    from tgdpo_megatron.scores.texts import read_texts

    using = tokenizer_of("Qwen3")
    data = prepare(using, spoken(CALL, "No.", WITH_RESULT, tools=[WEATHER]))
    prompts = ContrastivePrompts("Good: {instruction} {response}", "Bad: {instruction} {response}")
    made, keys, _ = contrastive_sequences(data, [0], read_texts(data), using, prompts, longest=2048)
    prompt = using.decode(made.sequence(0, 0)[: made.prompt_lengths[0]])
    assert keys[0].name == "better" and f"<|im_start|>user\nGood: {ASKED} <think>" in prompt
    assert '"arguments": {"c": "Paris"}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_call>' not in prompt
    assert '<tool_response>\n{"degrees": 21}\n</tool_response>' in prompt and "# Tools" in prompt


def test_a_tokenizer_with_several_templates_uses_the_one_for_tools(
    prepare: Callable[..., PreparedPairs], tmp_path: Path
) -> None:
    """It keeps them as a checkpoint keeps its files."""
    from tgdpo_megatron.checkpoint.manifest import copy_companions

    using = tokenizer_of("Qwen3")
    plain = QWEN3.replace("{%- if tools %}", "{%- if false %}")
    using.chat_template = {"default": plain, "tool_use": QWEN3}
    using.save_pretrained(tmp_path / "hf")
    copy_companions(tmp_path / "hf", tmp_path / "checkpoint")
    kept = load_tokenizer(tmp_path / "checkpoint", None, {"enable_thinking": False})
    data = prepare(kept, spoken("It is warm.", "No."), spoken("It is warm.", "No.", tools=[WEATHER]))
    assert ["# Tools" in texts(kept, data, pair)[0] for pair in (0, 1)] == [False, True]
    assert template_hash(load_tokenizer(tmp_path / "checkpoint")) == template_hash(using)


# ---------------------------------------------------------------- data.chat_template_kwargs


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of Qwen3's tokenizer."""
    tokenizer_of("Qwen3").save_pretrained(tmp_path / "qwen3")
    return tmp_path / "qwen3"


def test_without_arguments_every_hash_is_what_it_was_before_there_were_any(
    tokenizer: Any, write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    """Written down with the program as it was then: scores and prepared pairs of that time stay usable."""
    assert template_hash(tokenizer) == HASHES["template"]
    assert source_hash(DataConfig(), write_pairs(tmp_path / "pairs.jsonl"), tokenizer) == HASHES["source"]
    data = prepare_pairs(DataConfig(), tmp_path / "pairs.jsonl", tokenizer, tmp_path / "prepared")
    assert data.summary.pairs_hash == HASHES["pairs"]
    assert data.prompts[0].tobytes().hex() == HASHES["prompt"]


HASHES = {
    "template": "6635cd87bada0796175270be23f649c2583fe25793ebd652a9fa362280662f0e",
    "source": "ed02a119471dbc778b9013396e8961994f0fb1da0d0c0bf2cec1e1f9b2e55e77",
    "pairs": "f554c64ec813ecf9754caa6b26d4f2123b4d33f971f9209e5b0bd1d5a526b708",
    "prompt": "b2c11aaa1eb1e9c1",
}


def test_arguments_are_part_of_every_identity(
    saved: Path, prepare: Callable[..., PreparedPairs], tmp_path: Path
) -> None:
    row = spoken("It is warm.", "It is cold.")
    settings = [DataConfig(chat_template_kwargs=kwargs) for kwargs in ({}, {"enable_thinking": False})]
    plain, quick = (tokenizer_for(saved, one) for one in settings)
    made = prepare(quick, row)
    assert len({template_hash(plain), template_hash(quick), made.summary.template}) == 2
    assert made.summary.chat_template_kwargs == {"enable_thinking": False}
    hashes = {
        source_hash(one, tmp_path / "pairs.jsonl", using) for one, using in zip(settings, (plain, quick), strict=True)
    }
    assert len(hashes) == 2
    with pytest.raises(UserError, match=r"were made with another data\.chat_template_kwargs; prepare them again"):
        prepare_pairs(DataConfig(), tmp_path / "prepared", plain, tmp_path / "unused")


def test_arguments_are_given_on_the_command_line_one_by_one_or_together() -> None:
    config = changed(
        Config(), ["data.chat_template_kwargs.enable_thinking=false", "data.chat_template_kwargs.a=[1, x]"]
    )
    assert config.data.chat_template_kwargs == {"enable_thinking": False, "a": [1, "x"]}
    assert changed(config, ["data.chat_template_kwargs={b: 2}"]).data.chat_template_kwargs == {"b": 2}
    assert changed(Config(), ["data.columns.prompt=ask", "data.columns.chosen=good"]).data.columns == {
        "prompt": "ask",
        "chosen": "good",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.chat_template_kwargs.tools=[]", "'tools' is given to the template by the program itself, leave it out"),
        ("data.chat_template_kwargs={tokenize: true}", "'tokenize' is given to the template by the program itself"),
        ("data.chat_template_kwargs={bos_token: x}", "'bos_token' is given to the template by the program itself"),
        ("data.chat_template_kwargs={a: {b: 1}}", "'a' must be a text, a number, true, false, null, or a list"),
        ("data.chat_template_kwargs={a: .nan}", "'a' must be a text, a number, true, false, null, or a list"),
        ("data.chat_template_kwargs={a b: 1}", "'a b' is no name of a variable"),
        ("data.chat_template_kwargs=false", "is refused"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused_in_one_sentence(change: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        changed(Config(), [change])
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_every_argument_of_transformers_own_is_refused() -> None:
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    for function in (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template):
        assert set(inspect.signature(function).parameters) <= GIVEN_ANYWAY


def test_texts_as_they_are_take_no_arguments() -> None:
    config = Config(data=DataConfig(template="none", chat_template_kwargs={"enable_thinking": False}))
    with pytest.raises(UserError, match="data.template=none takes texts as they are and reads no data.chat_template_k"):
        complete(config, where="the settings")


def test_an_argument_that_the_template_does_not_read_is_refused_with_those_that_it_reads(
    saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        load_tokenizer(saved, None, {"enable_thinkin": False})
    assert str(refused.value) == (
        "data.chat_template_kwargs: the chat template does not read 'enable_thinkin'; it reads enable_thinking."
    )
    (tmp_path / "llama.jinja").write_text(LLAMA31)
    with pytest.raises(UserError, match="it reads date_string, tools_in_user_message.$"):
        load_tokenizer(saved, str(tmp_path / "llama.jinja"), {"enable_thinking": False})


def test_arguments_reach_the_template(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "llama.jinja").write_text(LLAMA31)
    kwargs = {"date_string": "1 May 2025", "tools_in_user_message": False}
    using = load_tokenizer(saved, str(tmp_path / "llama.jinja"), kwargs)
    text = render(using, [turn("user", ASKED)], [WEATHER])
    assert "Today Date: 1 May 2025" in text and text.index("Today's weather.") < text.index("user<|end_header_id|>")


# ---------------------------------------------------------------- templates that mean harm

HARM = {
    "loops without end": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "did not finish a conversation within 2 seconds",
    ),
    "one operation without end": ("{{ (10 ** (10 ** 9)) % 7 }}", "did not finish a conversation within 2 seconds"),
    "a text without end": ("{{ 'a' * 10 ** 10 }}", "takes more than 1024 MiB of memory"),
    "a list without end": ("{{ ([1] * 10 ** 9) | length }}", "takes more than 1024 MiB of memory"),
    "a long text": ("{{ 'a' * 7 * 10 ** 7 }}", "writes more than 67108864 characters for one conversation"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template fails (RecursionError"),
    "leaves the sandbox": ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering with a short limit, in a process that knows it."""
    monkeypatch.setattr(rendering, "SECONDS", 2.0)
    monkeypatch.setattr(rendering, "_child", None)


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.usefixtures("impatient")
def test_a_template_that_means_harm_is_refused_in_one_sentence(
    harm: str, tokenizer: Any, prepare: Callable[..., PreparedPairs], tmp_path: Path
) -> None:
    template, words = HARM[harm]
    tokenizer.save_pretrained(tmp_path / "hf")
    path = tmp_path / "harm.jinja"
    path.write_text(template)
    started = time.monotonic()
    with pytest.raises(UserError) as refused:
        prepare(load_tokenizer(tmp_path / "hf", str(path)), spoken("Yes.", "No."), template=str(path))
    assert str(refused.value).startswith(f"data.template={path}: the chat template") and words in str(refused.value)
    assert "\n" not in str(refused.value) and time.monotonic() - started < 60
    assert render(tokenizer, [turn("user", "Hi")]) == "<|begin|><|user|>\nHi<|end|>", "rendering goes on"


@pytest.mark.usefixtures("impatient")
def test_a_template_that_harms_only_some_conversations_is_refused_with_the_row(
    prepare: Callable[..., PreparedPairs],
) -> None:
    using = tokenizer_of("Qwen3")
    using.chat_template = "{% if messages | length > 2 %}" + HARM["loops without end"][0] + "{% endif %}" + QWEN3
    long = [turn("user", "Hi"), turn("assistant", "Hello!"), turn("user", ASKED)]
    with pytest.raises(UserError, match=r"pairs.jsonl line 2: the chat template did not finish a conversation within"):
        prepare(using, spoken("Yes.", "No."), spoken("Yes.", "No.", long))


@pytest.mark.usefixtures("impatient")
def test_arguments_of_a_template_that_means_harm_are_looked_for_within_the_same_limits(
    saved: Path, tmp_path: Path
) -> None:
    """Jinja computes what is constant while it reads a template."""
    (tmp_path / "harm.jinja").write_text("{{ enable_thinking }}{{ (10 ** (10 ** 9)) % 7 }}")
    with pytest.raises(UserError, match="did not finish"):
        load_tokenizer(saved, str(tmp_path / "harm.jinja"), {"enable_thinking": False})


@pytest.mark.usefixtures("impatient")
def test_limits_hold_in_every_thread(tokenizer: Any) -> None:
    said: list[str] = []

    def work() -> None:
        said.append(render(tokenizer, [turn("user", "Hi")]))
        try:
            rendering.render(HARM["one operation without end"][0], [turn("user", "Hi")], variables={})
        except UserError as refusal:
            said.append(str(refusal))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said)[:2] == ["<|begin|><|user|>\nHi<|end|>"] * 2
    assert all("did not finish" in one for one in sorted(said)[2:]) and len(said) == 4


@pytest.mark.usefixtures("impatient")
def test_a_template_without_end_is_refused_also_where_nobody_learns_how_its_process_ended() -> None:
    """Where a program ignores the end of its children, the operating system keeps no status of them."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(UserError, match="the chat template ended the process that renders it"):
            rendering.render(HARM["loops without end"][0], [turn("user", "Hi")], variables={})
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_rendering_is_a_program_of_its_own_without_torch(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """Not a fork, which would share a rank's network cards with it."""
    import psutil

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(rendering, "_child", None)
    render(tokenizer, [turn("user", "Hi")])
    assert rendering._child is not None
    program = psutil.Process(rendering._child.program.pid)
    assert "tgdpo_megatron.data.rendering" in program.cmdline() and "RANK" not in program.environ()
    assert not any("libtorch" in mapped.path for mapped in program.memory_maps())


def test_the_process_that_renders_ends_when_it_is_not_needed(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    import psutil

    monkeypatch.setattr(rendering, "_IDLE", 0.2)
    monkeypatch.setattr(rendering, "_child", None)
    turns = [turn("user", "Hi")]
    first = render(tokenizer, turns)
    child = rendering._child
    assert child is not None and psutil.pid_exists(child.program.pid)
    child.ending.join(timeout=10)
    assert not psutil.pid_exists(child.program.pid)
    assert render(tokenizer, turns) == first
    assert np.array_equal(rendering._child is child, False)
