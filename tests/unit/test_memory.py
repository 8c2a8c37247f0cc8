"""The memory planner without a model: published sizes, remedies, layouts, and what tools.plan prints."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from recipes.settings import RECIPES
from tests.support.memory import pairs_of
from tgdpo_megatron.config import Config, check_batch_layout, complete, load
from tgdpo_megatron.data.batch import make_batch
from tgdpo_megatron.data.prepare import save_prepared
from tgdpo_megatron.data.shared_prompts import tokens_read
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.planning import memory
from tgdpo_megatron.planning.load import Load, load_of_pairs, longest_pair, most_tokens
from tgdpo_megatron.planning.memory import GIB, plan
from tgdpo_megatron.planning.remedies import layouts, remedies, step_time

ROOT = Path(__file__).resolve().parents[2]
LLAMA_8B = ModelDescription(32, 4096, 14336, 32, 8, 128, 128256, 8192, 1e-5, False, 5e5, None)
LLAMA_3B = ModelDescription(28, 3072, 8192, 24, 8, 128, 128256, 131072, 1e-5, True, 5e5, 32.0)
LLAMA_70B = replace(LLAMA_8B, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64)


def settings(*changes: str, recipe: str = "tgdpo_llama3_8b_pairrm") -> Config:
    config = RECIPES[recipe]()
    for change in changes:
        config = changed_by(change, config)
    return complete(config, where="test")


PLAIN = ("parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false")


@pytest.mark.parametrize(
    ("description", "changes", "world_size", "gigabytes"),
    [
        (LLAMA_8B, PLAIN, 8, 60.2),
        (LLAMA_8B, (), 8, 36.1),
        (LLAMA_70B, ("parallel.tensor_model_parallel_size=8",), 64, 66.1),
    ],
)
def test_policy_state_of_llamas_is_6n_and_12n_over_data_parallel_ranks(
    description: ModelDescription, changes: tuple[str, ...], world_size: int, gigabytes: float
) -> None:
    """N of the published models, 8.03e9 and 70.6e9, by hand."""
    parts = plan(settings(*changes), description, world_size=world_size).phase("weights and optimizer").parts
    state = sum(parts[name] for name in ("policy weights", "gradients", "optimizer state"))
    assert state / 1e9 == pytest.approx(gigabytes, abs=0.1)


@pytest.mark.parametrize(("description", "kilobytes"), [(LLAMA_8B, 139), (LLAMA_70B, 274)])
def test_transformer_engine_keeps_per_token_and_layer_what_is_published(
    description: ModelDescription, kilobytes: float
) -> None:
    """2 (6 H + 2 K) + 6 F bytes, flash attention, nothing recomputed; here with its log-sum-exps."""
    load = Load.plain(1000, 1000, longest=1000)
    found = plan(settings(*PLAIN), description, world_size=8, transformer_engine=True, load=load)
    activations = found.phase("forward and backward").parts["activations"]
    assert activations / 1000 / description.num_layers == pytest.approx(kilobytes * 1000, rel=0.01)


@pytest.mark.parametrize(("world_size", "gigabytes"), [(1, 32.12), (8, 4.015)])
def test_torchs_adam_on_a_gpu_takes_four_bytes_a_parameter_of_its_share_for_a_moment(
    world_size: int, gigabytes: float
) -> None:
    """The roots of all second moments at once, in fp32: 4 × 8.03e9 over the data-parallel ranks."""
    config = settings(*PLAIN, "train.global_batch_size=8")
    parts = plan(config, LLAMA_8B, world_size=world_size, device="cuda").phase("optimizer step").parts
    assert parts["working memory"] / 1e9 == pytest.approx(gigabytes, rel=1e-3)


@pytest.mark.parametrize(("device", "bytes_of_a_logit"), [("cuda", 4), ("cpu", 6)])
def test_a_logit_takes_four_bytes_on_a_gpu_which_keeps_its_sum_and_two_more_on_a_cpu(
    device: Literal["cpu", "cuda"], bytes_of_a_logit: int
) -> None:
    """While a bf16 model scores 100 labelled tokens; both vocabularies are one tile."""

    def working(vocabulary: int) -> int:
        model = replace(LLAMA_8B, vocab_size=vocabulary, ffn_hidden_size=128)
        found = plan(
            settings(*PLAIN),
            model,
            world_size=8,
            program="score",
            device=device,
            load=Load.plain(200, 100, longest=100),
        )
        return found.phase("scoring").parts["working memory"]

    assert working(40_000) - working(30_000) == bytes_of_a_logit * 100 * 10_000


def test_a_product_takes_four_bytes_before_a_gpu_adds_it_to_the_gradient_of_the_output_matrix() -> None:
    """With few labels, that product is backward's most: 4 H bytes a column, and 2 for the probability of each label."""

    def working(vocabulary: int) -> int:
        model = replace(LLAMA_8B, vocab_size=vocabulary, ffn_hidden_size=128)
        found = plan(settings(*PLAIN), model, world_size=8, device="cuda", load=Load.plain(200, 100, longest=100))
        return found.phase("forward and backward").parts["working memory"]

    assert working(128_000) - working(64_000) == (4 * LLAMA_8B.hidden_size + 2 * 100) * 64_000


def test_fp8_layers_hold_two_bytes_per_weight_of_their_products_more() -> None:
    """Of Llama-3-8B's 8.030e9 weights, 1.051e9 are embedding and output, 0.3e6 norms."""
    found = plan(settings(*PLAIN, "train.fp8=hybrid"), LLAMA_8B, world_size=8, transformer_engine=True)
    plain = plan(settings(*PLAIN), LLAMA_8B, world_size=8, transformer_engine=True)
    assert found.phases[0].bytes - plain.phases[0].bytes == pytest.approx(2 * 6.979e9, rel=1e-3)
    kept, before = (of.phase("forward and backward").parts["activations"] for of in (found, plain))
    assert 0.75 < kept / before < 0.95


def test_running_out_where_it_should_do_says_that_something_else_takes_memory(checkpoint: Path) -> None:
    import torch

    from tgdpo_megatron.planning.out_of_memory import available, sentence
    from tgdpo_megatron.platform.processes import Ranks

    config = settings(f"model.checkpoint={checkpoint}", recipe="dpo_tiny")
    cpu = torch.device("cpu")
    said = sentence("train", config, Ranks(0, 1, 0, cpu))
    assert f"the rank can have {memory.size(available(cpu))}, which should be enough: other programs" in said


def changed_by(change: str, config: Config) -> Config:
    key, _, value = change.partition("=")
    group, _, name = key.partition(".")
    return load(config, {group: {name: value}}, where="test")


@pytest.mark.parametrize(
    ("recipe", "description", "gibibytes"),
    [
        ("dpo_llama3_8b_pairrm", LLAMA_8B, 65.4),
        ("tgdpo_llama3_8b_pairrm", LLAMA_8B, 57.9),
        ("dpo_llama32_3b", LLAMA_3B, 55.6),
        ("tgdpo_llama32_3b", LLAMA_3B, 49.5),
    ],
)
def test_the_papers_settings_need_what_their_recipes_say_and_fit_80_gb(
    recipe: str, description: ModelDescription, gibibytes: float
) -> None:
    needs = plan(settings(recipe=recipe), description, world_size=8).bytes / GIB
    assert needs == pytest.approx(gibibytes, abs=0.06) and needs * GIB < 0.9 * 80e9
    assert f"{gibibytes}" in (ROOT / "recipes" / "ultrafeedback.py").read_text()


@pytest.mark.parametrize("recipe", [name for name in RECIPES if not name.endswith("_tiny")])
@pytest.mark.parametrize("changes", [(), PLAIN, ("train.recompute=selective", "scores.source=live")])
def test_a_remedy_is_a_setting_that_is_accepted_new_and_frees_what_it_says(
    recipe: str, changes: tuple[str, ...]
) -> None:
    if "dpo_reg" in recipe or "simpo_reg" in recipe:
        changes = tuple(change for change in changes if change != "scores.source=live")
    config = settings(*changes, recipe=recipe)
    ranks = 8 * (config.cluster.nodes or 1)
    before = plan(config, LLAMA_8B, world_size=ranks).bytes
    found = remedies(config, LLAMA_8B, world_size=ranks)
    assert found
    for remedy in found:
        changed = changed_by(remedy.change, config)
        assert changed != config
        check_batch_layout(changed, world_size=remedy.world_size)
        assert before - plan(changed, LLAMA_8B, world_size=remedy.world_size).bytes == remedy.frees > 0


def test_remedies_that_suffice_come_first_and_the_cheapest_of_them_before() -> None:
    config = settings(*PLAIN, "scores.source=live")
    needed = plan(config, LLAMA_8B, world_size=8).bytes
    found = remedies(config, LLAMA_8B, world_size=8, available=needed - 10 * GIB)
    assert found[0].change == "scores.source=cached" and found[0].slower < 1  # 10 N to 6 N operations
    assert found[0].slower == pytest.approx(0.6, abs=0.01)
    assert all(remedy.frees >= 10 * GIB for remedy in found)
    assert [max(1, remedy.slower) for remedy in found] == sorted(max(1, remedy.slower) for remedy in found)


def test_nothing_is_offered_that_is_there_or_cannot_be() -> None:
    config = settings(*PLAIN, "train.recompute=full", "train.micro_batch_tokens=4094")
    offered = {remedy.change.partition("=")[0] for remedy in remedies(config, LLAMA_8B, world_size=1)}
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    assert offered <= {f"parallel.{name}" for name in sizes}
    divergence = settings(*PLAIN, "loss.type=tdpo2", recipe="dpo_llama3_8b_pairrm")
    assert "scores.source=cached" not in {remedy.change for remedy in remedies(divergence, LLAMA_8B, world_size=8)}
    prime = replace(LLAMA_8B, num_layers=31, num_attention_heads=1, num_query_groups=1)
    for remedy in remedies(config, prime, world_size=1):
        assert remedy.change == "parallel.context_parallel_size=2" and "needs 2 ranks" in remedy.cost


def test_ranks_split_a_sequence_where_a_pair_at_once_is_too_much_and_not_before() -> None:
    """Two sequences of 32,767 tokens are one longest pair. Context parallelism halves what a rank keeps of it."""
    full = (*PLAIN, "data.max_length=32768", "train.recompute=full")
    longer = replace(LLAMA_8B, max_position_embeddings=131072)

    def offered(tokens: int) -> dict[str, float]:
        config = settings(*full, f"train.micro_batch_tokens={tokens}")
        return {remedy.change: remedy.slower for remedy in remedies(config, longer, world_size=8)}

    split = "parallel.context_parallel_size=2"
    assert split in offered(65534) and split not in offered(4 * 65534)
    assert 1 < offered(65534)[split] < 1.1
    config = settings(*full, "train.micro_batch_tokens=65534")
    whole, half = (
        plan(changed, longer, world_size=8).phase("forward and backward").parts["activations"]
        for changed in (config, changed_by(split, config))
    )
    assert half / whole == pytest.approx(0.5, abs=0.01)


def test_the_optimizers_state_is_shared_by_context_parallel_ranks_too() -> None:
    config = settings(*PLAIN)
    whole, split = (
        plan(changed, LLAMA_8B, world_size=8).phase("weights and optimizer").parts["optimizer state"]
        for changed in (config, changed_by("parallel.context_parallel_size=2", config))
    )
    assert whole == split


def test_layouts_raise_the_context_parallel_size_only_where_nothing_fits_without() -> None:
    config = settings("train.micro_batch_tokens=4096")
    ample = layouts(config, LLAMA_8B, world_size=8, available=80 * GIB)
    assert ample and not any("context" in words for words, _ in ample)
    # Two groups of keys end tensor parallelism at 2, which would need less than context parallelism.
    narrow = replace(LLAMA_8B, num_query_groups=2, max_position_embeddings=131072)
    long = settings("data.max_length=32768", "train.micro_batch_tokens=65536")
    needed = min(needs.bytes for _, needs in layouts(long, narrow, world_size=8, available=1 << 50))
    found = layouts(long, narrow, world_size=8, available=needed - 1)
    assert found
    for words, needs in found:
        assert "parallel.context_parallel_size=" in words and needs.bytes < needed


@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("budget", [None, 1056])
@pytest.mark.parametrize("transformer_engine", [False, True])
def test_no_pairs_that_the_settings_allow_need_more_than_is_planned(
    context: int, budget: int | None, transformer_engine: bool
) -> None:
    """Pairs of every length of prompt, shared or not, packed as they are in training, on every rank."""
    shape = replace(LLAMA_8B, num_layers=2, hidden_size=64, ffn_hidden_size=64, num_attention_heads=8, vocab_size=512)
    parallel = {"context_parallel_size": context}
    train = {"micro_batch_tokens": budget, "micro_batch_size": 2, "global_batch_size": 2}
    changes: dict[str, Any] = {"parallel": parallel, "train": train, "data": {"max_length": 257}}
    changes |= {"loss": {"type": "dpo"}, "scores": {"source": "cached"}}
    config = Config.model_validate(changes)
    where: dict[str, Any] = {"world_size": context, "transformer_engine": transformer_engine, "micro_batches": 1}
    most = plan(config, shape, **where).bytes
    nearest = 0.0
    for prompt in (1, 2, 64, 128, 200, 248, 254, 255, 256):
        for shared in (True, False):
            data = pairs_of([257] * 4, prompt, 512, shared=shared)
            size = int(tokens_read(data, np.arange(1), (0, 1), shared_prompts=True)[0])
            pairs = 2 if budget is None else budget // size
            for rank in range(context):
                batch = make_batch(
                    data,
                    range(pairs),
                    shared_prompts=True,
                    align=config.token_multiple,
                    context_rank=rank,
                    context_ranks=context,
                )
                needs = plan(config, shape, load=Load.of(batch), **where).bytes
                nearest = max(nearest, needs / most)
    assert 0.9 < nearest <= 1


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("train", [{"micro_batch_size": 2}, {"micro_batch_tokens": 1056}], ids=["two pairs", "packs"])
def test_a_plan_for_pairs_that_are_there_is_what_their_fullest_micro_batch_needs(
    train: dict[str, Any], context: int
) -> None:
    """Of all micro-batches of two pairs, or of all packs, within a twentieth; and less than the longest allowed."""
    shape = replace(LLAMA_8B, num_layers=2, hidden_size=64, ffn_hidden_size=64, num_attention_heads=8, vocab_size=512)
    changes: dict[str, Any] = {"train": {**train, "global_batch_size": 4}}
    changes["parallel"] = {"context_parallel_size": context}
    changes |= {"loss": {"type": "dpo"}, "data": {"max_length": 300}, "scores": {"source": "cached"}}
    config = Config.model_validate(changes)
    data = pairs_of([180, 257, 120, 257, 200, 90], 60, 512, shared=True)
    where: dict[str, Any] = {"world_size": context, "micro_batches": 1}
    read = tokens_read(data, np.arange(6), (0, 1), shared_prompts=True)
    budget = config.train.micro_batch_tokens
    together = [
        picked
        for size in range(1, 7)
        for picked in itertools.combinations(range(6), size)
        if (size == 2 if budget is None else sum(read[list(picked)]) <= budget)
    ]
    most = max(
        plan(
            config,
            shape,
            load=Load.of(
                make_batch(
                    data,
                    picked,
                    align=config.token_multiple,
                    size=budget,
                    shared_prompts=True,
                    context_rank=rank,
                    context_ranks=context,
                )
            ),
            **where,
        ).bytes
        for picked in together
        for rank in range(context)
    )
    found = plan(config, shape, load_of=partial(load_of_pairs, data), **where)
    assert most <= found.bytes < 1.05 * most
    assert found.bytes < plan(config, shape, **where).bytes


def test_a_plan_has_room_for_a_pair_whose_prompts_differ() -> None:
    config = Config.model_validate({"train": {"micro_batch_size": 3}})
    assert config.train.shared_prompts and longest_pair(config, LLAMA_8B) == 2 * (config.data.max_length - 1)
    assert most_tokens(config, LLAMA_8B) == 3 * longest_pair(config, LLAMA_8B)


def test_full_recomputation_costs_a_third() -> None:
    now, full = (
        step_time(settings(*PLAIN, f"train.recompute={what}"), LLAMA_8B, world_size=8) for what in ("none", "full")
    )
    assert full / now == pytest.approx(4 / 3, abs=0.04)  # the head is not computed again


def test_layouts_fit_are_accepted_and_leave_out_what_is_so_already() -> None:
    config = settings("parallel.tensor_model_parallel_size=4")
    found = layouts(config, LLAMA_70B, world_size=64, available=80 * GIB)
    assert found
    for words, needs in found:
        changed = config
        for change in words.split():
            changed = changed_by(change, changed)
        assert changed.parallel != config.parallel or changed.train != config.train
        check_batch_layout(changed, world_size=64)
        assert plan(changed, LLAMA_70B, world_size=64).bytes == needs.bytes <= 80 * GIB
    assert "as it is" in dict(layouts(settings(), LLAMA_8B, world_size=8, available=80 * GIB))


def test_a_plan_says_its_largest_parts_in_words() -> None:
    found = plan(settings(), LLAMA_8B, world_size=8)
    assert found.sentence().startswith(f"up to {found.bytes / GIB:.1f} GiB in 'forward and backward' with 8192 tokens")
    assert found.sentence().index("activations") < found.sentence().index("gradients") < len(found.sentence())


@pytest.fixture
def config_alone(tmp_path: Path) -> Path:
    """A HuggingFace folder without weights."""
    shape: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return tmp_path


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.plan", "--recipe", "tgdpo_llama3_8b_pairrm", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_tool_plans_from_a_config_alone(config_alone: Path) -> None:
    done = tool("--model", str(config_alone), "--nproc-per-node", "64", "--memory", "80", "scores.source=live")
    assert done.returncode == 0, done.stderr
    needs = plan(settings("scores.source=live"), LLAMA_70B, world_size=64)
    row = next(line for line in done.stdout.splitlines() if line.startswith("together"))
    assert row.split()[1:] == [f"{phase.bytes / GIB:.2f}" for phase in needs.phases]
    assert "does not fit" in done.stdout and "scores.source=cached frees" in done.stdout
    assert "parallel.tensor_model_parallel_size=8" in done.stdout.split("layouts of 64 ranks that fit")[1]


def test_the_tool_plans_for_prepared_pairs(config_alone: Path, tmp_path: Path) -> None:
    data = replace(pairs_of([300] * 4, 200, 512, shared=True), prompts=np.zeros((4, 8), np.uint8))
    save_prepared(data, tmp_path / "pairs")
    settings_ = ("train.micro_batch_tokens=null", "train.micro_batch_size=2")
    done = tool("--model", str(config_alone), "--nproc-per-node", "64", "--pairs", str(tmp_path / "pairs"), *settings_)
    assert done.returncode == 0, done.stderr
    assert f"{2 * (299 + 99)} tokens at once" in done.stdout  # a prompt of 200 tokens once for both responses


NOWHERE = "nowhere: no such folder; a model on a hub is named ORGANISATION/NAME or ORGANISATION/NAME@REVISION."


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--memory", "0"], "--memory must be a number of GiB above 0, not 0.0."),
        (["--memory", "inf"], "--memory must be a number of GiB above 0, not inf."),
        ([], "model.checkpoint is not set; set it, or give --model with a HuggingFace model."),
        (["--model", "nowhere"], NOWHERE),
        (["--memry", "80"], "command line: --memry is not known here; see python -m tools.plan --help."),
        (["model.checkpoint=nowhere"], NOWHERE),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], sentence: str) -> None:
    done = tool("--nproc-per-node", "8", *arguments)
    assert (done.returncode, done.stderr) == (2, f"error: {sentence}\n")


def test_pairs_that_are_not_there_are_one_sentence(config_alone: Path) -> None:
    done = tool("--model", str(config_alone), "--nproc-per-node", "64", "--pairs", "nowhere")
    assert (done.returncode, done.stderr) == (2, "error: nowhere/summary.json: no such summary of prepared pairs.\n")
