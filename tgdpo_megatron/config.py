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
from tgdpo_megatron.methods import GIVEN_BY, METHODS, SCORE_NAMES, SOURCES, Method, SequenceWeight, reward_options

FP8_MULTIPLE, FP8_BLOCK = 16, 128
"""FP8 matrix products take sizes that are multiples of the first. Where scaling is blockwise and ranks split the
sequence, Transformer Engine gathers only whole blocks: the second."""

FP8_FORMATS = {"tensorwise": "hybrid", "delayed": "hybrid", "blockwise": "e4m3"}
"""The format that goes with each recipe: Transformer Engine's defaults."""

LayoutName = Literal[
    "trl",
    "trl_messages",
    "trl_implicit_prompt",
    "trl_implicit_prompt_messages",
    "llama_factory",
    "llama_factory_sharegpt",
    "llama_factory_openai",
    "ultrafeedback_binarized",
    "nemo_rl",
    "nemo_rl_binary",
    "hh_rlhf",
]
"""Ways to write preference pairs down; what each looks like is in tgdpo_megatron/data/layouts.py."""


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
    """Which loss, and its strength. The formulas are in tgdpo_megatron/losses, the defaults in methods.py.

    A setting left unset takes the method's default; one that the method does not read is refused.
    """

    type: Literal[
        "sft",
        "dpo",
        "dpo_norm",
        "robust",
        "hinge",
        "ipo",
        "ipo_sum",
        "simpo",
        "tgdpo",
        "tdpo1",
        "tdpo2",
        "sepo",
        "dpo_reg",
        "simpo_reg",
    ] = "tgdpo"
    """`sft`: likelihood of the chosen response. `dpo`; `dpo_norm`: per token; `robust`, `hinge`, `ipo` (per token),
    `ipo_sum`: other losses on DPO's margin. `simpo`: per token, no reference. `tgdpo`: DPO with every token weighted by
    its reward. `tdpo1`, `tdpo2`: with the divergence from the reference. `sepo`: on the tokens of highest and lowest
    reward. `dpo_reg`, `simpo_reg`: T-REG."""
    beta: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Inverse temperature, unitless."""
    label_smoothing: float | None = Field(None, ge=0, lt=0.5)
    """dpo, dpo_norm, simpo, robust: probability that a pair's label is wrong."""
    gamma_beta_ratio: float | None = Field(None, ge=0, allow_inf_nan=False)
    """simpo, simpo_reg: margin that is asked for, over beta."""
    alpha: float | None = Field(None, ge=0, allow_inf_nan=False)
    """tgdpo: strength of r̂ in a token's weight; 0 is DPO. tdpo2: of the divergence. dpo_reg, simpo_reg: of the
    regulariser. Unitless."""
    sequence_weight: SequenceWeight | None = None
    """dpo_reg, simpo_reg: weight of a pair's regulariser: σ(−margin), `detached` from the gradient or `attached`, or
    `static`."""
    static_weight: float | None = Field(None, gt=0, allow_inf_nan=False)
    """The weight where sequence_weight=static. Default: 1."""
    gamma: float | None = Field(None, gt=0, allow_inf_nan=False)
    """sepo: scale of the mean log-prob of selected tokens."""
    selected_share: float | None = Field(None, gt=0, le=1)
    """sepo: share of a response's tokens that is selected."""
    sft_loss_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Adds this much of the chosen response's negative mean log-prob to the loss."""
    token_rewards: Literal["guidance", "contrastive", "file", "chosen"] | None = None
    """tgdpo, sepo, dpo_reg, simpo_reg: where the token rewards r̂ come from. `guidance`: log-ratio of model.guidance to
    the reference. `contrastive`: log-ratio of the reference under a prompt that asks for better and one that asks for
    worse. `file`: scores.reward_file. `chosen`: 1 on the chosen response, 0 on the rejected one."""
    beta_r: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Scale of r̂. Default: `beta` for guidance, as in TGDPO's code, else 1."""
    reward_squash: bool | None = None
    """Turn r̂ into σ(r̂) − 0.5. Default: for contrastive rewards only."""
    reward_clip: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Limit of |r̂|, after scaling and squashing. Default: none."""
    reward_end_of_turn: bool | None = None
    """Whether the token that closes a response has a reward; false gives it 0. Default: true."""

    @property
    def method(self) -> Method:
        """What `type` reads."""
        return METHODS[self.type]

    @property
    def source(self) -> str | None:
        """Where token rewards come from; None for a method without."""
        return (self.token_rewards or self.method.rewards) if self.method.rewards else None

    @property
    def options(self) -> dict[str, Any]:
        """The method's own settings, defaults filled in: what its formula takes."""
        return {name: _value(self, name, default) for name, default in self.method.options.items()}

    @property
    def reward_options(self) -> dict[str, Any]:
        """The settings of its token rewards, defaults filled in."""
        if self.source is None:
            return {}
        defaults = reward_options(self.method, self.source)
        options = {name: _value(self, name, default) for name, default in defaults.items()}
        if "beta_r" in options and options["beta_r"] is None:
            options["beta_r"] = self.options.get("beta", 1.0)
        return options

    @property
    def scores(self) -> tuple[str, ...]:
        """The per-token scores it needs beside the policy, in the order of the store."""
        needed = {"reference"} if "reference" in self.method.reads else set()
        needed |= set(SOURCES[self.source].scores) if self.source else set()
        return tuple(name for name in SCORE_NAMES if name in needed)

    @property
    def log_prob_scores(self) -> tuple[str, ...]:
        """Those that are log-probs of frozen models: what recipes.score computes."""
        return tuple(name for name in self.scores if name != "reward")

    @property
    def frozen_models(self) -> tuple[str, ...]:
        """The frozen models those come from."""
        return tuple(model for model, gives in GIVEN_BY.items() if set(gives).intersection(self.scores))

    @property
    def carried(self) -> tuple[str, ...]:
        """The frozen models that ride with the policy where scores are live."""
        return tuple(name for name in ("reference", "guidance") if name in self.scores)


def _value(loss: LossConfig, name: str, default: Any) -> Any:
    value = getattr(loss, name)
    return default if value is None else value


class ScoresConfig(_Group):
    """Where the reference's and guidance's token log-probs, and other token rewards, come from."""

    source: Literal["live", "cached"] = "live"
    """`live`: the frozen models run beside the policy. `cached`: files written once by recipes.score."""
    path: Path | None = None
    """Folder of cached scores; recipes.score writes it, recipes.train reads it."""
    reward_file: Path | None = None
    """For loss.token_rewards=file: .jsonl with a line for each pair of data.train (format: scores/reward_file.py)."""
    validation_reward_file: Path | None = None
    """The same for data.validation."""
    contrastive_prompts: Path | None = None
    """For loss.token_rewards=contrastive: YAML with the templates `better` and `worse`. Default:
    tgdpo_megatron/scores/prompts/refine.yaml."""


class DataConfig(_Group):
    """Preference pairs and how they become tokens."""

    train: Path | None = None
    """Pairs to train on, or to score: .json, .jsonl, .parquet or a saved `datasets` folder, in any known layout;
    or a folder written by tools.prepare_pairs."""
    validation: Path | None = None
    """Held-out pairs in the same formats, evaluated every `train.eval_interval` iterations."""
    layout: LayoutName | None = None
    """How the pairs are written down. Default: recognised by the columns, and printed."""
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
    fp8: Literal["hybrid", "e4m3"] | None = None
    """FP8 format of the policy's linear layers, in training: `hybrid` (gradients in e5m2) or `e4m3` throughout. Frozen
    models, attention, norms and the head stay in bf16 or fp32 (docs/fp8.md). Needs Transformer Engine."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise"] | None = None
    """How FP8 numbers are scaled: by each tensor's own largest value, by the largest of earlier micro-batches, or
    by blocks (with fp8=e4m3). Default: tensorwise where fp8 is set."""
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

    @property
    def recipe_of_fp8(self) -> str | None:
        """`fp8_recipe`, its default filled in; None without FP8."""
        return (self.fp8_recipe or "tensorwise") if self.fp8 else None


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

    @property
    def fp8_multiple(self) -> int:
        """What FP8 wants the tokens on a rank, and the hidden channels, to be a multiple of; 1 without FP8."""
        if self.train.fp8 is None:
            return 1
        in_blocks = self.train.fp8_recipe == "blockwise" and self.parallel.sequence_parallel
        return FP8_BLOCK if in_blocks else FP8_MULTIPLE

    @property
    def token_multiple(self) -> int:
        """Tokens of a micro-batch are padded to a multiple of this, so that ranks and FP8 can divide them."""
        ranks = self.parallel.tensor_model_parallel_size if self.parallel.sequence_parallel else 1
        return ranks * self.fp8_multiple


def complete(config: Config, *, where: str) -> Config:
    """Write the method's defaults out, and refuse what it does not read.

    Raises:
        UserError: A setting that nothing would read, or that another one needs.
    """
    loss = config.loss
    reads = {"type", "sft_loss_weight", *loss.method.options}
    reads |= {"token_rewards", *loss.reward_options} if loss.source else set()
    if loss.type == "sft":
        reads.remove("sft_loss_weight")
    for name, field in LossConfig.model_fields.items():
        value = getattr(loss, name)
        if name not in reads and value != field.default:
            method = f"loss.type={loss.type}"
            method += f" with loss.token_rewards={loss.source}" if loss.source else ""
            default = "null" if field.default is None else field.default
            raise UserError(
                f"{where}: {method} does not read loss.{name}={value}; leave it out (loss.{name}={default})."
            )
    if loss.source == "chosen" and loss.method.order_alone:
        raise UserError(
            f"{where}: loss.token_rewards=chosen gives all tokens of a response the same reward, and "
            f"loss.type={loss.type} nothing to select; choose another source."
        )
    for name, source in {
        "reward_file": "file",
        "validation_reward_file": "file",
        "contrastive_prompts": "contrastive",
    }.items():
        if getattr(config.scores, name) is not None and loss.source != source:
            raise UserError(
                f"{where}: scores.{name} is not read by loss.type={loss.type}"
                + (f" with loss.token_rewards={loss.source}; set that to {source}, or" if loss.source else ";")
                + f" leave scores.{name} out."
            )
    for role in GIVEN_BY:
        if getattr(config.model, role) is not None and role not in loss.frozen_models:
            raise UserError(
                f"{where}: model.{role} is not read by loss.type={loss.type}"
                + (f" with loss.token_rewards={loss.source}" if loss.source else "")
                + "; leave it out."
            )
    if loss.static_weight is not None and loss.sequence_weight != "static":
        raise UserError(f"{where}: loss.static_weight={loss.static_weight} needs loss.sequence_weight=static.")
    train = config.train
    if train.fp8_recipe and not train.fp8:
        raise UserError(
            f"{where}: train.fp8_recipe={train.fp8_recipe} is not read without train.fp8; set it to hybrid."
        )
    if train.fp8 and train.precision != "bf16":
        raise UserError(
            f"{where}: train.fp8={train.fp8} needs train.precision=bf16, which the other layers keep; set it."
        )
    filled = loss.options | loss.reward_options | ({"token_rewards": loss.source} if loss.source else {})
    if train.fp8 == "hybrid" and train.fp8_recipe == "blockwise":
        raise UserError(
            f"{where}: train.fp8_recipe=blockwise takes train.fp8=e4m3, Transformer Engine's own choice for it; set it."
        )
    return config.model_copy(
        update={
            "loss": loss.model_copy(update=filled),
            "train": train.model_copy(update={"fp8_recipe": train.recipe_of_fp8}),
        }
    )


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
        elif isinstance(value, bool) and inner not in (bool, bool | None):
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


def check_layout(config: Config, *, world_size: int) -> int:
    """Check that processes and layout fit each other; return the data-parallel size.

    Raises:
        UserError: One sentence naming the numbers that do not divide.
    """
    parallel, train = config.parallel, config.train
    tensor = parallel.tensor_model_parallel_size
    if parallel.context_parallel_size > 1:
        raise UserError(
            f"parallel.context_parallel_size={parallel.context_parallel_size} is not supported: "
            "a pair's sum over tokens would be split before the loss; set it to 1."
        )
    if parallel.sequence_parallel and tensor == 1:
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
            f"(tensor {tensor} × pipeline {parallel.pipeline_model_parallel_size}); "
            "change --nproc-per-node or the parallel sizes."
        )
    if train.micro_batch_tokens is not None and train.micro_batch_tokens % config.token_multiple:
        causes = [f"FP8's {config.fp8_multiple}"] if train.fp8 else []
        if parallel.sequence_parallel:
            causes.append(f"parallel.tensor_model_parallel_size={tensor}, over which sequence_parallel splits them")
        raise UserError(
            f"train.micro_batch_tokens={train.micro_batch_tokens} is not a multiple of {config.token_multiple} "
            f"({' × '.join(causes)}); round it up to "
            f"{-(-train.micro_batch_tokens // config.token_multiple) * config.token_multiple}."
        )
    return world_size // parallel.model_parallel_size


def check_batch_layout(config: Config, *, world_size: int) -> int:
    """Check that processes, layout, batch and schedule of a training fit each other; return the data-parallel size.

    Raises:
        UserError: One sentence naming the numbers that do not divide.
    """
    data_parallel_size = check_layout(config, world_size=world_size)
    parallel, train = config.parallel, config.train
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
    if train.eval_interval and config.data.validation is None:
        raise UserError(
            f"train.eval_interval={train.eval_interval} needs data.validation; set it, or the interval to 0."
        )
    if train.micro_batch_tokens is not None:
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
