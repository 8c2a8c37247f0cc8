"""The losses against golden numbers, limit cases and identities; float64 to 1e-12 unless a test says otherwise."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tgdpo_megatron.config import LossConfig
from tgdpo_megatron.data.batch import make_batch
from tgdpo_megatron.losses import CHOSEN, LOSSES, REJECTED, Pairs
from tgdpo_megatron.losses.rewards import REWARD_SOURCES, reward_options, token_rewards
from tgdpo_megatron.losses.tgdpo import token_weights
from tgdpo_megatron.pair_losses import inputs_of, pair_losses, start_of

EXACT = {"rtol": 0, "atol": 1e-12}

# Name in golden.json -> our configuration.
METHODS = {
    "dpo": LossConfig(type="dpo", beta=0.1),
    "dpo_label_smoothing_0.1 (cDPO)": LossConfig(type="dpo", beta=0.1, label_smoothing=0.1),
    "dpo_robust_0.1": LossConfig(type="robust", beta=0.1, label_smoothing=0.1),
    "dpo_hinge": LossConfig(type="hinge", beta=0.1),
    "ipo_sum": LossConfig(type="ipo_sum", beta=0.1),
    "ipo_avg": LossConfig(type="ipo", beta=0.1),
    "simpo": LossConfig(type="simpo", beta=2.5, gamma_beta_ratio=0.55),
    "simpo_label_smoothing_0.1": LossConfig(type="simpo", beta=2.5, gamma_beta_ratio=0.55, label_smoothing=0.1),
    "dpo_reg": LossConfig(type="dpo_reg", beta=0.1, alpha=0.25),
    "simpo_reg": LossConfig(type="simpo_reg", beta=2.5, gamma_beta_ratio=0.55, alpha=0.25),
    "tdpo1": LossConfig(type="tdpo1", beta=0.1),
    "tdpo2": LossConfig(type="tdpo2", beta=0.1, alpha=0.5),
    "sepo": LossConfig(type="sepo", gamma=2.0, selected_share=0.5),
    "tgdpo": LossConfig(type="tgdpo", beta=0.1, alpha=0.5),
    "tgdpo_alpha0 (must equal dpo)": LossConfig(type="tgdpo", beta=0.1, alpha=0.0),
    "tgdpo_alpha2": LossConfig(type="tgdpo", beta=0.1, alpha=2.0),
    "tgdpo_beta_r_1.0": LossConfig(type="tgdpo", beta=0.1, alpha=0.5, beta_r=1.0),
}
DPO, TGDPO = METHODS["dpo"], METHODS["tgdpo"]
EVERY = [
    LossConfig(type=name, sequence_weight="attached") if name.endswith("_reg") else LossConfig(type=name)
    for name in LOSSES
]
"""Each method with its defaults, differentiable throughout."""


# ---------------------------------------------------------------- inputs


SCORES = {"reference": "ref", "guidance": "rm", "better": "better", "worse": "worse", "divergence": "kl"}
"""Our name of a per-token number -> its name in golden.json."""


class Tokens:
    """Flat log-probs and other numbers of some pairs' response tokens."""

    def __init__(self, policy: Tensor, pairs: Pairs, **scores: Tensor) -> None:
        self.policy, self.pairs, self.scores = policy, pairs, scores

    def loss(self, config: LossConfig, *, policy: Tensor | None = None, **changes: Tensor) -> tuple[Tensor, Tensor]:
        return pair_losses(
            config, self.policy if policy is None else policy, self.pairs, **needed(config, self.scores | changes)
        )

    def swapped(self) -> Tokens:
        return Tokens(self.policy, Pairs(self.pairs.pair, 1 - self.pairs.side, self.pairs.num_pairs), **self.scores)


def needed(config: LossConfig, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those scores the method is given in training."""
    names = (*config.scores, *(["divergence"] if "divergence" in config.method.reads else []))
    return {name: scores[name] for name in names}


@pytest.fixture
def part_a(golden: Any) -> Tokens:
    """Part A: two pairs, 4 + 5 and 6 + 4 response tokens, float64."""
    sides = [pair[side] for pair in golden["part_a_token_logprobs"]["inputs"] for side in "wl"]

    def flat(name: str) -> Tensor:
        return torch.tensor([value for side in sides for value in side[name]], dtype=torch.float64)

    lengths = torch.tensor([len(side["pi"]) for side in sides])
    which = torch.arange(4).repeat_interleave(lengths)
    scores = {ours: flat(theirs) for ours, theirs in SCORES.items()}
    scores["divergence"].requires_grad_()
    return Tokens(flat("pi").requires_grad_(), Pairs(which // 2, which % 2, 2), **scores)


@pytest.fixture
def random_tokens() -> Tokens:
    """Seven pairs of random lengths, float64; every score differs from the policy by about a nat."""
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (14,), generator=random)
    which = torch.arange(14).repeat_interleave(lengths)
    policy, *others = -3 * torch.rand(7, len(which), generator=random, dtype=torch.float64)
    scores = dict(zip((*SCORES, "reward"), others, strict=True))
    scores["divergence"] = -scores["divergence"]
    return Tokens(policy.requires_grad_(), Pairs(which // 2, which % 2, 7), **scores)


def part_b_logits(golden: Any, model: str) -> Tensor:
    """Logits by Part B's formula. [row, position, vocabulary] float64."""
    b = golden["part_b_full_vocab"]
    rows, positions, vocab = b["shape"]["rows"], b["shape"]["seq"], b["shape"]["vocab"]
    r, s, v = torch.meshgrid(torch.arange(rows), torch.arange(positions), torch.arange(vocab), indexing="ij")
    p, q, t, d, e = b["logits_coefficients"][model]
    return ((p * r + q * s + t * v + d * r * v + e * s * v) % 13).double() / 4 - 1.5


def part_b_sequences(golden: Any) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected ids of Part B's two pairs."""
    b = golden["part_b_full_vocab"]
    pairs = []
    for pair in (0, 1):
        ids, labels = ([b[name][row] for row in (pair, pair + 2)] for name in ("input_ids", "labels"))
        responses = [[label for label in row if label != -100] for row in labels]
        prompt = next(place for place, label in enumerate(labels[0]) if label != -100)
        pairs.append((ids[0][:prompt], *responses))
    return pairs


@pytest.fixture
def part_b(golden: Any, prepared_by_hand: Any) -> Any:
    """Part B through our own batch: a function of (model, logits) to log-probs of the labelled tokens, and the pairs.

    Part B's rows are chosen 0, chosen 1, rejected 0, rejected 1; our segments are chosen 0, rejected 0, chosen 1, ….
    """
    batch = make_batch(prepared_by_hand(part_b_sequences(golden)), [0, 1])

    def logps(logits: Tensor, *, row_shift: int = 0) -> Tensor:
        segments = zip((0, 2, 1, 3), batch.plan.query_lengths, strict=True)
        flat = torch.cat([logits[row, : length + 1] for row, length in segments])
        start = torch.arange(4).repeat_interleave(torch.tensor(batch.plan.query_lengths))  # one extra row a segment
        rows = batch.predictors + start[batch.predictors] + row_shift
        return flat.log_softmax(-1)[rows].gather(1, batch.labels[:, None]).squeeze(1)

    def divergence(policy: Tensor, reference: Tensor) -> Tensor:
        """KL(reference ‖ policy) of whole rows of logits, at the place of each label."""
        rows = (reference.softmax(-1) * (reference.log_softmax(-1) - policy.log_softmax(-1))).sum(-1)
        segments = zip((0, 2, 1, 3), batch.plan.query_lengths, strict=True)
        return torch.cat([rows[row, :length] for row, length in segments])[batch.predictors]

    return logps, batch.pairs, divergence


# ---------------------------------------------------------------- golden numbers


@pytest.mark.parametrize("name", METHODS)
def test_part_a_losses_and_margins_are_golden(name: str, golden: Any, part_a: Tokens) -> None:
    expected = golden["part_a_token_logprobs"]["methods"][name]
    losses, margins = part_a.loss(METHODS[name])
    assert losses.tolist() == pytest.approx([pair["loss"] for pair in expected["pairs"]], rel=0, abs=1e-12)
    assert margins.tolist() == pytest.approx([pair["z"] for pair in expected["pairs"]], rel=0, abs=1e-12)
    assert losses.mean().item() == pytest.approx(expected["mean_loss"], rel=0, abs=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_part_a_gradients_on_the_policy_are_golden(name: str, golden: Any, part_a: Tokens) -> None:
    pairs = golden["part_a_token_logprobs"]["methods"][name]["pairs"]
    expected = [value for pair in pairs for side in ("grad_chosen", "grad_rejected") for value in pair[side]]
    part_a.loss(METHODS[name])[0].mean().backward()
    torch.testing.assert_close(part_a.policy.grad, torch.tensor(expected, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_part_a_gradients_on_the_divergence_are_golden(name: str, golden: Any, part_a: Tokens) -> None:
    pairs = golden["part_a_token_logprobs"]["methods"][name]["pairs"]
    expected = [value for pair in pairs for side in ("grad_kl_chosen", "grad_kl_rejected") for value in pair[side]]
    part_a.loss(METHODS[name])[0].mean().backward()
    found = part_a.scores["divergence"].grad
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("name", ["dpo_reg", "simpo_reg"])
def test_gradients_with_an_attached_sequence_weight_are_golden(name: str, golden: Any, part_a: Tokens) -> None:
    """The golden numbers are finite differences, printed to 1e-9."""
    pairs = golden["part_a_token_logprobs"]["methods"][f"{name}_weight_not_detached"]["pairs"]
    expected = [value for pair in pairs for side in ("grad_chosen", "grad_rejected") for value in pair[side]]
    attached = METHODS[name].model_copy(update={"sequence_weight": "attached"})
    part_a.loss(attached)[0].mean().backward()
    assert part_a.policy.grad is not None
    assert part_a.policy.grad.tolist() == pytest.approx(expected, rel=0, abs=1.5e-9)


@pytest.mark.parametrize("name", ["dpo_reg", "simpo_reg"])
def test_part_a_token_rewards_of_contrastive_prompts_are_golden(name: str, golden: Any, part_a: Tokens) -> None:
    pairs = golden["part_a_token_logprobs"]["methods"][name]["pairs"]
    expected = [value for pair in pairs for side in ("rhat_chosen", "rhat_rejected") for value in pair[side]]
    found = inputs_of(METHODS[name], part_a.pairs, **needed(METHODS[name], part_a.scores))["rewards"]
    assert found.tolist() == pytest.approx(expected, rel=0, abs=1e-12)


def test_part_b_log_probs_are_golden(golden: Any, part_b: Any) -> None:
    logps, _, _ = part_b
    names = {"policy": "policy_logps", "ref": "ref_logps", "rm": "guidance_logps"}
    for model, name in names.items():
        rows = golden["part_b_full_vocab"][name]
        expected = torch.tensor([value for row in (0, 2, 1, 3) for value in rows[row]], dtype=torch.float64)
        torch.testing.assert_close(logps(part_b_logits(golden, model)), expected, **EXACT)


@pytest.mark.parametrize("name", ["dpo", "simpo", "tgdpo", "dpo_reg", "simpo_reg", "tdpo1", "tdpo2", "sepo"])
def test_part_b_is_golden_from_logits_to_logit_gradients(name: str, golden: Any, part_b: Any) -> None:
    expected = golden["part_b_full_vocab"]["methods"][name]
    logps, pairs, divergence = part_b
    policy = part_b_logits(golden, "policy").requires_grad_()
    reference, guidance = (logps(part_b_logits(golden, model)) for model in ("ref", "rm"))
    scores = {
        "reference": reference,
        "guidance": guidance,
        "better": guidance + 0.25,
        "worse": reference,
        "divergence": divergence(policy, part_b_logits(golden, "ref")),
    }
    losses, margins = pair_losses(METHODS[name], logps(policy), pairs, **needed(METHODS[name], scores))
    losses.mean().backward()
    assert policy.grad is not None
    found = {
        "mean_loss": losses.mean().item(),
        "per_pair_loss": losses.tolist(),
        "z": margins.tolist(),
        "grad_logits_l2": policy.grad.norm().item(),
        "grad_logits_max_abs": policy.grad.abs().max().item(),
        "grad_logits_row0_pos2": policy.grad[0, 2].tolist(),
        "grad_logits_row2_pos2": policy.grad[2, 2].tolist(),
    }
    for number, value in found.items():
        assert value == pytest.approx(expected[number], rel=0, abs=1e-12), number


def test_metrics_of_the_golden_identity_hold(golden: Any, part_a: Tokens) -> None:
    expected = golden["part_a_token_logprobs"]["identity_tgdpo_equals_dpo_plus_guidance_inside"]
    margins = part_a.loss(TGDPO)[1]
    assert margins.tolist() == pytest.approx([pair["z_from_identity"] for pair in expected], rel=0, abs=1e-12)


# ---------------------------------------------------------------- what mistakes would give


def dpo_on_part_b(golden: Any, part_b: Any, **mistake: int) -> float:
    logps, pairs, _ = part_b
    policy, reference = (logps(part_b_logits(golden, model), **mistake) for model in ("policy", "ref"))
    return pair_losses(DPO, policy, pairs, reference=reference)[0].mean().item()


def test_labels_of_a_batch_are_shifted_once_and_leave_the_prompt_out(golden: Any, part_b: Any) -> None:
    mistakes = golden["part_b_full_vocab"]["mistakes"]
    found = dpo_on_part_b(golden, part_b)
    assert found == pytest.approx(mistakes["dpo_correct"], rel=0, abs=1e-12)
    for name in ("dpo_no_shift", "dpo_double_shift", "dpo_one_prompt_token_counted"):
        assert abs(found - mistakes[name]) > 1e-2, name


def test_a_batch_without_the_shift_would_be_noticed(golden: Any, part_b: Any) -> None:
    unshifted = golden["part_b_full_vocab"]["mistakes"]["dpo_no_shift"]
    assert dpo_on_part_b(golden, part_b, row_shift=1) == pytest.approx(unshifted, rel=0, abs=1e-12)


def test_pairs_are_not_mixed_up(golden: Any, part_b: Any) -> None:
    logps, pairs, _ = part_b
    policy, reference = (logps(part_b_logits(golden, model)) for model in ("policy", "ref"))
    # The four responses in batch order, cut into halves: chosen 0 against chosen 1, rejected 0 against rejected 1.
    halves = Pairs(pair=pairs.side, side=pairs.pair, num_pairs=2)
    mistaken = pair_losses(DPO, policy, halves, reference=reference)[0].mean().item()
    named = golden["part_b_full_vocab"]["mistakes"]["dpo_interleaved_rows_split_as_halves"]
    assert mistaken == pytest.approx(named, rel=0, abs=1e-12)
    assert abs(dpo_on_part_b(golden, part_b) - named) > 1e-2


def test_padding_of_the_vocabulary_does_not_count(golden: Any, part_b: Any, prepared_by_hand: Any) -> None:
    """Through the distributed head: ten columns, the last two padding with logit 0. fp32, hence 1e-6."""
    from tgdpo_megatron.model.head import LabelledLogProbs
    from tgdpo_megatron.model.vocabulary import VocabShard

    batch = make_batch(prepared_by_hand(part_b_sequences(golden)), [0, 1])
    weight = torch.cat([torch.eye(8), torch.zeros(2, 8)])
    shard = VocabShard.of(weight, vocab_size=8, group=None)

    def through_head(model: str) -> Tensor:
        logits = part_b_logits(golden, model).float()
        segments = zip((0, 2, 1, 3), batch.plan.query_lengths, strict=True)
        hidden = torch.cat([logits[row, :length] for row, length in segments])[batch.predictors]
        policy, *_ = LabelledLogProbs.apply(hidden, weight, [], batch.labels, shard, None, True)
        assert isinstance(policy, Tensor)
        return policy

    losses, _ = pair_losses(DPO, through_head("policy"), batch.pairs, reference=through_head("ref"))
    mistakes = golden["part_b_full_vocab"]["mistakes"]
    assert losses.mean().item() == pytest.approx(mistakes["dpo_correct"], rel=0, abs=1e-6)
    assert abs(losses.mean().item() - mistakes["dpo_padded_vocab_zero_logits"]) > 1e-3


def test_dpo_sums_over_tokens_and_does_not_average(golden: Any, part_a: Tokens) -> None:
    found = part_a.loss(DPO)[0].mean().item()
    assert found == pytest.approx(golden["part_c_mistakes"]["dpo_sum"], rel=0, abs=1e-12)
    for name in ("dpo_with_averages", "fork_stage_dpo_elementwise_padded_to_8"):
        assert abs(found - golden["part_c_mistakes"][name]) > 1e-2, name


def test_the_guidance_enters_the_rejected_side_with_a_minus(golden: Any, part_a: Tokens) -> None:
    found = part_a.loss(TGDPO)[0].mean().item()
    assert found == pytest.approx(golden["part_c_mistakes"]["tgdpo_correct"], rel=0, abs=1e-12)
    assert abs(found - golden["part_c_mistakes"]["tgdpo_plus_sign_on_rejected"]) > 1e-3


def test_a_policy_that_guides_itself_gets_no_gradient_through_the_guidance(golden: Any, part_a: Tokens) -> None:
    part_a.loss(TGDPO, guidance=part_a.policy)[0][0].backward()  # the golden numbers are of pair 0's own loss
    assert part_a.policy.grad is not None
    chosen = part_a.policy.grad[:4].tolist()
    mistakes = golden["part_c_mistakes"]
    assert chosen == pytest.approx(mistakes["tgdpo_self_guidance_detached_grad_chosen"], rel=0, abs=1e-12)
    assert chosen != pytest.approx(mistakes["tgdpo_self_guidance_not_detached_grad_chosen"], rel=0, abs=1e-4)


# ---------------------------------------------------------------- limit cases and identities


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.type)
def test_gradcheck(config: LossConfig, random_tokens: Tokens) -> None:
    assert torch.autograd.gradcheck(lambda policy: random_tokens.loss(config, policy=policy), random_tokens.policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tgdpo_with_alpha_zero_is_dpo_bit_for_bit(dtype: torch.dtype, random_tokens: Tokens) -> None:
    results = []
    for config in (DPO, LossConfig(type="tgdpo", beta=0.1, alpha=0.0)):
        policy = random_tokens.policy.detach().to(dtype).requires_grad_()
        frozen = {
            "reference": random_tokens.scores["reference"].to(dtype),
            "guidance": random_tokens.scores["guidance"].to(dtype),
        }
        losses, margins = random_tokens.loss(config, policy=policy, **frozen)
        losses.mean().backward()
        results.append((losses, margins, policy.grad))
    for dpo, tgdpo in zip(*results, strict=True):
        assert torch.equal(dpo, tgdpo)


def test_tgdpo_guided_by_the_reference_is_dpo(random_tokens: Tokens) -> None:
    guided = random_tokens.loss(TGDPO, guidance=random_tokens.scores["reference"])
    for tgdpo, dpo in zip(guided, random_tokens.loss(DPO), strict=True):
        assert torch.equal(tgdpo, dpo)


def test_swapping_chosen_and_rejected_negates_the_dpo_margin(random_tokens: Tokens) -> None:
    assert torch.equal(random_tokens.swapped().loss(DPO)[1], -random_tokens.loss(DPO)[1])


def test_swapping_sides_and_guidance_negates_the_tgdpo_margin(random_tokens: Tokens) -> None:
    """The guidance adds to both responses with the same sign (the identity below), so its reward r̂ must turn too."""
    opposite = 2 * random_tokens.scores["reference"] - random_tokens.scores["guidance"]  # r̂ of the other sign
    margins = random_tokens.swapped().loss(TGDPO, guidance=opposite)[1]
    torch.testing.assert_close(margins, -random_tokens.loss(TGDPO)[1], **EXACT)


def test_tgdpo_margin_is_dpo_margin_plus_guidance_inside(random_tokens: Tokens) -> None:
    """z_TGDPO = z_DPO + α β Σ r̂ d over both responses, with the same sign on both."""
    config = LossConfig(type="tgdpo", beta=0.3, alpha=0.7, beta_r=0.9)
    log_ratio = random_tokens.policy - random_tokens.scores["reference"]
    rewards = 0.9 * (random_tokens.scores["guidance"] - random_tokens.scores["reference"])
    inside = torch.zeros(7, dtype=torch.float64).index_add(0, random_tokens.pairs.pair, rewards * log_ratio)
    dpo_margin = random_tokens.loss(LossConfig(type="dpo", beta=0.3))[1]
    torch.testing.assert_close(random_tokens.loss(config)[1], dpo_margin + 0.7 * 0.3 * inside, **EXACT)


@pytest.mark.parametrize("config", [DPO, TGDPO], ids=lambda config: config.type)
def test_loss_is_ln_2_where_policy_is_reference(config: LossConfig, golden: Any, random_tokens: Tokens) -> None:
    losses, margins = random_tokens.loss(config, policy=random_tokens.scores["reference"])
    assert losses.tolist() == pytest.approx([math.log(2)] * 7, rel=0, abs=1e-12)
    assert math.log(2) == pytest.approx(golden["part_c_mistakes"]["dpo_at_init_any_guidance"], rel=0, abs=1e-12)
    assert margins.tolist() == [0.0] * 7


def test_the_guidance_gets_no_gradient(random_tokens: Tokens) -> None:
    guidance = random_tokens.scores["guidance"].clone().requires_grad_()
    random_tokens.loss(TGDPO, guidance=guidance)[0].sum().backward()
    assert guidance.grad is None


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.type)
def test_order_of_tokens_and_of_pairs_changes_nothing(config: LossConfig, random_tokens: Tokens) -> None:
    """Tokens of all responses shuffled together, pairs numbered backwards. 1e-12: sums are added in another order."""
    order = torch.randperm(len(random_tokens.policy), generator=torch.Generator().manual_seed(2))
    pairs = Pairs(6 - random_tokens.pairs.pair[order], random_tokens.pairs.side[order], 7)
    scores = {name: values[order] for name, values in random_tokens.scores.items()}
    shuffled = Tokens(random_tokens.policy[order], pairs, **scores)
    for found, expected in zip(shuffled.loss(config), random_tokens.loss(config), strict=True):
        torch.testing.assert_close(found.flip(0), expected, **EXACT)


def test_a_far_lost_pair_has_a_finite_loss_and_full_gradient() -> None:
    """z = −0.1 · 20,000 = −2,000: −log σ(z) = 2,000, where log(sigmoid) would be infinite."""
    policy = torch.tensor([-20_000.0, 0.0], requires_grad=True)
    pairs = Pairs(torch.tensor([0, 0]), torch.tensor([CHOSEN, REJECTED]), 1)
    losses, _ = pair_losses(DPO, policy, pairs, reference=torch.zeros(2))
    losses.sum().backward()
    assert losses.item() == pytest.approx(2000.0)
    assert policy.grad is not None and policy.grad.tolist() == pytest.approx([-0.1, 0.1])


def test_token_weights_by_hand() -> None:
    """Pair 0 of Part A: r̂ = 0.1 · (rm − ref); weights 1 + 0.5 r̂ chosen, 1 − 0.5 r̂ rejected."""
    reference, guidance = torch.tensor([-0.7, -1.0, -0.8, -0.6]), torch.tensor([-0.4, -1.3, -1.0, -0.5])
    pairs = Pairs(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 1, 1]), 1)
    weights = token_weights(
        token_rewards("guidance", pairs, {"guidance": guidance, "reference": reference}, beta_r=0.1), pairs, alpha=0.5
    )
    assert weights.tolist() == pytest.approx([1.015, 0.985, 1.01, 0.995], abs=1e-6)


def test_sft_is_the_mean_over_tokens_then_one_number_a_pair() -> None:
    """Pair 0: −(−1 − 2) / 2 = 1.5. Pair 1: 4. Rejected tokens do not count. Gradient −1/length on chosen tokens."""
    policy = torch.tensor([-1.0, -2.0, -9.0, -4.0], requires_grad=True)
    pairs = Pairs(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 0]), 2)
    losses, margins = pair_losses(LossConfig(type="sft"), policy, pairs)
    losses.sum().backward()
    assert losses.tolist() == [1.5, 4.0] and margins.tolist() == [0.0, 0.0]
    assert policy.grad is not None and policy.grad.tolist() == [-0.5, -0.5, 0.0, -1.0]


# ---------------------------------------------------------------- methods by hand


def of(tokens: Tokens, pair: int, side: int) -> Any:
    """Which tokens belong to a response."""
    return (tokens.pairs.pair == pair) & (tokens.pairs.side == side)


def test_dpo_norm_is_dpo_on_mean_log_ratios(random_tokens: Tokens) -> None:
    ratio = random_tokens.policy - random_tokens.scores["reference"]
    means = [[ratio[of(random_tokens, pair, side)].mean() for side in (CHOSEN, REJECTED)] for pair in range(7)]
    expected = [math.log1p(math.exp(-float(2.0 * (chosen - rejected)))) for chosen, rejected in means]
    losses, _ = random_tokens.loss(LossConfig(type="dpo_norm", beta=2.0))
    assert losses.tolist() == pytest.approx(expected, rel=0, abs=1e-12)


def test_rpo_is_zero_where_the_margin_is_the_reward_models(random_tokens: Tokens) -> None:
    """And so is its gradient: such a pair is learned."""
    reward = 0.1 * (random_tokens.policy.detach() - random_tokens.scores["reference"])
    losses, _ = random_tokens.loss(LossConfig(type="rpo", beta=0.1), reward=reward)
    losses.sum().backward()
    assert random_tokens.policy.grad is not None
    assert losses.tolist() == pytest.approx([0.0] * 7, rel=0, abs=1e-12)
    assert random_tokens.policy.grad.abs().max() < 1e-12


def test_rpo_is_dpo_where_the_reward_model_is_certain(random_tokens: Tokens) -> None:
    reward = torch.where(random_tokens.pairs.side == CHOSEN, 50.0, -50.0).double()
    losses, margins = random_tokens.loss(LossConfig(type="rpo", beta=0.1), reward=reward)
    expected, of_dpo = random_tokens.loss(DPO)
    assert torch.equal(margins, of_dpo)
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=0, abs=1e-12)


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_sepo_selects_as_sorting_each_response_does(share: float, random_tokens: Tokens) -> None:
    expected = []
    rewards = random_tokens.scores["guidance"] - random_tokens.scores["reference"]
    for pair in range(7):
        means = []
        for side in (CHOSEN, REJECTED):
            own = of(random_tokens, pair, side)
            wanted = max(1, int(share * int(own.sum())))
            order = sorted(range(int(own.sum())), key=lambda place: float(rewards[own][place]), reverse=side == CHOSEN)
            means.append(random_tokens.policy[own][order[:wanted]].mean())
        expected.append(float(2.0 * (means[0] - means[1])))
    config = LossConfig(type="sepo", gamma=2.0, selected_share=share)
    assert random_tokens.loss(config)[1].tolist() == pytest.approx(expected, rel=0, abs=1e-12)


def test_sepo_selects_all_tokens_of_a_response_whose_rewards_say_nothing() -> None:
    pairs = Pairs(torch.zeros(7, dtype=torch.int64), torch.tensor([0, 0, 0, 0, 1, 1, 1]), 1)
    policy = torch.tensor([-1.0, -2.0, -3.0, -6.0, -1.0, -5.0, -4.0])
    reward = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0, -1.0, 0.5])
    config = LossConfig(type="sepo", gamma=1.0, selected_share=0.3, token_rewards="file")
    _, margins = pair_losses(config, policy, pairs, reward=reward)
    assert margins.tolist() == [-3.0 + 5.0]  # the mean of all four, and the one of lowest reward


def test_an_unknown_source_of_rewards_is_refused() -> None:
    with pytest.raises(ValueError, match="no source of token rewards is called oracle"):
        token_rewards("oracle", Pairs(torch.zeros(1).long(), torch.zeros(1).long(), 1), {})


def test_a_chosen_nll_term_adds_its_weight_times_the_sft_loss(random_tokens: Tokens) -> None:
    plain, sft = random_tokens.loss(DPO)[0], random_tokens.loss(LossConfig(type="sft"))[0]
    both = random_tokens.loss(LossConfig(type="dpo", beta=0.1, sft_loss_weight=0.7))[0]
    torch.testing.assert_close(both, plain + 0.7 * sft, **EXACT)


def test_a_chosen_nll_term_pulls_with_its_weight_over_the_length_on_chosen_tokens_alone(random_tokens: Tokens) -> None:
    """Its gradient is −weight / |y_w| on each chosen token, beside DPO's own."""
    grads = []
    for config in (DPO, LossConfig(type="dpo", beta=0.1, sft_loss_weight=0.7)):
        policy = random_tokens.policy.detach().requires_grad_()
        grads.append(torch.autograd.grad(random_tokens.loss(config, policy=policy)[0].sum(), policy)[0])
    expected = torch.zeros_like(grads[0])
    for pair in range(7):
        chosen = of(random_tokens, pair, CHOSEN)
        expected[chosen] = -0.7 / int(chosen.sum())
    torch.testing.assert_close(grads[1] - grads[0], expected, **EXACT)


def test_tgdpo_is_dpo_reg_with_the_tgdpo_margin_in_its_weight(random_tokens: Tokens) -> None:
    """Their gradients are one formula: −w β (±1 + α r̂), with w = σ(−z) of each method's own margin."""
    grads = []
    for config in (TGDPO, LossConfig(type="dpo_reg", beta=0.1, alpha=0.5, token_rewards="guidance")):
        policy = random_tokens.policy.detach().requires_grad_()
        losses, margins = random_tokens.loss(config, policy=policy)
        losses.sum().backward()
        assert policy.grad is not None
        grads.append(policy.grad / (-margins.detach()).sigmoid()[random_tokens.pairs.pair])
    torch.testing.assert_close(grads[0], grads[1], **EXACT)


def test_token_rewards_are_scaled_then_squashed_then_clipped_and_end_before_the_last_token() -> None:
    pairs = Pairs(torch.zeros(5, dtype=torch.int64), torch.tensor([0, 0, 0, 1, 1]), 1)
    reward = torch.tensor([0.0, 2.0, -9.0, 0.5, 7.0])
    found = token_rewards(
        "file", pairs, {"reward": reward}, beta_r=2.0, reward_squash=True, reward_clip=0.4, reward_end_of_turn=False
    )
    assert found.tolist() == pytest.approx([0.0, 0.4, 0.0, 1 / (1 + math.exp(-1.0)) - 0.5, 0.0])
    assert token_rewards("file", pairs, {"reward": reward}).tolist() == reward.tolist()
    assert token_rewards("chosen", pairs, {}).tolist() == [1, 1, 1, 0, 0]


# ---------------------------------------------------------------- nothing is silently ignored

OTHER_VALUES = {
    "beta": 0.37,
    "label_smoothing": 0.2,
    "gamma_beta_ratio": 0.1,
    "alpha": 1.3,
    "sequence_weight": "attached",
    "static_weight": 0.4,
    "gamma": 0.9,
    "selected_share": 0.7,
    "beta_r": 0.6,
    "reward_squash": True,
    "reward_clip": 0.01,
    "reward_end_of_turn": False,
    "sft_loss_weight": 0.3,
}


def other_value(loss: str, option: str) -> Any:
    """A value that an option does not have by default."""
    if option in OTHER_VALUES:
        return OTHER_VALUES[option]
    declared = LOSSES[loss].options[option]
    return declared.choices[-1] if declared.choices else 1.3 * (declared.default or 0) + 0.1


OPTIONS = [
    (name, source, option)
    for name, method in LOSSES.items()
    for source in (REWARD_SOURCES if method.rewards else [None])
    for option in (*method.options, *(reward_options(method, source) if source else ()), "sft_loss_weight")
    if (name, option) != ("sft", "sft_loss_weight") and not (method.order_alone and source == "chosen")
]


def outcome(config: LossConfig, tokens: Tokens) -> list[float]:
    """Losses and gradient."""
    policy = tokens.policy.detach().requires_grad_()
    losses = tokens.loss(config, policy=policy)[0]
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    return [*losses.tolist(), *grad.tolist()]


@pytest.mark.parametrize(("name", "source", "option"), OPTIONS)
def test_every_option_a_method_reads_changes_its_loss(
    name: str, source: str | None, option: str, random_tokens: Tokens
) -> None:
    base = {"type": name, "token_rewards": source} | (
        {"sequence_weight": "static"} if option == "static_weight" else {}
    )
    value = other_value(name, option)
    if option == "reward_squash" and source == "contrastive":
        value = False
    plain, changed = LossConfig(**base), LossConfig(**base, **{option: value})
    assert outcome(plain, random_tokens) != outcome(changed, random_tokens)


def test_every_loss_type_and_every_source_of_rewards_gives_another_loss(random_tokens: Tokens) -> None:
    configs = [
        LossConfig(type=name, token_rewards=source, **({"beta": 0.3} if "beta" in method.options else {}))
        for name, method in LOSSES.items()
        for source in (REWARD_SOURCES if method.rewards else [None])
        if not (method.order_alone and source == "chosen")  # refused: nothing to select
    ]
    outcomes = [tuple(outcome(config, random_tokens)) for config in configs]
    assert len(set(outcomes)) == len(outcomes)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(("config", "missing"), [(config, name) for config in EVERY for name in config.scores])
def test_missing_log_probs_are_refused_by_name(config: LossConfig, missing: str, random_tokens: Tokens) -> None:
    given = {name: random_tokens.scores[name] for name in config.scores if name != missing}
    with pytest.raises(ValueError, match=f"loss.type={config.type} needs {missing}, one number per token"):
        pair_losses(config, random_tokens.policy, random_tokens.pairs, **given)


def test_log_probs_of_another_shape_are_refused(random_tokens: Tokens) -> None:
    with pytest.raises(ValueError, match="reference has shape"):
        random_tokens.loss(DPO, reference=random_tokens.scores["reference"][:, None])


def test_log_probs_that_do_not_match_the_pairs_are_refused(random_tokens: Tokens) -> None:
    short = random_tokens.scores["reference"][:-1]
    with pytest.raises(ValueError, match="one number per token"):
        pair_losses(DPO, short, random_tokens.pairs, reference=short)


@pytest.mark.parametrize(
    ("blocked", "imported"),
    [
        ("megatron", "tgdpo_megatron.losses, tgdpo_megatron.config, recipes.settings"),
        ("torch", "tgdpo_megatron.config, recipes.settings, tgdpo_megatron.losses, tgdpo_megatron.model.families"),
        ("torch", "tgdpo_megatron.planning.memory, tgdpo_megatron.planning.remedies"),
    ],
)
def test_imports_without(blocked: str, imported: str) -> None:
    code = f"import sys; sys.modules['{blocked}'] = None; import {imported}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- the loss while the policy is the reference

LN_2 = math.log(2)
START_VALUES = {
    "dpo": LN_2,
    "dpo_norm": LN_2,
    "robust": LN_2,
    "hinge": 1.0,
    "ipo": 25.0,
    "ipo_sum": 25.0,
    "tgdpo": LN_2,
    "tdpo1": LN_2,
    "tdpo2": LN_2,
    "sft": None,
    "simpo": None,
    "sepo": None,
    "rpo": None,
    "dpo_reg": None,
    "simpo_reg": None,
}
"""With the defaults: β = 0.1 makes (1 / 2β)² = 25. None where every pair has a start value of its own."""


@pytest.mark.parametrize("name", START_VALUES)
def test_the_loss_of_a_policy_that_is_the_reference_is_the_known_one(name: str) -> None:
    known, found = START_VALUES[name], start_of(LossConfig(type=name))
    assert (found is None) == (known is None) and (found is None or found.value == pytest.approx(known))


@pytest.mark.parametrize(("name", "slope"), [("dpo", 0.05), ("ipo_sum", 10.0), ("ipo", 10 / 3), ("hinge", 0.1)])
def test_the_slope_at_the_start_is_that_of_the_formula(name: str, slope: float) -> None:
    """β/2 for DPO, 2 · 1/(2β) for IPO of sums, which IPO of means shares out over the three tokens of a response."""
    found = start_of(LossConfig(type=name))
    assert found is not None and found.slope == pytest.approx(slope)


def test_a_share_of_sft_makes_the_first_loss_unknown() -> None:
    assert start_of(LossConfig(type="dpo", sft_loss_weight=0.1)) is None
