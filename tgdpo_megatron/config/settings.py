"""Every setting: its name, type, unit and default."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, create_model, field_validator

from tgdpo_megatron.config.constants import FP8_BLOCK, FP8_MULTIPLE, MOST
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
    "hh_rlhf_prompt",
    "pairs",
    "pairs_of_conversations",
    "scored_lists",
    "llama_factory_output",
    "swift_messages",
    "swift_rejected_messages",
    "openai_preference",
    "lmflow",
    "vertex_gemini",
    "amazon_nova",
    "paddlenlp",
    "helpsteer2_preference",
    "helpsteer3_preference",
    "pku_saferlhf",
    "shp",
    "halos",
    "webgpt",
    "summarize_from_feedback",
    "alpaca_farm",
    "arena",
    "arena_table",
    "ultrafeedback",
    "nectar",
]
"""Formats of preference pairs; tgdpo_megatron/data/formats/table.py describes each."""


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_assignment=True)

    @field_validator("*")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > MOST:
            raise ValueError(f"a whole number should be at most {MOST}")
        return value


class ModelConfig(_Group):
    """Which weights are trained, and which frozen weights they are compared with."""

    # A Path, like every other place: the name of a model on a hub stays what it is in one.
    checkpoint: Path | None = None
    """Model that the policy starts from: a HuggingFace folder, the name of a model on a hub (`ORGANISATION/NAME` or
    `ORGANISATION/NAME@REVISION`), a Megatron checkpoint, or the folder of a run. HuggingFace models are converted once,
    into the cache folder."""
    reference: Path | None = None
    """Frozen reference checkpoint. Default: `model.checkpoint`, from which the policy starts. It is given in the same
    ways."""
    guidance: Path | None = None
    """Frozen, already aligned checkpoint whose log-ratio to the reference is TGDPO's token reward. It is given in
    the same ways."""
    require_certificate: bool = True
    """Whether a checkpoint is refused that no certificate shows to give HuggingFace's log-probs (docs/models.md)."""


class ParallelConfig(_Group):
    """How one model is split over processes. The data-parallel size is the world size divided by these sizes."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share each weight matrix."""
    pipeline_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share the layers, in order."""
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=2)
    """Model chunks per pipeline rank, for the interleaved schedule. Default: one chunk, without interleaving."""
    context_parallel_size: int = Field(1, ge=1)
    """Ranks over which each sequence is split, where one is too long for a rank. Each gathers all keys and values."""
    sequence_parallel: bool = False
    """Whether to also split norms and residuals over the tensor-parallel ranks, along the sequence."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


class _LossSettings(_Group):
    """Which loss, and its options. The formulas, their options and defaults are in tgdpo_megatron/losses.

    An option that is not set takes the default of the loss. An option that the loss does not read is refused.
    """

    type: str = "tgdpo"
    sft_loss_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the chosen response's negative mean log-prob, which is added to the loss."""
    token_rewards: str | None = None
    beta_r: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Scale of r̂. Default: `beta` for guidance, as in TGDPO's code, otherwise 1."""
    reward_squash: bool | None = None
    """Whether to turn r̂ into σ(r̂) − 0.5. Default: true for contrastive rewards, otherwise false."""
    reward_clip: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Limit of |r̂|, after scaling and squashing. Default: no limit."""
    reward_end_of_turn: bool | None = None
    """Whether the token that closes a response keeps its reward. False gives it 0. Default: true."""

    @property
    def method(self) -> Loss:
        """The declaration of `type`."""
        return LOSSES[self.type]

    @property
    def reward_source(self) -> str | None:
        """Where the token rewards come from; None for a loss without token rewards."""
        return (self.token_rewards or self.method.rewards) if self.method.rewards else None

    @property
    def options(self) -> dict[str, Any]:
        """The options of the loss with defaults filled in, as its formula takes them."""
        return {name: _value(self, name, default) for name, default in self.method.defaults.items()}

    @property
    def reward_options(self) -> dict[str, Any]:
        """The settings of the token rewards with defaults filled in."""
        if self.reward_source is None:
            return {}
        defaults = reward_options(self.method, self.reward_source)
        options = {name: _value(self, name, default) for name, default in defaults.items()}
        if "beta_r" in options and options["beta_r"] is None:
            options["beta_r"] = self.options.get("beta", 1.0)
        return options

    @property
    def scores(self) -> tuple[str, ...]:
        """The per-token scores that the loss needs beside the policy's, in the order of SCORE_NAMES."""
        needed = {"reference"} if "reference" in self.method.reads else set()
        needed |= set(REWARD_SOURCES[self.reward_source].scores) if self.reward_source else set()
        return tuple(name for name in SCORE_NAMES if name in needed)

    @property
    def log_prob_scores(self) -> tuple[str, ...]:
        """The scores that are log-probs of frozen models, which recipes.score computes."""
        return tuple(name for name in self.scores if name != "reward")

    @property
    def frozen_models(self) -> tuple[str, ...]:
        """The frozen models that the scores of the loss come from."""
        return tuple(model for model, gives in GIVEN_BY.items() if set(gives).intersection(self.scores))

    @property
    def carried(self) -> tuple[str, ...]:
        """The frozen models that run beside the policy where scores are live."""
        return tuple(name for name in ("reference", "guidance") if name in self.scores)


def _value(loss: _LossSettings, name: str, default: Any) -> Any:
    value = getattr(loss, name)
    return default if value is None else value


def _loss_config() -> type[_LossSettings]:
    """The settings of a loss, with the options that the declared losses have."""
    meanings = "\n\n".join(f"`{name}`: {loss.meaning}" for name, loss in LOSSES.items())
    fields: dict[str, Any] = {"type": (Literal[tuple(LOSSES)], Field("tgdpo", description=meanings))}
    sources = "\n\n".join(f"`{name}`: {source.meaning}" for name, source in REWARD_SOURCES.items())
    fields["token_rewards"] = (
        Literal[tuple(REWARD_SOURCES)] | None,
        Field(None, description=f"For losses with token rewards: where the token reward r̂ comes from.\n\n{sources}"),
    )
    for loss in LOSSES.values():
        for name, option in loss.options.items():
            fields.setdefault(name, (_annotation(option), _field(name, option)))
    return create_model("LossConfig", __base__=_LossSettings, __doc__=_LossSettings.__doc__, **fields)


def _annotation(option: Option) -> Any:
    return Literal[option.choices] | None if option.choices else float | None


def _field(name: str, option: Option) -> Any:
    """The field of an option: not set by default, with its range and its meaning for each loss that has it."""
    told: dict[str, list[str]] = {}
    for loss in LOSSES.values():
        if name in loss.options:
            its = loss.options[name]
            default = "none" if its.default is None else its.default
            told.setdefault(its.meaning, []).append(f"{loss.name} ({default})")
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
        """As below. Which options there are is known only once the losses have been read."""

        def __init__(self, **settings: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

else:
    LossConfig = _loss_config()


class ScoresConfig(_Group):
    """Where the token log-probs of the frozen models and other token rewards come from."""

    source: Literal["live", "cached"] | None = None
    """`live`: the frozen models run beside the policy. `cached`: their log-probs are read from files that recipes.score
    wrote. Default: cached where `path` is set, otherwise live."""
    path: Path | None = None
    """Folder of cached scores. recipes.score writes it, and recipes.train reads it."""
    reward_file: Path | None = None
    """For loss.token_rewards=file: a .jsonl file with a line for each pair of data.train. Its format is described in
    tgdpo_megatron/scores/reward_file.py."""
    validation_reward_file: Path | None = None
    """The same for data.validation. With data.validation_share, the lines of reward_file are read."""
    contrastive_prompts: Path | None = None
    """For loss.token_rewards=contrastive: a YAML file with the templates `better` and `worse`. Default:
    tgdpo_megatron/scores/prompts/refine.yaml."""

    @property
    def cached(self) -> bool:
        """Whether log-probs of frozen models are read from files; `source` with its default filled in."""
        return self.source == "cached" if self.source else self.path is not None


GIVEN_ANYWAY = frozenset(
    {
        *("self", "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "kwargs"),
        *("conversations", "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"),
        *("mask_token", "additional_special_tokens"),
    }
)
"""Arguments of apply_chat_template, and what it gives every template itself."""


def _template_kwargs(given: dict[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        if name in GIVEN_ANYWAY:
            raise ValueError(f"'{name}' is given to the template by the program itself, leave it out")
        if not name.isidentifier():
            raise ValueError(f"'{name}' is no name of a variable")
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, (dict, list)) or (isinstance(one, float) and not math.isfinite(one)):
                raise ValueError(f"'{name}' must be a text, a number, true, false, null, or a list of these")
    return given


class DataConfig(_Group):
    """Preference pairs, and how they become tokens."""

    train: Path | list[Path] | None = None
    """Pairs to train on or to score: a file, a saved `datasets` folder, or a split of a data set on a hub
    (`ORGANISATION/NAME[@REVISION][:[CONFIG/]SPLIT]`) in any known format (docs/formats.md), or a folder written by
    tools.prepare_pairs. Or a list of these, each in a format of its own."""
    weights: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    """How many times the pairs of each file in `train` are seen in an epoch: 2 shows each pair twice, 0.5 half of them,
    another half in the next epoch. Default: once each."""
    validation: Path | None = None
    """Held-out pairs in one file, folder or split of a data set, evaluated every `train.eval_interval` iterations."""
    validation_share: float | None = Field(None, gt=0, lt=1)
    """Share of the pairs of `train` that is held out, in place of `validation`. Pairs with the same prompt stay
    together, and which prompts are held out depends on their text alone."""
    format: FormatName | None = None
    """Format of the pairs, by its name in docs/formats.md. Default: recognised by the columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of columns that no format has: our name -> the file's, such as {prompt: ask, chosen: good, rejected: bad}.
    They hold for all files."""
    max_length: int = Field(2048, ge=8)
    """Longest sequence (prompt and one response), in tokens. What becomes of longer ones: data.truncation."""
    truncation: Literal["prompt_left", "response_right", "drop", "proportional"] = "prompt_left"
    """What becomes of a pair that is longer than `max_length`.

    `prompt_left`: the prompt loses its start. The pair is left out if a response alone does not fit.

    `response_right`: a response loses its end, and with it the token that closes its turn. The pair is left out if the
    prompt alone does not fit.

    `drop`: the pair is left out.

    `proportional`: the rule of TGDPO's code, which is LLaMA-Factory's. Prompt and responses lose their ends."""
    template: str | None = None
    """Chat template that turns a conversation into text: a file (`FILE.jinja`), or `none` to take prompts and responses
    as they are, for texts in which the template is written already. Default: the tokenizer's own. Checkpoints of the
    run keep the template."""
    chat_template_kwargs: Annotated[dict[str, JsonValue], AfterValidator(_template_kwargs)] = Field(
        default_factory=dict
    )
    """What the chat template is given in every rendering, such as {enable_thinking: false} for Qwen3's: texts, numbers,
    true, false, null, or lists of these. An argument that the template does not read is refused."""
    special_tokens: Literal["refuse", "drop", "keep"] = "refuse"
    """What becomes of a pair whose texts hold a special token of the tokenizer or a mark of a chat template, such as
    `<|im_end|>`. `refuse`: the program stops and names the row. `drop`: the pair is left out. `keep`: the text is
    tokenised, and becomes that token where the tokenizer has it. Not read with template=none."""
    shuffle: bool = True
    """Whether pairs are drawn in random order, by train.seed, new in each epoch. False keeps the order of the file."""

    @property
    def sources(self) -> list[Path]:
        """The files, folders and splits of `train`."""
        if self.train is None:
            return []
        return self.train if isinstance(self.train, list) else [self.train]

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out pairs."""
        return self.validation is not None or self.validation_share is not None


class OptimizerConfig(_Group):
    """AdamW, gradient clipping and the schedule of the learning rate."""

    lr: float = Field(7e-7, gt=0, le=1e30)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Learning rate at the end of the schedule."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes from `lr` to `min_lr` after the warm-up. `constant` keeps `lr`."""
    lr_warmup_iters: int | None = Field(None, ge=0)
    """Optimizer steps of linear warm-up from 0. Default: none, or those of lr_warmup_fraction."""
    lr_warmup_fraction: float | None = Field(None, ge=0, lt=1)
    """The same as a share of all steps, in place of lr_warmup_iters."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Decoupled weight decay of matrices. Norms have none."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the running mean of the gradient."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the running mean of the squared gradient."""
    adam_eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    """Added to the denominator of Adam's update."""
    clip_grad: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Largest norm of the gradient over all ranks. Larger gradients are scaled down to it."""
    use_distributed_optimizer: bool = True
    """Whether to split the optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Whether to reduce gradients over the data-parallel ranks while backward still runs."""
    overlap_param_gather: bool = False
    """Whether to gather updated weights while the next forward already runs. Needs use_distributed_optimizer and
    overlap_grad_reduce."""


class TrainConfig(_Group):
    """One run: its length, its batches, its arithmetic, and what it saves."""

    output: Path | None = None
    """Folder of the run, for its settings, metrics and checkpoints."""
    num_epochs: float | None = Field(None, gt=0, allow_inf_nan=False)
    """How often each training pair is seen, in place of train_iters. Default: 1."""
    train_iters: int | None = Field(None, ge=1)
    """Optimizer steps. Default: see num_epochs."""
    global_batch_size: int = Field(128, ge=1)
    """Preference pairs per optimizer step, over all ranks."""
    micro_batch_size: int = Field(1, ge=1)
    """Preference pairs that go through the model at once on one data-parallel rank. Not read where micro_batch_tokens
    is set."""
    micro_batch_tokens: int | None = Field(None, ge=16)
    """Largest number of tokens that go through one copy of the model at once, over its context-parallel ranks together.
    As many whole pairs as fit are taken, instead of micro_batch_size pairs."""
    fixed_micro_batches: bool = False
    """Whether to pad every micro-batch to micro_batch_tokens, so that pipeline stages need not send each other its
    size."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format in which the model computes. `auto`: bf16 on a GPU, fp32 on a CPU. Log-probs and losses are always
    fp32."""
    fp8: Literal["hybrid", "e4m3"] | None = None
    """FP8 format of the policy's linear layers in training: `hybrid` (e4m3, with gradients in e5m2) or `e4m3` for
    everything. Frozen models, attention, norms and the head stay in bf16 or fp32 (docs/fp8.md). Needs Transformer
    Engine."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise"] | None = None
    """How FP8 numbers are scaled. `tensorwise`: by each tensor's own largest value. `delayed`: by the largest value of
    earlier micro-batches. `blockwise`: block by block, with fp8=e4m3. Default: tensorwise where fp8 is set."""
    shared_prompts: bool = True
    """Whether the prompt of a pair is computed once for both responses, in training and in scoring. A pair whose two
    prompts differ keeps both."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping it in memory. `none`: nothing. `selective`: core attention.
    `full`: whole layers."""
    seed: int = Field(42, ge=0)
    """Seed of the order of the pairs."""
    log_interval: int = Field(1, ge=1)
    """Iterations between lines of metrics."""
    eval_interval: int = Field(0, ge=0)
    """Iterations between evaluations on `data.validation`. 0 evaluates only before the first step and at the end."""
    save_interval: int = Field(0, ge=0)
    """Iterations between checkpoints. 0 saves none for their number; the last is saved in any case."""
    export_interval: int = Field(0, ge=0)
    """Iterations between exports to HuggingFace, into the folder hf of `output`. A checkpoint is saved at each. The
    last is exported as well. 0 exports nothing."""
    save_minutes: float = Field(30.0, ge=0, allow_inf_nan=False)
    """Minutes without a checkpoint after which one is saved in any case. 0 saves none for the time."""
    keep_last: int = Field(2, ge=0)
    """Newest checkpoints that are kept. An older one is removed once a newer one is whole. 0 keeps all."""
    keep_best: Literal["eval/loss", "eval/rewards/accuracies", "eval/rewards/margins"] | None = None
    """Metric of the held-out pairs. The checkpoint with its best value (the lowest loss, or the highest of the others)
    is kept as well, and `checkpoints/best` leads to it."""
    async_save: bool = True
    """Whether training goes on while the files of a checkpoint are written. The state is copied into the memory of the
    hosts first, at most 16 bytes for each parameter of a rank."""
    save_optimizer: bool = True
    """Whether a checkpoint holds the optimizer's state. Without it, a checkpoint takes a seventh of the disk in bf16, a
    quarter in fp32, and the run cannot be continued from it. A run that is asked to stop saves that state all the
    same."""
    report: bool = True
    """Whether to write report.html into the folder of the run."""
    resume: bool = False
    """Whether to continue the run in `output` from its newest checkpoint."""
    resume_with_changes: bool = False
    """Whether to continue the run with other data, frozen models or settings of the method than it had."""
    exit_after_minutes: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Minutes after the program's start when the run must have ended. It stops one step and two saves earlier, of
    which one may be under way, and its exit code 75 asks for another start. 0 sets no end."""
    max_skipped_steps: int = Field(3, ge=0)
    """Steps in a row that may be skipped because their loss or gradient is not finite. One more ends the run."""
    loss_spike_deviations: float = Field(8.0, ge=0, allow_inf_nan=False)
    """How many standard deviations above the median of the last 50 steps a loss must be for its pairs to be written to
    spikes.jsonl. 0 looks for none."""
    distributed_timeout_minutes: int = Field(10, ge=1, le=10_080)
    """Minutes after which a collective that has not finished ends the job. The machines of a job wait as long for each
    other at its start."""
    rank_timeout_minutes: float = Field(5.0, gt=0, le=10_080, allow_inf_nan=False)
    """Minutes after which a rank that stands still ends the job. Shorter than distributed_timeout_minutes, so that
    the rank is named before the others give up waiting for it."""

    @property
    def recipe_of_fp8(self) -> str | None:
        """`fp8_recipe` with its default filled in; None without FP8."""
        return (self.fp8_recipe or "tensorwise") if self.fp8 else None


class ClusterConfig(_Group):
    """The machines that a job asks for. tools.submit asks Slurm for as many, and the programs start as many ranks."""

    nodes: int | None = Field(None, ge=1)
    """Machines of a job. Default: the number that it is started on."""
    gpus_per_node: int | None = Field(None, ge=1)
    """GPUs of one machine, each with a rank of its own; on a machine without GPUs, ranks. `--nproc-per-node` overrides
    it. Default: 1."""


class ReportConfig(_Group):
    """What report.html shows beside the curves, and where metrics go beside metrics.jsonl and TensorBoard."""

    samples: int = Field(0, ge=0)
    """Number of held-out prompts that the model answers before and after training."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest such answer, in tokens. The answers are greedy."""
    wandb_project: str | None = Field(None, min_length=1)
    """Project in Weights & Biases that gets the metrics as well. Its key comes from the environment or ~/.netrc, and
    WANDB_MODE=offline works without network."""
    mlflow_experiment: str | None = Field(None, min_length=1)
    """MLflow experiment that gets the metrics as well, at the address in MLFLOW_TRACKING_URI."""


class Config(_Group):
    """A complete configuration."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    scores: ScoresConfig = Field(default_factory=ScoresConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @property
    def reference_checkpoint(self) -> Path | None:
        """The frozen reference: `model.reference`, or `model.checkpoint` where that is not set."""
        return self.model.reference or self.model.checkpoint

    @property
    def live_models(self) -> tuple[str, ...]:
        """The frozen models that run beside the policy in training; none where their scores are cached."""
        return () if self.scores.cached else self.loss.carried

    @property
    def picks_keys(self) -> bool:
        """Whether attention has blocks with more keys than queries, whose keys are picked from other rows
        (data/attention_plan.py)."""
        shares = self.train.shared_prompts and len(self.loss.method.sides) > 1
        return shares or self.parallel.context_parallel_size > 1

    @property
    def fp8_multiple(self) -> int:
        """FP8 needs the tokens on a rank and the hidden channels to be multiples of this number. 1 without FP8."""
        if self.train.fp8 is None:
            return 1
        in_blocks = self.train.fp8_recipe == "blockwise" and self.parallel.sequence_parallel
        return FP8_BLOCK if in_blocks else FP8_MULTIPLE

    @property
    def token_multiple(self) -> int:
        """Tokens of a micro-batch are padded to a multiple of this number, as sequence and context parallelism and FP8
        need."""
        ranks = self.parallel.tensor_model_parallel_size if self.parallel.sequence_parallel else 1
        return ranks * self.fp8_multiple * self.parallel.context_parallel_size
