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
    lines = [{"iteration": step, "loss": float(step)} for step in range(1, 12) if step not in (3, 9, 10, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"iteration": 0}, *lines]))
    found = history_of(tmp_path, 10)
    assert (found.skipped, found.in_a_row) == (3, 2)
    assert list(found.losses) == [1, 2, 4, 5, 6, 7, 8]
    assert history_of(tmp_path, 8).in_a_row == 0
    assert history_of(tmp_path, 0) == History()


def test_a_journal_drops_what_was_written_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n{"itera')
    journal = Journal(path, first=2)
    journal.write(3, {"pairs": [7]})
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3, "pairs": [7]}\n'
    Journal(path, first=0)
    assert path.read_text() == ""
