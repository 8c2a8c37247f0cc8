"""Our side of the timed comparisons: a whole optimizer step of the product's engine in one process.

What is timed is what recipes.train does in a step: cutting micro-batches, Megatron's schedule over them, adding up
what is reported, clipping and AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.pairs import VOCABULARY
from tgdpo_megatron.checkpoint.convert import hf_to_megatron
from tgdpo_megatron.checkpoint.manifest import describe
from tgdpo_megatron.config import Config, LossConfig, OptimizerConfig, ScoresConfig, TrainConfig
from tgdpo_megatron.data.batch import Batch, rank_batches
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.token_scores import TokenScores, response_starts
from tgdpo_megatron.losses import CHOSEN, REJECTED
from tgdpo_megatron.pair_losses import PreferenceLoss

BODY = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 4096,
    "vocab_size": VOCABULARY,
}
"""A small model whose head is 7 % of its matrix products, as in Llama-3-8B."""
ROLES = ("policy", "reference", "guidance")
PAIRS_PER_STEP, BUDGET = 4, 4096
LEARNING_RATE = 1e-12
"""So small that weights stay what they are: losses of programs that took unequal numbers of steps can be compared."""
LOSS = LossConfig(type="tgdpo", beta=0.1, alpha=0.5, beta_r=1.0)


@dataclass(frozen=True)
class Checkpoints:
    """The same weights for both sides. All three models differ, as in the middle of training: with a policy that is
    equal to its reference every loss would be ln 2, and equal losses would say little."""

    hf: dict[str, Path]
    megatron: dict[str, Path]


def make_checkpoints(folder: Path) -> Checkpoints:
    """Three random models in HuggingFace's format and in Megatron's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hf, megatron = {}, {}
    for seed, role in enumerate(ROLES):
        hf[role], megatron[role] = folder / "hf" / role, folder / "megatron" / role
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**BODY)).float().save_pretrained(hf[role])
        hf_to_megatron(hf[role], megatron[role])
    return Checkpoints(hf, megatron)


class Ours:
    """The engine, training with cached or live scores, and with prompts that are shared or not."""

    device = torch.device("cpu")

    def __init__(
        self,
        data: PreparedPairs,
        checkpoints: Checkpoints,
        *,
        cached: bool,
        loss: LossConfig = LOSS,
        shared_prompts: bool = True,
    ) -> None:
        from tgdpo_megatron.engine import build_engine

        self.data, self.places = data, checkpoints.megatron
        self.config = Config(
            loss=loss,
            scores=ScoresConfig(source="cached" if cached else "live"),
            optimizer=OptimizerConfig(lr=LEARNING_RATE, min_lr=LEARNING_RATE),
            train=TrainConfig(
                precision="fp32",
                train_iters=100,
                global_batch_size=PAIRS_PER_STEP,
                micro_batch_tokens=BUDGET,
                shared_prompts=shared_prompts,
            ),
        )
        riders = [self.places[role] for role in loss.carried]
        self.engine = build_engine(
            self.config,
            describe(self.places["policy"]),
            loss=PreferenceLoss(self.config),
            start=self.places["policy"],
            frozen=[] if cached else riders,
        )
        self.scores: TokenScores | None = None

    def batches(self, pairs: Sequence[int]) -> list[Batch]:
        """The micro-batches of a step."""
        return rank_batches(
            self.data,
            np.asarray(pairs),
            self.config,
            sides=(CHOSEN, REJECTED),
            rank=0,
            ranks=1,
            device=self.device,
            scores=self.scores,
        )

    def step(self, pairs: Sequence[int]) -> float:
        """One optimizer step over some pairs. Returns the mean loss."""
        self.engine.zero_grad()
        totals = self.engine.forward_backward(self.batches(pairs))
        self.engine.update()
        return totals["loss"] / totals["pairs"]

    def loss(self, pairs: Sequence[int]) -> float:
        """The mean loss of some pairs, without a step."""
        totals = self.engine.forward(self.batches(pairs))
        return totals["loss"] / totals["pairs"]

    def score(self, model: Any, pairs: Sequence[int]) -> list[torch.Tensor]:
        """Token log-probs of some pairs under one frozen model, as recipes.score computes them."""
        from tgdpo_megatron.engine import token_logps

        return [logps[0] for logps in token_logps(model, self.batches(pairs), self.config)]

    def frozen_model(self, role: str) -> Any:
        """A model without optimizer, as scoring holds it."""
        from tgdpo_megatron.checkpoint.state import load_weights
        from tgdpo_megatron.model.build import build_model, transformer_config

        description = describe(self.places[role])
        chunks = build_model(description, transformer_config(description, self.config))
        load_weights(chunks, self.places[role])
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
        return chunks

    def cache_scores(self, pairs: Sequence[int]) -> None:
        """Score the reference and the guidance once and keep the result for training, beside what was kept before."""
        cut = self.batches(pairs)
        values = {
            role: torch.cat(self.score(self.frozen_model(role), pairs)).cpu().numpy()
            for role in self.config.loss.carried
        }
        order = [pair for batch in cut for pair in batch.samples]
        lengths = [sum(self.data.response_length(pair, side) for side in (CHOSEN, REJECTED)) for pair in order]
        starts = response_starts(self.data)
        laid_out = {role: np.zeros(starts[-1], np.float32) for role in values}
        laid_out |= self.scores.values if self.scores else {}
        for role, scores in values.items():
            for pair, piece in zip(order, np.split(scores, np.cumsum(lengths)[:-1]), strict=True):
                laid_out[role][starts[2 * pair] : starts[2 * pair + 2]] = piece
        self.scores = TokenScores.of(self.data, laid_out)
