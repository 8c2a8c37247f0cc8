"""Our side of the comparisons on a GPU: layers of Llama-3-8B's size, with weights that never see a disk.

Weights are random and made where they stay; packs are of 8,192 tokens, pairs like UltraFeedback's. The policy differs
from its reference, as in the middle of training: with both equal every loss would be ln 2, and equal losses say little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench.gpu import device
from bench.ours import LEARNING_RATE, LOSS, Ours
from bench.pairs import ultrafeedback_like
from tgdpo_megatron.config import Config, OptimizerConfig, ScoresConfig, TrainConfig
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.shared_prompts import tokens_read, tokens_read_by_side
from tgdpo_megatron.losses import CHOSEN, REJECTED
from tgdpo_megatron.model.build import HAVE_TRANSFORMER_ENGINE
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.flops import TRAINING, forward_operations
from tgdpo_megatron.pair_losses import PreferenceLoss
from tgdpo_megatron.planning import memory


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        layers: At most, of a whole step; `few_layers` where another program needs room, or fewer say as much.
        pack: Tokens of a micro-batch.
        pairs: To an optimizer step.
        longest: Tokens of a sequence.
        steps: Timed, after one that warms up.
    """

    layers: int
    few_layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocabulary: int
    pack: int
    pairs: int
    longest: int
    steps: int


SIZES = (
    Sizes(2, 2, 64, 96, 4, 2, 512, 256, 4, 64, 2)
    if device.REHEARSAL
    else Sizes(16, 8, 4096, 14336, 32, 8, 128256, 8192, 32, 2048, 3)
)
PACKED = f"UltraFeedback-like, packs of {SIZES.pack} tokens"
SIDES = (CHOSEN, REJECTED)
LAYERS = "Transformer Engine" if HAVE_TRANSFORMER_ENGINE else "local layers"
"""Whose layers and optimizer a row was measured with."""


def describe(layers: int) -> ModelDescription:
    """Some layers of Llama-3-8B."""
    return ModelDescription(
        num_layers=layers,
        hidden_size=SIZES.hidden,
        ffn_hidden_size=SIZES.ffn,
        num_attention_heads=SIZES.heads,
        num_query_groups=SIZES.groups,
        kv_channels=SIZES.hidden // SIZES.heads,
        vocab_size=SIZES.vocabulary,
        max_position_embeddings=8192,
        layernorm_epsilon=1e-5,
        tie_word_embeddings=False,
        rotary_base=500000.0,
        rope_scaling_factor=None,
    )


def layers_that_fit() -> int:
    """As many as the plan of a step with both frozen models beside the policy lets onto the card, at most SIZES.layers.

    Raises:
        SystemExit: Not even one fits.
    """
    if device.REHEARSAL:
        return SIZES.layers
    config = settings()
    config = config.model_copy(update={"scores": ScoresConfig(source="live")})
    for layers in range(SIZES.layers, 0, -1):
        plan = memory.plan(config, describe(layers), world_size=1, transformer_engine=HAVE_TRANSFORMER_ENGINE)
        if plan.bytes <= memory.ROOM * device.total_memory():
            return layers
    raise SystemExit("not one layer of this size fits the card")


def settings(**train: Any) -> Config:
    """Of every run here: TGDPO, cached scores, bf16, packs."""
    shape = {"global_batch_size": SIZES.pairs, "micro_batch_tokens": SIZES.pack}
    return Config(
        loss=LOSS,
        scores=ScoresConfig(source="cached"),
        optimizer=OptimizerConfig(lr=LEARNING_RATE, min_lr=LEARNING_RATE),
        train=TrainConfig(precision="bf16", train_iters=100, **shape, **train),
    )


def make_pairs(steps: int = 1 + SIZES.steps) -> tuple[PreparedPairs, list[list[int]]]:
    """Pairs, and those of each step."""
    data = ultrafeedback_like(steps * SIZES.pairs, longest=SIZES.longest, vocabulary=SIZES.vocabulary)
    return data, [list(range(first, first + SIZES.pairs)) for first in range(0, len(data), SIZES.pairs)]


class InPlace(Ours):
    """The engine and the frozen models beside it, all of them on the device from the start."""

    device = device.HERE

    def __init__(
        self,
        data: PreparedPairs,
        description: ModelDescription,
        *,
        trained: bool = True,
        frozen: bool = True,
        **train: Any,
    ) -> None:
        """
        Args:
            trained: Whether the policy is there, with its optimizer.
            frozen: Whether the reference and the guidance are there, for scoring and to ride along.
            train: Settings of the policy's training, e.g. its FP8.
        """
        from tgdpo_megatron.engine import build_engine
        from tgdpo_megatron.model.build import build_model, transformer_config

        self.data, self.description, self.scores = data, description, None
        self.config = settings(**train)
        if trained:
            self.engine = build_engine(
                self.config, description, loss=PreferenceLoss(self.config), start=None, frozen=[]
            )
        untrained = transformer_config(description, self.config, trained=False)
        self.frozen: dict[str, Any] = {}
        for role in LOSS.carried if frozen else ():
            self.frozen[role] = build_model(description, untrained)
            for chunk in self.frozen[role]:
                chunk.requires_grad_(False).eval()

    def frozen_model(self, role: str) -> Any:
        """A model without optimizer, as scoring holds it."""
        return self.frozen[role]

    def find_scales(self, pairs: Sequence[int]) -> None:
        """A pass whose gradients are dropped: how training begins where FP8 scales come from earlier steps."""
        self.engine.find_scales(self.batches(pairs))

    def ride(self, live: bool) -> None:
        """From now on the frozen models run beside the policy, or else their cached scores are read."""
        models = [self.frozen[role] for role in LOSS.carried] if live else []
        for place, chunk in enumerate(self.engine.chunks):
            chunk.carry([model[place] for model in models])
        self.config = self.config.model_copy(update={"scores": ScoresConfig(source="live" if live else "cached")})
        self.engine = replace(self.engine, config=self.config, loss=PreferenceLoss(self.config))


def tokens_of(data: PreparedPairs, pairs: Sequence[int], *, shared_prompts: bool = True) -> int:
    """Tokens that the model reads: all but the last of each sequence, and a shared prompt once, as our steps read it.

    Args:
        shared_prompts: False counts a prompt for each response, as a program reads it that shares none.
    """
    return int(tokens_read(data, np.array(pairs), SIDES, shared_prompts=shared_prompts).sum())


def model_flops(data: PreparedPairs, pairs: Sequence[int], model: ModelDescription) -> int:
    """Operations of forward and backward that these pairs need: those of a shared prompt once, and none that are
    computed again."""
    picked = np.array(pairs)
    fed, prefixes = tokens_read_by_side(data, picked, SIDES, shared_prompts=True)
    labels = sum(data.response_length(pair, side) for pair in pairs for side in SIDES)
    return TRAINING * forward_operations(model, fed, labels, prefixes)
