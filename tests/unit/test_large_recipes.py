"""The recipes of models of 70 billion parameters: their layouts are the planner's, and fit the models and the nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes import large
from recipes.settings import RECIPES
from tests.support.public_models import PUBLIC_MODELS
from tgdpo_megatron.config import Config, complete, load, on_device
from tgdpo_megatron.model.description import ModelDescription, check_model_layout
from tgdpo_megatron.model.families import FAMILIES, parameters
from tgdpo_megatron.planning.disk import disk_need
from tgdpo_megatron.planning.memory import GIB, ROOM, plan
from tgdpo_megatron.planning.remedies import layouts

GPU_BYTES = 80 * 10**9
NAMES = [name for name, recipe in RECIPES.items() if recipe.__module__ == large.__name__]
MODELS = {"llama3": "Llama-3.3-70B", "qwen25": "Qwen2.5-72B"}
"""Llama-3-70B has the sizes of Llama-3.3-70B."""
PAGE = Path(__file__).resolve().parents[2] / "docs" / "cluster.md"


def read(name: str, **train: object) -> tuple[Config, ModelDescription, int]:
    """The recipe as a GPU gets it, the model's sizes, and the number of GPUs."""
    config = on_device(complete(load(RECIPES[name](), {"train": train}, where="test"), where="test"), "cuda")
    shape, _ = PUBLIC_MODELS[MODELS[name.split("_")[1]]]
    assert config.cluster.nodes is not None and config.cluster.gpus_per_node is not None
    description = FAMILIES[shape["model_type"]].read(shape, Path("config.json"))
    return config, description, config.cluster.nodes * config.cluster.gpus_per_node


def test_there_is_a_recipe_for_each_method_model_and_number_of_nodes() -> None:
    assert len(NAMES) == 8


@pytest.mark.parametrize("name", NAMES)
def test_the_planners_own_sentence_stands_beside_a_recipe_and_it_fits_80_gb(name: str) -> None:
    config, description, ranks = read(name)
    needs = plan(config, description, world_size=ranks)
    assert needs.bytes <= ROOM * GPU_BYTES
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layout = f"TP{tensor} PP{pipeline} DP{ranks // tensor // pipeline}"
    said = " ".join((RECIPES[name].__doc__ or "").split())
    assert said.endswith(f"{ranks // 8} nodes of 8 × 80 GB. {layout}: {needs.sentence()}.")


@pytest.mark.parametrize("name", NAMES)
def test_the_page_says_of_a_recipe_what_the_planner_says(name: str) -> None:
    config, description, ranks = read(name)
    in_bf16 = plan(config, description, world_size=ranks).bytes
    config, description, ranks = read(name, fp8="hybrid")
    in_fp8 = plan(config, description, world_size=ranks, transformer_engine=True).bytes
    (row,) = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |")]
    assert row.endswith(f"| {in_bf16 / GIB:.1f} GiB | {in_fp8 / GIB:.1f} GiB |")


def test_the_page_says_how_much_disk_the_whole_chain_takes() -> None:
    """The guidance keeps its checkpoints while the policy writes one more than it keeps."""
    config, description, _ = read("tgdpo_llama3_70b_4x8")
    need, model = disk_need(config, description), parameters(description) * 2
    assert need.checkpoints == config.train.keep_last + 1 == 3
    amounts = [model, model, 2 * need.checkpoint, 3 * need.checkpoint, model]
    section = PAGE.read_text(encoding="utf-8").partition("| what | where | GB |")[2].partition("\n\n")[0]
    rows = [line.strip("|").split("|")[-1].strip().replace(",", "") for line in section.splitlines()[2:]]
    assert rows == [f"{amount / 1e9:.0f}" for amount in (*amounts, sum(amounts))]


def test_the_page_says_how_much_host_memory_a_save_takes() -> None:
    """Weights and optimizer state of the fullest rank, for every GPU of a node."""
    at_most = []
    for name in ("tgdpo_llama3_70b_4x8", "tgdpo_llama3_70b_8x8"):
        config, description, ranks = read(name)
        parts = plan(config, description, world_size=ranks).phase("weights and optimizer").parts
        at_most.append((parts["policy weights"] + parts["optimizer state"]) * (config.cluster.gpus_per_node or 1) / 1e9)
    said = f"memory: at most {at_most[0]:.0f} GB on 4 nodes, and {at_most[1]:.0f} GB on 8."
    assert said in " ".join(PAGE.read_text(encoding="utf-8").split())


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("dpo_")])
def test_the_layout_is_the_fastest_that_the_planner_lists_for_the_guidance(name: str) -> None:
    config, description, ranks = read(name)
    fastest, _ = layouts(config, description, world_size=ranks, available=round(ROOM * GPU_BYTES))[0]
    assert fastest == "as it is"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("tgdpo_")])
def test_a_run_differs_from_its_guidance_in_the_loss_alone(name: str) -> None:
    (config, _, _), (guidance, _, _) = read(name), read(name.removeprefix("tg"))
    for group in ("parallel", "train", "data", "optimizer", "cluster"):
        assert getattr(config, group) == getattr(guidance, group)


@pytest.mark.parametrize("name", NAMES)
def test_tensor_parallelism_stays_within_a_node_and_divides_the_heads(name: str) -> None:
    config, description, _ = read(name)
    tensor = config.parallel.tensor_model_parallel_size
    assert 1 < tensor <= (config.cluster.gpus_per_node or 1)
    assert description.num_attention_heads % tensor == description.num_query_groups % tensor == 0
    check_model_layout(description, config.parallel)


def test_one_node_cannot_hold_a_policy_of_70_billion_parameters() -> None:
    """148 GiB of each of 8 GPUs, as the recipes say."""
    config, description, _ = read("tgdpo_llama3_70b_4x8")
    config = load(config, {"parallel": {"pipeline_model_parallel_size": 1}}, where="test")
    parts = plan(config, description, world_size=8).phase("weights and optimizer").parts
    state = sum(parts[name] for name in ("policy weights", "gradients", "optimizer state"))
    assert round(state / GIB) == 148
    assert "need 148 GiB of each" in (large.__doc__ or "")
