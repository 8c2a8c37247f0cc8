"""The papers' recipes: published values against a table written by hand, layouts against the models' shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from recipes import large, tiny
from recipes.settings import RECIPES, read_command_line
from tests.support.public_models import PUBLIC_MODELS
from tgdpo_megatron.config import Config, check_batch_layout
from tgdpo_megatron.model.description import ModelDescription, check_model_layout
from tgdpo_megatron.model.families import FAMILIES

GPUS, GPU_BYTES = 8, 80e9


@dataclass(frozen=True)
class Published:
    """One row of the table, from the sources that recipes/tgdpo.py and recipes/treg.py name."""

    model: str
    loss: str
    lr: float
    beta: float
    alpha: float | None = None
    gamma_beta_ratio: float | None = None
    scores: str = "cached"


TABLE = {
    "dpo_llama3_8b_pairrm": Published("Llama-3-8B", "dpo", lr=7e-7, beta=0.01, scores="live"),
    "tgdpo_llama3_8b_pairrm": Published("Llama-3-8B", "tgdpo", lr=7e-7, beta=0.1, alpha=0.5),
    "dpo_llama3_8b_armorm": Published("Llama-3-8B", "dpo", lr=3e-7, beta=0.01, scores="live"),
    "tgdpo_llama3_8b_armorm": Published("Llama-3-8B", "tgdpo", lr=7e-7, beta=0.1, alpha=0.5),
    "dpo_llama32_3b": Published("Llama-3.2-3B", "dpo", lr=3e-7, beta=0.01, scores="live"),
    "tgdpo_llama32_3b": Published("Llama-3.2-3B", "tgdpo", lr=7e-7, beta=0.1, alpha=0.5),
    "dpo_gemma2_2b": Published("Gemma-2-2B", "dpo", lr=5e-7, beta=0.01, scores="live"),
    "tgdpo_gemma2_2b": Published("Gemma-2-2B", "tgdpo", lr=7e-7, beta=0.1, alpha=0.5),
    "dpo_reg_llama3_8b": Published("Llama-3-8B", "dpo_reg", lr=3e-7, beta=0.01, alpha=0.25),
    "simpo_reg_llama3_8b": Published("Llama-3-8B", "simpo_reg", lr=1e-6, beta=10, alpha=0.25, gamma_beta_ratio=0.3),
    "simpo_reg_gemma2_9b": Published("Gemma-2-9B", "simpo_reg", lr=8e-7, beta=10, alpha=0.25, gamma_beta_ratio=0.5),
}


def described(model: str) -> ModelDescription:
    """The shape that the model's config.json gives."""
    config, _ = PUBLIC_MODELS[model]
    return FAMILIES[config["model_type"]].read(config, Path("config.json"))


@dataclass(frozen=True)
class Size:
    parameters: float
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int


SIZES = {
    "Llama-3-8B": Size(8.03e9, 32, 4096, 14336, 32, 8),
    "Llama-3.2-3B": Size(3.21e9, 28, 3072, 8192, 24, 8),
    "Gemma-2-2B": Size(2.61e9, 26, 2304, 9216, 8, 4),
    "Gemma-2-9B": Size(9.24e9, 42, 3584, 14336, 16, 8),
}


def read(name: str) -> Config:
    """As a program reads it: recipe, method's defaults filled in, checked for eight processes."""
    command = read_command_line("recipes.train", "", ["--recipe", name, "--nproc-per-node", str(GPUS)])
    config, processes = command.config, command.processes
    check_batch_layout(config, world_size=processes)
    return config


def test_the_table_has_every_recipe_of_a_paper() -> None:
    ours = (tiny.__name__, large.__name__)
    assert set(TABLE) == {name for name, recipe in RECIPES.items() if recipe.__module__ not in ours}


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_has_its_published_values(name: str) -> None:
    config, published = read(name), TABLE[name]
    loss = config.loss
    assert (loss.type, loss.beta, loss.alpha) == (published.loss, published.beta, published.alpha)
    assert (loss.gamma_beta_ratio, config.optimizer.lr) == (published.gamma_beta_ratio, published.lr)
    assert config.scores.source == published.scores


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_has_the_values_that_all_settings_share(name: str) -> None:
    config = read(name)
    assert (config.train.global_batch_size, config.data.max_length, config.train.precision) == (128, 2048, "auto")
    assert (config.train.num_epochs, config.train.save_interval, config.train.seed) == (1, 60, 42)
    optimizer = config.optimizer
    assert (optimizer.lr_warmup_fraction, optimizer.min_lr, optimizer.clip_grad) == (0.1, 0.0, 1.0)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.999, 1e-8)
    assert optimizer.weight_decay == 0.0


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.loss == "tgdpo"])
def test_tgdpo_scales_its_rewards_by_the_training_beta_as_its_authors_do(name: str) -> None:
    loss = read(name).loss
    assert (loss.token_rewards, loss.beta_r, loss.reward_squash, loss.reward_clip) == ("guidance", 0.1, False, None)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.loss.endswith("_reg")])
def test_treg_takes_squashed_rewards_from_contrastive_prompts_and_a_detached_weight(name: str) -> None:
    loss = read(name).loss
    assert (loss.token_rewards, loss.beta_r, loss.reward_squash) == ("contrastive", 1.0, True)
    assert loss.sequence_weight == "detached"


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.loss == "tgdpo"])
def test_a_tgdpo_setting_has_a_guidance_run_that_differs_in_the_loss_alone(name: str) -> None:
    guidance, config = read(f"dpo_{name.removeprefix('tgdpo_')}"), read(name)
    assert (guidance.parallel, guidance.train, guidance.data) == (config.parallel, config.train, config.data)


@pytest.mark.parametrize("name", TABLE)
def test_a_longest_pair_fits_a_micro_batch(name: str) -> None:
    config = read(name)
    assert config.train.micro_batch_tokens is not None
    assert 2 * config.data.max_length <= config.train.micro_batch_tokens


@pytest.mark.parametrize("name", TABLE)
def test_megatron_takes_the_model_at_the_recipes_layout(name: str) -> None:
    from tgdpo_megatron.model.build import transformer_config

    description, config = described(TABLE[name].model), read(name)
    check_model_layout(description, config.parallel)
    made = transformer_config(description, config)
    assert (made.num_layers, made.hidden_size, made.num_query_groups) == (
        description.num_layers,
        description.hidden_size,
        description.num_query_groups,
    )
    assert made.tensor_model_parallel_size == config.parallel.tensor_model_parallel_size and made.bf16


@pytest.mark.parametrize("name", TABLE)
def test_the_arithmetic_of_memory_fits_80_gb_with_an_eighth_to_spare(name: str) -> None:
    """By hand, apart from the planner, in bytes: n = parameters of a GPU, 6 n + 12 n/DP for the policy, 2 n for a live
    frozen model, and what each layer keeps of each token."""
    config, size = read(name), SIZES[TABLE[name].model]
    tensor = config.parallel.tensor_model_parallel_size
    here = size.parameters / tensor
    assert config.train.micro_batch_tokens is not None and config.train.recompute == "none"
    assert size.groups % tensor == 0 and size.ffn % tensor == 0
    frozen = len(config.live_models)
    per_token = 12 * size.hidden + 4 * size.hidden * size.groups / size.heads + 6 * size.ffn
    if "Gemma" in TABLE[name].model:  # the norms after the blocks, and an activation that is not fused
        per_token += 8 * size.hidden + 4 * size.ffn
    activations = config.train.micro_batch_tokens * size.layers * per_token / tensor
    needed = here * (6 + 12 / (GPUS // tensor) + 2 * frozen) + activations
    assert needed < 7 / 8 * GPU_BYTES, f"{needed / 1e9:.1f} GB"
