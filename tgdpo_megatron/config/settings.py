"""Every setting: its name, type, unit and default."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from tgdpo_megatron.config.constants import FP8_BLOCK, FP8_MULTIPLE
from tgdpo_megatron.losses import LOSSES, Loss, Option
from tgdpo_megatron.losses.rewards import GIVEN_BY, REWARD_SOURCES, SCORE_NAMES, reward_options

FormatName = Literal[
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
"""Ways to write preference pairs down; what each looks like is in tgdpo_megatron/data/formats.py."""


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


class _LossSettings(_Group):
    """Which loss, and its strength. The formulas, their options and defaults are in tgdpo_megatron/losses.

    A setting left unset takes the default of the loss; one that the loss does not read is refused.
    """

    type: str = "tgdpo"
    sft_loss_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Adds this much of the chosen response's negative mean log-prob to the loss."""
    token_rewards: Literal["guidance", "contrastive", "file", "chosen"] | None = None
    """For losses with token rewards r̂: where they come from. `guidance`: log-ratio of model.guidance to
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
    def method(self) -> Loss:
        """The declaration of `type`."""
        return LOSSES[self.type]

    @property
    def reward_source(self) -> str | None:
        """Where the token rewards come from; None for a loss without."""
        return (self.token_rewards or self.method.rewards) if self.method.rewards else None

    @property
    def options(self) -> dict[str, Any]:
        """The method's own settings, defaults filled in: what its formula takes."""
        return {name: _value(self, name, default) for name, default in self.method.defaults.items()}

    @property
    def reward_options(self) -> dict[str, Any]:
        """The settings of its token rewards, defaults filled in."""
        if self.reward_source is None:
            return {}
        defaults = reward_options(self.method, self.reward_source)
        options = {name: _value(self, name, default) for name, default in defaults.items()}
        if "beta_r" in options and options["beta_r"] is None:
            options["beta_r"] = self.options.get("beta", 1.0)
        return options

    @property
    def scores(self) -> tuple[str, ...]:
        """The per-token scores it needs beside the policy, in the order of the store."""
        needed = {"reference"} if "reference" in self.method.reads else set()
        needed |= set(REWARD_SOURCES[self.reward_source].scores) if self.reward_source else set()
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


def _value(loss: _LossSettings, name: str, default: Any) -> Any:
    value = getattr(loss, name)
    return default if value is None else value


def _loss_config() -> type[_LossSettings]:
    """The loss's settings, with those that the declared losses have as options."""
    meanings = "\n\n".join(f"`{name}`: {loss.meaning}" for name, loss in LOSSES.items())
    fields: dict[str, Any] = {"type": (Literal[tuple(LOSSES)], Field("tgdpo", description=meanings))}
    for loss in LOSSES.values():
        for name, option in loss.options.items():
            fields.setdefault(name, (_annotation(option), _field(name, option)))
    return create_model("LossConfig", __base__=_LossSettings, __doc__=_LossSettings.__doc__, **fields)


def _annotation(option: Option) -> Any:
    return Literal[option.choices] | None if option.choices else float | None


def _field(name: str, option: Option) -> Any:
    """An option's field: unset by default, its range, and what it means for each loss that has it."""
    told: dict[str, list[str]] = {}
    for loss in LOSSES.values():
        if name in loss.options:
            its = loss.options[name]
            default = "" if its.default is None else f" ({its.default})"
            told.setdefault(its.meaning, []).append(f"{loss.name}{default}")
    description = " ".join(f"{meaning} Default by loss: {', '.join(losses)}." for meaning, losses in told.items())
    if option.choices:
        return Field(None, description=description)
    return Field(
        None,
        gt=option.above,
        ge=option.at_least,
        lt=option.below,
        le=option.at_most,
        allow_inf_nan=False,
        description=description,
    )


if TYPE_CHECKING:

    class LossConfig(_LossSettings):
        """As below; which options there are is known only when the losses have been read."""

        def __init__(self, **settings: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

else:
    LossConfig = _loss_config()


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
    """Pairs to train on, or to score: .json, .jsonl, .parquet or a saved `datasets` folder, in any known format;
    or a folder written by tools.prepare_pairs."""
    validation: Path | None = None
    """Held-out pairs, given in the same ways, evaluated every `train.eval_interval` iterations."""
    format: FormatName | None = None
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
