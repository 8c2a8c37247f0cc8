"""Checks that the settings fit the loss, each other, and the number of processes."""

from __future__ import annotations

import math
from pathlib import Path

from tgdpo_megatron.config.constants import FP8_FORMATS, round_up
from tgdpo_megatron.config.settings import Config, LossConfig
from tgdpo_megatron.config.steps import with_steps
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.losses.rewards import GIVEN_BY


def complete(config: Config, *, where: str) -> Config:
    """Fill in the defaults of the loss, and refuse settings that it does not read.

    Raises:
        UserError: A setting would not be read, or needs another setting.
    """
    loss = config.loss
    reads = {"type", "sft_loss_weight", *loss.method.options}
    reads |= {"token_rewards", *loss.reward_options} if loss.reward_source else set()
    if not loss.method.compares:
        reads.remove("sft_loss_weight")
    for name, field in LossConfig.model_fields.items():
        value = getattr(loss, name)
        if name not in reads and value != field.default:
            method = f"loss.type={loss.type}"
            method += f" with loss.token_rewards={loss.reward_source}" if loss.reward_source else ""
            default = "null" if field.default is None else field.default
            raise UserError(
                f"{where}: {method} does not read loss.{name}={value}; leave it out (loss.{name}={default})."
            )
    if loss.reward_source == "chosen" and loss.method.order_alone:
        raise UserError(
            f"{where}: loss.token_rewards=chosen gives all tokens of a response the same reward, which leaves "
            f"loss.type={loss.type} nothing to select; choose another loss.token_rewards."
        )
    if loss.reward_source == "contrastive" and config.data.template == "none":
        raise UserError(
            f"{where}: loss.token_rewards=contrastive rewrites the user's turn, and data.template=none does not tell "
            "where that is; give pairs without template, and leave data.template out."
        )
    for name, source in {
        "reward_file": "file",
        "validation_reward_file": "file",
        "contrastive_prompts": "contrastive",
    }.items():
        if getattr(config.scores, name) is not None and loss.reward_source != source:
            given = loss.reward_source
            raise UserError(
                f"{where}: scores.{name} is not read by loss.type={loss.type}"
                + (f" with loss.token_rewards={given}; set loss.token_rewards={source}, or" if given else ";")
                + f" leave scores.{name} out."
            )
    for role in GIVEN_BY:
        if getattr(config.model, role) is not None and role not in loss.frozen_models:
            raise UserError(
                f"{where}: model.{role} is not read by loss.type={loss.type}"
                + (f" with loss.token_rewards={loss.reward_source}" if loss.reward_source else "")
                + "; leave it out."
            )
    for name, option in loss.method.options.items():
        if option.only_with is None or getattr(loss, name) is None:
            continue
        other, value = option.only_with
        if loss.options[other] != value:
            raise UserError(f"{where}: loss.{name}={getattr(loss, name)} needs loss.{other}={value}; set loss.{other}.")
    train, optimizer = config.train, config.optimizer
    for one, other, group in (
        ("train_iters", "num_epochs", train),
        ("lr_warmup_iters", "lr_warmup_fraction", optimizer),
    ):
        if getattr(group, one) is not None and getattr(group, other) is not None:
            name = "train" if group is train else "optimizer"
            raise UserError(f"{where}: {name}.{one} and {name}.{other} say the same in two ways; give one of them.")
    _check_sources(config, where)
    _check_keep_best(config, where)
    if train.fp8_recipe and not train.fp8:
        raise UserError(
            f"{where}: train.fp8_recipe={train.fp8_recipe} is not read without train.fp8; set "
            f"train.fp8={FP8_FORMATS[train.fp8_recipe]}."
        )
    if train.fp8 and train.precision == "fp32":
        raise UserError(
            f"{where}: train.fp8={train.fp8} needs train.precision=bf16, in which the other layers compute; set "
            "train.precision=bf16."
        )
    if train.fp8 == "hybrid" and train.fp8_recipe == "blockwise":
        raise UserError(
            f"{where}: train.fp8_recipe=blockwise needs train.fp8=e4m3, Transformer Engine's own choice; set "
            "train.fp8=e4m3."
        )
    source = "cached" if config.scores.cached else "live"
    filled = loss.options | loss.reward_options | ({"token_rewards": loss.reward_source} if loss.reward_source else {})
    return config.model_copy(
        update={
            "loss": loss.model_copy(update=filled),
            "train": train.model_copy(update={"fp8_recipe": train.recipe_of_fp8}),
            "scores": config.scores.model_copy(update={"source": source}),
        }
    )


def _check_sources(config: Config, where: str) -> None:
    """Check that the settings of files of pairs fit each other."""
    data = config.data
    if data.template == "none" and data.chat_template_kwargs:
        raise UserError(
            f"{where}: data.template=none takes texts as they are and reads no data.chat_template_kwargs; leave one of "
            "them out."
        )
    files = len(data.sources)
    if data.validation is not None and data.validation_share is not None:
        raise UserError(
            f"{where}: data.validation names held-out pairs already, so data.validation_share={data.validation_share} "
            "is not read; leave one of them out."
        )
    if data.weights is not None and len(data.weights) != files:
        raise UserError(
            f"{where}: data.weights has {len(data.weights)} numbers and data.train {files} files; give one number for "
            "each file, in the same order."
        )
    if config.scores.reward_file is not None and files > 1:
        raise UserError(
            f"{where}: scores.reward_file numbers the rows of one file, and data.train names {files}; put the pairs "
            "into one file."
        )


def _check_keep_best(config: Config, where: str) -> None:
    """Check that the metric of train.keep_best is known of every checkpoint that is saved for its number."""
    train, metric = config.train, config.train.keep_best
    if metric is None:
        return
    if metric.startswith("eval/rewards/") and not config.loss.method.compares:
        raise UserError(
            f"{where}: loss.type={config.loss.type} has no {metric}, because it does not compare two responses; set "
            "train.keep_best=eval/loss."
        )
    missing = []
    if not config.data.holds_out:
        missing.append("held-out pairs: set data.validation or data.validation_share")
    intervals = {"save_interval": train.save_interval, "export_interval": train.export_interval}
    intervals = {f"train.{name}": steps for name, steps in intervals.items() if steps}
    often = math.gcd(*intervals.values())
    if not intervals:
        missing.append("checkpoints with an evaluation at each: set train.save_interval and train.eval_interval")
    elif not train.eval_interval or often % train.eval_interval:
        saved = " and ".join(f"{name}={steps}" for name, steps in intervals.items())
        missing.append(
            f"an evaluation at every checkpoint of {saved}: set train.eval_interval={often}, not {train.eval_interval}"
        )
    if missing:
        raise UserError(f"{where}: train.keep_best={metric} needs {'; and '.join(missing)}.")


def check_layout(config: Config, *, world_size: int) -> int:
    """Check that the number of processes and the layout fit each other; return the data-parallel size.

    Raises:
        UserError: They do not fit; the sentence names the numbers.
    """
    parallel, train = config.parallel, config.train
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
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
            f"{world_size} process{' is' if world_size == 1 else 'es are'} no multiple of the "
            f"{parallel.model_parallel_size} that one copy of the model takes (parallel.tensor_model_parallel_size="
            f"{tensor} × parallel.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}"
            f"{f' × parallel.context_parallel_size={context}' if context > 1 else ''}); change "
            f"{_where_processes_come_from(config, world_size)} or these sizes."
        )
    if train.micro_batch_tokens is not None and train.micro_batch_tokens % config.token_multiple:
        causes = [f"FP8's {config.fp8_multiple}"] if train.fp8 else []
        if parallel.sequence_parallel:
            causes.append(
                f"parallel.tensor_model_parallel_size={tensor}, over which sequence_parallel splits the tokens"
            )
        if context > 1:
            causes.append(f"parallel.context_parallel_size={context}, whose ranks each hold a share of the tokens")
        raise UserError(
            f"train.micro_batch_tokens={train.micro_batch_tokens} is not a multiple of {config.token_multiple} "
            f"({' × '.join(causes)}); round it up to "
            f"{round_up(train.micro_batch_tokens, config.token_multiple)}."
        )
    return world_size // parallel.model_parallel_size


def _where_processes_come_from(config: Config, world_size: int) -> str:
    """The settings that gave the number of processes, as far as it shows."""
    nodes, each = config.cluster.nodes or 1, config.cluster.gpus_per_node
    per_node = f"cluster.gpus_per_node={each}" if each and each * nodes == world_size else "--nproc-per-node"
    return f"cluster.nodes={nodes}, {per_node}" if nodes > 1 else per_node


def check_batch_layout(config: Config, *, world_size: int) -> int:
    """Check that processes, layout, batch and schedule of a training fit each other; return the data-parallel size.

    Raises:
        UserError: They do not fit; the sentence names the numbers.
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
    if train.train_iters is not None:
        with_steps(config, num_pairs=1)
    if train.eval_interval and not config.data.holds_out:
        raise UserError(
            f"train.eval_interval={train.eval_interval} needs held-out pairs; set data.validation or "
            "data.validation_share, or train.eval_interval=0."
        )
    if config.report.samples and not config.data.holds_out:
        raise UserError(
            f"report.samples={config.report.samples} answers held-out prompts; set data.validation or "
            "data.validation_share, or report.samples=0."
        )
    if config.report.samples and train.fixed_micro_batches:
        raise UserError(
            f"report.samples={config.report.samples} needs micro-batches of changing size; set "
            "train.fixed_micro_batches=false, or report.samples=0."
        )
    if train.micro_batch_tokens is not None:
        most = 2 * config.data.max_length * train.global_batch_size
        if train.fixed_micro_batches and train.micro_batch_tokens > most + config.token_multiple:
            raise UserError(
                f"train.micro_batch_tokens={train.micro_batch_tokens} is more than the {most} tokens that a step can "
                f"have (2 × data.max_length={config.data.max_length} × {train.global_batch_size} pairs), and "
                "train.fixed_micro_batches=true pads every micro-batch to it; lower it."
            )
        return data_parallel_size
    if train.fixed_micro_batches:
        raise UserError(
            "train.fixed_micro_batches=true needs train.micro_batch_tokens, the size to pad to; set "
            "train.micro_batch_tokens."
        )
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


def required(value: Path | None, key: str, purpose: str) -> Path:
    """A path the configuration must give.

    Raises:
        UserError: It does not.
    """
    if value is None:
        raise UserError(f"{key} is not set; give {purpose}.")
    return value
