"""Llama-3-8B-Instruct on one node of 8 × 80 GB. Not measured yet: the layout is sized by arithmetic."""

from tgdpo_megatron.config import (
    Config,
    DataConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    ScoresConfig,
    TrainConfig,
)


def dpo_llama3_8b() -> Config:
    """DPO, as the guidance model of TGDPO is trained."""
    return Config(
        parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        loss=LossConfig(type="dpo", beta=0.1),
        data=DataConfig(max_length=2048),
        optimizer=OptimizerConfig(lr=7e-7, lr_warmup_iters=47, overlap_grad_reduce=True, overlap_param_gather=True),
        train=TrainConfig(train_iters=467, global_batch_size=128, micro_batch_tokens=8192, save_interval=60),
    )


def tgdpo_llama3_8b() -> Config:
    """TGDPO from the SFT model, with the authors' YAML values: beta 0.1 (their paper's notes say 0.01), alpha 0.5."""
    config = dpo_llama3_8b()
    config.loss = LossConfig(type="tgdpo", beta=0.1, alpha=0.5)
    config.scores = ScoresConfig(source="cached")
    return config
