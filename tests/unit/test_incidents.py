"""Which steps are taken for incidents, and what a continued run remembers of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tgdpo_megatron.incidents import FEWEST, WINDOW, History, culprit, history_of
from tgdpo_megatron.report.journal import Journal

CALM = [0.69, 0.68, 0.70, 0.66, 0.69, 0.71, 0.67, 0.68, 0.70, 0.69]


def after(losses: list[float]) -> History:
    history = History()
    for loss in losses:
        history.add(loss)
    return history


def test_a_loss_far_above_those_before_is_a_leap_and_its_median_is_given() -> None:
    """Their median absolute deviation is 0.01, which in a normal distribution is 0.0148 standard deviations."""
    history = after(CALM)
    assert history.leap(0.9, 8) == pytest.approx(0.69)
    assert history.leap(0.69 + 8 * 0.0148 + 0.01, 8) == pytest.approx(0.69)
    assert history.leap(0.69 + 8 * 0.0148 - 0.01, 8) is None
    assert history.leap(0.1, 8) is None, "a low loss is none"
    assert history.leap(99.0, 0) is None, "0 looks for none"


def test_earlier_leaps_do_not_hide_a_later_one() -> None:
    """A mean and a standard deviation would: four of these losses are 20."""
    history = after([*CALM, 20.0, 20.0, 20.0, 20.0])
    assert history.leap(20.0, 8) is not None


def test_losses_that_hardly_differ_do_not_make_every_loss_a_leap() -> None:
    history = after([math.log(2)] * 20)
    assert history.leap(0.75, 8) is None
    assert history.leap(0.85, 8) is not None


def test_no_leap_is_seen_in_the_first_steps_and_old_steps_are_forgotten() -> None:
    assert after(CALM[: FEWEST - 1]).leap(99.0, 8) is None
    assert after([50.0] * 20 + [0.5] * WINDOW).leap(1.0, 8) == 0.5


@pytest.mark.parametrize("bad", [{0}, {6}, {3, 6}, {0, 1, 2, 3, 4, 5, 6}])
def test_a_pair_that_is_bad_is_found_by_halving(bad: set[int]) -> None:
    pairs, asked = np.array([10, 11, 12, 13, 14, 15, 16]), []

    def is_bad(some: np.ndarray) -> bool:
        asked.append(len(some))
        return any(pair - 10 in bad for pair in some)

    assert culprit(pairs, is_bad) in {10 + place for place in bad}
    assert len(asked) <= 6


def test_no_pair_is_blamed_where_only_all_together_are_bad() -> None:
    assert culprit(np.arange(8), lambda some: len(some) == 8) is None


def test_a_continued_run_remembers_what_its_files_say_up_to_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "skipped.jsonl").write_text("".join(f'{{"iteration": {step}}}\n' for step in (3, 9, 10, 11)))
    skipped = (3, 9, 10, 11)
    lines = [{"iteration": step} | ({"loss": float(step)} if step not in skipped else {}) for step in range(1, 12)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = history_of(tmp_path, 10)
    assert (found.skipped, found.in_a_row) == (3, 2)
    assert list(found.losses) == [1, 2, 4, 5, 6, 7, 8]
    assert history_of(tmp_path, 8).in_a_row == 0
    assert history_of(tmp_path, 0) == History()


def test_a_continued_run_measures_leaps_against_the_same_losses_as_one_that_was_never_stopped(tmp_path: Path) -> None:
    """Also where steps among the last were skipped: as many losses are remembered, from further back."""
    steps, history = 2 * WINDOW, History()
    with (tmp_path / "samples.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = {} if step % 7 == 0 else {"loss": 1 / step}
            file.write(json.dumps({"iteration": step, "pairs": [step]} | loss) + "\n")
            history.add(loss["loss"]) if loss else history.skip()
    assert history_of(tmp_path, steps).losses == history.losses and len(history.losses) == WINDOW


def test_a_line_that_the_system_refuses_is_told_with_the_name_of_its_file_and_nothing_follows_it(
    tmp_path: Path,
) -> None:
    """The folder is gone for a while, as one over a network may be."""
    folder = tmp_path / "run"
    journal = Journal(folder / "samples.jsonl", first=0)
    journal.write(1, {})
    assert journal.refused is not None and journal.refused.startswith(f"{folder}/samples.jsonl: this file of the run")
    assert "No such file or directory" in journal.refused
    folder.mkdir()
    journal.write(2, {})
    assert not journal.path.exists()


def test_the_line_of_the_step_from_which_a_run_goes_on_is_completed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step, line in (
        (2, '{"iteration": 2, "loss": 0.5, "eval/loss": 0.25}'),
        (3, '{"iteration": 3, "eval/loss": 0.25}'),
    ):
        path.write_text('{"iteration": 1, "loss": 1}\n{"iteration": 2, "loss": 0.5}\n')
        journal = Journal(path, first=step)
        journal.complete(step, {"eval/loss": 0.25})
        journal.write(step + 1, {"loss": 0.1})
        *_, completed, last = path.read_text().splitlines()
        assert (completed, last) == (line, f'{{"iteration": {step + 1}, "loss": 0.1}}')


def test_a_journal_drops_what_was_written_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n{"itera')
    journal = Journal(path, first=2)
    journal.write(3, {"pairs": [7]})
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3, "pairs": [7]}\n'
    Journal(path, first=0)
    assert path.read_text() == ""
