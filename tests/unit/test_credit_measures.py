"""The token-credit benchmark's measures, against slow and obvious counting."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.credit.measures import (
    Marks,
    average_precision,
    detection,
    exact_match,
    mean_and_spread,
    moved,
    preference_accuracy,
    steps_to_reach,
)
from bench.credit.world import right_spans
from tools.marked_pairs import make_splits

# Two pairs; chosen responses of two tokens, rejected ones of three.
PAIR = np.repeat([0, 1], 5)
SIDE = np.tile([0, 0, 1, 1, 1], 2)
WRONG = np.array([0, 0, 0, 1, 1, 0, 0, 1, 0, 0], bool)
FIRST = np.array([0, 0, 0, 1, 0, 0, 0, 1, 0, 0], bool)
RIGHT = np.array([0, 1, 0, 0, 0, 1, 0, 0, 0, 0], bool)
MARKS = Marks(PAIR, SIDE, WRONG, FIRST, (SIDE == 1) & ~WRONG, RIGHT)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_counts_every_wrong_token_against_every_other_token_of_rejected_responses(seed: int) -> None:
    rewards = np.random.default_rng(seed).integers(0, 4, len(PAIR)).astype(np.float32)  # with ties
    wins = [(rewards[w] < rewards[k]) + (rewards[w] == rewards[k]) / 2 for w in (3, 4, 7) for k in (2, 8, 9)]
    assert detection(rewards, MARKS).auroc == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    of_first = wins[:3] + wins[6:]
    assert detection(rewards, MARKS).auroc_first == pytest.approx(sum(of_first) / len(of_first), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_sums_precision_over_the_recall_gained_at_every_threshold(seed: int) -> None:
    random = np.random.default_rng(seed)
    positive, negative = random.integers(0, 6, 7).astype(float), random.integers(0, 6, 20).astype(float)
    total, recall = 0.0, 0.0
    for threshold in sorted(set(positive) | set(negative), reverse=True):
        hits, named = (positive >= threshold).sum(), (positive >= threshold).sum() + (negative >= threshold).sum()
        total += (hits / len(positive) - recall) * hits / named
        recall = hits / len(positive)
    assert average_precision(positive, negative) == pytest.approx(total, abs=1e-12)


def test_average_precision_of_a_perfect_ranking_is_one_and_of_ties_the_share_of_positives() -> None:
    assert average_precision(np.array([2.0, 3.0]), np.array([1.0, 0.0])) == 1
    assert average_precision(np.zeros(3), np.zeros(9)) == pytest.approx(3 / 12)


def test_a_pair_is_preferred_rightly_when_its_chosen_response_is_the_likelier_one() -> None:
    logps = np.array([-1, -1, -1, -1, -1, -2, -2, -1, -1, -1], float)
    assert preference_accuracy(logps, MARKS) == 0.5


def test_one_token_that_is_not_the_likeliest_spoils_an_exact_match_and_only_of_the_chosen_response() -> None:
    assert exact_match(SIDE == 0, MARKS) == 1
    assert exact_match(np.array([1, 0, 1, 1, 1, 1, 1, 1, 1, 1], bool), MARKS) == 0.5


def test_mass_is_moved_on_the_tokens_it_is_counted_for() -> None:
    before = np.full(len(PAIR), math.log(0.5))
    after = before.copy()
    after[3], after[1] = math.log(0.2), math.log(0.9)
    change = moved(before, after, MARKS)
    assert change["mass_wrong"] == pytest.approx(-0.3 / 3)
    assert change["mass_right"] == pytest.approx(0.4 / 2)
    assert change["mass_kept"] == change["nats_kept"] == 0
    assert change["nats_wrong"] == pytest.approx(math.log(0.4) / 3)


def test_steps_are_counted_to_the_first_evaluation_that_reaches_the_target() -> None:
    curve = {0: 0.5, 3: 0.9, 6: 0.85, 9: 0.95}
    assert steps_to_reach(0.9, curve) == 3
    assert steps_to_reach(0.96, curve) is None


def test_a_single_seed_has_no_spread() -> None:
    assert mean_and_spread([1.0, 3.0]) == (2.0, math.sqrt(2))
    assert math.isnan(mean_and_spread([1.0])[1])


def test_right_spans_are_where_the_rejected_answer_is_wrong() -> None:
    rows = make_splits(seed=5, num_train=300, num_validation=1, num_sft=1, noise=0.0).train
    for row in rows:
        spans = right_spans(row)
        assert len(spans) == len(row.wrong)
        mended, end = "", 0
        for (first, last), (start, stop) in zip(row.wrong, spans, strict=True):
            mended += row.rejected[end:first] + row.chosen[start:stop]
            end = last
        assert mended + row.rejected[end:] == row.chosen
