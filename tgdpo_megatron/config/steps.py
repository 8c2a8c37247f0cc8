"""The length of a run, once it is known how many pairs there are and on which device it runs."""

from __future__ import annotations

import math

from tgdpo_megatron.config.constants import MOST
from tgdpo_megatron.config.settings import Config
from tgdpo_megatron.errors import UserError


def with_steps(config: Config, num_pairs: int, *, warmup: int | None = None) -> Config:
    """Fill in train.train_iters and optimizer.lr_warmup_iters.

    Args:
        num_pairs: Pairs in one epoch.
        warmup: The warm-up of the run that is continued, which a share of the steps does not change.

    Raises:
        UserError: The warm-up leaves no step, or the epochs are more steps than can be counted.
    """
    train, optimizer = config.train, config.optimizer
    iterations = train.train_iters
    if iterations is None:
        epochs = train.num_epochs or 1
        if epochs * num_pairs / train.global_batch_size > MOST:
            raise UserError(f"train.num_epochs={epochs} of {num_pairs} pairs is more than {MOST} steps; lower it.")
        iterations = max(1, math.floor(epochs * num_pairs / train.global_batch_size + 1e-9))
    steps = optimizer.lr_warmup_iters
    if steps is None:
        share = (optimizer.lr_warmup_fraction or 0.0) * iterations
        steps = min(math.ceil(share - 1e-9), iterations - 1) if warmup is None else warmup
    if steps >= iterations:
        raise UserError(
            f"optimizer.lr_warmup_iters={steps} leaves no step of the {iterations} after the warm-up; lower it."
        )
    return config.model_copy(
        update={
            "train": train.model_copy(update={"train_iters": iterations}),
            "optimizer": optimizer.model_copy(update={"lr_warmup_iters": steps}),
        }
    )


def on_device(config: Config, device: str) -> Config:
    """Fill in train.precision=auto: bf16 on `cuda`, fp32 on `cpu`."""
    if config.train.precision != "auto":
        return config
    precision = "bf16" if device == "cuda" else "fp32"
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
