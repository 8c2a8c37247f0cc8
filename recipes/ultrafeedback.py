"""One epoch of UltraFeedback on 8 × 80 GB: what the settings of TGDPO and T-REG share, and a layout for each model.

Both papers follow SimPO's setup. Where every value is from: docs/methods.md, "Where the papers' values come from".

The layouts are ours, by the arithmetic of `python -m tools.plan` (local layers, fullest rank, longest pairs), not
measured on a GPU. Recomputing core attention alone frees next to nothing, so nothing is recomputed; where memory is
short, halve micro_batch_tokens (a pair needs at most 4096), then train.recompute=full.
"""

from tgdpo_megatron.config import (
    ClusterConfig,
    Config,
    DataConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    ScoresConfig,
    TrainConfig,
)


def llama3_8b(loss: LossConfig, *, lr: float) -> Config:
    """Llama-3-8B at TP2 DP4."""
    # 65.4 GiB with DPO's live reference, 57.9 with cached scores; TP1 with it live: 118.
    return one_epoch(loss, lr, tensor_parallel=2)


def llama32_3b(loss: LossConfig, *, lr: float) -> Config:
    """Llama-3.2-3B at DP8."""
    # 55.6 GiB with DPO's live reference, 49.5 with cached scores.
    return one_epoch(loss, lr, tensor_parallel=1)


def gemma2_2b(loss: LossConfig, *, lr: float) -> Config:
    """Gemma-2-2B at DP8."""
    # 49.6 GiB with DPO's live reference, 44.7 with cached scores.
    return one_epoch(loss, lr, tensor_parallel=1)


def gemma2_9b(loss: LossConfig, *, lr: float) -> Config:
    """Gemma-2-9B at TP4 DP2."""
    # 44.4 GiB with cached scores; TP2: 73.5, which an 80 GB GPU hardly has.
    return one_epoch(loss, lr, tensor_parallel=4)


def one_epoch(loss: LossConfig, lr: float, *, tensor_parallel: int) -> Config:
    """What all settings share, on one node."""
    return Config(
        parallel=ParallelConfig(tensor_model_parallel_size=tensor_parallel, sequence_parallel=tensor_parallel > 1),
        loss=loss,
        # Token rewards are scored once, before the run; DPO's reference is used once, so it runs beside the policy.
        scores=ScoresConfig(source="cached" if loss.reward_source else "live"),
        data=DataConfig(max_length=2048),
        optimizer=OptimizerConfig(lr=lr, lr_warmup_fraction=0.1, overlap_grad_reduce=True, overlap_param_gather=True),
        train=TrainConfig(num_epochs=1, global_batch_size=128, micro_batch_tokens=8192, save_interval=60),
        cluster=ClusterConfig(nodes=1, gpus_per_node=8),
    )
