"""One rank's part of a training step: the policy, the frozen models that run beside it, and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from tgdpo_megatron.checkpoint.state import load_weights
from tgdpo_megatron.config import Config
from tgdpo_megatron.data.batch import Batch
from tgdpo_megatron.model.build import build_model, transformer_config
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.gpt import PreferenceGPT
from tgdpo_megatron.platform.clock import OPTIMIZER, WAITING, Clock, Spent, parts
from tgdpo_megatron.report.metrics import Sums, add_up, names_for


class LossFunction(Protocol):
    """Turns the output of the model on the last stage into a loss."""

    def __call__(self, output: Tensor, batch: Batch, /) -> tuple[Tensor, Tensor, Sums]:
        """Sum of the losses over pairs, number of pairs, sums to report. Megatron divides once, by the number of pairs
        of all ranks."""

    def of_each_pair(self, output: Tensor, batch: Batch, /) -> Tensor:
        """The loss of each pair. [P]"""


@dataclass(frozen=True)
class Engine:
    """One rank's part of the policy, with the optimizer that updates it.

    Attributes:
        chunks: The policy's pipeline chunks, not wrapped. They hold the frozen models.
        policy: The same chunks wrapped in Megatron's data parallelism.
        loss: Turns the output of the last stage into a loss.
        clock: Where this rank's time goes.
    """

    config: Config
    chunks: list[PreferenceGPT]
    policy: list[DistributedDataParallel]
    optimizer: Any
    scheduler: OptimizerParamScheduler
    loss: LossFunction
    clock: Clock

    def forward_backward(
        self, batches: Sequence[Batch], votes: Callable[[], Mapping[str, float]] = dict
    ) -> dict[str, float]:
        """Run this rank's micro-batches forward and backward, which adds gradients to the policy. Collective.

        Args:
            votes: Gives numbers of this rank, under the same names on every rank, that are added up with the sums. It
                is called after the pass, so that what happens meanwhile still counts.

        Returns:
            The sums that the loss reports, over all micro-batches of all ranks, and the votes of all ranks.
        """
        spent = self._time_to_add()
        totals = self._run(batches, forward_only=False, votes=lambda: {**votes(), **spent})
        self.clock.of_all_ranks = Spent.of(totals, dist.get_world_size())
        return totals

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Run this rank's micro-batches forward only. Collective.

        Returns:
            The same sums as forward_backward.
        """
        return self._run(batches, forward_only=True, votes=dict)

    def _run(
        self, batches: Sequence[Batch], *, forward_only: bool, votes: Callable[[], Mapping[str, float]]
    ) -> dict[str, float]:
        sums = run_pipeline(
            self.policy,
            self.forward_step,
            batches,
            self.config,
            forward_only=forward_only,
        )
        last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        with self.clock.during(WAITING):  # the reduction ends when the slowest rank comes to it
            return add_up(
                sums,
                names=names_for(self.config.loss),
                counts_here=last_stage and reports_for_its_stage(),
                device=self.device,
                votes=votes(),
            )

    def _time_to_add(self) -> dict[str, float]:
        return parts(self.clock.seconds(), dist.get_rank(), dist.get_world_size())

    def time_spent(self) -> Spent:
        """Where the time of all ranks went up to now. Collective, and it waits for the device."""
        self.clock.catch_up()
        sums = add_up([], names=[], counts_here=False, device=self.device, votes=self._time_to_add())
        return Spent.of(sums, dist.get_world_size())

    def forward_step(self, batches: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Run one stage on a micro-batch.

        Returns:
            The output of the stage, and the function that turns the output of the last stage into a loss.
        """
        batch = next(batches)
        return model(batch), lambda output: self.loss(output, batch)

    @property
    def device(self) -> torch.device:
        """The device that holds this rank's part of the model."""
        return next(self.chunks[0].parameters()).device

    def find_scales(self, batches: Sequence[Batch]) -> None:
        """Run a training pass without keeping its gradients. Delayed FP8 takes its scales from earlier passes."""
        self.forward_backward(batches)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for model in self.policy:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()

    def gather_weights(self) -> None:
        """Wait until every rank has the updated weights. Needed before anything but a forward pass reads them."""
        if self.config.optimizer.overlap_param_gather:
            for model in self.policy:
                model.start_param_sync(force_sync=True)

    @torch.no_grad()
    def losses_of_pairs(self, batches: Sequence[Batch]) -> dict[int, float]:
        """Run this rank's micro-batches forward only. Collective, and slow where there are many ranks.

        Returns:
            Pair -> its loss, of all micro-batches of all ranks.
        """

        def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[..., Tensor]]:
            batch = next(batches)
            return model(batch), lambda output, non_loss_data: self.loss.of_each_pair(output, batch)

        outputs = run_pipeline(
            self.policy, forward_step, batches, self.config, forward_only=True, collect_non_loss_data=True
        )
        here = {
            pair: loss
            for batch, losses in zip(batches, outputs, strict=False)
            for pair, loss in zip(batch.samples, losses.tolist(), strict=True)
        }
        everywhere: list[dict[int, float]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, here)
        return {pair: loss for found in everywhere for pair, loss in found.items()}

    def gradient_norm(self) -> float:
        """The norm of the gradient over all ranks. Collective."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def advance_schedule(self) -> float:
        """Move the schedule on by a step, and return its learning rate. :meth:`update` does so itself."""
        self.scheduler.step(increment=1)  # before the update, so that no step has learning rate 0
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def update(self) -> tuple[float, float]:
        """Clip the gradient and update the weights, unless the gradient is not finite: then only the schedule moves.

        Returns:
            The norm of the gradient over all ranks, before clipping, and the learning rate of this step.
        """
        learning_rate = self.advance_schedule()
        with self.clock.during(OPTIMIZER):
            norm = self.gradient_norm()
            if math.isfinite(norm):
                clip_grad_by_total_norm_fp32(self.optimizer.get_parameters(), self.config.optimizer.clip_grad, norm)
                self.optimizer.step_with_ready_grads()
        return norm, learning_rate


def build_engine(
    config: Config, description: ModelDescription, *, loss: LossFunction, start: Path | None, frozen: list[Path]
) -> Engine:
    """Build and load everything on this rank. Collective.

    Args:
        loss: Turns the output of the last stage into a loss.
        start: Checkpoint of the policy's weights. None where they will be loaded with the training state.
        frozen: Checkpoints of the frozen models that run beside the policy: none with cached scores, otherwise the
            reference, or the reference and the guidance.
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
    megatron.finalize_model_grads_func = _finalize
    megatron.grad_scale_func = optimizer.scale_loss
    if config.optimizer.overlap_grad_reduce:
        waits = [model.no_sync for model in policy]
        megatron.no_sync_func = waits if len(waits) > 1 else waits[0]
    megatron.timers = Clock(next(chunks[0].parameters()).device)
    return Engine(config, chunks, policy, optimizer, _scheduler(config, optimizer), loss, megatron.timers)


def _finalize(chunks: Sequence[Any], pairs: Tensor | None, **options: Any) -> None:
    """Let Megatron reduce the gradients, and divide them by the number of pairs of all ranks. Collective.

    Megatron would divide, too, but before 0.18 it asks the device whether the number is 0, and the host waits.

    Args:
        pairs: Number of pairs of this rank's micro-batches, known on the last stage. Scalar int; overwritten.
        options: For Megatron.
    """
    finalize_model_grads(chunks, None, **options)
    if pairs is None:
        return
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(pairs, parallel_state.get_pipeline_model_parallel_last_rank(), pipeline)
    dist.all_reduce(pairs, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    for chunk in chunks:
        chunk.scale_gradients(1.0 / pairs.clamp(min=1))  # without any pair the gradients are 0


def run_pipeline(
    models: Sequence[Any],
    forward_step: Callable[..., Any],
    batches: Sequence[Batch],
    config: Config,
    *,
    forward_only: bool,
    collect_non_loss_data: bool = False,
    alone: bool = False,
) -> list[Any]:
    """Run Megatron's pipeline schedule over some micro-batches. Collective.

    Args:
        models: This rank's chunks, wrapped or not.
        forward_step: Runs a stage on one micro-batch. Megatron's schedule calls it.
        collect_non_loss_data: Whether the function that forward_step returns is given the output without computing a
            loss, as in Megatron.
        alone: Whether stages send each other the hidden states of the policy alone, and not of the frozen models.

    Returns:
        On the last stage, what the function returned by forward_step reported for each micro-batch. Empty elsewhere.
    """
    schedule = get_forward_backward_func()
    reported: list[Any] = schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in models],
        model=list(models),
        num_microbatches=len(batches),
        # Megatron divides seq_length by the context-parallel size and, under sequence parallelism, by the
        # tensor-parallel size. Between stages go [that, micro_batch_size, hidden] numbers. Where micro-batches differ
        # in length, stages send each other the true shape.
        seq_length=config.train.micro_batch_tokens or 1,
        # The models whose hidden states travel together.
        micro_batch_size=1 if alone else 1 + len(get_attr_wrapped_model(models[0], "frozen")),
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
    )
    return reported


def reports_for_its_stage() -> bool:
    """Whether this rank is the first of the tensor- and context-parallel ranks of its stage, which all compute the same
    log-probs."""
    return parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_context_parallel_rank() == 0


@torch.no_grad()
def token_logps(models: Sequence[Any], batches: Sequence[Batch], config: Config) -> list[Tensor]:
    """Token log-probs of some micro-batches, nats, without gradient. Collective.

    Args:
        models: This rank's chunks of a model, wrapped or not. They may hold other models.

    Returns:
        On the last pipeline stage [k, R] fp32 for each micro-batch: the model, then the models that it holds. Empty
        elsewhere.
    """

    def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[..., Tensor]]:
        return model(next(batches)), lambda logps, non_loss_data: logps

    return run_pipeline(models, forward_step, batches, config, forward_only=True, collect_non_loss_data=True)


def _optimizer_config(config: Config) -> OptimizerConfig:
    settings = config.optimizer
    bf16 = config.train.precision != "fp32"
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
    """Linear warm-up, then decay, counted in optimizer steps."""
    settings, iterations = config.optimizer, config.train.train_iters
    assert iterations is not None, "with_steps fills it in"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters or 0,
        lr_decay_steps=iterations + 1,  # so that the learning rate of the last step is above min_lr
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=iterations,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
