"""Make logits like a large model's, and compute log-probs from them in three ways.

No trained model of that size is at hand, so the hidden states and the output matrix are made up. What a rounded logit
loses depends on its size alone, and sizes can be chosen. All logits of a position lie around MEAN with a spread of
SPREAD. A few candidates stand out, the first so far above what all the others add up to that the answer's tokens are as
likely as those of a model that answers by itself. From this follows how large the largest logits are: it has to be
MEAN + ln V + SPREAD²/2 and more.

The guidance and the policy are the reference with other hidden states: noise is added to them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.fp8.measure import spread
from tgdpo_megatron.config import Config, LossConfig, complete
from tgdpo_megatron.losses import CHOSEN, REJECTED, Pairs
from tgdpo_megatron.losses.dpo import dpo_loss
from tgdpo_megatron.losses.tgdpo import token_weights
from tgdpo_megatron.model.head import labelled_logprobs
from tgdpo_megatron.pair_losses import inputs_of

MEAN, SPREAD = -3.0, 2.5
"""Of all logits of a position. transformers' own test of Llama-2-7B expects means of 8 positions that are −2.9 in the
mean, and 30 logits of one position that spread by 2.8 (test_model_7b_logits, in test_modeling_llama.py)."""
CANDIDATES, GAP = 8, 2.0
"""Tokens that stand out at a position, and the mean distance of each from the one before, nats."""
ABOVE, ABOVE_SPREAD = 5.0, 2.0
"""How far the first stands above the log-sum-exp of the tokens that do not stand out: mean and spread, nats."""
APART = 0.15
"""Spread of what is added to each hidden channel, which is of size 1, in the guidance and in the policy."""
MODELS = ("policy", "reference", "guidance")
CHECKED = 64
"""Tokens whose log-probs are computed in float64 as well."""

Numbers = dict[str, Any]
"""JSON types."""


@dataclass(frozen=True)
class Effort:
    """How much is computed: two responses to each pair, one after the other."""

    pairs: int = 16
    response: int = 64
    width: int = 1024
    vocabularies: tuple[int, ...] = (32_000, 128_256)


def measure(effort: Effort) -> Numbers:
    """What the logits are, and all errors, for each size of the vocabulary."""
    return {
        "effort": asdict(effort),
        "vocabularies": {str(vocabulary): _measure(effort, vocabulary) for vocabulary in effort.vocabularies},
    }


@torch.no_grad()
def _measure(effort: Effort, vocabulary: int) -> Numbers:
    generator = torch.Generator().manual_seed(0)
    marks = _marks(effort)
    weight = _output_matrix(vocabulary, effort.width, generator)
    states = _hidden_states(len(marks.pair), weight, generator)
    labels, described = _answers(states, weight, generator)
    hidden = {name: states if name == "reference" else _moved(states, generator) for name in MODELS}
    rounded = {name: of.bfloat16() for name, of in hidden.items()}
    logps = {
        "fp32": _logps(hidden, weight.float(), labels),
        "rounded": _logps(rounded, weight, labels),
        # fp32 sums of the same bf16 numbers: what a GPU's tensor cores have before anything is rounded.
        "unrounded": _logps({name: of.float() for name, of in rounded.items()}, weight.float(), labels),
    }
    exact = exact_logps(rounded["reference"][:CHECKED], weight, labels[:CHECKED])
    made = {kind: _made_of(of, marks) for kind, of in logps.items()}
    return {
        "logits": described,
        "spread": {name: float(values.std()) for name, values in made["fp32"].items()},
        "errors": {
            kind: {name: spread((values - made["fp32"][name]).numpy()) for name, values in made[kind].items()}
            for kind in ("rounded", "unrounded")
        },
        "head": {
            kind: spread((logps[kind]["reference"][:CHECKED] - exact).numpy()) for kind in ("rounded", "unrounded")
        },
    }


def _marks(effort: Effort) -> Pairs:
    """Pair and side of each token: the chosen response of a pair, then the rejected one."""
    sides = torch.tensor([CHOSEN, REJECTED]).repeat_interleave(effort.response).repeat(effort.pairs)
    pairs = torch.arange(effort.pairs).repeat_interleave(2 * effort.response)
    return Pairs(pairs, sides, effort.pairs)


def _output_matrix(vocabulary: int, width: int, generator: torch.Generator) -> Tensor:
    """Random directions, and in the first channel, which is 1 in every hidden state, MEAN. [V, H] bf16."""
    weight = torch.randn(vocabulary, width, generator=generator).mul_(SPREAD / math.sqrt(width))
    weight[:, 0] = MEAN
    return weight.bfloat16()


def _hidden_states(tokens: int, weight: Tensor, generator: torch.Generator) -> Tensor:
    """States whose candidates have the logits that they shall have. [R, H] fp32."""
    vocabulary, width = weight.shape
    states = torch.randn(tokens, width, generator=generator)
    states[:, 0] = 1
    first_candidate = torch.randint(0, vocabulary, (tokens, 1), generator=generator)
    candidates = (first_candidate + vocabulary // CANDIDATES * torch.arange(CANDIDATES)) % vocabulary  # all different
    above = ABOVE + ABOVE_SPREAD * torch.randn(tokens, 1, generator=generator)
    gaps = torch.empty(tokens, CANDIDATES).exponential_(1 / GAP, generator=generator)
    gaps[:, 0] = 0
    wanted = MEAN + math.log(vocabulary) + SPREAD**2 / 2 + above - gaps.cumsum(dim=1)
    rows = weight[candidates].float()
    rows[:, :, 0] = 0  # the first channel stays 1
    missing = wanted - MEAN - (rows @ states[:, :, None])[:, :, 0]
    steps = torch.linalg.solve(rows @ rows.mT, missing)
    return states + (steps[:, None] @ rows)[:, 0]


def _moved(states: Tensor, generator: torch.Generator) -> Tensor:
    """The hidden states of a model that was trained a little. [R, H] fp32."""
    moved = states + APART * torch.randn(states.shape, generator=generator)
    moved[:, 0] = 1
    return moved


def _answers(states: Tensor, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Numbers]:
    """Tokens drawn from the reference's own distribution, [R] int64, and what its logits are like."""
    labels, seen = [], []
    for rows in states.split(64):
        logits = rows @ weight.float().t()
        probabilities = logits.softmax(dim=1)
        drawn = probabilities.multinomial(1, generator=generator)
        labels.append(drawn[:, 0])
        seen.append(
            torch.stack(
                [
                    logits.mean(dim=1),
                    logits.std(dim=1),
                    logits.amax(dim=1),
                    logits.gather(1, drawn)[:, 0],
                    probabilities.gather(1, drawn)[:, 0].log(),
                ]
            )
        )
    mean, deviation, largest, label, logp = torch.cat(seen, dim=1).double()
    described = {
        "mean": float(mean.mean()),
        "std": float(deviation.mean()),
        "largest": float(largest.mean()),
        "label": float(label.mean()),
        "logp": float(logp.mean()),
        "above_16": float((label.abs() >= 16).double().mean()),
    }
    return torch.cat(labels), described


def _logps(hidden: dict[str, Tensor], weight: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Log-probs of the labels under every model by the product's own head, nats. Each [R] float64."""
    from megatron.core import parallel_state

    found = labelled_logprobs(
        [(states[:, None], weight) for states in hidden.values()],
        torch.arange(len(labels)),
        labels,
        vocab_size=len(weight),
        sequence_parallel=False,
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    return dict(zip(hidden, found.double(), strict=True))


def exact_logps(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same in float64, without tiles of ours. [R, H], [V, H], [R] -> [R] float64."""
    logits = torch.cat([states.double() @ rows.double().t() for rows in weight.split(16_384)], dim=1)
    return logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]


def _made_of(logps: dict[str, Tensor], marks: Pairs) -> dict[str, Tensor]:
    """Log-probs, log-ratios, which r̂ is β_r times, and weights of tokens [R]; reward margins of pairs [P]."""
    loss = complete(Config(loss=LossConfig(type="tgdpo")), where="bench.logits").loss
    policy, reference, guidance = (logps[name] for name in MODELS)
    rewards = inputs_of(loss, marks, reference=reference, guidance=guidance)["rewards"]
    return {
        "logp": reference,
        "log_ratio": guidance - reference,
        "weight": token_weights(rewards, marks, alpha=loss.options["alpha"]),
        "margin": dpo_loss(policy, marks, reference=reference, beta=loss.options["beta"])[1],
    }
