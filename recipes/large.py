"""TGDPO of models of 70 billion parameters on 32 and 64 GPUs of 80 GB, each with the DPO run that makes its guidance.

No paper trained models of this size with token rewards: the values are those of Llama-3-8B with pairs chosen by PairRM
(tgdpo.py), and untested here.

The layouts are the planner's: the fastest of those that `python -m tools.plan` lists for the DPO run, whose reference
runs beside the policy. The TGDPO run takes the same. Tensor parallelism stays within a node of 8 GPUs, whose links are
faster than those between nodes. A micro-batch holds one longest pair on 32 GPUs and two on 64. What the planner says of
each run stands beside it (local layers, fullest rank, longest pairs); nothing was measured on a GPU.

One node is not enough: on 8 GPUs, weights, gradients and optimizer of such a policy alone need 148 GiB of each.
"""

from recipes.tgdpo import guidance_loss, tgdpo_loss
from recipes.ultrafeedback import one_epoch
from tgdpo_megatron.config import Config, LossConfig


def dpo_llama3_70b_4x8() -> Config:
    """DPO, the guidance for TGDPO: Llama-3-70B-Instruct, 4 nodes of 8 × 80 GB.

    TP8 PP4 DP1: up to 57.0 GiB in 'forward and backward' with 4096 tokens at once (optimizer state 25.4 GiB,
    activations 14.3 GiB, gradients 8.46 GiB, policy weights 4.23 GiB, frozen weights 4.23 GiB, working memory 320 MiB).
    """
    return _on_32_gpus(guidance_loss())


def tgdpo_llama3_70b_4x8() -> Config:
    """TGDPO: Llama-3-70B-Instruct, 4 nodes of 8 × 80 GB.

    TP8 PP4 DP1: up to 52.7 GiB in 'forward and backward' with 4096 tokens at once (optimizer state 25.4 GiB,
    activations 14.3 GiB, gradients 8.46 GiB, policy weights 4.23 GiB, working memory 320 MiB).
    """
    return _on_32_gpus(tgdpo_loss())


def dpo_llama3_70b_8x8() -> Config:
    """DPO, the guidance for TGDPO: Llama-3-70B-Instruct, 8 nodes of 8 × 80 GB.

    TP8 PP4 DP2: up to 58.8 GiB in 'forward and backward' with 8192 tokens at once (activations 28.6 GiB, optimizer
    state 12.7 GiB, gradients 8.46 GiB, policy weights 4.23 GiB, frozen weights 4.23 GiB, working memory 528 MiB).
    """
    return _on_64_gpus(guidance_loss())


def tgdpo_llama3_70b_8x8() -> Config:
    """TGDPO: Llama-3-70B-Instruct, 8 nodes of 8 × 80 GB.

    TP8 PP4 DP2: up to 54.5 GiB in 'forward and backward' with 8192 tokens at once (activations 28.6 GiB, optimizer
    state 12.7 GiB, gradients 8.46 GiB, policy weights 4.23 GiB, working memory 528 MiB).
    """
    return _on_64_gpus(tgdpo_loss())


def dpo_qwen25_72b_4x8() -> Config:
    """DPO, the guidance for TGDPO: Qwen2.5-72B-Instruct, 4 nodes of 8 × 80 GB.

    TP8 PP4 DP1: up to 58.7 GiB in 'forward and backward' with 4096 tokens at once (optimizer state 26.3 GiB,
    activations 14.6 GiB, gradients 8.76 GiB, policy weights 4.38 GiB, frozen weights 4.38 GiB, working memory 322 MiB).
    """
    return _on_32_gpus(guidance_loss())


def tgdpo_qwen25_72b_4x8() -> Config:
    """TGDPO: Qwen2.5-72B-Instruct, 4 nodes of 8 × 80 GB.

    TP8 PP4 DP1: up to 54.3 GiB in 'forward and backward' with 4096 tokens at once (optimizer state 26.3 GiB,
    activations 14.6 GiB, gradients 8.76 GiB, policy weights 4.38 GiB, working memory 322 MiB).
    """
    return _on_32_gpus(tgdpo_loss())


def dpo_qwen25_72b_8x8() -> Config:
    """DPO, the guidance for TGDPO: Qwen2.5-72B-Instruct, 8 nodes of 8 × 80 GB.

    TP8 PP4 DP2: up to 60.3 GiB in 'forward and backward' with 8192 tokens at once (activations 29.2 GiB, optimizer
    state 13.1 GiB, gradients 8.76 GiB, policy weights 4.38 GiB, frozen weights 4.38 GiB, working memory 528 MiB).
    """
    return _on_64_gpus(guidance_loss())


def tgdpo_qwen25_72b_8x8() -> Config:
    """TGDPO: Qwen2.5-72B-Instruct, 8 nodes of 8 × 80 GB.

    TP8 PP4 DP2: up to 56.0 GiB in 'forward and backward' with 8192 tokens at once (activations 29.2 GiB, optimizer
    state 13.1 GiB, gradients 8.76 GiB, policy weights 4.38 GiB, working memory 528 MiB).
    """
    return _on_64_gpus(tgdpo_loss())


def _on_32_gpus(loss: LossConfig) -> Config:
    return _of_nodes(4, loss, micro_batch_tokens=4096)


def _on_64_gpus(loss: LossConfig) -> Config:
    return _of_nodes(8, loss, micro_batch_tokens=8192)


def _of_nodes(nodes: int, loss: LossConfig, *, micro_batch_tokens: int) -> Config:
    config = one_epoch(loss, lr=7e-7, tensor_parallel=8)
    config.parallel.pipeline_model_parallel_size = 4
    config.train.micro_batch_tokens = micro_batch_tokens
    config.train.save_interval = 0  # at 14 bytes a parameter a checkpoint is 1 TB: train.save_minutes alone
    config.cluster.nodes = nodes
    return config
