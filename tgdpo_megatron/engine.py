"""Build what a step needs: this rank's part of the policy, the frozen models that ride with it, the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from tgdpo_megatron.checkpoint.state import load_weights
from tgdpo_megatron.config import Config
from tgdpo_megatron.data.batch import Batch
from tgdpo_megatron.model.build import build_model, transformer_config
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.gpt import PreferenceGPT

Pass = Callable[[], list[Any]]


@dataclass(frozen=True)
class Engine:
    """One rank's policy and what moves it.

    Attributes:
        chunks: The policy's pipeline chunks, without wrapping. Frozen models ride inside.
        policy: The same chunks under Megatron's data parallelism.
    """

    config: Config

    chunks: list[PreferenceGPT]
    policy: list[DistributedDataParallel]
    optimizer: Any
    scheduler: OptimizerParamScheduler

    def over(self, forward_step: Callable[..., Any], batches: Sequence[Batch], **settings: Any) -> Pass:
        """A pass of the policy over some micro-batches; see pipeline_pass."""
        stacked = 1 + len(self.chunks[0].frozen)
        return pipeline_pass(self.policy, forward_step, batches, self.config, stacked=stacked, **settings)

    def find_scales(self, forward_step: Callable[..., Any], batches: Sequence[Batch]) -> None:
        """One training pass whose gradients are dropped: delayed FP8 scaling takes its scales from earlier ones."""
        self.over(forward_step, batches)()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the last step's gradients."""
        for model in self.policy:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()

    def gather_weights(self) -> None:
        """Wait until every rank has the updated weights; needed before they are read other than by a forward."""
        if self.config.optimizer.overlap_param_gather:
            for model in self.policy:
                model.start_param_sync(force_sync=True)

    def update(self) -> tuple[float, float]:
        """Clip and step, unless the gradient is not finite.

        Returns:
            The gradient's norm over all ranks, before clipping, and the learning rate of this step.
        """
        self.scheduler.step(increment=1)  # before the update: no step is spent at learning rate 0
        learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if math.isfinite(norm):
            clip_grad_by_total_norm_fp32(self.optimizer.get_parameters(), self.config.optimizer.clip_grad, norm)
            self.optimizer.step_with_ready_grads()
        return norm, learning_rate


def build_engine(config: Config, description: ModelDescription, *, start: Path | None, frozen: list[Path]) -> Engine:
    """Build and load everything on this rank. Collective.

    Args:
        start: Checkpoint of the policy's weights; None where they will be loaded with the training state.
        frozen: Checkpoints that ride with the policy: none (cached scores), the reference, or the reference
            and the guidance.
    """
    megatron = transformer_config(description, config)
    chunks = build_model(description, megatron)
    if start is not None:
        load_weights(chunks, start)
    untrained = transformer_config(description, config, trained=False)
    carried = [build_model(description, untrained) for _ in frozen]
    for model, folder in zip(carried, frozen, strict=True):
        load_weights(model, folder)
    for place, chunk in enumerate(chunks):
        chunk.carry([model[place] for model in carried], divergence="divergence" in config.loss.method.reads)

    data_parallel = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
        overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
        overlap_param_gather=config.optimizer.overlap_param_gather,
    )
    policy = [DistributedDataParallel(megatron, data_parallel, chunk) for chunk in chunks]
    for model in policy:
        model.broadcast_params()
    optimizer = get_megatron_optimizer(_optimizer_config(config), policy)
    megatron.finalize_model_grads_func = finalize_model_grads
    megatron.grad_scale_func = optimizer.scale_loss
    if config.optimizer.overlap_grad_reduce:
        waits = [model.no_sync for model in policy]
        megatron.no_sync_func = waits if len(waits) > 1 else waits[0]
    return Engine(config, chunks, policy, optimizer, _scheduler(config, optimizer))


def pipeline_pass(
    models: Sequence[Any],
    forward_step: Callable[..., Any],
    batches: Sequence[Batch],
    config: Config,
    *,
    stacked: int,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
) -> Pass:
    """Megatron's pipeline schedule over some micro-batches, ready to be called. Calling it is collective.

    Args:
        models: This rank's chunks, wrapped or not.
        forward_step: What a stage does with one micro-batch, as Megatron's schedules call it.
        stacked: Models whose hidden states travel together.

    Returns:
        Uncalled, so that a formula stays five frames from the command line: a function that runs forward and (unless
        forward_only) backward, and returns what the loss function reported for each micro-batch: on the last stage;
        elsewhere nothing.
    """
    return partial(
        get_forward_backward_func(),
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in models],
        model=list(models),
        num_microbatches=len(batches),
        # The shape between stages, [seq_length, micro_batch_size, hidden]; where micro-batches differ in length,
        # Megatron's stages tell each other the true shape.
        seq_length=config.train.micro_batch_tokens or 1,
        micro_batch_size=stacked,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
    )


def _optimizer_config(config: Config) -> OptimizerConfig:
    settings = config.optimizer
    bf16 = config.train.precision == "bf16"
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_param_gather=settings.overlap_param_gather,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )


def _scheduler(config: Config, optimizer: Any) -> OptimizerParamScheduler:
    """Linear warm-up, then cosine, counted in optimizer steps."""
    settings, iterations = config.optimizer, config.train.train_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=iterations + 1,  # the last step still moves
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=iterations,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
