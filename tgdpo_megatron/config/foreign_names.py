"""What settings of other programs are called here: for the sentence about an unknown key, and for docs/coming-from.md.

The names are those of TRL 1.16 (with the transformers arguments that it takes), LLaMA-Factory 0.9.5, ms-swift 4 (with
Megatron-SWIFT), NeMo-RL's examples/configs/dpo.yaml and Megatron-LM's arguments. Some are of earlier versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TRL, LLAMA_FACTORY, SWIFT = "TRL", "LLaMA-Factory", "ms-swift"
NEMO, MEGATRON = "NeMo-RL", "Megatron-LM"
TRAINER = (TRL, LLAMA_FACTORY, SWIFT)
"""The programs that take the arguments of transformers' Trainer."""
MCORE = (MEGATRON, SWIFT)
"""The programs that take Megatron-LM's arguments; with ms-swift it is `megatron rlhf`."""


@dataclass(frozen=True)
class Foreign:
    """Names of other programs that stand for one thing.

    Attributes:
        names: As their programs write them: the full path for NeMo-RL, underscores for Megatron-LM's dashes.
        tools: The programs that have them.
        ours: Our setting; None where nothing is set for it here.
        difference: What differs in meaning, or what takes its place. Empty where the same value means the same.
    """

    names: tuple[str, ...]
    tools: tuple[str, ...]
    ours: str | None
    difference: str = ""

    def sentence(self, written: str, example: str) -> str:
        """What an error says about one of the names, without a full stop.

        Args:
            written: The name as the user wrote it.
            example: How our setting is written where the user wrote theirs, with the value where it means the same.
        """
        *others, last = [f"{tool}'s" for tool in self.tools]
        whose = f"{', '.join(others)} and {last}" if others else last
        if self.ours is None:
            return f"'{written}' is {whose} name; nothing is set for it here: {self.difference}"
        difference = f" ({self.difference})" if self.difference else ""
        return f"'{written}' is {whose} name; here it is {self.ours}: write {example}{difference}"


_MODEL = "a HuggingFace folder or a name on a hub, with a revision as NAME@REVISION; or a checkpoint of a run here"
_FILE = "a file or folder of pairs, or a name on a hub with its split, as NAME:SPLIT"
_DTYPE = "bfloat16 is bf16 here and float32 is fp32"
_LENGTH = "a limit for prompt and answer together; data.truncation says what is cut"
_WEIGHTS = "how many times an epoch shows the pairs of each file of data.train, not a probability"
_PREPARED = "a folder that tools.prepare_pairs wrote"
_PACKED = "sequences are always packed without padding, and attention stays within each"
_BATCH = "pairs of a step over all ranks, so device batch × accumulation × devices; train.micro_batch_size goes at once"
_PAIRS = "counts pairs, which are two sequences each"
_ALL_HELD_OUT = "all held-out pairs are evaluated, in micro-batches like those of training"
_ONE_LENGTH = "set train.num_epochs or train.train_iters, not both"
_RECOMPUTE = "true is full here, false is none"
_ATTENTION = "attention is Transformer Engine's where that is installed, otherwise torch's"
_FULL = "all weights are trained, and adapters are not supported"
_UNQUANTISED = "weights are not quantised"
_SPLIT = "the parallel settings split the model, optimizer.use_distributed_optimizer the optimizer's state"
_BEST_KEPT = "one is kept beside the newest: the best by a metric, which train.keep_best names"
_METRIC = (
    "a metric of the held-out pairs; eval_loss is eval/loss here, and checkpoints/best is a link to the checkpoint"
)
_OTHER_WAY_ROUND = "the other way round: true there is false here"
_MINUTES = "in minutes, such as 230; the run then saves a checkpoint and ends"
_METRICS = "metrics go to metrics.jsonl in train.output, and to tensorboard/ there where TensorBoard is installed"
_SERVICES = "the name of a project, or report.mlflow_experiment; tensorboard is written where it is installed"
_NAMED = "the name of a project switches it on"
_SIZES = "the model's sizes come with its checkpoint"
_TOKENIZER = "the tokenizer travels with the checkpoint"
_WHOLE_RUN = "the schedule always covers the whole run"

_TABLE: tuple[tuple[str, tuple[str, ...], str | None, str], ...] = (
    # models
    ("model_name_or_path", (TRL, LLAMA_FACTORY), "model.checkpoint", _MODEL),
    ("model", (SWIFT,), "model.checkpoint", _MODEL),
    ("policy.model_name", (NEMO,), "model.checkpoint", _MODEL),
    ("load", MCORE, "model.checkpoint", "where the policy starts; train.resume=true continues a run"),
    ("pretrained_checkpoint", (MEGATRON,), "model.checkpoint", _MODEL),
    ("ref_model", TRAINER, "model.reference", f"{_MODEL}; by default the policy's start"),
    ("ref_load", (SWIFT,), "model.reference", f"{_MODEL}; by default the policy's start"),
    ("dtype", (TRL,), "train.precision", _DTYPE),
    ("torch_dtype", (TRL, SWIFT), "train.precision", _DTYPE),
    ("policy.precision", (NEMO,), "train.precision", _DTYPE),
    ("bf16", (*TRAINER, MEGATRON), "train.precision", "true is bf16 here, false is fp32"),
    ("pure_bf16", (LLAMA_FACTORY,), "train.precision", "bf16 here keeps an fp32 copy of the weights in the optimizer"),
    ("fp16", (*TRAINER, MEGATRON), None, "train.precision takes bf16 or fp32, not fp16"),
    ("tokenizer_model tokenizer_type", (MEGATRON,), None, _TOKENIZER),
    ("policy.tokenizer.name", (NEMO,), None, _TOKENIZER),
    ("num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups", MCORE, None, _SIZES),
    ("trust_remote_code", (TRL, LLAMA_FACTORY), None, "code that comes with a checkpoint is never run"),
    ("disable_dropout", (TRL,), None, "dropout is always off"),
    # pairs
    ("dataset_name datasets", (TRL,), "data.train", _FILE),
    ("dataset", (LLAMA_FACTORY, SWIFT), "data.train", _FILE),
    ("data.train.data_path", (NEMO,), "data.train", ""),
    ("data.train.dataset_name", (NEMO,), "data.train", _FILE),
    ("data_path train_data_path", (MEGATRON,), "data.train", "preference pairs as text, not tokens in .bin files"),
    ("dataset_dir", (LLAMA_FACTORY,), None, "data.train is the path of the file itself, and nothing is registered"),
    (
        "dataset_test_split",
        (TRL,),
        "data.validation",
        "a file or folder of its own, or NAME:SPLIT of a data set on a hub",
    ),
    ("eval_dataset", (LLAMA_FACTORY,), "data.validation", _FILE),
    ("val_dataset", (SWIFT,), "data.validation", _FILE),
    ("data.validation.data_path", (NEMO,), "data.validation", ""),
    ("valid_data_path", (MEGATRON,), "data.validation", "preference pairs as text, not tokens in .bin files"),
    ("val_size", (LLAMA_FACTORY,), "data.validation_share", "always a share, between 0 and 1"),
    ("split_dataset_ratio", (SWIFT,), "data.validation_share", ""),
    ("max_length", (TRL, SWIFT), "data.max_length", _LENGTH),
    ("max_prompt_length max_completion_length", (TRL,), "data.max_length", _LENGTH),
    ("cutoff_len", (LLAMA_FACTORY,), "data.max_length", f"{_LENGTH}, and its value proportional is LLaMA-Factory's"),
    ("policy.max_total_sequence_length data.max_input_seq_length", (NEMO,), "data.max_length", _LENGTH),
    ("seq_length", MCORE, "data.max_length", "the longest sequence that is kept; nothing is padded to it"),
    ("truncation_mode", (TRL,), "data.truncation", "keep_start is response_right here, keep_end is prompt_left"),
    (
        "truncation_strategy",
        (SWIFT,),
        "data.truncation",
        "delete is drop here, left is prompt_left, right is response_right",
    ),
    ("template", (LLAMA_FACTORY, SWIFT), "data.template", "the model's own by default, or a file; not a name"),
    ("use_chat_template", (SWIFT,), "data.template", "false is none here"),
    (
        "enable_thinking",
        (LLAMA_FACTORY, SWIFT),
        "data.chat_template_kwargs",
        "one of the template's arguments, such as {enable_thinking: false}",
    ),
    ("policy.tokenizer.chat_template_kwargs", (NEMO,), "data.chat_template_kwargs", ""),
    ("columns", (SWIFT,), "data.columns", "the other way round: from the name that is known here to the file's column"),
    (
        "data.train.prompt_key data.train.chosen_key data.train.rejected_key",
        (NEMO,),
        "data.columns",
        "one setting for all columns, such as {prompt: question}",
    ),
    ("dataset_shuffle", (SWIFT,), "data.shuffle", ""),
    ("interleave_probs", (LLAMA_FACTORY,), "data.weights", _WEIGHTS),
    ("interleave_prob", (SWIFT,), "data.weights", _WEIGHTS),
    ("disable_shuffling", (LLAMA_FACTORY,), "data.shuffle", _OTHER_WAY_ROUND),
    ("data_seed", TRAINER, "train.seed", "the order of the pairs is all that it decides"),
    ("tokenized_path", (LLAMA_FACTORY,), "data.train", _PREPARED),
    ("cached_dataset", (SWIFT,), "data.train", _PREPARED),
    ("dataset_num_proc", (TRL, SWIFT), None, "tools.prepare_pairs tokenises a large file once, for all runs"),
    (
        "preprocessing_num_workers",
        (LLAMA_FACTORY,),
        None,
        "tools.prepare_pairs tokenises a large file once, for all runs",
    ),
    ("max_samples", (LLAMA_FACTORY,), None, "give a shorter file"),
    ("system", (SWIFT,), None, "a system turn belongs into the pairs, as a turn or as a column called system"),
    ("padding_free", (TRL, SWIFT), None, _PACKED),
    ("packing", (LLAMA_FACTORY, SWIFT), None, _PACKED),
    ("neat_packing", (LLAMA_FACTORY,), None, _PACKED),
    ("policy.sequence_packing.enabled", (NEMO,), None, _PACKED),
    # the loss
    (
        "loss_type",
        (TRL, SWIFT),
        "loss.type",
        "sigmoid is dpo here and sigmoid_norm is dpo_norm; hinge, ipo, robust, simpo and sft keep their names",
    ),
    ("pref_loss", (LLAMA_FACTORY,), "loss.type", "sigmoid is dpo here; hinge, ipo and simpo keep their names"),
    ("stage", (LLAMA_FACTORY,), "loss.type", "dpo and sft keep their names; pref_loss is loss.type, too"),
    ("rlhf_type", (SWIFT,), "loss.type", "dpo and simpo keep their names"),
    ("beta", (TRL, SWIFT), "loss.beta", ""),
    ("pref_beta", (LLAMA_FACTORY,), "loss.beta", ""),
    ("dpo.reference_policy_kl_penalty", (NEMO,), "loss.beta", ""),
    ("label_smoothing", (TRL, SWIFT), "loss.label_smoothing", ""),
    ("dpo_label_smoothing", (LLAMA_FACTORY,), "loss.label_smoothing", ""),
    ("simpo_gamma", TRAINER, "loss.gamma_beta_ratio", "simpo_gamma divided by beta"),
    ("rpo_alpha", (TRL, SWIFT), "loss.sft_loss_weight", ""),
    ("pref_ftx", (LLAMA_FACTORY,), "loss.sft_loss_weight", ""),
    ("cpo_alpha", (TRL, SWIFT), "loss.sft_loss_weight", "its default there is 1, and here 0"),
    ("loss_weights", (TRL, SWIFT), "loss.sft_loss_weight", "only the SFT term can be added to another loss"),
    (
        "dpo.sft_loss_weight",
        (NEMO,),
        "loss.sft_loss_weight",
        "of the mean over the answer's tokens; there of their sum unless sft_average_log_probs is true",
    ),
    ("dpo.sft_average_log_probs", (NEMO,), None, "the SFT term is always the mean over the answer's tokens"),
    ("dpo.preference_average_log_probs", (NEMO,), "loss.type", "true is dpo_norm here, false is dpo"),
    ("reference_free", (TRL, SWIFT), "loss.type", "simpo is the loss without a reference"),
    ("precompute_ref_log_probs", (TRL,), "scores.source", "true is cached here, once recipes.score has written them"),
    ("sync_ref_model", (TRL,), None, "the reference stays as it is"),
    ("f_divergence_type", (TRL, SWIFT), None, "the divergence is always the reverse KL"),
    ("ld_alpha", TRAINER, None, "LD-DPO is not among the losses"),
    # batches and the length of a run
    ("per_device_train_batch_size gradient_accumulation_steps", TRAINER, "train.global_batch_size", _BATCH),
    ("per_device_eval_batch_size", TRAINER, None, _ALL_HELD_OUT),
    ("global_batch_size", MCORE, "train.global_batch_size", _PAIRS),
    ("micro_batch_size", MCORE, "train.micro_batch_size", _PAIRS),
    ("policy.train_global_batch_size", (NEMO,), "train.global_batch_size", ""),
    ("policy.train_micro_batch_size", (NEMO,), "train.micro_batch_size", ""),
    ("policy.dynamic_batching.enabled", (NEMO,), "train.micro_batch_tokens", "a number of tokens, for whole pairs"),
    ("dpo.val_batches dpo.val_global_batch_size dpo.val_micro_batch_size", (NEMO,), None, _ALL_HELD_OUT),
    ("eval_iters", MCORE, None, _ALL_HELD_OUT),
    ("num_train_epochs", TRAINER, "train.num_epochs", ""),
    ("max_epochs", (SWIFT,), "train.num_epochs", ""),
    ("dpo.max_num_epochs", (NEMO,), "train.num_epochs", _ONE_LENGTH),
    ("max_steps", TRAINER, "train.train_iters", _ONE_LENGTH),
    ("dpo.max_num_steps", (NEMO,), "train.train_iters", _ONE_LENGTH),
    ("train_iters", MCORE, "train.train_iters", ""),
    ("train_samples", (MEGATRON,), "train.train_iters", "divided by the pairs of a step"),
    ("seed", (*TRAINER, MEGATRON), "train.seed", ""),
    ("dpo.seed", (NEMO,), "train.seed", ""),
    # the optimizer
    ("learning_rate", TRAINER, "optimizer.lr", ""),
    ("lr", MCORE, "optimizer.lr", ""),
    ("policy.optimizer.kwargs.lr policy.megatron_cfg.optimizer.lr", (NEMO,), "optimizer.lr", ""),
    ("min_lr", MCORE, "optimizer.min_lr", ""),
    ("lr_scheduler_kwargs", TRAINER, "optimizer.min_lr", "the one value of it that can be set here"),
    ("policy.megatron_cfg.optimizer.min_lr", (NEMO,), "optimizer.min_lr", ""),
    (
        "lr_scheduler_type",
        TRAINER,
        "optimizer.lr_decay_style",
        "linear, constant or cosine; each with or without warm-up",
    ),
    ("lr_decay_style", MCORE, "optimizer.lr_decay_style", "linear, constant or cosine"),
    ("policy.megatron_cfg.scheduler.lr_decay_style", (NEMO,), "optimizer.lr_decay_style", "linear, constant or cosine"),
    ("lr_decay_iters", MCORE, None, _WHOLE_RUN),
    ("warmup_ratio", TRAINER, "optimizer.lr_warmup_fraction", ""),
    ("lr_warmup_fraction", MCORE, "optimizer.lr_warmup_fraction", ""),
    (
        "warmup_steps",
        TRAINER,
        "optimizer.lr_warmup_iters",
        "a number below 1 there is optimizer.lr_warmup_fraction here",
    ),
    ("lr_warmup_iters", MCORE, "optimizer.lr_warmup_iters", ""),
    ("policy.megatron_cfg.scheduler.lr_warmup_iters", (NEMO,), "optimizer.lr_warmup_iters", ""),
    ("weight_decay", (*TRAINER, MEGATRON), "optimizer.weight_decay", ""),
    (
        "policy.optimizer.kwargs.weight_decay policy.megatron_cfg.optimizer.weight_decay",
        (NEMO,),
        "optimizer.weight_decay",
        "",
    ),
    ("adam_beta1", (*TRAINER, MEGATRON), "optimizer.adam_beta1", ""),
    ("adam_beta2", (*TRAINER, MEGATRON), "optimizer.adam_beta2", ""),
    ("policy.optimizer.kwargs.betas", (NEMO,), "optimizer.adam_beta1", "the second is optimizer.adam_beta2"),
    ("policy.megatron_cfg.optimizer.adam_beta1", (NEMO,), "optimizer.adam_beta1", ""),
    ("policy.megatron_cfg.optimizer.adam_beta2", (NEMO,), "optimizer.adam_beta2", ""),
    ("adam_epsilon", TRAINER, "optimizer.adam_eps", ""),
    ("adam_eps", MCORE, "optimizer.adam_eps", ""),
    ("policy.optimizer.kwargs.eps policy.megatron_cfg.optimizer.adam_eps", (NEMO,), "optimizer.adam_eps", ""),
    ("max_grad_norm", TRAINER, "optimizer.clip_grad", ""),
    ("clip_grad", MCORE, "optimizer.clip_grad", ""),
    ("policy.max_grad_norm", (NEMO,), "optimizer.clip_grad", ""),
    ("optim", TRAINER, None, "the optimizer is AdamW"),
    ("policy.optimizer.name", (NEMO,), None, "the optimizer is AdamW"),
    # how the model is split, and memory
    ("tensor_model_parallel_size", MCORE, "parallel.tensor_model_parallel_size", ""),
    (
        "policy.megatron_cfg.tensor_model_parallel_size policy.dtensor_cfg.tensor_parallel_size",
        (NEMO,),
        "parallel.tensor_model_parallel_size",
        "",
    ),
    ("pipeline_model_parallel_size", MCORE, "parallel.pipeline_model_parallel_size", ""),
    (
        "policy.megatron_cfg.pipeline_model_parallel_size",
        (NEMO,),
        "parallel.pipeline_model_parallel_size",
        "",
    ),
    (
        "num_virtual_stages_per_pipeline_rank",
        (MEGATRON,),
        "parallel.virtual_pipeline_model_parallel_size",
        "",
    ),
    (
        "num_layers_per_virtual_pipeline_stage",
        (MEGATRON,),
        "parallel.virtual_pipeline_model_parallel_size",
        "the number of chunks on a rank, not of layers in a chunk",
    ),
    ("context_parallel_size", MCORE, "parallel.context_parallel_size", ""),
    (
        "policy.megatron_cfg.context_parallel_size policy.dtensor_cfg.context_parallel_size",
        (NEMO,),
        "parallel.context_parallel_size",
        "",
    ),
    ("sequence_parallel_size", (SWIFT,), "parallel.context_parallel_size", ""),
    ("sequence_parallel", MCORE, "parallel.sequence_parallel", ""),
    (
        "policy.megatron_cfg.sequence_parallel policy.dtensor_cfg.sequence_parallel",
        (NEMO,),
        "parallel.sequence_parallel",
        "",
    ),
    ("use_distributed_optimizer", MCORE, "optimizer.use_distributed_optimizer", "true by default"),
    (
        "policy.megatron_cfg.optimizer.use_distributed_optimizer",
        (NEMO,),
        "optimizer.use_distributed_optimizer",
        "",
    ),
    ("overlap_grad_reduce", MCORE, "optimizer.overlap_grad_reduce", ""),
    ("overlap_param_gather", MCORE, "optimizer.overlap_param_gather", ""),
    (
        "policy.megatron_cfg.distributed_data_parallel_config.overlap_grad_reduce",
        (NEMO,),
        "optimizer.overlap_grad_reduce",
        "",
    ),
    (
        "policy.megatron_cfg.distributed_data_parallel_config.overlap_param_gather",
        (NEMO,),
        "optimizer.overlap_param_gather",
        "",
    ),
    ("deepspeed fsdp", TRAINER, None, _SPLIT),
    ("config", (TRL, SWIFT), None, "write --conf FILE"),
    ("nproc_per_node", ("torchrun",), None, "write --nproc-per-node N"),
    ("cluster.num_nodes", (NEMO,), "cluster.nodes", "tools.submit asks Slurm for as many"),
    ("ddp_timeout", TRAINER, "train.distributed_timeout_minutes", "in minutes, not in seconds"),
    ("distributed_timeout_minutes", MCORE, "train.distributed_timeout_minutes", ""),
    ("use_cpu", TRAINER, None, "the CPU is used where there is no GPU"),
    ("gradient_checkpointing activation_checkpointing", TRAINER, "train.recompute", _RECOMPUTE),
    ("disable_gradient_checkpointing", (LLAMA_FACTORY,), "train.recompute", "true is none here, false is full"),
    (
        "policy.megatron_cfg.activation_checkpointing policy.dtensor_cfg.activation_checkpointing",
        (NEMO,),
        "train.recompute",
        _RECOMPUTE,
    ),
    ("recompute_granularity", MCORE, "train.recompute", ""),
    ("recompute_activations", (MEGATRON,), "train.recompute", "it is selective here"),
    ("fp8", (LLAMA_FACTORY,), "train.fp8", "a format, hybrid or e4m3, instead of true"),
    ("fp8_format", MCORE, "train.fp8", ""),
    ("policy.megatron_cfg.fp8_cfg.fp8", (NEMO,), "train.fp8", ""),
    ("fp8_recipe", MCORE, "train.fp8_recipe", "tensorwise by default; mxfp8 is not supported"),
    ("policy.megatron_cfg.fp8_cfg.fp8_recipe", (NEMO,), "train.fp8_recipe", ""),
    ("attn_implementation", (TRL,), None, _ATTENTION),
    ("flash_attn", (LLAMA_FACTORY,), None, _ATTENTION),
    ("attn_impl", (SWIFT,), None, _ATTENTION),
    ("attention_backend", MCORE, None, _ATTENTION),
    ("use_flash_attn transformer_impl", (MEGATRON,), None, _ATTENTION),
    ("use_liger_kernel", TRAINER, None, "the head never holds all logits, on any machine"),
    ("enable_liger_kernel", (LLAMA_FACTORY,), None, "the head never holds all logits, on any machine"),
    ("use_peft lora_r lora_target_modules", (TRL,), None, _FULL),
    ("finetuning_type lora_target", (LLAMA_FACTORY,), None, _FULL),
    ("tuner_type train_type target_modules adapters", (SWIFT,), None, _FULL),
    ("lora_rank", (LLAMA_FACTORY, SWIFT), None, _FULL),
    ("lora_alpha lora_dropout", TRAINER, None, _FULL),
    ("policy.dtensor_cfg.lora_cfg.enabled", (NEMO,), None, _FULL),
    ("load_in_4bit load_in_8bit", (TRL,), None, _UNQUANTISED),
    ("quantization_bit", (LLAMA_FACTORY,), None, _UNQUANTISED),
    ("quant_bits", (SWIFT,), None, _UNQUANTISED),
    # what a run writes
    ("output_dir", TRAINER, "train.output", ""),
    ("save", MCORE, "train.output", ""),
    ("checkpointing.checkpoint_dir", (NEMO,), "train.output", ""),
    ("run_name", TRAINER, "train.output", "the folder's name is the run's"),
    ("save_steps", TRAINER, "train.save_interval", ""),
    ("save_strategy", TRAINER, "train.save_interval", "always in steps"),
    ("save_interval", MCORE, "train.save_interval", ""),
    ("checkpointing.save_period", (NEMO,), "train.save_interval", ""),
    ("save_total_limit", TRAINER, "train.keep_last", ""),
    ("save_only_model", TRAINER, "train.save_optimizer", _OTHER_WAY_ROUND),
    ("no_save_optim", MCORE, "train.save_optimizer", _OTHER_WAY_ROUND),
    ("async_save", MCORE, "train.async_save", ""),
    ("checkpointing.keep_top_k", (NEMO,), None, _BEST_KEPT),
    ("eval_steps", TRAINER, "train.eval_interval", ""),
    ("eval_strategy", TRAINER, "train.eval_interval", "always in steps"),
    ("eval_interval", MCORE, "train.eval_interval", ""),
    ("dpo.val_period", (NEMO,), "train.eval_interval", ""),
    ("logging_steps", TRAINER, "train.log_interval", ""),
    ("log_interval", MCORE, "train.log_interval", ""),
    ("log_throughput", (MEGATRON,), None, "perf/tflops_per_rank is in every line of metrics.jsonl"),
    ("report_to", TRAINER, "report.wandb_project", _SERVICES),
    ("logging_dir", TRAINER, None, _METRICS),
    ("tensorboard_dir", MCORE, None, _METRICS),
    ("wandb_project", MCORE, "report.wandb_project", ""),
    ("wandb_exp_name", MCORE, "train.output", "the folder's name is the run's"),
    ("logger.log_dir logger.tensorboard_enabled", (NEMO,), None, _METRICS),
    ("logger.wandb_enabled", (NEMO,), "report.wandb_project", _NAMED),
    ("logger.wandb.project", (NEMO,), "report.wandb_project", ""),
    ("logger.wandb.name", (NEMO,), "train.output", "the folder's name is the run's"),
    ("logger.mlflow_enabled", (NEMO,), "report.mlflow_experiment", "the name of an experiment switches it on"),
    ("logger.mlflow.experiment_name", (NEMO,), "report.mlflow_experiment", ""),
    ("plot_loss", (LLAMA_FACTORY,), "train.report", "true by default; the curves are in report.html"),
    ("generate_during_eval", (TRL,), "report.samples", "a number of held-out prompts"),
    ("logger.num_val_samples_to_print", (NEMO,), "report.samples", "answered before and after training"),
    (
        "resume_from_checkpoint",
        TRAINER,
        "train.resume",
        "true or false: the run in train.output goes on from its newest whole checkpoint",
    ),
    (
        "overwrite_output_dir",
        (TRL, LLAMA_FACTORY),
        None,
        "a run is never overwritten; choose another train.output, or continue the run with train.resume=true",
    ),
    ("finetune", MCORE, None, "a run begins at step 0 unless train.resume=true"),
    ("ignore_data_skip", TRAINER, None, "a continued run always takes the pairs that come next"),
    ("exit_duration_in_mins", (MEGATRON,), "train.exit_after_minutes", ""),
    ("max_time_per_run exp_manager.max_time_per_run", ("NeMo",), "train.exit_after_minutes", _MINUTES),
    ("checkpointing.checkpoint_must_save_by", (NEMO,), "train.exit_after_minutes", _MINUTES),
    ("exit_signal_handler", (MEGATRON,), None, "SIGTERM and SIGUSR1 always let a training save a checkpoint and end"),
    ("load_best_model_at_end metric_for_best_model", TRAINER, "train.keep_best", _METRIC),
    ("checkpointing.metric_name", (NEMO,), "train.keep_best", _METRIC),
    ("greater_is_better", TRAINER, None, "the metric that train.keep_best names decides it"),
    ("checkpointing.higher_is_better", (NEMO,), None, "the metric that train.keep_best names decides it"),
    ("push_to_hub", TRAINER, None, "nothing is uploaded; tools.convert_megatron_to_hf writes a HuggingFace folder"),
    ("do_train do_eval", TRAINER, None, "recipes.train trains, and evaluates where there are held-out pairs"),
)

FOREIGN = tuple(Foreign(tuple(names.split()), *row) for names, *row in _TABLE)  # type: ignore[arg-type]
"""One entry for each row of the tables in docs/coming-from.md."""
_BY_NAME = {name: foreign for foreign in FOREIGN for name in foreign.names}


def foreign_name(written: str) -> Foreign | None:
    """The entry of a name, however it is written: --micro-batch-size, micro-batch-size or micro_batch_size."""
    return _BY_NAME.get(written.lstrip("-").replace("-", "_"))


def of_tool(tool: str) -> Iterator[Foreign]:
    """The entries of one program."""
    return (foreign for foreign in FOREIGN if tool in foreign.tools)
