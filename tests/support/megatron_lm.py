"""The arguments that Megatron-LM keeps in its checkpoints, by the names of its own parser.

The names and their defaults are those of megatron/training/arguments.py of Megatron-LM, at about Megatron-Core 0.16:
what is added there by hand, and what the parser makes of the fields of TransformerConfig. validate_args() and a
training add dtypes, enums and what they count. Vision, retrieval and reinforcement learning are left out.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

_OFF = """
accumulate_allreduce_grads_in_fp32 add_qkv_bias adlr_autoresume allow_ambiguous_pad_tokens apply_query_key_layer_scaling
apply_residual_connection_post_layernorm apply_wd_to_qk_layernorm async_save attention_output_gate
attention_softmax_in_fp32 batch_invariant_mode bf16 cache_mla_latents calc_ft_timeouts calculate_per_token_loss
check_for_large_grads checkpoint_activations ckpt_fully_parallel_save_deprecated clone_scatter_output_in_embedding
create_all_gather_group dataloader_defer_npy_index_mmap dataloader_fast_cache_load ddp_average_in_collective
ddp_pad_buckets_for_high_nccl_busbw ddp_reduce_scatter_with_fp32_accumulation decode_only_cuda_graphs
delay_wgrad_compute deprecated_use_mcore_models deterministic_mode disable_bf16_reduced_precision_matmul
disable_symmetric_registration distribute_saved_activations dsa_indexer_use_sparse_loss enable_chunked_prefill
enable_cuda_graph enable_experimental enable_ft_package enable_full_sharding_in_hsdp eod_mask_loss
external_cuda_graph fake_process_group fim_data fine_grained_activation_offloading first_last_layers_bf16 flash_decode
fp16 fp16_lm_cross_entropy fp32_residual_connection fp4_param fp8_param_gather fsdp_double_buffer
fsdp_manual_registration grad_reduce_in_bf16 group_query_attention hybrid_context_parallel inference_dynamic_batching
inference_dynamic_batching_track_generated_token_events inference_dynamic_batching_track_paused_request_events
inference_fuse_tp_communication inference_wandb_logging init_method_xavier_uniform init_model_with_meta_device
inprocess_empty_cuda_cache inprocess_restart is_hybrid_model keep_fp8_transpose_cache layernorm_zero_centered_gamma
log_throughput log_progress mock_data moe_apply_probs_on_input moe_enable_deepep moe_enable_routing_replay
moe_grouped_gemm moe_layer_recompute moe_pad_expert_input_to_capacity moe_per_layer_logging moe_permute_fusion
moe_router_enable_expert_bias moe_router_force_load_balancing moe_router_fusion moe_router_padding_for_fp8
moe_router_padding_for_quantization moe_router_pre_softmax moe_shared_expert_gate moe_shared_expert_overlap
moe_use_legacy_grouped_gemm moe_use_upcycling mtp_standalone multi_latent_attention muon_use_nesterov nccl_ub
no_persist_layer_norm one_logger_async openai_gelu optimizer_cpu_offload output_bert_embeddings
overlap_cpu_optimizer_d2h_h2d overlap_grad_reduce overlap_moe_expert_parallel_comm overlap_p2p_comm_warmup_flush
overlap_param_gather overlap_param_gather_with_optimizer_step perform_rl_step qk_clip qk_l2_norm qk_layernorm
quick_geglu recompute_activations reset_attention_mask reset_position_ids reuse_grad_buf_for_mxfp8_param_ag
rotary_interleaved run_workload_inspector_server sequence_parallel sft squared_relu swiglu tokenizer_hf_use_fast
tokenizer_hf_include_special_tokens tokenizer_sentencepiece_legacy tp_comm_overlap tp_comm_overlap_rs_dgrad
trust_remote_code untie_embeddings_and_output_weights use_cpu_initialization use_dist_ckpt_deprecated
use_distributed_optimizer use_flash_attn use_fused_weighted_squared_relu use_kitchen_attention use_legacy_models
use_legacy_static_engine use_precision_aware_optimizer use_ring_exchange_p2p use_rope_scaling
use_rotary_position_embeddings use_te_activation_func use_torch_optimizer_for_cpu_offload
"""

_ON = """
add_bias_linear add_position_embedding align_param_gather apply_rope_fusion bert_binary_head bias_dropout_fusion
bias_gelu_fusion bias_swiglu_fusion check_for_nan_in_loss_and_grad create_attention_mask_in_dataloader
enable_msc enable_one_logger fp8_wgrad gradient_accumulation_fusion gradient_reduce_div_fusion masked_softmax_fusion
mmap_bin_files muon_split_qkv overlap_p2p_comm perform_initialization pin_cpu_grads pin_cpu_params
scatter_gather_tensors_in_pipeline torch_fsdp2_reshard_after_forward tp_comm_bulk_dgrad tp_comm_bulk_wgrad
tp_comm_overlap_ag tp_comm_overlap_rs use_mamba_mem_eff_path
"""

_UNSET = """
activation_func_clamp_value app_tag_run_name batch_size data_args_path data_cache_path dataloader_type ddp_bucket_size
ddp_num_buckets decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers decoder_num_layers
decoder_seq_length decoupled_lr decoupled_min_lr dist_ckpt_format_deprecated dsa_indexer_head_dim dsa_indexer_n_heads
dsa_indexer_topk dump_param_to_param_group_map embedding_init_method_std encoder_seq_length
experimental_attention_variant fim_fragment_rate fim_no_prefix fim_split_sample fp4 fp4_quantizer_factory fp8
fp8_quantizer_factory heterogeneous_layers_config_encoded_json heterogeneous_layers_config_path
hierarchical_context_parallel_sizes hybrid_override_pattern inference_dynamic_batching_mamba_memory_ratio
inference_dynamic_batching_max_requests inference_dynamic_batching_max_tokens
inference_dynamic_batching_paused_buffer_size_gb inprocess_max_iterations kitchen_attention_backend langrl_env_config
linear_attention_freq linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads
linear_value_head_dim load loss_scale mamba_num_heads max_seqlen_per_dp_cp_rank merge_file
microbatch_group_size_per_vp_stage mlp_chunks_for_prefill model_parallel_size moe_expert_capacity_factor
moe_ffn_hidden_size moe_flex_dispatcher_backend moe_input_jitter_eps moe_latent_size moe_router_dtype
moe_router_group_topk moe_router_num_groups moe_router_topk_scaling_factor moe_shared_expert_intermediate_size
moe_z_loss_coeff mrope_section mtp_num_layers no_load_optim no_load_rng no_rope_freq no_save_optim no_save_rng
no_weight_decay_cond_type num_experts num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank
object_storage_cache_path offload_modules one_logger_run_name onnx_safe per_dataset_sequences_path
per_split_data_args_path phase_transition_iterations pipeline_model_parallel_comm_backend
pipeline_model_parallel_layout q_lora_rank recompute_granularity recompute_method recompute_modules
recompute_num_layers result_rejected_tracker_filename rope_type rotary_seq_len_interpolation_factor spec
suggested_communication_unit_size symmetric_ar_type te_precision_config_file test_data_path tiktoken_pattern
tiktoken_special_tokens tokenizer_metadata tokenizer_special_tokens tp_comm_overlap_cfg train_data_path
valid_data_path virtual_pipeline_model_parallel_size vocab_file vocab_size warmup window_attn_skip_freq window_size
yaml_cfg
"""

_VALUES: dict[str, Any] = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
    "adlr_autoresume_interval": 1000,
    "app_tag_run_version": "0.0.0",
    "attention_dropout": 0.0,
    "bert_embedder_type": "megatron",
    "clip_grad": 1.0,
    "config_logger_dir": "",
    "consumed_train_samples": 3072,
    "consumed_valid_samples": 0,
    "context_parallel_size": 1,
    "cp_comm_type": ["p2p"],
    "cpu_offloading_num_layers": 0,
    "cross_entropy_fusion_impl": "native",
    "cuda_graph_impl": "none",
    "cuda_graph_warmup_steps": 3,
    "data_parallel_sharding_strategy": "no_shard",
    "data_parallel_size": 1,
    "data_path": ["0.7", "/data/web_text_document", "0.3", "/data/code_text_document"],
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 2,
    "fim_eod_token": "<|endoftext|>",
    "fim_middle_token": "<fim_middle>",
    "fim_pad_token": "<fim_pad>",
    "fim_prefix_token": "<fim_prefix>",
    "fim_rate": 0.5,
    "fim_spm_rate": 0.5,
    "fim_suffix_token": "<fim_suffix>",
    "fp4_recipe": "nvfp4",
    "fp8_amax_compute_algo": "most_recent",
    "fp8_amax_history_len": 1,
    "fp8_interval": 1,
    "fp8_margin": 0,
    "fp8_recipe": "delayed",
    "ft_num_warmup_iters": 5,
    "glu_linear_offset": 0.0,
    "hidden_dropout": 0.0,
    "hybrid_attention_ratio": 0.0,
    "hybrid_mlp_ratio": 0.0,
    "hysteresis": 2,
    "inference_batch_times_seqlen_threshold": -1,
    "inference_coordinator_port": 12346,
    "inference_dynamic_batching_block_size": 256,
    "inference_dynamic_batching_buffer_size_gb": 40.0,
    "inference_dynamic_batching_num_cuda_graphs": 16,
    "inference_max_requests": 8,
    "inference_max_seq_length": 2560,
    "init_method_std": 0.02,
    "initial_loss_scale": 2**32,
    "inprocess_granularity": "node",
    "inprocess_hard_timeout": 90,
    "inprocess_soft_timeout": 60,
    "iteration": 3,
    "kv_lora_rank": 32,
    "loss_scale_window": 1000,
    "lr": 3e-4,
    "make_vocab_size_divisible_by": 128,
    "mamba_head_dim": 64,
    "mamba_num_groups": 8,
    "mamba_state_dim": 128,
    "mask_prob": 0.15,
    "max_tokens_to_oom": 12000,
    "mid_level_dataset_surplus": 0.005,
    "min_loss_scale": 1.0,
    "min_lr": 3e-5,
    "min_offloaded_tensor_size": 1048576,
    "moe_aux_loss_coeff": 0.0,
    "moe_deepep_num_sms": 20,
    "moe_hybridep_num_sms": 16,
    "moe_layer_freq": 1,
    "moe_router_bias_update_rate": 1e-3,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_score_function": "softmax",
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "allgather",
    "moe_token_drop_policy": "probs",
    "moe_upcycling_granularity": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "mtp_loss_scaling_factor": 0.1,
    "muon_momentum": 0.9,
    "muon_scale_mode": "spectral",
    "muon_tp_mode": "blockwise",
    "num_distributed_optimizer_instances": 1,
    "num_layers_at_end_in_bf16": 1,
    "num_layers_at_start_in_bf16": 1,
    "num_query_groups": 1,
    "num_workers": 2,
    "one_logger_project": "megatron-lm",
    "optimizer": "adam",
    "optimizer_offload_fraction": 1.0,
    "outer_dp_sharding_strategy": "no_shard",
    "pipeline_model_parallel_size": 1,
    "qk_clip_alpha": 0.5,
    "qk_clip_threshold": 100.0,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "rank": 0,
    "refit_method": "gloo",
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "rope_scaling_factor": 8.0,
    "rotary_percent": 1.0,
    "rotary_scaling_factor": 1.0,
    "sample_rate": 1.0,
    "seq_length": 4096,
    "sft_tokenizer_prompt_format": "nemotron-h-aligned",
    "sgd_momentum": 0.9,
    "short_seq_prob": 0.1,
    "softmax_type": "vanilla",
    "split": "99,1,0",
    "tensor_model_parallel_size": 2,
    "tiktoken_num_special_tokens": 1000,
    "tokenizer_model": "/models/tokenizer",
    "tokenizer_type": "HuggingFaceTokenizer",
    "transformer_impl": "transformer_engine",
    "v_head_dim": 128,
    "vocab_extra_ids": 0,
    "weight_decay": 0.1,
    "wgrad_deferral_limit": 0,
    "world_size": 2,
}


def of_megatron_lm(config: dict[str, Any], **changed: Any) -> Namespace:
    """The arguments of a training of Megatron-LM at two tensor-parallel ranks, of a model that a config.json describes.

    Args:
        config: Of a family that Megatron-LM has arguments for.
        changed: Arguments that are others.
    """
    import torch
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend, CudaGraphScope

    rope = config.get("rope_parameters") or {}
    heads = config["num_attention_heads"]
    model = {
        "num_layers": config["num_hidden_layers"],
        "encoder_num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "max_position_embeddings": config["max_position_embeddings"],
        "padded_vocab_size": config["vocab_size"] + -config["vocab_size"] % 256,
        "position_embedding_type": "rope",
        "rotary_base": int(rope.get("rope_theta", 10000)),
        "use_rope_scaling": rope.get("rope_type") == "llama3",
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": config["model_type"] == "qwen2",
        "qk_layernorm": config["model_type"] == "qwen3",
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
    }
    of_training = {
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "main_grads_dtype": torch.float32,
        "main_params_dtype": torch.float32,
        "exp_avg_dtype": torch.float32,
        "exp_avg_sq_dtype": torch.float32,
        "attention_backend": AttnBackend.auto,
        "cuda_graph_scope": [CudaGraphScope.attn],
        "model_type": ModelType.encoder_or_decoder,
    }
    flags = {**dict.fromkeys(_OFF.split(), False), **dict.fromkeys(_ON.split(), True), **dict.fromkeys(_UNSET.split())}
    return Namespace(**{**flags, **_VALUES, **model, **of_training, **changed})
