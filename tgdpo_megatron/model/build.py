"""Build this rank's part of a model from the model's description."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from torch.nn.functional import silu

from tgdpo_megatron.config import Config
from tgdpo_megatron.config.constants import VOCAB_MULTIPLE, round_up
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.gpt import PreferenceGPT
from tgdpo_megatron.model.kernels import find_kernel
from tgdpo_megatron.model.layers import block_spec, gelu_tanh, needs_no_kernel
from tgdpo_megatron.platform.checks import check_attention, check_fp8, refuse_silent_traps
from tgdpo_megatron.platform.versions import SENDS_BEFORE_FREEING

# Transformer Engine's layers run on GPUs only.
HAVE_TRANSFORMER_ENGINE = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def transformer_config(description: ModelDescription, settings: Config, *, trained: bool = True) -> TransformerConfig:
    """Megatron's configuration of a model under the settings of a run.

    Args:
        trained: Whether the model is the policy. Only the policy computes in FP8.

    Raises:
        UserError: A setting that is known to give wrong numbers without an error, an attention that has no kernel
            for packed sequences, or FP8 on a machine that cannot compute it.
    """
    check_attention(settings.train.precision, transformer_engine=HAVE_TRANSFORMER_ENGINE)
    parallel = settings.parallel
    dtype = torch.float32 if settings.train.precision == "fp32" else torch.bfloat16
    cuda = torch.cuda.is_available()
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    fp8: dict[str, Any] = {}
    if trained and settings.train.fp8:
        check_fp8(settings.train)
        fp8 = {
            "fp8": settings.train.fp8,
            "fp8_recipe": settings.train.recipe_of_fp8,
            # Only the delayed recipe reads these two: it scales by the largest value of the last 1024 micro-batches.
            "fp8_amax_history_len": 1024,
            "fp8_amax_compute_algo": "max",
        }
    recompute: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    config = TransformerConfig(
        num_layers=description.num_layers,
        hidden_size=description.hidden_size,
        ffn_hidden_size=description.ffn_hidden_size,
        num_attention_heads=description.num_attention_heads,
        num_query_groups=description.num_query_groups,
        kv_channels=description.kv_channels,
        layernorm_epsilon=description.layernorm_epsilon,
        **_architecture(description),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not cuda,
        perform_initialization=True,
        # Where micro-batches differ in length, a stage sends the shape of its output before the output itself.
        # Megatron accepts this only with the dispatcher `alltoall`, even for a model without experts.
        variable_seq_lengths=not settings.train.fixed_micro_batches,
        moe_token_dispatcher_type="alltoall",
        deallocate_pipeline_outputs=cuda and (SENDS_BEFORE_FREEING.holds or not interleaved),
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # The loss function returns the sum over pairs and the number of pairs. Megatron divides once, by the number
        # of pairs of all ranks.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        # Megatron's fused SwiGLU; it has no fused unit for Gemma's GELU.
        bias_activation_fusion=HAVE_TRANSFORMER_ENGINE and description.activation == "silu",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=HAVE_TRANSFORMER_ENGINE,
        persist_layer_norm=HAVE_TRANSFORMER_ENGINE,
        attention_softmax_in_fp32=True,
        **recompute[settings.train.recompute],
        **fp8,
    )
    # Despite its name, this setting makes Megatron build the activation that the layer spec names, GatedUnit. It is set
    # here because Megatron's check of the setting knows the functions of Transformer Engine only.
    config.use_te_activation_func = not HAVE_TRANSFORMER_ENGINE
    config.kernel = None  # a field of ours, which block_spec and _attends_by_plan read
    if cuda and settings.picks_keys and dtype is torch.bfloat16:  # the kernels compute in 16 bits
        config.kernel, _ = find_kernel(
            *_heads(description, settings), torch.device("cuda", torch.cuda.current_device())
        )
    refuse_silent_traps(config, packed=not _attends_by_plan(description, config))
    return config


def _attends_by_plan(description: ModelDescription, config: TransformerConfig) -> bool:
    """Whether attention is that of attention.py, and not Transformer Engine's as Megatron calls it."""
    return config.kernel is not None or needs_no_kernel(description, transformer_engine=HAVE_TRANSFORMER_ENGINE)


def _heads(description: ModelDescription, settings: Config) -> tuple[int, int, int]:
    """Query heads and key-value heads of a rank, and the channels of a head."""
    ranks = settings.parallel.tensor_model_parallel_size
    groups = max(1, description.num_query_groups // ranks)
    return description.num_attention_heads // ranks, groups, description.kv_channels


def settle_attention(config: Config, *descriptions: ModelDescription) -> tuple[Config, str | None]:
    """Switch shared prompts off where no attention kernel can share them on a GPU.

    Collective where there are several ranks: all do the same, also where a kernel works on some of them alone.

    Args:
        descriptions: All models that are going to run.

    Returns:
        The settings, and a sentence where they were changed.

    Raises:
        UserError: Context parallelism on Transformer Engine's layers, which need such a kernel for it as well.
    """
    found = [_why_no_kernel(config, description) for description in descriptions]
    if dist.is_initialized():
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, found)
        found = [faults for of_rank in of_ranks for faults in of_rank]
    faults = next(filter(None, found), None)
    if faults is None:
        return config, None
    if (size := config.parallel.context_parallel_size) > 1:
        if not HAVE_TRANSFORMER_ENGINE:  # local layers compute one block after another
            return config, None
        raise UserError(
            f"parallel.context_parallel_size={size} needs an attention kernel for fewer queries than keys, and none "
            f"works here ({faults}); set it to 1."
        )
    train = config.train.model_copy(update={"shared_prompts": False})
    return config.model_copy(update={"train": train}), (
        f"each response has a prompt of its own, because no attention kernel can share prompts here ({faults})"
    )


def _why_no_kernel(config: Config, description: ModelDescription) -> str | None:
    """Why no kernel computes a model's attention by a plan on this rank.

    None where one does, and where none would: on a CPU, in fp32, and with a soft-cap or a window, see layers.py.
    """
    on_gpu = HAVE_TRANSFORMER_ENGINE or torch.cuda.is_available()
    in_16_bits = config.train.precision != "fp32"  # which Transformer Engine's layers are only built in
    if not (config.picks_keys and on_gpu and in_16_bits) or needs_no_kernel(description, transformer_engine=True):
        return None
    kernel, faults = find_kernel(*_heads(description, config), torch.device("cuda", torch.cuda.current_device()))
    return None if kernel else faults


def _architecture(description: ModelDescription) -> dict[str, Any]:
    """The settings of Megatron's configuration that depend on the kind of the layers."""
    windowed = description.sliding_window is not None
    return {
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": description.zero_centered_norms,
        "gated_linear_unit": True,
        "activation_func": {"silu": silu, "gelu_tanh": gelu_tanh}[description.activation],
        "add_bias_linear": False,
        "add_qkv_bias": description.attention_bias,
        "qk_layernorm": description.qk_layernorm,
        "softmax_scale": description.query_scale,
        # Megatron counts the tokens before the query.
        "window_size": (description.sliding_window - 1, 0) if description.sliding_window is not None else None,
        "window_attn_skip_freq": [int(layer) for layer in description.windowed_layers] if windowed else None,
    }


def build_model(description: ModelDescription, config: TransformerConfig) -> list[PreferenceGPT]:
    """Build this rank's chunks of a model with random weights: one chunk, or one for each virtual pipeline stage."""
    virtual = config.virtual_pipeline_model_parallel_size
    return [_build_chunk(description, config, stage) for stage in (range(virtual) if virtual else [None])]


def _build_chunk(description: ModelDescription, config: TransformerConfig, vp_stage: int | None) -> PreferenceGPT:
    position = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    multiple = VOCAB_MULTIPLE * config.tensor_model_parallel_size
    model = PreferenceGPT(
        config=config,
        transformer_layer_spec=block_spec(description, config, vp_stage, transformer_engine=HAVE_TRANSFORMER_ENGINE),
        vocab_size=round_up(description.vocab_size, multiple),
        max_sequence_length=description.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**position),
        post_process=parallel_state.is_pipeline_last_stage(**position),
        share_embeddings_and_output_weights=description.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=description.rotary_base,
        rope_scaling=description.rope_scaling_factor is not None,
        rope_scaling_factor=description.rope_scaling_factor or 8.0,
        seq_len_interpolation_factor=description.rope_linear_factor,
        vp_stage=vp_stage,
    )
    if model.post_process:
        # The head multiplies by the output weight itself, so the layer only returns the weight. The head calls the
        # layer for it, because Megatron's hook on the call waits for weights that are still being gathered.
        model.output_layer.forward = lambda: model.output_layer.weight
    for module in model.modules():
        # Transformer Engine's linear layers can add weight gradients to the fp32 `main_grad` themselves. Megatron's own
        # setting for this also requires apex, for layers that are not used here. In FP8 the first micro-batch of a
        # pass overwrites `main_grad` instead of adding to it, so gradients must be zeroed before every training pass,
        # as train.py does.
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
    model.description = description
    model.attends_by_plan = _attends_by_plan(description, config)
    model.rotary_of_windows = None
    if description.window_rotary_base is not None:
        model.rotary_of_windows = RotaryEmbedding(
            description.kv_channels,
            rotary_percent=1.0,
            rotary_base=description.window_rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
        )
    if torch.cuda.is_available():
        model.cuda(torch.cuda.current_device())
    return model
