"""From sampled answers to scored pairs: which pairs, what is left out and named, and a run that was stopped."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.reward_models import answered, make_classifier, write_lines
from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.data.formats import read_pairs
from tgdpo_megatron.data.prepare import prepare_pairs
from tgdpo_megatron.data.rendering import TemplateRefusal
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.reward_models import open_scorer
from tgdpo_megatron.reward_models.annotation import Report, annotate, begun, report_file
from tgdpo_megatron.reward_models.candidates import Candidates, read_candidates
from tgdpo_megatron.reward_models.classifier import Classifier
from tgdpo_megatron.reward_models.pairing import NoPair, Rules, choose
from tgdpo_megatron.reward_models.scorer import Group, RewardModel, Scorer, Tokens
from tools.annotate import run

RULES = Rules()


class Numbered(RewardModel):
    """Scores an answer by the number that it begins with. An answer that begins with no number is too long. Takes no
    tool turn."""

    device = torch.device("cpu")
    vocabulary = 10**9

    def encode(self, group: Group, answers: Sequence[str]) -> list[Tokens | None]:
        if group.messages[-1]["role"] == "tool":
            raise TemplateRefusal("the chat template refuses the conversation (no tool)")
        firsts = [answer.split()[0] for answer in answers]
        return [Tokens([1000 + int(10 * float(first))]) if first[0] in "-0123456789" else None for first in firsts]

    def numbers(self, sequences: Sequence[Tokens]) -> torch.Tensor:
        return torch.tensor([(sequence.ids[0] - 1000) / 10 for sequence in sequences])


def numbered() -> Scorer:
    return Scorer(Numbered(), name="numbered", fingerprint="abc")


def annotated(rows: Iterable[Any], folder: Path, rules: Rules = RULES) -> tuple[list[dict[str, Any]], Report]:
    """The pairs that are made of lines of answers, and the report."""
    answers, output = write_lines(folder / "answers.jsonl", list(rows)), folder / "pairs.jsonl"
    report = annotate(read_candidates([answers]), numbered(), output, {"of": "a test"}, rules)
    assert json.loads(report_file(output).read_text())["complete"]
    return [json.loads(line) for line in output.read_text().splitlines()], report


# ---------------------------------------------------------------- which two


def test_the_best_answer_is_chosen_and_the_worst_rejected_and_of_equals_the_first() -> None:
    assert choose(np.array([1.0, 3.0, 0.5, 3.0, 0.5]), "p", RULES) == (1, 2)


def test_answers_without_a_score_take_no_part() -> None:
    assert choose(np.array([np.nan, 3.0, np.nan, 2.0]), "p", RULES) == (1, 3)
    with pytest.raises(NoPair, match="too_long"):
        choose(np.array([np.nan, 3.0]), "p", RULES)


def test_equal_scores_are_no_pair_and_a_margin_asks_for_more() -> None:
    with pytest.raises(NoPair, match="ties"):
        choose(np.array([2.0, 2.0, 2.0]), "p", RULES)
    assert choose(np.array([2.0, 1.5]), "p", replace(RULES, margin=0.5)) == (0, 1)
    with pytest.raises(NoPair, match="below_margin"):
        choose(np.array([2.0, 1.5]), "p", replace(RULES, margin=0.51))


def test_a_random_rejected_answer_is_any_worse_one_and_follows_from_the_seed_and_the_prompt() -> None:
    scores = np.array([1.0, 5.0, 2.0, 4.9, 5.0])
    rules = Rules("best-random", margin=0.5)
    found = [choose(scores, f"prompt {number}", rules) for number in range(3000)]
    assert {chosen for chosen, _ in found} == {1}
    share = np.bincount([rejected for _, rejected in found], minlength=5) / 3000
    np.testing.assert_allclose(share, [0.5, 0, 0.5, 0, 0], atol=0.04)
    assert found == [choose(scores, f"prompt {number}", rules) for number in range(3000)]
    assert found != [choose(scores, f"prompt {number}", replace(rules, seed=1)) for number in range(3000)]


# ---------------------------------------------------------------- the file of pairs


def test_a_pair_keeps_all_answers_and_scores_and_what_the_answers_said(tmp_path: Path) -> None:
    row = answered("Count.", ["1 a", "3 b", "2 c"], tools=[{"type": "function", "function": {"name": "f"}}])
    (pair,), _ = annotated([row], tmp_path)
    asked = {"role": "user", "content": "Count."}
    assert pair == row | {
        "all_rm_scores": [1.0, 3.0, 2.0],
        "chosen": [asked, {"role": "assistant", "content": "3 b"}],
        "rejected": [asked, {"role": "assistant", "content": "1 a"}],
        "score_chosen": 3.0,
        "score_rejected": 1.0,
        "scorer": {"name": "numbered", "fingerprint": "abc"},
    }


LEFT_OUT = {
    "identical": answered("A", ["1 a", "1 a", "1 a"]),
    "too_few": answered("B", ["1 a", "2 b", "  "], unfinished=[0]),
    "refused": answered([{"role": "user", "content": "u"}, {"role": "tool", "content": "t"}], ["1 a", "2 b"]),
    "too_long": answered("C", ["long", "longer", "3 c"]),
    "ties": answered("D", ["1 a", "1 b"]),
    "below_margin": answered("E", ["1.1 a", "1 b"]),
}


def test_what_is_left_out_is_counted_and_named_by_its_reason(tmp_path: Path) -> None:
    rows = [*LEFT_OUT.values(), answered("F", ["9 a", "1 b", "0 c"], unfinished=[2])]
    (pair,), report = annotated(rows, tmp_path, replace(RULES, margin=0.5))
    assert (report.prompts, report.answers, report.pairs) == (7, 18, 1)
    assert report.prompts_left_out == {
        reason: {"number": 1, "first": [row["prompt_id"]]} for reason, row in LEFT_OUT.items()
    }
    assert report.answers_left_out == {"unfinished": 2, "empty": 1, "too_long": 2}
    assert pair["all_rm_scores"] == [9.0, 1.0, None] and pair["score_rejected"] == 1.0


def test_a_prompt_gives_one_pair_however_often_it_is_there(tmp_path: Path) -> None:
    """In a file that was joined to itself, in two parts, and in a run that goes on."""
    rows = [answered(f"p{number}", ["1 a", "2 b"]) for number in range(12)]
    pairs, report = annotated([*rows, *rows], tmp_path)
    assert [pair["prompt"] for pair in pairs] == [row["prompt"] for row in rows]
    assert (report.pairs, report.prompts) == (12, 24)
    assert report.prompts_left_out == {"repeated": {"number": 12, "first": [row["prompt_id"] for row in rows]}}
    parts = [write_lines(tmp_path / f"{first}.jsonl", rows[first:]) for first in (0, 4)]
    output = tmp_path / "of-parts.jsonl"
    with pytest.raises(Killed):
        annotate(dying(read_candidates(parts), 15), numbered(), output, {}, RULES, block=5)
    assert begun(output, {}).prompts == 15
    report = annotate(read_candidates(parts), numbered(), output, {}, RULES, block=5)
    assert (report.pairs, report.prompts_left_out["repeated"]["number"]) == (12, 8)


def test_unfinished_answers_take_part_where_that_is_asked_for(tmp_path: Path) -> None:
    rows = [answered("F", ["9 a", "1 b", "0 c"], unfinished=[0, 2])]
    (pair,), report = annotated(rows, tmp_path, Rules(keep_unfinished=True))
    assert (pair["score_chosen"], pair["score_rejected"], report.answers_left_out["unfinished"]) == (9.0, 0.0, 0)


def test_only_the_first_prompts_of_a_reason_are_named(tmp_path: Path) -> None:
    _, report = annotated([answered(f"p{number}", ["1 a", "1 b"]) for number in range(300)], tmp_path)
    assert report.prompts_left_out["ties"]["number"] == 300 and len(report.prompts_left_out["ties"]["first"]) == 100


def test_training_reads_the_file_as_it_is_with_prompts_of_one_turn_and_of_several(
    tokenizer: Any, tmp_path: Path
) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Count."},
    ]
    rows = [answered(prompt, ["1 a", "2 b"]) for prompt in ("One.", conversation, "Two.")]
    for first in (rows, [rows[1], rows[0], rows[2]]):
        output = tmp_path / str(first[0]["prompt"] == "One.")
        output.mkdir()
        annotated(first, output)
        read = read_pairs(output / "pairs.jsonl")
        assert read.format == "ultrafeedback_binarized"
        by_length = {len(pair.messages): pair for pair in read.pairs}
        assert list(by_length[4].messages) == conversation
        assert [(pair.chosen, pair.rejected) for pair in read.pairs] == [("2 b", "1 a")] * 3
        data = prepare_pairs(DataConfig(max_length=64), output / "pairs.jsonl", tokenizer, output / "prepared")
        assert len(data) == 3


# ---------------------------------------------------------------- several files


def found(paths: Sequence[Path]) -> list[tuple[Any, list[str]]]:
    return [(one.fields["prompt"], one.answers) for one in read_candidates(paths)]


def test_parts_follow_each_other_and_runs_over_the_same_prompts_are_put_together(tmp_path: Path) -> None:
    parts = [[answered("A", ["1", "2"])], [answered("B", ["3", "4"]), answered("C", ["5", "6"])]]
    runs = [[answered("A", ["1", "2"]), answered("B", ["3"])], [answered("A", ["7"]), answered("B", ["8"])]]
    of_parts = [write_lines(tmp_path / f"part-{number}.jsonl", rows) for number, rows in enumerate(parts)]
    of_runs = [write_lines(tmp_path / f"run-{number}.jsonl", rows) for number, rows in enumerate(runs)]
    assert found(of_parts) == [("A", ["1", "2"]), ("B", ["3", "4"]), ("C", ["5", "6"])]
    assert found(of_runs) == [("A", ["1", "2", "7"]), ("B", ["3", "8"])]
    first = next(read_candidates(of_runs))
    assert first.fields["finish_reasons"] == ["stop"] * 3 and first.fields["sampling"]["n"] == 3


SAMPLED = {"engine": "transformers", "n": 1, "temperature": 0.8, "seed": 0}


def test_runs_over_the_same_prompts_say_all_their_seeds(tmp_path: Path) -> None:
    """As with SimPO's five."""
    paths = [
        write_lines(tmp_path / f"{seed}.jsonl", [answered("A", [f"{seed}"], sampling=SAMPLED | {"seed": seed})])
        for seed in (13, 21, 42, 79, 100)
    ]
    (one,) = read_candidates(paths)
    assert one.answers == ["13", "21", "42", "79", "100"]
    assert one.fields["sampling"] == SAMPLED | {"n": 5, "seed": [13, 21, 42, 79, 100]}


def test_simpos_files_are_read_as_its_scripts_write_them(tmp_path: Path) -> None:
    """One file for each seed, and the file that its scripts make of them."""
    for seed, texts in ((13, ["1 a", "2 b"]), (21, ["3 c", "4 d"])):
        rows = [
            {"prompt": prompt, "format_prompt": f"<{prompt}>", "generated_text": text}
            for prompt, text in zip("AB", texts, strict=True)
        ]
        (tmp_path / f"output_{seed}.json").write_text(json.dumps(rows))
    whole = [{"prompt": "A", "all_generated_responses": ["1 a", "3 c"]}]
    whole += [{"prompt": "B", "all_generated_responses": ["2 b", "4 d"]}]
    (tmp_path / "all_outputs.json").write_text(json.dumps(whole))
    expected = [("A", ["1 a", "3 c"]), ("B", ["2 b", "4 d"])]
    assert found([tmp_path / "output_13.json", tmp_path / "output_21.json"]) == expected
    assert found([tmp_path / "all_outputs.json"]) == expected


@pytest.mark.parametrize("name", ["all_outputs.json", "answers.jsonl"])
def test_half_a_character_becomes_a_question_mark(name: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = [answered("A \ud83d", ["B \ud83d!", "C"], format_prompt="\ud83d")]
    (tmp_path / name).write_text(json.dumps(rows if name.endswith(".json") else rows[0]))
    output = tmp_path / "pairs.jsonl"
    run(make_classifier(tmp_path / "rm", tokenizer), [tmp_path / name], output, RULES, batch_tokens=256)
    pair = json.loads(output.read_text())
    assert pair["prompt"] == "A ?" and {pair["chosen"][1]["content"], pair["rejected"][1]["content"]} == {"B ?!", "C"}


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        ([answered("A", ["1"])], "second.jsonl: ends before the other files; files of the same prompts must have all"),
        ([answered("A", ["1"]), answered("C", ["1"])], "second.jsonl prompt 2: is another prompt than "),
        (
            [answered("A", ["1"], sampling=SAMPLED | {"temperature": 1.2, "seed": 21})],
            r"second.jsonl prompt 1: was sampled with temperature 1\.2, and .*first.jsonl prompt 1 with 0\.8; annotate",
        ),
        ([answered("A", ["1"], model="other")], "second.jsonl prompt 1: the answers are another model's than those of"),
        ([], "second.jsonl: the file holds no answers"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(second: list[Any], sentence: str, tmp_path: Path) -> None:
    rows = [answered("A", ["1"]), answered("B", ["1"])]
    paths = [write_lines(tmp_path / "first.jsonl", rows), write_lines(tmp_path / "second.jsonl", second)]
    with pytest.raises(UserError, match=sentence):
        list(read_candidates(paths))


# ---------------------------------------------------------------- stopped and started again


ROWS = [answered(f"p{number}", [f"{number % 5} a", f"{number % 3} b", "0.5 c"]) for number in range(50)]


class Killed(Exception):
    """The end of a run in the midst of its work."""


def dying(candidates: Iterator[Candidates], after: int) -> Iterator[Candidates]:
    yield from islice(candidates, after)
    raise Killed


@pytest.mark.parametrize("after", [0, 7, 16, 37])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(after: int, tmp_path: Path) -> None:
    answers = write_lines(tmp_path / "answers.jsonl", ROWS)
    whole, parted = tmp_path / "whole.jsonl", tmp_path / "parted.jsonl"
    annotate(read_candidates([answers]), numbered(), whole, {}, RULES, block=8)
    with pytest.raises(Killed):
        annotate(dying(read_candidates([answers]), after), numbered(), parted, {}, RULES, block=8)
    with parted.open("ab") as file:
        file.write(b'{"half a line')
    assert begun(parted, {}).prompts == after // 8 * 8, "what was made is kept"
    annotate(read_candidates([answers]), numbered(), parted, {}, RULES, block=8)
    assert parted.read_bytes() == whole.read_bytes()
    assert report_file(parted).read_text() == report_file(whole).read_text()


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_what_another_job_made_while_the_model_was_loaded_is_kept(
    margin: float, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, output = make_classifier(tmp_path / "rm", tokenizer), tmp_path / "pairs.jsonl"
    answers = write_lines(tmp_path / "answers.jsonl", [answered(f"p{number}", ["a", "b"]) for number in range(9)])
    made = []

    def loaded(given: Path, **options: Any) -> Scorer:
        if not made:
            made.append(b"")
            run(scorer, [answers], output, Rules(margin=margin), batch_tokens=256)
            made.append(output.read_bytes())
        return open_scorer(given, **options)

    monkeypatch.setattr("tools.annotate.open_scorer", loaded)
    refused = pytest.raises(UserError, match=r"was begun with margin 0\.5, and now it is 0\.0")
    with refused if margin else contextlib.nullcontext():
        run(scorer, [answers], output, RULES, batch_tokens=256)
    assert output.read_bytes() == made[-1] and len(made[-1].splitlines()) > 5


def test_other_settings_and_files_of_others_are_refused(tmp_path: Path) -> None:
    answers, output = write_lines(tmp_path / "answers.jsonl", ROWS), tmp_path / "pairs.jsonl"
    annotate(read_candidates([answers]), numbered(), output, {"margin": 0.0, "seed": 0}, RULES)
    with pytest.raises(UserError, match=r"pairs\.jsonl: was begun with margin 0\.0, and now it is 0\.5; give the same"):
        begun(output, {"margin": 0.5, "seed": 0})
    report_file(output).unlink()
    with pytest.raises(UserError, match=r"pairs\.jsonl: is there already, without pairs\.report\.json"):
        begun(output, {"margin": 0.0, "seed": 0})


def test_a_run_whose_memory_ran_out_goes_on_in_smaller_batches(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its own sentence advises."""
    scorer, output = make_classifier(tmp_path / "rm", tokenizer), tmp_path / "pairs.jsonl"
    answers = write_lines(tmp_path / "answers.jsonl", [answered(f"p{number}", ["a", "b"]) for number in range(9)])
    whole = Classifier.numbers

    def short_of_memory(model: Classifier, sequences: Sequence[Tokens]) -> torch.Tensor:
        if len(sequences) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(model, sequences)

    monkeypatch.setattr(Classifier, "numbers", short_of_memory)
    with pytest.raises(UserError, match="memory ran out with --batch-tokens 256; give a smaller number, or a"):
        run(scorer, [answers], output, RULES, batch_tokens=256)
    run(scorer, [answers], output, RULES, batch_tokens=1)
    assert len(output.read_text().splitlines()) == 9


def test_prompts_are_told_of_as_they_are_scored_and_not_those_of_an_earlier_run(tmp_path: Path) -> None:
    """Those would make the rest look quick."""
    answers, output = write_lines(tmp_path / "answers.jsonl", [*ROWS, ROWS[0]]), tmp_path / "pairs.jsonl"
    with pytest.raises(Killed):
        annotate(dying(read_candidates([answers]), 16), numbered(), output, {}, RULES, block=8)
    done: list[int] = []
    scorer = Scorer(Numbered(), name="numbered", fingerprint="abc", batch_tokens=1)
    annotate(
        read_candidates([answers]),
        scorer,
        output,
        {},
        RULES,
        block=100,
        told=lambda prompts, tokens: done.append(prompts),
    )
    assert sum(done) == 35 and max(done) == 1


def test_two_jobs_do_not_write_one_file(tmp_path: Path) -> None:
    answers, output = write_lines(tmp_path / "answers.jsonl", ROWS), tmp_path / "pairs.jsonl"

    def while_running() -> Iterator[Candidates]:
        with pytest.raises(UserError, match=r"pairs\.jsonl: another job writes it"):
            annotate(read_candidates([answers]), numbered(), output, {}, RULES)
        yield from read_candidates([answers])

    annotate(while_running(), numbered(), output, {}, RULES)
    assert len(output.read_text().splitlines()) > 30


def test_a_file_is_never_held_in_memory(tmp_path: Path) -> None:
    """At its peak, the memory is that of a block of prompts, and a small share of the file."""
    output = tmp_path / "pairs.jsonl"
    rows = [answered(f"p{number}", [f"{number % 7} {'x' * 4000}", f"{number % 3} b"]) for number in range(1500)]
    answers = write_lines(tmp_path / "answers.jsonl", rows)
    del rows
    tracemalloc.start()
    annotate(read_candidates([answers]), numbered(), output, {}, RULES, block=16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert output.stat().st_size > 5e6 and peak < answers.stat().st_size / 5


# ---------------------------------------------------------------- the program


def test_the_program_makes_pairs_that_training_takes_all_of(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer = make_classifier(tmp_path / "rm", tokenizer)
    texts = ["Blue.", "A stone.", "Paris.", "Hello there!", "No."]
    rows = [answered(f"Name {number} colours.", texts[number % 3 :]) for number in range(9)]
    answers = write_lines(tmp_path / "answers.jsonl", [*rows, answered("Same.", ["a", "a"])])
    output = tmp_path / "pairs.jsonl"

    def said() -> str:
        run(scorer, [answers], output, RULES, batch_tokens=256)
        return capsys.readouterr().out

    first = said()
    assert f"{output}: 9 pairs of 10 prompts with 38 answers, scored by {scorer} (" in first
    assert "left out        1 prompts: all answers are the same (" in first
    data = prepare_pairs(DataConfig(max_length=64), output, tokenizer, tmp_path / "prepared")
    assert (len(data), data.summary.rows, data.summary.dropped) == (9, 9, {})
    assert "unfinished" not in first
    written = output.read_bytes()
    assert "9 pairs of 10 prompts" in said(), "there is nothing left to do"
    assert output.read_bytes() == written


def test_where_unfinished_answers_leave_no_pair_the_program_says_what_helps(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [answered(f"p{number}", ["a", "b"], unfinished=[0, 1]) for number in range(2)]
    answers, scorer = write_lines(tmp_path / "answers.jsonl", rows), make_classifier(tmp_path / "rm", tokenizer)
    advice = "sample with a larger --max-new-tokens, or give --keep-unfinished and another --output"
    for rules, helps in ((RULES, True), (Rules(keep_unfinished=True), False)):
        run(scorer, [answers], tmp_path / f"{helps}.jsonl", rules, batch_tokens=256)
        assert (advice in capsys.readouterr().out) == helps
