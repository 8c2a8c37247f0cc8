"""The authors' computation of a TGDPO step, written plainly with HuggingFace modules.

Three live models; the chosen then the rejected sequences of a micro-batch as rows, padded on the right to a
multiple of 8; full fp32 logits, log-softmax, gather; one optimizer step of AdamW with clipped gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.losses import CHOSEN, REJECTED

IGNORED = -100


class Theirs:
    """The three models, policy first, and the policy's optimizer."""

    def __init__(self, models: Sequence[Any], *, beta: float, alpha: float, beta_r: float, lr: float) -> None:
        self.policy, *self.frozen = models
        for model in self.frozen:
            model.requires_grad_(False).eval()
        self.beta, self.alpha, self.beta_r = beta, alpha, beta_r
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=lr, weight_decay=0.0)

    def step(self, data: PreparedPairs, pairs: Sequence[int], *, micro_batch: int) -> float:
        """One optimizer step over some pairs. Returns the mean loss."""
        self.optimizer.zero_grad()
        total = 0.0
        for first in range(0, len(pairs), micro_batch):
            loss = self.loss(data, pairs[first : first + micro_batch]).sum() / len(pairs)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        return total

    def loss(self, data: PreparedPairs, pairs: Sequence[int]) -> Tensor:
        """The loss of each pair. [pairs]"""
        tokens, mask, labels = (part.to(self.policy.device) for part in padded(data, pairs))
        policy = token_logps(self.policy, tokens, mask, labels)
        with torch.no_grad():
            reference, guidance = (token_logps(model, tokens, mask, labels) for model in self.frozen)
        # Chosen rows, then rejected ones.
        sign = torch.tensor([1.0, -1.0], device=policy.device).repeat_interleave(len(pairs))[:, None]
        weight = 1 + sign * self.alpha * self.beta_r * (guidance - reference)
        chosen, rejected = (self.beta * weight * (policy - reference)).sum(dim=1).chunk(2)
        return -torch.nn.functional.logsigmoid(chosen - rejected)


def read_models(folders: Sequence[Path]) -> list[Any]:
    """The models of some HuggingFace folders, fp32."""
    from transformers import LlamaForCausalLM

    return [
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa") for folder in folders
    ]


def padded(data: PreparedPairs, pairs: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels (IGNORED on prompts and padding). Each [2 · pairs, length]."""
    keys = [(pair, side) for side in (CHOSEN, REJECTED) for pair in pairs]
    longest = max(len(data.sequence(*key)) for key in keys)
    shape = len(keys), -(-longest // 8) * 8
    tokens, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, (pair, side) in enumerate(keys):
        ids = torch.from_numpy(data.sequence(pair, side).astype("int64"))
        prompt = int(data.prompt_lengths[pair])
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        labels[row, prompt : len(ids)] = ids[prompt:]
    return tokens, mask, labels


def token_logps(model: Any, tokens: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Log-probs of the labelled tokens, 0 elsewhere. [rows, length − 1]"""
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.float()[:, :-1]
    targets = labels[:, 1:]
    counted = targets != IGNORED
    logps = logits.log_softmax(dim=-1).gather(2, targets.where(counted, 0)[:, :, None]).squeeze(2)
    return logps * counted
