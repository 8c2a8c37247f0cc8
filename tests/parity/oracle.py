"""What must a layout reproduce? HuggingFace's model in one process, each sequence by itself, torch's AdamW.

The models are fp32; from the logits on everything is float64. Of our code only the container of the pairs takes
part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.parity.formulas import Method, Response
from tests.parity.models import make_model
from tgdpo_megatron.data.prepare import PreparedPairs, Summary
from tgdpo_megatron.losses import CHOSEN, REJECTED

PAIRS_PER_STEP, STEPS, LEARNING_RATE, CLIP_GRAD = 8, 2, 1e-3, 1.0
ROLES = ("policy", "reference", "guidance")
FROM_ELSEWHERE = ("better", "worse", "reward")
"""Scores that no model here gives: any numbers do."""

Scores = dict[str, dict[tuple[int, int], Tensor]]
"""Name -> pair and side -> one number, or row, for each response token."""
ONE_TOKEN = 12
"""The pair whose rejected response has one token, which the prompt predicts. It is one of the second step: Adam's first
step follows the sign of each gradient, however small, and where one is near 0 it magnifies its rounding."""


def make_pairs() -> PreparedPairs:
    """Random pairs of uneven lengths. One rejected response has a single token."""
    random = np.random.default_rng(7)
    sequences, prompts = [], []
    for _ in range(PAIRS_PER_STEP * STEPS):
        prompt = random.integers(0, 300, random.integers(3, 13))
        prompts.append(len(prompt))
        sequences += [np.concatenate([prompt, random.integers(0, 300, random.integers(2, 21))]) for _ in range(2)]
    sequences[2 * ONE_TOKEN + REJECTED] = sequences[2 * ONE_TOKEN + REJECTED][: prompts[ONE_TOKEN] + 1]
    number = len(prompts)
    return PreparedPairs(
        tokens=np.concatenate(sequences).astype(np.int32),
        starts=np.cumsum([0, *map(len, sequences)]).astype(np.int64),
        prompt_lengths=np.asarray(prompts, dtype=np.int32),
        hashes=np.stack([np.full(32, pair, dtype=np.uint8) for pair in range(number)]),
        rows=np.arange(number),
        summary=Summary(source="random"),
    )


def frozen_scores(data: PreparedPairs, family: str, tied: bool) -> Scores:
    """What does not change in training, and what the policy gives before the first step.

    `policy`, `reference`, `guidance`: token log-probs. `better`, `worse`, `reward`: random. `divergence`: of the policy
    from the reference. `distribution`: the reference's log-probs of the whole vocabulary, [T, V].
    """
    random = np.random.default_rng(11)
    models = [make_model(seed, family, tied) for seed in range(len(ROLES))]
    scores: Scores = {name: {} for name in (*ROLES, *FROM_ELSEWHERE, "divergence", "distribution")}
    for pair in range(len(data)):
        for key in ((pair, CHOSEN), (pair, REJECTED)):
            with torch.no_grad():
                distributions = [_distribution(model, data, *key) for model in models]
            for role, distribution in zip(ROLES, distributions, strict=True):
                scores[role][key] = _of_labels(distribution, data, *key)
            for name in FROM_ELSEWHERE:
                # As precise as what is stored in files.
                scores[name][key] = torch.from_numpy(random.normal(size=data.response_length(*key))).float().double()
            scores["distribution"][key] = distributions[1]
            scores["divergence"][key] = _divergence(distributions[1], distributions[0])
    return scores


def train(data: PreparedPairs, family: str, tied: bool, method: Method, scores: Scores) -> dict[str, Any]:
    """Loss and gradient norm of each step, the first step's gradient, the weights after the last."""
    policy = make_model(0, family, tied)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, eps=method.adam_eps_for(family)
    )
    losses, gradients, norms = [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for pair in range(step * PAIRS_PER_STEP, (step + 1) * PAIRS_PER_STEP):
            chosen, rejected = (_response(policy, data, pair, side, scores) for side in (CHOSEN, REJECTED))
            total = total + method.formula(chosen, rejected)
        (total / PAIRS_PER_STEP).backward()
        losses.append(float(total) / PAIRS_PER_STEP)
        gradients.append({name: weight.grad.clone() for name, weight in policy.named_parameters()})
        norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP_GRAD)))
        optimizer.step()
    weights = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    return {"losses": losses, "norms": norms, "gradient": gradients[0], "weights": weights}


def _response(policy: Any, data: PreparedPairs, pair: int, side: int, scores: Scores) -> Response:
    distribution = _distribution(policy, data, pair, side)
    return Response(
        policy=_of_labels(distribution, data, pair, side),
        divergence=_divergence(scores["distribution"][pair, side], distribution),
        scores={name: scores[name][pair, side] for name in ("reference", "guidance", *FROM_ELSEWHERE)},
        chosen=side == CHOSEN,
    )


def _distribution(model: Any, data: PreparedPairs, pair: int, side: int) -> Tensor:
    """Log-probs of the whole vocabulary at each response token's place. [T, V]"""
    ids = torch.from_numpy(data.sequence(pair, side).astype(np.int64))
    logits = model(ids[None]).logits[0].double()
    return torch.log_softmax(logits[int(data.prompt_lengths[pair]) - 1 : -1], dim=-1)


def _of_labels(distribution: Tensor, data: PreparedPairs, pair: int, side: int) -> Tensor:
    """Log-probs of the response's own tokens. [T, V] -> [T]"""
    response = data.sequence(pair, side)[int(data.prompt_lengths[pair]) :]
    return distribution.gather(1, torch.from_numpy(response.astype(np.int64))[:, None])[:, 0]


def _divergence(reference: Tensor, policy: Tensor) -> Tensor:
    """KL(reference ‖ policy) = Σ_v p_ref(v) (log p_ref(v) − log p(v)). [T, V] -> [T]"""
    return (reference.exp() * (reference - policy)).sum(dim=1)
