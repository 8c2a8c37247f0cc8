"""From text to token ids: BOS, end of turn, the boundary between prompt and response, cuts, drops, identity."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.memory import pairs_of
from tgdpo_megatron.config import DataConfig, FormatName
from tgdpo_megatron.data.prepare import (
    PreparedPairs,
    is_prepared,
    load_prepared,
    pair_hash,
    prepare_pairs,
    save_prepared,
    source_hash,
    tokenised,
)
from tgdpo_megatron.data.tokenizer import encode_prompt, encode_response, load_tokenizer, template_hash, tokenizer_hash
from tgdpo_megatron.errors import UserError

TURN = "<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>"
HEADER = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TEMPLATES = {
    "with BOS": "{{ bos_token }}{% for message in messages %}" + TURN + "{% endfor %}" + HEADER,
    "without BOS": "{% for message in messages %}" + TURN + "{% endfor %}" + HEADER,
    "newline after each turn": "{{ bos_token }}{% for message in messages %}" + TURN + "\n{% endfor %}" + HEADER,
}


def templated(tokenizer: Any, template: str, *, adds_bos: bool = False) -> Any:
    """A copy of the tokenizer with another chat template, which adds a BOS of its own where asked."""
    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    if adds_bos:
        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        changed.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
        assert changed("x")["input_ids"][0] == bos[1]
    return changed


@pytest.fixture
def prepare(tokenizer: Any, write_pairs: Callable[..., Path], tmp_path: Path) -> Callable[..., PreparedPairs]:
    """A function that prepares rows with a tokenizer and a length limit."""

    def run(
        rows: Sequence[Any],
        *,
        using: Any = tokenizer,
        max_length: int = 512,
        format: FormatName | None = None,
        **settings: Any,
    ) -> PreparedPairs:
        source = write_pairs(tmp_path / "pairs.jsonl", rows)
        config = DataConfig(max_length=max_length, format=format, **settings)
        return prepare_pairs(config, source, using, tmp_path / "prepared")

    return run


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def row(prompt: str = "Say hello.", chosen: str = "Hello there!", rejected: str = "No.") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# ---------------------------------------------------------------- one sequence


@pytest.mark.parametrize(
    ("name", "adds_bos"),
    [
        ("with BOS", False),
        ("with BOS", True),
        ("without BOS", True),
        ("newline after each turn", False),
        ("newline after each turn", True),
    ],
)
def test_every_sequence_has_exactly_one_bos_at_its_start(
    name: str, adds_bos: bool, tokenizer: Any, prepare: Callable[..., PreparedPairs]
) -> None:
    data = prepare([row()], using=templated(tokenizer, TEMPLATES[name], adds_bos=adds_bos))
    for side in (0, 1):
        ids = data.sequence(0, side).tolist()
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_template_that_writes_two_bos_gives_one(
    adds_bos: bool, tokenizer: Any, prepare: Callable[..., PreparedPairs]
) -> None:
    twice = templated(tokenizer, "{{ bos_token }}" + TEMPLATES["with BOS"], adds_bos=adds_bos)
    ids = prepare([row()], using=twice).sequence(0, 0).tolist()
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_no_bos_is_invented(tokenizer: Any, prepare: Callable[..., PreparedPairs]) -> None:
    data = prepare([row()], using=templated(tokenizer, TEMPLATES["without BOS"]))
    assert tokenizer.bos_token_id not in data.sequence(0, 0)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_response_is_its_text_and_the_end_of_turn(
    name: str, tokenizer: Any, prepare: Callable[..., PreparedPairs]
) -> None:
    """What a template writes after the end of turn (a newline) is not labelled: generation stops before it."""
    data = prepare([row(chosen="Hello there!")], using=templated(tokenizer, TEMPLATES[name]))
    response = data.sequence(0, 0)[data.prompt_lengths[0] :].tolist()
    assert response[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
    assert tokenizer.decode(response) == "Hello there!<|end|>"


CLOSES_NO_TURN = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_that_closes_no_turn_gets_the_end_of_sequence(
    tokenizer: Any, prepare: Callable[..., PreparedPairs]
) -> None:
    data = prepare([row(chosen="Hello there!")], using=templated(tokenizer, CLOSES_NO_TURN))
    response = data.sequence(0, 0)[data.prompt_lengths[0] :].tolist()
    assert response[-1] == tokenizer.eos_token_id and response.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(response[:-1]).strip() == "Hello there!"


def test_a_response_that_mentions_the_end_of_turn_keeps_all_its_tokens(tokenizer: Any) -> None:
    prompt_text, _ = encode_prompt(tokenizer, asked("Say it."))
    ids = encode_response(tokenizer, asked("Say it."), prompt_text, "a<|end|>b")
    assert tokenizer.decode(ids) == "a<|end|>b<|end|>"


@pytest.mark.parametrize("mentioned", ["<|end|>", "<|user|>"])
def test_a_special_token_inside_a_response_does_not_end_it_where_the_template_closes_no_turn(
    mentioned: str, tokenizer: Any
) -> None:
    open_ended = templated(tokenizer, CLOSES_NO_TURN)
    prompt_text, _ = encode_prompt(open_ended, asked("Say it."))
    ids = encode_response(open_ended, asked("Say it."), prompt_text, f"a{mentioned}b")
    assert tokenizer.decode(ids[:-1]) == f"a{mentioned}b\n" and ids[-1] == tokenizer.eos_token_id


def test_prompt_and_response_are_tokenised_apart() -> None:
    """`Answer` + `ing` would be one token, `Answering`, if the texts were joined first."""
    from tools.make_tiny_model import train_tokenizer

    tokenizer = train_tokenizer(["Answering Answer ing"] * 20, vocab_size=300)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}Answer{% endif %}"
        "{{ message['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}Answer{% endif %}"
    )
    prompt_text, prompt = encode_prompt(tokenizer, asked("x"))
    response = encode_response(tokenizer, asked("x"), prompt_text, "ing")
    assert tokenizer.convert_ids_to_tokens(prompt)[-1] == "Answer"
    assert tokenizer.convert_ids_to_tokens(response) == ["ing", "<|end|>"]
    joined = tokenizer(prompt_text + "ing<|end|>", add_special_tokens=False)["input_ids"]
    assert joined != prompt + response  # the case has power


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer: Any) -> None:
    rewriting = templated(
        tokenizer, "{{ messages | length }}{% for message in messages %}" + TURN + "{% endfor %}" + HEADER
    )
    prompt_text, _ = encode_prompt(rewriting, asked("Hello"))
    with pytest.raises(UserError, match="does not render the prompt the same way"):
        encode_response(rewriting, asked("Hello"), prompt_text, "Hi")


def test_a_template_that_fails_like_a_program_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="^the chat template fails \\(TypeError: "):
        encode_prompt(templated(tokenizer, "{{ 1 + 'a' }}"), asked("Hello"))


def test_a_template_without_a_header_for_the_answer_is_refused(
    tokenizer: Any, prepare: Callable[..., PreparedPairs]
) -> None:
    headless = templated(tokenizer, "{% for message in messages %}" + TURN + "{% endfor %}")
    with pytest.raises(UserError, match="ignores add_generation_prompt"):
        prepare([row()], using=headless)


def test_a_response_that_begins_with_a_special_tokens_text_is_no_reason_to_refuse_the_file(
    prepare: Callable[..., PreparedPairs],
) -> None:
    data = prepare([row(), row(chosen="<|end|> is how a turn ends.")], special_tokens="keep")
    assert len(data) == 2


def test_a_template_that_writes_the_date_gives_the_same_ids_every_day(tokenizer: Any) -> None:
    dated = "{{ date_string | default(strftime_now('%d %b %Y')) }}{% for message in messages %}"
    text, _ = encode_prompt(templated(tokenizer, dated + TURN + "{% endfor %}" + HEADER), asked("Hello"))
    assert text.startswith("26 Jul 2024")


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say hello."},
    {"role": "assistant", "content": "Hello there!"},
    {"role": "user", "content": "Name a colour."},
]


def spoken(chosen: str = "Blue.", rejected: str = "A stone.") -> dict[str, Any]:
    return {
        "prompt": CONVERSATION,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_what_transformers_renders_of_it(
    name: str, tokenizer: Any, prepare: Callable[..., PreparedPairs]
) -> None:
    """The oracle joins all turns into one text; ours tokenises the answer apart, and ends with the end of turn."""
    using = templated(tokenizer, TEMPLATES[name])
    data = prepare([spoken()], using=using)
    for side, text in enumerate(("Blue.", "A stone.")):
        ids = data.sequence(0, side).tolist()
        whole = [*CONVERSATION, {"role": "assistant", "content": text}]
        assert using.decode(ids) == using.apply_chat_template(whole, tokenize=False).rstrip("\n")
        assert using.decode(ids[data.prompt_lengths[0] :]) == f"{text}<|end|>"
        prompt = using.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False)
        assert ids[: data.prompt_lengths[0]] == prompt


def test_a_long_conversation_keeps_its_bos_and_its_end(tokenizer: Any, prepare: Callable[..., PreparedPairs]) -> None:
    whole, cut = prepare([spoken()]), prepare([spoken()], max_length=30)
    kept = cut.sequence(0, 0)[: cut.prompt_lengths[0]].tolist()
    assert kept[0] == tokenizer.bos_token_id and len(kept) > 2
    assert kept[1:] == whole.sequence(0, 0)[: whole.prompt_lengths[0]].tolist()[1 - len(kept) :]
    assert cut.summary.prompts_cut == 1


def test_a_conversation_the_template_refuses_is_left_out_and_counted(
    tokenizer: Any, prepare: Callable[..., PreparedPairs]
) -> None:
    """As Gemma's template refuses a system turn."""
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    using = templated(tokenizer, refuse + TEMPLATES["with BOS"])
    plain = spoken() | {"prompt": CONVERSATION[1:]}
    data = prepare([plain, spoken()], using=using)
    assert data.summary.dropped == {"the chat template refuses the conversation (System role not supported)": [2]}


def test_both_responses_share_the_prompt(prepare: Callable[..., PreparedPairs]) -> None:
    data = prepare([row(prompt="Say hello. " * 30)], max_length=40)
    length = data.prompt_lengths[0]
    assert data.sequence(0, 0)[:length].tolist() == data.sequence(0, 1)[:length].tolist()


# ---------------------------------------------------------------- what does not fit


def test_a_long_prompt_loses_its_start_but_neither_bos_nor_response(
    tokenizer: Any, prepare: Callable[..., PreparedPairs]
) -> None:
    long = row(prompt=" ".join(f"word{number}" for number in range(60)))
    whole, cut = prepare([long]), prepare([long], max_length=40)
    assert len(whole.sequence(0, 0)) > 40
    for side in (0, 1):
        response = whole.sequence(0, side)[whole.prompt_lengths[0] :].tolist()
        assert cut.sequence(0, side)[cut.prompt_lengths[0] :].tolist() == response
    assert max(len(cut.sequence(0, side)) for side in (0, 1)) == 40
    kept = cut.sequence(0, 0)[: cut.prompt_lengths[0]].tolist()
    assert kept[0] == tokenizer.bos_token_id
    assert kept[1:] == whole.sequence(0, 0)[: whole.prompt_lengths[0]].tolist()[-len(kept) + 1 :]
    assert cut.summary.prompts_cut == 1 and whole.summary.prompts_cut == 0


def test_what_is_dropped_is_counted_with_reasons_and_rows(prepare: Callable[..., PreparedPairs]) -> None:
    rows = [
        row(),
        row(chosen=""),
        row(rejected=" \n"),
        row(chosen="Same.", rejected="Same."),
        row(chosen="far too long " * 60),
        row(prompt="Another."),
        row(chosen=""),
    ]
    data = prepare(rows, max_length=60)
    assert data.summary.dropped == {
        "the chosen response is empty": [2, 7],
        "the rejected response is empty": [3],
        "chosen and rejected are the same": [4],
        "a response does not fit data.max_length=60; raise it or set data.truncation=response_right": [5],
    }
    assert data.rows.tolist() == [1, 6] and len(data) == 2
    assert (data.summary.rows, data.summary.pairs) == (7, 2)
    assert "2 of 7 pairs kept" in data.summary.sentences()
    assert "2 dropped: the chosen response is empty (row 2, 7)" in data.summary.sentences()


def test_a_response_that_just_fits_is_kept_and_one_token_less_drops_it(prepare: Callable[..., PreparedPairs]) -> None:
    long = row(chosen="Hello there! " * 9)
    needed = prepare([long]).response_length(0, 0) + 2  # BOS and one prompt token
    kept = prepare([long], max_length=needed)
    assert len(kept.sequence(0, 0)) == needed and kept.prompt_lengths.tolist() == [2]
    with pytest.raises(UserError, match=f"1 dropped: a response does not fit data.max_length={needed - 1}"):
        prepare([long], max_length=needed - 1)


def test_no_pair_left_is_refused_with_the_reasons(prepare: Callable[..., PreparedPairs]) -> None:
    with pytest.raises(
        UserError, match=r"no pair is left to train on \(1 dropped: chosen and rejected are the same; 1 dropped: the"
    ):
        prepare([row(chosen="No."), row(chosen="")])


def test_the_summary_counts_tokens(prepare: Callable[..., PreparedPairs]) -> None:
    data = prepare([row(), row(prompt="Name a colour.", chosen="Blue.")])
    sequences = [data.sequence(pair, side) for pair in (0, 1) for side in (0, 1)]
    assert data.summary.prompt_tokens + data.summary.response_tokens == sum(map(len, sequences)) == len(data.tokens)
    assert data.summary.longest_sequence == max(map(len, sequences))


def test_rows_the_layout_leaves_out_are_counted_beside_the_others(prepare: Callable[..., PreparedPairs]) -> None:
    data = prepare([spoken(), spoken() | {"chosen": []}, spoken(chosen="")])
    assert data.summary.dropped == {
        "an answer is not one assistant turn after the shared prompt": [2],
        "the chosen response is empty": [3],
    }
    assert (data.summary.rows, data.summary.pairs, data.rows.tolist()) == (3, 1, [1])


def test_the_summary_says_how_the_rows_were_read(prepare: Callable[..., PreparedPairs]) -> None:
    assert prepare([spoken()]).summary.read_as() == "read as trl_messages (columns prompt, chosen, rejected)"


def test_the_histograms_count_every_kept_pair_once(prepare: Callable[..., PreparedPairs]) -> None:
    rows = [row(chosen="Hello there! " * times) for times in (1, 2, 4, 8, 16, 32)] + [row(chosen="")]
    data = prepare(rows)
    lengths = {"prompt": data.prompt_lengths.tolist()} | {
        name: [data.response_length(pair, side) for pair in range(len(data))]
        for side, name in enumerate(("chosen", "rejected"))
    }
    assert data.summary.lengths.keys() == lengths.keys()
    for name, tokens in lengths.items():
        counts = data.summary.lengths[name]
        assert list(counts)[:3] == ["1-16", "17-32", "33-64"] and list(counts)[-1] == "over 32768"
        for bin_name, count in counts.items():
            if "-" in bin_name:
                first, last = map(int, bin_name.split("-"))
                assert count == sum(first <= length <= last for length in tokens), (name, bin_name)
        assert sum(counts.values()) == len(data) == 6


def test_a_length_on_a_bins_border_is_in_the_bin_it_ends() -> None:
    import numpy as np

    from tgdpo_megatron.data.prepare import _histogram

    counts = _histogram(np.array([16, 17, 32768, 32769, 90000]))
    assert {name: count for name, count in counts.items() if count} == {
        "1-16": 1,
        "17-32": 1,
        "16385-32768": 1,
        "over 32768": 2,
    }


# ---------------------------------------------------------------- identity


def test_the_same_input_gives_the_same_hash(prepare: Callable[..., PreparedPairs]) -> None:
    first, second = prepare([row()]), prepare([row()])
    assert first.summary.pairs_hash == second.summary.pairs_hash
    assert first.hashes.tobytes() == second.hashes.tobytes()


@pytest.mark.parametrize("change", ["chosen", "rejected", "prompt"])
def test_the_hash_changes_with_each_text(change: str, prepare: Callable[..., PreparedPairs]) -> None:
    assert prepare([row()]).summary.pairs_hash != prepare([row(**{change: "Other."})]).summary.pairs_hash


def test_the_hash_tells_where_the_prompt_ends() -> None:
    """Equal ids, another boundary: other tokens are labelled."""
    import numpy as np

    from tgdpo_megatron.data.prepare import pair_hash

    sequences = [np.array([1, 2, 3, 4], np.int32), np.array([1, 2, 3, 5], np.int32)]
    assert pair_hash(2, sequences) != pair_hash(3, sequences)


def test_the_hash_tells_where_the_chosen_response_ends() -> None:
    """Equal ids one after another, another border between the two sequences."""
    import numpy as np

    from tgdpo_megatron.data.prepare import pair_hash

    ids = np.array([1, 2, 3, 4, 1, 2, 5], np.int32)
    assert pair_hash(2, [ids[:4], ids[4:]]) != pair_hash(2, [ids[:3], ids[3:]])


def test_a_hash_changes_with_template_and_cut(tokenizer: Any, prepare: Callable[..., PreparedPairs]) -> None:
    long = row(prompt="Say hello to all of them. " * 9)
    hashes = [
        prepare([long]).summary.pairs_hash,
        prepare([long], max_length=40).summary.pairs_hash,
        prepare([long], using=templated(tokenizer, TEMPLATES["without BOS"])).summary.pairs_hash,
    ]
    assert len(set(hashes)) == 3


def test_identity_of_a_tokenizer_is_what_it_does(tokenizer: Any, tmp_path: Path) -> None:
    """Saving, loading and using one with truncation change nothing; another template or vocabulary does."""
    from tools.make_tiny_model import train_tokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    loaded("a long text", truncation=True, max_length=2)
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    assert template_hash(loaded) == template_hash(tokenizer)
    assert template_hash(templated(tokenizer, TEMPLATES["with BOS"])) != template_hash(tokenizer)
    assert tokenizer_hash(train_tokenizer(["other texts"], vocab_size=300)) != tokenizer_hash(tokenizer)


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_tokenizer_that_begins_or_ends_sequences_otherwise_is_another(name: str, tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    setattr(other, name, "<|pad|>")
    assert other.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str(), "the vocabulary is the same"
    assert tokenizer_hash(other) != tokenizer_hash(tokenizer)


@pytest.mark.parametrize("differs", ["tokenizer", "template", "max_length", "format", "data.columns"])
def test_prepared_pairs_of_another_identity_are_refused_by_name(
    differs: str, tokenizer: Any, prepare: Callable[..., PreparedPairs], tmp_path: Path
) -> None:
    from tools.make_tiny_model import train_tokenizer

    prepare([row()])
    format: FormatName | None = "llama_factory" if differs == "format" else None
    config = DataConfig(max_length=100 if differs == "max_length" else 512, format=format)
    if differs == "data.columns":
        config.columns = {"prompt": "instruction"}
    using = tokenizer
    if differs == "tokenizer":
        using = train_tokenizer(["other texts"], vocab_size=300)
    elif differs == "template":
        using = templated(tokenizer, TEMPLATES["with BOS"])
    with pytest.raises(UserError, match=f"made with another {differs}"):
        prepare_pairs(config, tmp_path / "prepared", using, tmp_path / "again")


def test_prepared_pairs_are_read_back_as_they_were(
    tokenizer: Any, prepare: Callable[..., PreparedPairs], tmp_path: Path
) -> None:
    data = prepare([row(), row(prompt="Name a colour.")])
    again = prepare_pairs(DataConfig(max_length=512), tmp_path / "prepared", tokenizer, tmp_path / "unused")
    for name in ("tokens", "starts", "prompt_lengths", "hashes", "rows", "prompts"):
        assert getattr(again, name).tolist() == getattr(data, name).tolist()
    assert again.summary == data.summary and not (tmp_path / "unused").exists()


def test_the_hash_of_a_source_changes_with_content_settings_and_layout(
    tokenizer: Any, write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    first = write_pairs(tmp_path / "a.jsonl", [row()])
    copied = write_pairs(tmp_path / "b.jsonl", [row()])
    other = write_pairs(tmp_path / "c.jsonl", [row(chosen="Other.")])
    usual = source_hash(DataConfig(), first, tokenizer)
    assert source_hash(DataConfig(), copied, tokenizer) == usual, "a file's name is not part of it"
    changed = [
        source_hash(DataConfig(), other, tokenizer),
        source_hash(DataConfig(max_length=100), first, tokenizer),
        source_hash(DataConfig(format="trl"), first, tokenizer),
        source_hash(DataConfig(format="llama_factory"), first, tokenizer),
        source_hash(DataConfig(columns={"prompt": "ask"}), first, tokenizer),
        source_hash(DataConfig(), first, templated(tokenizer, TEMPLATES["without BOS"])),
    ]
    assert len({usual, *changed}) == 7


def test_a_saved_folder_is_hashed_by_its_rows(tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    for name, chosen in (("a", "One."), ("b", "One."), ("c", "Two.")):
        Dataset.from_list([row(chosen=chosen)]).save_to_disk(str(tmp_path / name))
    (tmp_path / "b" / "cache-0123456789abcdef.arrow").write_bytes(b"left there by the library")
    hashes = {name: source_hash(DataConfig(), tmp_path / name, tokenizer) for name in "abc"}
    assert hashes["a"] == hashes["b"] != hashes["c"]


def test_a_saved_folder_is_no_prepared_one(prepare: Callable[..., PreparedPairs], tmp_path: Path) -> None:
    from datasets import Dataset

    prepare([row()])
    Dataset.from_list([row()]).save_to_disk(str(tmp_path / "saved"))
    assert is_prepared(tmp_path / "prepared") and not is_prepared(tmp_path / "saved")
    assert not is_prepared(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("lost", ["summary.json", "pairs.safetensors"])
def test_a_prepared_folder_that_lost_a_file_is_refused_as_such(
    lost: str, tokenizer: Any, prepare: Callable[..., PreparedPairs], tmp_path: Path
) -> None:
    prepare([row()])
    (tmp_path / "prepared" / lost).unlink()
    with pytest.raises(UserError, match="no such summary of prepared pairs|not a folder of prepared pairs"):
        prepare_pairs(DataConfig(), tmp_path / "prepared", tokenizer, tmp_path / "unused")


def test_pairs_are_the_same_whatever_layout_they_came_in(prepare: Callable[..., PreparedPairs]) -> None:
    implicit = {
        name: [*CONVERSATION, {"role": "assistant", "content": text}]
        for name, text in (("chosen", "Blue."), ("rejected", "A stone."))
    }
    assert prepare([spoken()]).summary.pairs_hash == prepare([implicit]).summary.pairs_hash


def test_a_folder_that_holds_no_prepared_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="summary.json: no such summary of prepared pairs"):
        load_prepared(tmp_path)


def test_a_token_id_that_was_changed_in_a_prepared_file_is_noticed(
    prepare: Callable[..., PreparedPairs], tokenizer: Any, tmp_path: Path
) -> None:
    """Scores are found by the hash that was made of the ids: it must be the hash of these ids."""
    from safetensors.numpy import load_file, save_file

    prepare([row(), row("Say goodbye.")])
    file = tmp_path / "prepared" / "pairs.safetensors"
    for name, place in (("tokens", -1), ("prompt_lengths", 1)):
        arrays = load_file(file)
        arrays[name][place] -= 1
        save_file(arrays, file)
        with pytest.raises(UserError, match="the token ids of row 2 of pairs.jsonl were altered; prepare the pairs"):
            prepare_pairs(DataConfig(max_length=512), tmp_path / "prepared", tokenizer, tmp_path / "unused")
        arrays[name][place] += 1
        save_file(arrays, file)


@pytest.mark.parametrize("prompt", [0, 9])
def test_prepared_pairs_without_a_token_in_the_prompt_or_in_a_response_are_refused(prompt: int, tmp_path: Path) -> None:
    data = pairs_of([10, 9, 10], 4, 100)
    save_prepared(replace(data, prompts=np.zeros((3, 8), np.uint8)), tmp_path / "whole")
    assert len(load_prepared(tmp_path / "whole")) == 3
    lengths = np.array([4, prompt, 4], np.int32)
    save_prepared(replace(data, prompts=np.zeros((3, 8), np.uint8), prompt_lengths=lengths), tmp_path / "empty")
    with pytest.raises(UserError, match="pair 1 of the prepared pairs has an empty prompt or response; prepare them"):
        load_prepared(tmp_path / "empty")


def test_two_prompts_of_a_pair_that_another_program_prepared_are_counted_where_it_did_not(
    prepare: Callable[..., PreparedPairs], tokenizer: Any, tmp_path: Path
) -> None:
    prepare([row(), row("Say goodbye.")])
    theirs = load_prepared(tmp_path / "prepared")
    assert theirs.summary.prompts_apart == 0
    tokens, hashes = theirs.tokens.copy(), theirs.hashes.copy()
    tokens[theirs.starts[3] + 1] += 1
    both = [tokens[theirs.starts[place] : theirs.starts[place + 1]] for place in (2, 3)]
    hashes[1] = np.frombuffer(pair_hash(int(theirs.prompt_lengths[1]), both), np.uint8)
    save_prepared(replace(theirs, tokens=tokens, hashes=hashes), tmp_path / "theirs")
    found = tokenised(DataConfig(max_length=512), tmp_path / "theirs", tokenizer)
    assert found.summary.prompts_apart == 1 and "1 pairs with two different prompts" in found.summary.sentences()


@pytest.mark.parametrize("name", ["tokens", "starts", "prompt_lengths", "hashes", "rows"])
def test_prepared_arrays_that_do_not_go_together_are_refused(
    name: str, prepare: Callable[..., PreparedPairs], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    prepare([row(), row(chosen="Another answer.")])
    (file,) = tmp_path.rglob("pairs.safetensors")
    arrays = load_file(file)
    for altered in (arrays | {name: arrays[name][:-1].copy()}, arrays | {name: arrays[name].astype(np.float32)}):
        save_file(altered, file)
        with pytest.raises(UserError, match="the prepared pairs were altered"):
            load_prepared(file.parent)
    save_file({key: array for key, array in arrays.items() if key != name}, file)
    with pytest.raises(UserError, match="not a folder of prepared pairs"):
        load_prepared(file.parent)


def test_a_truncated_prepared_file_is_refused(prepare: Callable[..., PreparedPairs], tmp_path: Path) -> None:
    prepare([row()])
    file = tmp_path / "prepared" / "pairs.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match="not a folder of prepared pairs"):
        load_prepared(tmp_path / "prepared")


# ---------------------------------------------------------------- the tokenizer's folder


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer.json there"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_template_can_be_loaded_but_not_used_without_one(
    tokenizer: Any, prepare: Callable[..., PreparedPairs], tmp_path: Path
) -> None:
    templated(tokenizer, "").save_pretrained(tmp_path)
    base = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no chat template; give data.template=FILE.jinja, or data.template=none"):
        prepare([row()], using=base)
    assert len(prepare([row()], using=load_tokenizer(tmp_path, "none"))) == 1


# ---------------------------------------------------------------- data.template


def test_template_none_takes_texts_as_they_are_and_closes_open_ones(
    tokenizer: Any, prepare: Callable[..., PreparedPairs], tmp_path: Path
) -> None:
    """The oracle is the tokenizer itself, on the texts that the file holds."""
    tokenizer.save_pretrained(tmp_path)
    plain = load_tokenizer(tmp_path, "none")
    rendered = "<|user|>\nSay hello.<|end|><|assistant|>\n"
    pair = row(prompt=rendered, chosen="Hello there!<|end|>", rejected="No.")
    data = prepare([pair], using=plain, template="none")
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert data.sequence(0, 0)[: data.prompt_lengths[0]].tolist() == ids
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    hello, no = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Hello there!", "No."))
    assert data.sequence(0, 0)[len(ids) :].tolist() == [*hello, end]
    assert data.sequence(0, 1)[len(ids) :].tolist() == [*no, tokenizer.eos_token_id]


def test_template_none_leaves_out_conversations(
    tokenizer: Any, prepare: Callable[..., PreparedPairs], tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    turns = [*asked("Hi."), {"role": "assistant", "content": "Hi!"}, *asked("Say hello.")]
    both = [{"role": "assistant", "content": text} for text in ("Hello!", "No.")]
    several = {"prompt": turns, "chosen": both[:1], "rejected": both[1:]}
    with pytest.raises(UserError, match="data.template=none takes only prompts that are one text"):
        prepare([several], using=load_tokenizer(tmp_path, "none"), template="none")


def test_a_template_file_takes_the_place_of_the_tokenizers_own(
    tokenizer: Any, prepare: Callable[..., PreparedPairs], tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "mine.jinja").write_text(TEMPLATES["without BOS"])
    using = load_tokenizer(tmp_path, str(tmp_path / "mine.jinja"))
    expected = prepare([row()], using=templated(tokenizer, TEMPLATES["without BOS"]))
    assert prepare([row()], using=using).sequence(0, 0).tolist() == expected.sequence(0, 0).tolist()
    assert template_hash(using) != template_hash(load_tokenizer(tmp_path))


def test_a_template_that_loses_the_answer_is_refused(tokenizer: Any, prepare: Callable[..., PreparedPairs]) -> None:
    forgets = "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}"
    with pytest.raises(UserError, match="the chat template loses the assistant's answer"):
        prepare([row()], using=templated(tokenizer, forgets + "{% endfor %}" + HEADER))


def test_a_missing_template_file_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="data.template=nowhere.jinja: no such file"):
        load_tokenizer(tmp_path, "nowhere.jinja")


# ---------------------------------------------------------------- special tokens in texts


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_texts_that_hold_a_special_token_are_refused_by_line(
    column: str, prepare: Callable[..., PreparedPairs]
) -> None:
    bad = row() | {column: "So.<|end|>"}
    with pytest.raises(
        UserError, match=r"pairs.jsonl line 2: the text holds '<\|end\|>', a special token.*template=none"
    ):
        prepare([row(), bad])


def test_special_tokens_drop_leaves_such_pairs_out_and_keep_makes_them_tokens(
    tokenizer: Any, prepare: Callable[..., PreparedPairs]
) -> None:
    rows = [row(), row(chosen="Hello<|end|> there!")]
    dropped = prepare(rows, special_tokens="drop").summary
    assert (dropped.pairs, dropped.dropped) == (1, {"a text holds a special token or a mark of a chat template": [2]})
    kept = prepare(rows, special_tokens="keep")
    assert kept.sequence(1, 0).tolist().count(tokenizer.convert_tokens_to_ids("<|end|>")) == 3  # user's, text's, own


def test_the_template_of_another_model_in_the_texts_is_noticed(prepare: Callable[..., PreparedPairs]) -> None:
    """The tokenizer has no such token."""
    with pytest.raises(UserError, match=r"line 1: the text holds '\[INST\]'.*template=none"):
        prepare([row(prompt="[INST] Say hello. [/INST]")])


@pytest.mark.parametrize("setting", [{"truncation": "drop"}, {"special_tokens": "drop"}])
def test_pairs_prepared_by_another_rule_are_refused(
    setting: dict[str, str], prepare: Callable[..., PreparedPairs], tokenizer: Any, tmp_path: Path
) -> None:
    prepare([row()])
    folder = tmp_path / "prepared"
    with pytest.raises(UserError, match=f"made with another {next(iter(setting))}"):
        prepare_pairs(DataConfig(max_length=512, **setting), folder, tokenizer, tmp_path / "unused")


def test_responses_that_lost_their_end_are_counted_and_lack_the_end_of_turn(
    tokenizer: Any, prepare: Callable[..., PreparedPairs]
) -> None:
    data = prepare([row(chosen="Hello there! " * 30)], max_length=48, truncation="response_right")
    assert data.summary.responses_cut == 1 and "1 responses cut, without end of turn" in data.summary.sentences()
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert len(data.sequence(0, 0)) == 48
    assert data.sequence(0, 0)[-1] != end and data.sequence(0, 1)[-1] == end


def test_a_damaged_tokenizer_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_pairs_prepared_by_an_earlier_version_are_refused(
    prepare: Callable[..., PreparedPairs], tmp_path: Path
) -> None:
    prepare([row()])
    path = tmp_path / "prepared" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(UserError, match="prepared by another version of this program; prepare them again"):
        load_prepared(path.parent)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "the file is not UTF-8 text"),
        (b" \n", "the file is empty"),
        (b"{% for message in messages %}", "the chat template has a mistake in line 1"),
        (b"{{ messages[0]['content'] }}", "the chat template loses the assistant's answer"),
    ],
)
def test_a_template_file_that_cannot_be_used_is_named(
    content: bytes, words: str, tokenizer: Any, prepare: Callable[..., PreparedPairs], tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "mine.jinja"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^data.template={path}: {words}"):
        prepare([row()], using=load_tokenizer(tmp_path, str(path)), template=str(path))
