"""Every setting: its name, type, unit, default, and which combinations are refused.

A complete configuration is one :class:`Config`. Recipes build it in Python, YAML files and
``key=value`` arguments change it, :func:`load` checks it. Nothing here imports torch or Megatron,
so a mistake is reported before anything slow begins.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tgdpo_megatron.errors import UserError


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_assignment=True)


class ModelConfig(_Group):
    """Which weights are trained, and which frozen weights they are compared with."""

    checkpoint: Path | None = None
    """Megatron checkpoint the policy starts from (made by tools.convert_hf_to_megatron, or saved by a run)."""
    reference: Path | None = None
    """Frozen reference checkpoint. Default: `model.checkpoint`, the policy's own start."""
    guidance: Path | None = None
    """Frozen, already aligned checkpoint whose log-ratio to the reference is TGDPO's token reward."""


class ParallelConfig(_Group):
    """How one model is cut over processes. Data parallelism takes what is left of the world size."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share each weight matrix."""
    pipeline_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share the layers, in order."""
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=2)
    """Model chunks per pipeline rank (interleaved schedule); unset for one."""
    context_parallel_size: int = Field(1, ge=1)
    """Ranks that share each sequence. Only 1 is supported."""
    sequence_parallel: bool = False
    """Also split norms and residuals over the tensor-parallel ranks, along the sequence."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


class LossConfig(_Group):
    """Which loss, and its strength. The formulas are in tgdpo_megatron/losses."""

    type: Literal["sft", "dpo", "tgdpo"] = "tgdpo"
    """`sft`: likelihood of the chosen response. `dpo`. `tgdpo`: DPO with every token weighted by guidance."""
    beta: float = Field(0.1, gt=0, allow_inf_nan=False)
    """DPO's inverse temperature on log-ratios, unitless."""
    alpha: float = Field(0.5, ge=0, allow_inf_nan=False)
    """TGDPO: strength of the token reward inside a token's weight, unitless; 0 is DPO."""
    beta_r: float | None = Field(None, gt=0, allow_inf_nan=False)
    """TGDPO: scale of the token reward, unitless. Default: `beta`, as in the authors' code."""

    @property
    def token_reward_scale(self) -> float:
        """`beta_r`, or its default."""
        return self.beta if self.beta_r is None else self.beta_r

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads reference log-probs."""
        return self.type in ("dpo", "tgdpo")

    @property
    def needs_guidance(self) -> bool:
        """Whether the loss reads guidance log-probs."""
        return self.type == "tgdpo"


class ScoresConfig(_Group):
    """Where the reference's and guidance's token log-probs come from."""

    source: Literal["live", "cached"] = "live"
    """`live`: the frozen models run beside the policy. `cached`: files written once by recipes.score."""
    path: Path | None = None
    """Folder of cached scores; recipes.score writes it, recipes.train reads it."""


class DataConfig(_Group):
    """Preference pairs and how they become tokens."""

    train: Path | None = None
    """Pairs to train on, or to score: .json, .jsonl or .parquet with `prompt` (or `instruction`), `chosen`, `rejected`;
    or a folder written by tools.prepare_pairs."""
    validation: Path | None = None
    """Held-out pairs in the same formats, evaluated every `train.eval_interval` iterations."""
    max_length: int = Field(2048, ge=8)
    """Longest sequence (prompt and one response), in tokens. Longer prompts lose their start."""
    shuffle: bool = True
    """Draw pairs in a seeded random order, new in each epoch; false keeps the file's order."""


class OptimizerConfig(_Group):
    """AdamW, gradient clipping and a cosine schedule with warm-up."""

    lr: float = Field(7e-7, gt=0, le=1e30)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Learning rate at the end of the schedule."""
    lr_warmup_iters: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up from 0."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Decoupled weight decay on matrices; norms take none."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""
    adam_eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    """Added to the denominator."""
    clip_grad: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Largest gradient norm, over all ranks."""
    use_distributed_optimizer: bool = True
    """Split optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while backward still runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward already runs. Needs the distributed optimizer."""


class TrainConfig(_Group):
    """One run: how much, how often, where to."""

    output: Path | None = None
    """Folder of the run: resolved config, metrics, checkpoints."""
    train_iters: int = Field(100, ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(128, ge=1)
    """Preference pairs per optimizer step, over all ranks."""
    micro_batch_size: int = Field(1, ge=1)
    """Preference pairs that go through the model at once on one data-parallel rank; not read where
    micro_batch_tokens is set."""
    micro_batch_tokens: int | None = Field(None, ge=16)
    """Tokens that go through the model at once: whole pairs, as many as fit, instead of micro_batch_size."""
    fixed_micro_batches: bool = False
    """Pad every micro-batch to micro_batch_tokens, so that pipeline stages need not tell each other its size."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the model. Log-probs and losses are always fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping: nothing, core attention, or whole layers."""
    seed: int = 42
    """Order of the pairs."""
    log_interval: int = Field(1, ge=1)
    """Iterations between metric lines."""
    eval_interval: int = Field(0, ge=0)
    """Iterations between evaluations on `data.validation`; 0 evaluates only at the end."""
    save_interval: int = Field(0, ge=0)
    """Iterations between checkpoints; 0 saves only at the end."""
    resume: bool = False
    """Continue the run in `output` from its newest checkpoint."""
    distributed_timeout_minutes: int = Field(10, ge=1)
    """A collective that takes longer ends the job."""


class Config(_Group):
    """A complete configuration."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    scores: ScoresConfig = Field(default_factory=ScoresConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)

    @property
    def reference_checkpoint(self) -> Path | None:
        """The frozen reference: `model.reference`, or the policy's own start."""
        return self.model.reference or self.model.checkpoint


def load(base: Config, changes: Mapping[str, Any], *, where: str) -> Config:
    """Return `base` with `changes` laid over it, checked.

    Args:
        base: A complete configuration, usually a recipe's.
        changes: Nested groups of values, as read from YAML.
        where: Named in error messages: a file, or "the command line".

    Raises:
        UserError: An unknown key (the nearest is named), a wrong type, or a value out of range.
    """
    merged = base.model_dump()
    _overlay(merged, changes, Config, prefix="", where=where)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {key}={first['input']!r} is refused: {_reason(first)}.") from None


def _reason(error: Any) -> str:
    text: str = error["msg"]
    return text[0].lower() + text[1:]


def _overlay(
    target: dict[str, Any], changes: Mapping[str, Any], group: type[BaseModel], prefix: str, where: str
) -> None:
    for name, value in changes.items():
        key = f"{prefix}{name}"
        if name not in group.model_fields:
            raise UserError(f"{where}: unknown key '{key}'{_nearest(str(name), prefix, group)}.")
        inner = group.model_fields[name].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            if not isinstance(value, Mapping):
                raise UserError(f"{where}: '{key}' is a group of settings, not {value!r}; write {key}.NAME=VALUE.")
            _overlay(target[name], value, inner, prefix=f"{key}.", where=where)
        elif isinstance(value, bool) and inner is not bool:
            raise UserError(f"{where}: {key}={str(value).lower()} is refused: input should not be true or false.")
        else:
            target[name] = value


def _nearest(name: str, prefix: str, group: type[BaseModel]) -> str:
    """A hint: the same name in another group, else the most similar name here, else elsewhere."""
    elsewhere = {
        field: f"{group_name}.{field}"
        for group_name, description in Config.model_fields.items()
        for field in _fields(description.annotation)
    }
    if name in elsewhere:
        return f"; did you mean '{elsewhere[name]}'"
    if close := difflib.get_close_matches(name, group.model_fields, n=1, cutoff=0.5):
        return f"; did you mean '{prefix}{close[0]}'"
    if close := difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.7):
        return f"; did you mean '{elsewhere[close[0]]}'"
    return f"; known here: {', '.join(prefix + field for field in group.model_fields)}"


def _fields(annotation: Any) -> Iterable[str]:
    return annotation.model_fields if isinstance(annotation, type) and issubclass(annotation, BaseModel) else ()


def check_batch_layout(config: Config, *, world_size: int) -> int:
    """Check that processes, layout, batch and schedule fit each other; return the data-parallel size.

    Raises:
        UserError: One sentence naming the numbers that do not divide.
    """
    parallel, train = config.parallel, config.train
    if parallel.context_parallel_size > 1:
        raise UserError(
            f"parallel.context_parallel_size={parallel.context_parallel_size} is not supported: "
            "a pair's sum over tokens would be split before the loss; set it to 1."
        )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise UserError(
            "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1; set it to false."
        )
    if parallel.virtual_pipeline_model_parallel_size and parallel.pipeline_model_parallel_size == 1:
        raise UserError(
            "parallel.virtual_pipeline_model_parallel_size needs parallel.pipeline_model_parallel_size > 1; unset it."
        )
    if world_size % parallel.model_parallel_size:
        raise UserError(
            f"{world_size} processes cannot be split into model copies of {parallel.model_parallel_size} "
            f"(tensor {parallel.tensor_model_parallel_size} × pipeline {parallel.pipeline_model_parallel_size}); "
            "change --nproc-per-node or the parallel sizes."
        )
    if config.optimizer.overlap_param_gather and not (
        config.optimizer.use_distributed_optimizer and config.optimizer.overlap_grad_reduce
    ):
        raise UserError(
            "optimizer.overlap_param_gather=true needs optimizer.use_distributed_optimizer=true and "
            "optimizer.overlap_grad_reduce=true; set both."
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        raise UserError(
            f"optimizer.min_lr={config.optimizer.min_lr} is more than optimizer.lr={config.optimizer.lr}; lower it."
        )
    if config.optimizer.lr_warmup_iters >= train.train_iters:
        raise UserError(
            f"optimizer.lr_warmup_iters={config.optimizer.lr_warmup_iters} leaves nothing of "
            f"train.train_iters={train.train_iters}; lower it."
        )
    data_parallel_size = world_size // parallel.model_parallel_size
    if train.eval_interval and config.data.validation is None:
        raise UserError(
            f"train.eval_interval={train.eval_interval} needs data.validation; set it, or the interval to 0."
        )
    if train.micro_batch_tokens is not None:
        if train.micro_batch_tokens % parallel.tensor_model_parallel_size:
            raise UserError(
                f"train.micro_batch_tokens={train.micro_batch_tokens} is not a multiple of "
                f"parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size}; round it up."
            )
        return data_parallel_size
    if train.fixed_micro_batches:
        raise UserError("train.fixed_micro_batches=true needs train.micro_batch_tokens, the size to pad to; set it.")
    pairs_at_once = train.micro_batch_size * data_parallel_size
    if train.global_batch_size % pairs_at_once:
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} pairs is not a multiple of micro_batch_size × "
            f"data-parallel size = {train.micro_batch_size} × {data_parallel_size} = {pairs_at_once}; "
            "change one of them."
        )
    micro_batches = train.global_batch_size // pairs_at_once
    if parallel.virtual_pipeline_model_parallel_size and micro_batches % parallel.pipeline_model_parallel_size:
        raise UserError(
            f"{micro_batches} micro-batches per step do not fill the interleaved pipeline of "
            f"{parallel.pipeline_model_parallel_size} ranks evenly; make train.global_batch_size a multiple of "
            f"{pairs_at_once * parallel.pipeline_model_parallel_size}."
        )
    return data_parallel_size
