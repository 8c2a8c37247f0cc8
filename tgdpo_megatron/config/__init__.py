"""The settings of a run, and the checks that they go through.

A complete configuration is one :class:`Config`. Recipes build it in Python. YAML files and ``key=value`` arguments
change it through :func:`load`, and :func:`complete` fills in the defaults of the loss. Nothing here imports torch or
Megatron, so that a mistake is reported before anything slow begins.
"""

from tgdpo_megatron.config.checks import check_batch_layout, check_layout, complete, required
from tgdpo_megatron.config.loading import ALTERNATIVES, COMMAND_LINE, explain_option, load
from tgdpo_megatron.config.settings import (
    ClusterConfig,
    Config,
    DataConfig,
    FormatName,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ReportConfig,
    ScoresConfig,
    TrainConfig,
)
from tgdpo_megatron.config.steps import on_device, with_steps

__all__ = [
    "ALTERNATIVES",
    "COMMAND_LINE",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "FormatName",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ReportConfig",
    "ScoresConfig",
    "TrainConfig",
    "check_batch_layout",
    "check_layout",
    "complete",
    "explain_option",
    "load",
    "on_device",
    "required",
    "with_steps",
]
