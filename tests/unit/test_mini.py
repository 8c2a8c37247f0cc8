"""The miniature's world, measures and rules, against hand-worked answers, plain loops and simulation."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.mini.compare import Tried, _best
from bench.mini.measures import agreement, at_divergence, moved, steps_to_reach, win_share
from bench.mini.methods import TRIED, Setting, with_other_beta
from bench.mini.report import METHODS, MOVED, NAME, summarise, tables
from bench.mini.rules import CLAIMS, QUESTIONS, T_800, T_975, judge
from bench.mini.stages import Effort, signed
from bench.mini.world import CONTENT, Prompt, first_is_preferred, make_prompts, pieces, reward, write
from bench.pages import with_tables

ROOT = Path(__file__).resolve().parents[2]
PROMPT = Prompt("harbor", "warm", ("rope", "key"), 2)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("the kind sailor docks the rope. the boat sails the pier.", 0.5 + 1),
        ("the kind sailor docks the rope.", 0.5 + 1 - 1),  # one sentence too few
        ("the grim sailor docks the rope.", 1 - 1 - 1),  # no adjective of any tone, so no sentence of the grammar
        ("the bleak sailor docks the oven.", -0.5 - 0.5 - 1),
        ("the boat sails the pier. the boat floats the key.", -0.5 + 1),
        ("the rope sails the pier. the wave docks the rope.", 1 - 0.5),
        ("the boat sails the pier. the wave docks the gull. the kind anchor rows the ferry.", 0.5 - 1),
        ("the very kind sailor docks the rope.", -0.5 + 0.5 + 1 - 1),
        ("the very sailor docks the rope.", -0.5 + 1 - 1 - 1),
        ("the boat sails", -1 - 1),
        ("sails the boat.", -1 - 1),
        ("the boat sails the pier under the sweet lamp.\nthe wave docks the gull.", 0.5),
        ("", -2),  # two sentences too few
    ],
)
def test_the_reward_is_what_one_counts_by_hand(answer: str, expected: float) -> None:
    assert reward(PROMPT, answer) == pytest.approx(expected, abs=1e-12)


def test_pieces_are_the_words_and_full_stops_of_an_answer() -> None:
    answer = write(PROMPT, 0.2, random.Random(3))
    found = pieces(PROMPT, answer)
    assert "".join(answer[piece.start : piece.end] for piece in found) == "".join(answer.split())
    assert all(len(answer[piece.start : piece.end].split()) == 1 for piece in found)


def test_prompts_differ_and_can_be_read_back() -> None:
    prompts = make_prompts(500, random.Random(0))
    assert len({prompt.text for prompt in prompts}) == 500
    assert [Prompt.parse(prompt.text) for prompt in prompts] == prompts
    assert all(set(prompt.keywords) <= CONTENT.keys() for prompt in prompts)


def test_better_writers_earn_more_and_good_and_bad_words_stand_in_answers_of_both_kinds() -> None:
    chance = random.Random(1)
    prompts = make_prompts(400, chance)
    rewards = {quality: [reward(p, write(p, quality, chance)) for p in prompts] for quality in (0, 0.5, 1)}
    means = [float(np.mean(some)) for some in rewards.values()]
    assert means[0] + 1 < means[1] < means[2] - 1
    for quality in (0.25, 0.75):
        signs = [{np.sign(piece.reward) for piece in pieces(p, write(p, quality, chance))} for p in prompts]
        assert np.mean([{1.0, -1.0} <= some for some in signs]) > 0.25


def test_labels_agree_with_the_reward_in_four_of_five_pairs() -> None:
    chance = random.Random(2)
    right = []
    for prompt in make_prompts(1500, chance):
        one, other = (write(prompt, chance.random(), chance) for _ in range(2))
        if (gap := reward(prompt, one) - reward(prompt, other)) != 0:
            right.append(first_is_preferred(prompt, one, other, chance) == (gap > 0))
    assert np.mean(right) == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("seed", range(3))
def test_wins_and_agreement_are_counted_pair_by_pair(seed: int) -> None:
    random_ = np.random.default_rng(seed)
    own, others = random_.integers(0, 4, 5).astype(float), random_.integers(0, 4, 6).astype(float)
    wins = [(a > b) + (a == b) / 2 for a in own for b in others]
    assert win_share(own, others) == pytest.approx(np.mean(wins), abs=1e-12)
    assert win_share(own, others) == pytest.approx(1 - win_share(others, own), abs=1e-12)
    truth = random_.integers(0, 4, 5).astype(float)
    right, counted = 0.0, 0
    for first in range(5):
        for second in range(first + 1, 5):
            if truth[first] != truth[second]:
                counted += 1
                same = (own[first] - own[second]) * (truth[first] - truth[second])
                right += 0.5 if same == 0 else float(same > 0)
    assert agreement(own, truth) == (pytest.approx(right), counted)


def test_the_reward_at_a_divergence_is_read_off_the_line_between_checkpoints() -> None:
    assert at_divergence(3.0, [0.0, 2.0, 6.0], [1.0, 2.0, 4.0]) == pytest.approx(2.5)
    assert at_divergence(2.0, [0.0, 2.0, 1.0, 6.0], [1.0, 2.0, 9.0, 4.0]) == 2.0  # where it first comes so far
    with pytest.raises(ValueError, match="does not reach"):
        at_divergence(7.0, [0.0, 2.0, 6.0], [1.0, 2.0, 4.0])


def test_tokens_move_by_what_they_are_worth_and_where_they_stand() -> None:
    truth, side = np.array([1.0, 0, -1, 1, 0, -1]), np.array([0, 0, 0, 1, 1, 1])
    found = moved(np.zeros(6), np.arange(6.0), truth, side)
    assert found["right in chosen"] == 0 and found["wrong in chosen"] == 2 and found["right in rejected"] == 3


def test_a_run_that_does_not_reach_the_target_counts_as_said() -> None:
    curve = {0: 0.5, 4: 0.7, 8: 0.6, 12: 0.8}
    assert steps_to_reach(0.7, curve, otherwise=48) == 4
    assert steps_to_reach(0.9, curve, otherwise=48) == 48


@pytest.mark.parametrize("freedom", sorted(T_975))
def test_the_quantiles_are_those_of_students_t(freedom: int) -> None:
    """By adding up the density from 0 on, in float64."""
    for table, level in ((T_975, 0.975), (T_800, 0.8)):
        x = np.linspace(0, table[freedom], 200_001)
        scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert 0.5 + np.trapezoid(density, x) == pytest.approx(level, abs=2e-4)


def test_an_interval_holds_the_truth_as_often_as_it_says_and_four_of_five_detectable_effects_are_found() -> None:
    random_ = np.random.default_rng(0)
    judged = [judge(random_.normal(0, 1, 5).tolist()) for _ in range(4000)]
    assert np.mean([one.low <= 0 <= one.high for one in judged]) == pytest.approx(0.95, abs=0.012)
    effect = (T_975[4] + T_800[4]) / math.sqrt(5)  # at the true spread
    found = [judge(random_.normal(effect, 1, 5).tolist()).verdict for _ in range(4000)]
    assert found.count("reproduced") / 4000 == pytest.approx(0.8, abs=0.05)


def test_verdicts_follow_from_the_interval() -> None:
    assert judge([1.0, 1.1, 0.9]).verdict == "reproduced"
    assert judge([-1.0, -1.1, -0.9]).verdict == "contradicted"
    assert judge([1.0, -1.0, 0.5]).verdict == "undecided"
    assert judge([1.0, 1.1, 0.9], within=2).verdict == "reproduced"
    assert judge([3.0, 3.1, 2.9], within=2).verdict == "contradicted"
    assert judge([-3.0, -3.1, -2.9], within=2).verdict == "contradicted"
    assert judge([3.0, -3.0, 0.5], within=2).verdict == "undecided"


def test_the_page_has_every_rule_word_for_word() -> None:
    page = (ROOT / "docs" / "miniature.md").read_text(encoding="utf-8")
    for claim in (*CLAIMS, *QUESTIONS):
        assert f"| {claim.name} | {claim.says} | {claim.number} | {claim.unit} |" in page


def test_the_page_has_the_tables_of_the_results_or_says_that_there_are_none() -> None:
    page, results = ROOT / "docs" / "miniature.md", ROOT / "results" / "mini.json"
    if not results.is_file():
        empty = with_tables(page, {NAME: "There are no results yet."})
        assert page.read_text(encoding="utf-8") == empty
        return
    summary = json.loads(results.read_text(encoding="utf-8"))
    assert with_tables(page, tables(summary)) == page.read_text(encoding="utf-8")
    assert "dirty" not in summary["machine"]["commit"] and len(summary["effort"]["seeds"]) >= 5


def test_what_the_page_says_of_the_results_is_in_its_tables() -> None:
    """Every number with a decimal; the one mean that is in no table is worked out here."""
    page = (ROOT / "docs" / "miniature.md").read_text(encoding="utf-8")
    says = page[page.index("### What it says") : page.index("## Why TGDPO is worse")]
    summary = json.loads((ROOT / "results" / "mini.json").read_text(encoding="utf-8"))
    below = f"{-np.mean(summary['claims']['C1']['values'][1:]):.1f}"
    quoted = re.findall(r"\d+\.\d+", says)
    written = set(re.findall(r"\d+\.\d+", tables(summary)[NAME]))
    assert len(quoted) > 10 and set(quoted) <= written | {below}
    assert [name for name, claim in summary["claims"].items() if claim["verdict"] != "undecided"] == ["C5"]


def test_the_page_quotes_the_earlier_runs() -> None:
    page = (ROOT / "docs" / "miniature.md").read_text(encoding="utf-8")
    first, second = (
        json.loads((ROOT / "results" / f"mini-{name}.json").read_text(encoding="utf-8")) for name in ("first", "second")
    )
    values = " | ".join(f"{value:+.1f}".replace("-", "−") for value in first["claims"]["C1"]["values"])
    assert f"| first run | {values} |" in page
    units = {claim.name: claim.unit for claim in (*CLAIMS, *QUESTIONS)}
    for name in first["claims"]:
        cells = []
        for found in (first["claims"][name], second["claims"][name]):
            form = "+.2f" if units[name] in ("nats", "reward") else "+.1f"
            cells.append(f"{found['mean']:{form}} {units[name]}, {found['verdict']}".replace("-", "−"))
        assert re.search(rf"\| {name} \| [^|]+ \| {re.escape(' | '.join(cells))} \|", page), name
    dpo, tgdpo = (next(at for at in first["curves"][name][2] if at["step"] == 44) for name in ("DPO", "TGDPO"))
    assert f"{dpo['unfinished']:.0f} % of DPO's answers and {tgdpo['unfinished']:.0f} % of TGDPO's" in page


def test_every_method_has_as_many_configurations_and_all_differ() -> None:
    assert {len(tried) for tried in TRIED.values()} == {Effort().configurations}
    everything = [setting for tried in TRIED.values() for setting in tried]
    assert len({setting.name for setting in everything}) == len(everything)
    for tried in TRIED.values():
        assert len({str(setting) for setting in tried}) == len(tried)


def test_the_other_guidance_is_ten_times_weaker_or_stronger() -> None:
    for beta, other in ((0.03, 0.3), (0.1, 1.0), (0.3, 0.03), (1.0, 0.1)):
        assert with_other_beta(Setting("dpo", beta)).beta == pytest.approx(other)


def test_the_best_configuration_is_one_whose_answers_end_if_there_is_any() -> None:
    slight, strong, endless = Setting("dpo", 1.0), Setting("dpo", 0.3), Setting("dpo", 0.1)
    tried = [Tried(slight, 0.6, 0.0, 0.9), Tried(strong, 0.7, 0.01, 0.5), Tried(endless, 0.9, 0.02, 0.8)]
    assert _best(tried) == strong and _best(tried[2:]) == endless


def test_token_rewards_have_the_sign_that_they_have_in_the_weights(prepared_by_hand: Any) -> None:
    data = prepared_by_hand([([1], [2, 3], [4]), ([5, 6], [7], [8, 9])])
    assert signed(data, np.arange(1.0, 7.0)).tolist() == [1, 2, -3, 4, -5, -6]


NAMES = (*METHODS, "spread-0.1", "spread-1")
WIN = {name: 0.30 + 0.05 * place for place, name in enumerate(NAMES)}
"""Win rate of each run after one epoch; all differ."""


def run_of(name: str, seed: int) -> dict[str, Any]:
    """A run whose win rate falls by a point for each epoch and run before it in the list, and by the seed."""
    place = NAMES.index(name)
    wins = {1: WIN[name] - 0.03, 2: WIN[name], 4: WIN[name] - 0.01 * place, 6: WIN[name] - 0.02 * place - 0.01 * seed}
    checks = {
        step: {"wins": [win], "kl": float(step), "reward": win * step, "tokens": 20.0, "unfinished": 0.0}
        for step, win in wins.items()
    }
    reached = {0: 0.5, 1: 0.6 if name == "spread-0.1" else 0.7, 2: 0.7}
    moved = {which: WIN[name] + number for number, which in enumerate(MOVED)}
    return {"name": name, "seed": seed, "setting": name, "checks": checks, "moved": moved, "accuracy": reached}


def test_the_number_of_every_claim_is_what_its_rule_says() -> None:
    """Two seeds of made-up runs, whose numbers are worked out by hand from WIN, in points."""
    effort = Effort(seeds=(1, 2), epoch=2, epochs=3, checked=(1, 2, 4, 6))
    start = {"wins": [0.5], "reward": 0.0, "tokens": 20.0, "unfinished": 0.0}
    found = {
        "worlds": [{"seed": seed, "start": start} for seed in (1, 2)],
        "tried": {},
        "chosen": {},
        "runs": [run_of(name, seed) for seed in (1, 2) for name in NAMES],
    }
    values = {name: claim["values"] for name, claim in summarise(found, effort)["claims"].items()}
    place = {name: number for number, name in enumerate(NAMES)}

    def apart(one: str, other: str) -> list[float]:
        return [100 * (WIN[one] - WIN[other])] * 2

    def drops(one: str, other: str) -> list[float]:
        return [2.0 * (place[one] - place[other])] * 2  # the seed takes as much of both

    expected = {
        "C1": apart("TGDPO", "DPO"),
        "C2": apart("TGDPO", "SimPO"),
        "C3, DPO": drops("DPO", "TGDPO"),
        "C3, SimPO": drops("SimPO", "TGDPO"),
        "C4": [2.0 - 1.0] * 2,
        "C5": apart("guided-otherwise", "TGDPO"),
        "Q1": [6 * (WIN["TGDPO"] - 0.02 * place["TGDPO"] - WIN["DPO"] + 0.02 * place["DPO"])] * 2,
        "Q2": apart("TGDPO", "shuffled"),
        "Q3": apart("TGDPO", "mean"),
        "Q4": apart("true", "same-beta"),
        "Q5": [100 * (WIN["TGDPO"] - WIN["DPO"] + 0.01 * place["DPO"])] * 2,
        "Q6": [WIN["TGDPO"] - WIN["same-beta"]] * 2,
        "Q7": apart("TGDPO", "same-beta"),
        "Q8": drops("same-beta", "TGDPO"),
    }
    assert values.keys() == expected.keys()
    for name, numbers in expected.items():
        assert values[name] == pytest.approx(numbers, abs=1e-9), name
