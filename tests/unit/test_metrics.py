"""Metrics: TRL's names and definitions, sums divided once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tgdpo_megatron.config import LossConfig
from tgdpo_megatron.losses import LOSSES, Pairs
from tgdpo_megatron.pair_losses import inputs_of, pair_losses
from tgdpo_megatron.report.metrics import averages, micro_batch_sums, names_for, warnings

DPO = LossConfig(type="dpo", beta=0.1)
TGDPO = LossConfig(type="tgdpo", beta=0.1, alpha=0.5)


def metrics_of(config: LossConfig, pairs: Pairs, policy: Tensor, reference: Tensor, guidance: Tensor) -> dict[str, Any]:
    sums = sums_of(config, pairs, policy, reference, guidance)
    return averages({name: float(value) for name, value in sums.items()})


def sums_of(
    config: LossConfig, pairs: Pairs, policy: Tensor, reference: Tensor, guidance: Tensor, *, padding: int = 0
) -> dict[str, Any]:
    scores = {"reference": reference, "guidance": guidance, "divergence": (policy - reference).square()}
    losses, margins = pair_losses(config, policy, pairs, **scores)
    return micro_batch_sums(config, pairs, policy, inputs_of(config, pairs, **scores), losses, margins, padding=padding)


@pytest.fixture
def part_a(golden: Any) -> tuple[Pairs, Tensor, Tensor, Tensor]:
    sides = [pair[side] for pair in golden["part_a_token_logprobs"]["inputs"] for side in "wl"]
    which = torch.arange(4).repeat_interleave(torch.tensor([len(side["pi"]) for side in sides]))
    policy, reference, guidance = (
        torch.tensor([value for side in sides for value in side[name]], dtype=torch.float64)
        for name in ("pi", "ref", "rm")
    )
    return Pairs(which // 2, which % 2, 2), policy, reference, guidance


@pytest.mark.parametrize("config", [DPO, TGDPO], ids=lambda config: config.type)
def test_rewards_and_log_probs_are_golden_for_every_method(config: LossConfig, golden: Any, part_a: Any) -> None:
    """`rewards/*` include β and no guidance, for TGDPO as well."""
    found = metrics_of(config, *part_a)
    for name, value in golden["part_a_token_logprobs"]["metrics_dpo_beta0_1"].items():
        assert found[name] == pytest.approx(value, rel=0, abs=1e-12), name


def test_the_loss_metric_is_the_mean_over_pairs(golden: Any, part_a: Any) -> None:
    expected = golden["part_a_token_logprobs"]["methods"]["tgdpo"]
    found = metrics_of(TGDPO, *part_a)
    assert found["loss"] == pytest.approx(expected["mean_loss"], rel=0, abs=1e-12)
    mean_margin = sum(pair["z"] for pair in expected["pairs"]) / 2
    assert found["tgdpo/margins"] == pytest.approx(mean_margin, rel=0, abs=1e-12)


def test_weight_statistics_by_hand() -> None:
    """With β_r = 0.5, α = 2 a weight is 1 ± (guidance − reference): chosen 2 and −1, rejected 0 and 3.

    Mean 1; mean square (4 + 1 + 0 + 9) / 4 = 3.5; deviation √2.5. Two of four are not positive. The mean of
    r̂ is (0.5 − 1 + 0.5 − 1) / 4 = −0.25.
    """
    pairs = Pairs(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 1, 1]), 1)
    guidance = torch.tensor([1.0, -2.0, 1.0, -2.0], dtype=torch.float64)
    zeros = torch.zeros(4, dtype=torch.float64)
    found = metrics_of(LossConfig(type="tgdpo", alpha=2, beta_r=0.5), pairs, zeros, zeros, guidance)
    assert found["tgdpo/weight_mean"] == pytest.approx(1.0, abs=1e-12)
    assert found["tgdpo/weight_std"] == pytest.approx(math.sqrt(2.5), abs=1e-12)
    assert found["tgdpo/weight_neg_frac"] == 0.5
    assert found["tgdpo/weight_share_0_to_0.5"] == 0.0 and found["tgdpo/weight_share_1.5_to_2"] == 0.25
    assert found["tgdpo/weight_share_2_to_inf"] == 0.25
    assert found["token_rewards/mean"] == pytest.approx(-0.25, abs=1e-12)


def test_the_guided_part_of_the_margin_is_what_is_beyond_dpo(part_a: Any) -> None:
    found = metrics_of(TGDPO, *part_a)
    assert found["tgdpo/margins"] - found["rewards/margins"] == pytest.approx(found["tgdpo/margins_guided"], abs=1e-12)


def test_correlation_of_token_rewards_with_implicit_rewards_is_pearsons(part_a: Any) -> None:
    _, policy, reference, guidance = part_a
    found = metrics_of(TGDPO, *part_a)["token_rewards/correlation"]
    assert found == pytest.approx(float(torch.corrcoef(torch.stack([guidance - reference, policy - reference]))[0, 1]))


def test_tokens_that_fill_a_micro_batch_change_no_mean(part_a: Any) -> None:
    filled = averages({name: float(value) for name, value in sums_of(TGDPO, *part_a, padding=50).items()})
    assert filled == metrics_of(TGDPO, *part_a)


def test_the_divergence_is_a_mean_over_tokens(part_a: Any) -> None:
    """Of nineteen tokens, not of two pairs. metrics_of makes it the squared log-ratio to the reference."""
    pairs, policy, reference, guidance = part_a
    found = metrics_of(LossConfig(type="tdpo1"), pairs, policy, reference, guidance)
    by_hand = [(ours - theirs) ** 2 for ours, theirs in zip(policy.tolist(), reference.tolist(), strict=True)]
    assert len(by_hand) == 19
    assert found["divergence/mean"] == pytest.approx(sum(by_hand) / 19, rel=1e-12)


@pytest.mark.parametrize("nll", [0.0, 0.3])
@pytest.mark.parametrize(("name", "beta", "per_token"), [("dpo_reg", 0.1, False), ("simpo_reg", 2.0, True)])
def test_tregs_regulariser_is_its_own_term_alone(
    name: Any, beta: float, per_token: bool, nll: float, part_a: Any
) -> None:
    """α σ(−z) Σ_y Σ_t −β r̂ ℓ of each pair, sums for DPO and means for SimPO; a term of NLL is not part of it."""
    target = {"gamma_beta_ratio": 0.4} if per_token else {}
    options = {"beta": beta, "alpha": 0.25, "token_rewards": "guidance", "beta_r": 1.0, "sft_loss_weight": nll}
    found = metrics_of(LossConfig(type=name, **target, **options), *part_a)
    pairs, policy, reference, guidance = part_a
    expected = []
    for pair in (0, 1):
        z, regulariser = -0.4 * beta if per_token else 0.0, 0.0
        for side, sign in ((0, 1), (1, -1)):
            own = (pairs.pair == pair) & (pairs.side == side)
            length = int(own.sum()) if per_token else 1
            learned = policy[own] if per_token else policy[own] - reference[own]
            z += sign * beta * float(learned.sum()) / length
            regulariser -= beta * float(((guidance[own] - reference[own]) * policy[own]).sum()) / length
        expected.append(0.25 * regulariser / (1 + math.exp(z)))
    assert found["treg/regulariser"] == pytest.approx(sum(expected) / 2, rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "most"), [("token_rewards/limit_frac", 0.5), ("tgdpo/weight_neg_frac", 0.05)], ids=str
)
def test_a_share_of_tokens_is_warned_of_where_it_is_above_its_limit(name: str, most: float) -> None:
    assert list(warnings(TGDPO, {name: most + 0.01})) == [name]
    assert warnings(TGDPO, {name: most}) == {}


@pytest.mark.parametrize(
    ("guidance", "settings", "words"),
    [
        (0.0, {}, ["all token rewards are 0"]),
        (-3.0, {"alpha": 1.0, "beta_r": 1.0}, ["50% of the token weights are ≤ 0"]),
        (9.0, {"reward_clip": 0.1}, ["100% of the token rewards are at their limit"]),
        (9.0, {"reward_squash": True, "beta_r": 1.0}, ["100% of the token rewards are at their limit"]),
        (0.5, {}, []),
    ],
    ids=str,
)
def test_unhealthy_guidance_is_said_in_words(guidance: float, settings: Any, words: list[str]) -> None:
    """Rewards of one value: on chosen tokens the weight is 1 + α r̂, on rejected ones 1 − α r̂."""
    pairs = Pairs(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 1, 1]), 1)
    zeros = torch.zeros(4, dtype=torch.float64)
    config = LossConfig(type="tgdpo", **settings)
    found = warnings(config, metrics_of(config, pairs, zeros, zeros, torch.full((4,), guidance, dtype=torch.float64)))
    assert [any(sentence.startswith(word) for sentence in found.values()) for word in words] == [True] * len(words)
    assert len(found) == len(words)


def test_sparse_rewards_are_not_taken_for_none() -> None:
    """One token of ten thousand has a reward; that is what a reward file may be like."""
    metrics = {"token_rewards/zero_frac": 0.9999, "token_rewards/std": 0.01}
    assert warnings(LossConfig(type="tgdpo", token_rewards="file"), metrics) == {}
    none = {"token_rewards/zero_frac": 1.0, "token_rewards/std": 0.0}
    assert "check scores.reward_file" in str(warnings(LossConfig(type="tgdpo", token_rewards="file"), none))
    assert "check scores.contrastive_prompts" in str(warnings(LossConfig(type="dpo_reg"), none))


def test_an_equal_pair_is_not_counted_as_right() -> None:
    pairs = Pairs(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), 2)
    policy = torch.tensor([-1.0, -1.0, -0.5, -1.0])
    reference = torch.full((4,), -1.0)
    assert metrics_of(DPO, pairs, policy, reference, reference)["rewards/accuracies"] == 0.5


def test_micro_batches_add_up_to_the_whole(part_a: Any) -> None:
    """Pairs apart or together: equal metrics, also where a statistic is per token and lengths differ."""
    pairs, *flat = part_a
    sums: dict[str, float] = {}
    for pair in (0, 1):
        own = pairs.pair == pair
        part = Pairs(pairs.pair[own] - pair, pairs.side[own], 1)
        values = [logps[own] for logps in flat]
        for name, value in sums_of(TGDPO, part, *values).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    assert averages(sums) == pytest.approx(metrics_of(TGDPO, *part_a), rel=1e-12)


@pytest.mark.parametrize("method", LOSSES)
def test_ranks_that_count_nothing_know_the_names_reported(method: Any, part_a: Any) -> None:
    """Names and order must agree between ranks: they are added up as one vector."""
    config = LossConfig(type=method, token_rewards="guidance" if LOSSES[method].rewards else None)
    assert list(sums_of(config, *part_a)) == names_for(config)


def test_an_empty_micro_batch_adds_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    empty = torch.zeros(0)
    sums = micro_batch_sums(TGDPO, Pairs(none, none, 0), empty, {"reference": empty, "rewards": empty}, empty, empty)
    assert all(float(value) == 0.0 for value in sums.values())


def test_a_loss_that_is_not_finite_is_counted() -> None:
    pairs = Pairs(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), 2)
    policy = torch.tensor([float("nan"), -1.0, -0.5, -1.0])
    losses, margins = pair_losses(DPO, policy, pairs, reference=torch.zeros(4))
    assert (
        float(micro_batch_sums(DPO, pairs, policy, {"reference": torch.zeros(4)}, losses, margins)["not_finite"]) == 1.0
    )


def test_a_loss_of_one_side_reports_its_own_metrics_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from tgdpo_megatron.losses import LOSSES, Metric

    def report(policy: Tensor, pairs: Pairs, margins: Tensor) -> dict[str, Tensor]:
        return {"sft/tokens": policy.new_full((), 3.0)}

    own = replace(LOSSES["sft"], metrics={"sft/tokens": Metric("Three.")}, report=report)
    monkeypatch.setitem(LOSSES, "sft", own)
    pairs, policy = Pairs(torch.zeros(2).long(), torch.zeros(2).long(), 1), torch.tensor([-1.0, -2.0])
    sums = micro_batch_sums(LossConfig(type="sft"), pairs, policy, {}, policy[:1], policy[:1])
    assert float(sums["sft/tokens"]) == 3.0
