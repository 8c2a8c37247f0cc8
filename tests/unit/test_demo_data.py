"""The demo's pairs: what is marked wrong is exactly what differs, and nothing held out is trained on."""

import json
import re

import pytest

from tools.marked_pairs import Row, Splits, make_splits, read_rows, write_rows


@pytest.fixture(scope="module")
def splits() -> Splits:
    return make_splits(seed=3, num_train=1000, num_validation=100, num_sft=1000, noise=0.4)


def test_a_seed_gives_the_same_rows_and_another_seed_others(splits: Splits) -> None:
    sizes = {"num_train": 1000, "num_validation": 100, "num_sft": 1000, "noise": 0.4}
    assert make_splits(seed=3, **sizes) == splits
    assert make_splits(seed=4, **sizes).train != splits.train


def test_the_rejected_answer_differs_from_the_chosen_one_in_the_marked_spans_and_nowhere_else(splits: Splits) -> None:
    for row in splits.train + splits.validation:
        assert row.wrong
        shared, spans = _cut(row)
        found = re.fullmatch("(.+)".join(map(re.escape, shared)), row.chosen)
        assert found, row
        assert all(right != wrong for right, wrong in zip(found.groups(), spans, strict=True)), row


def test_a_wrong_digit_is_marked_alone() -> None:
    splits = make_splits(seed=0, num_train=2000, num_validation=1, num_sft=1, noise=0.0)
    row = next(row for row in splits.train if row.kind == "sum" and len(row.chosen) == len(row.rejected))
    assert all(row.rejected[start:end] != row.chosen[start:end] for start, end in row.wrong)
    assert sum(end - start for start, end in row.wrong) == sum(
        one != other for one, other in zip(row.chosen, row.rejected, strict=True)
    )


def test_no_held_out_prompt_is_trained_on(splits: Splits) -> None:
    held_out = {row.prompt for row in splits.validation}
    assert len(held_out) == 100
    assert held_out.isdisjoint(row.prompt for row in splits.train + splits.sft)


def test_the_share_of_wrong_examples_is_the_one_asked_for(splits: Splits) -> None:
    # A swapped row marks nothing: its rejected answer is the right one.
    assert sum(not row.wrong for row in splits.sft) == 400


def test_every_family_is_in_every_set(splits: Splits) -> None:
    for rows in (splits.train, splits.validation, splits.sft):
        assert {row.kind for row in rows} == {"sum", "date", "list", "capitals", "fact"}


def test_rows_are_written_one_to_a_line_with_the_trainers_columns(splits: Splits, tmp_path) -> None:
    write_rows(splits.train[:3], tmp_path / "pairs.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert read_rows(tmp_path / "pairs.jsonl") == splits.train[:3]
    assert {"prompt", "chosen", "rejected", "wrong"} <= lines[0].keys()


def test_the_trainer_reads_the_rows_and_ignores_what_it_does_not_know(splits: Splits, tmp_path) -> None:
    from tgdpo_megatron.data.formats import read_pairs

    write_rows(splits.sft, tmp_path / "sft.jsonl")
    read = read_pairs(tmp_path / "sft.jsonl")
    assert [tuple(pair.texts) for pair in read.pairs] == [(row.prompt, row.chosen, row.rejected) for row in splits.sft]


def _cut(row: Row) -> tuple[list[str], list[str]]:
    """The pieces of the rejected answer outside the marked spans, and those inside."""
    shared, spans, place = [], [], 0
    for start, end in row.wrong:
        shared.append(row.rejected[place:start])
        spans.append(row.rejected[start:end])
        place = end
    return [*shared, row.rejected[place:]], spans
