"""Token scores are the log-probs HuggingFace gives, at whatever layout they are made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.program import run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one process": (1, {}, {"micro_batch_size": 1}),
    "TP2×PP2, sequence parallel": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
        {"micro_batch_size": 2},
    ),
    "DP2, packs": (2, {}, {"micro_batch_tokens": 128}),
    "CP2×TP2, sequence parallel, packs": (
        4,
        {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True},
        {"micro_batch_tokens": 128},
    ),
    "one process, prompts apart": (1, {}, {"micro_batch_size": 2, "shared_prompts": False}),
}


SCALED_ROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 32.0,  # Llama-3.2's; Llama-3.1 has 8
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "initializer_range": 0.1,  # attention that looks at places: with the usual 0.02 it averages over them
}


@pytest.fixture(scope="module", params=[64, 128], ids=["same width", "wider guidance"])
def models(
    request: Any, tmp_path_factory: pytest.TempPathFactory, make_hf_model: Callable[..., Path]
) -> dict[str, Path]:
    """Reference and guidance, as HuggingFace folders; each converted beside itself."""
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron

    folder = tmp_path_factory.mktemp("models")
    made = {
        "reference": make_hf_model(folder / "reference", seed=0, **SCALED_ROPE),
        "guidance": make_hf_model(folder / "guidance", seed=1, hidden_size=request.param, **SCALED_ROPE),
    }
    for name, place in made.items():
        hf_to_megatron(place, folder / f"{name}-megatron")
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_huggingfaces_log_probs(
    layout: str, models: dict[str, Path], pairs_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from tgdpo_megatron.data.prepare import load_prepared
    from tgdpo_megatron.scores.store import load_scores

    ranks, parallel, train = LAYOUTS[layout]
    job = {
        "model": {"checkpoint": f"{models['reference']}-megatron", "guidance": f"{models['guidance']}-megatron"},
        "parallel": parallel,
        "data": {"train": str(pairs_file)},
        "scores": {"path": str(tmp_path / "scores")},
        "train": train,
    }
    run_ranks("tests.support.jobs", "score_all", ranks, recipe="tgdpo_tiny", jobs=[job])
    data = load_prepared(next((tmp_path / "scores" / "data").glob("train-*")))
    scores = load_scores(tmp_path / "scores" / "train", data, list(models))
    for name, place in models.items():
        model = AutoModelForCausalLM.from_pretrained(place)
        for pair in range(len(data)):
            for side in (0, 1):
                ids = torch.from_numpy(data.sequence(pair, side).astype(np.int64))
                prompt = int(data.prompt_lengths[pair])
                with torch.no_grad():
                    logps = torch.log_softmax(model(ids[None]).logits[0, prompt - 1 : -1], dim=-1)
                expected = logps.gather(1, ids[prompt:, None])[:, 0].numpy()
                found = scores.join([pair], [side])[name]
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


FILLED = {"micro_batch_tokens": 112, "fixed_micro_batches": True}


def test_training_on_scores_from_files_equals_training_beside_the_models(
    models: dict[str, Path], pairs_file: Path, tmp_path: Path
) -> None:
    from tgdpo_megatron.data.order import global_batch
    from tgdpo_megatron.data.prepare import load_prepared
    from tgdpo_megatron.data.shared_prompts import tokens_read

    if "wider" in os.environ["PYTEST_CURRENT_TEST"]:
        pytest.skip("a guidance model of another width cannot run beside the policy")
    common = {
        "model": {"checkpoint": f"{models['reference']}-megatron", "guidance": f"{models['guidance']}-megatron"},
        "data": {"train": str(pairs_file)},
        "optimizer": {"lr_warmup_iters": 0},
    }
    train = {"train_iters": 3, "global_batch_size": 4, "micro_batch_size": 1}
    store = {"path": str(tmp_path / "scores")}
    jobs = [
        {**common, "scores": {"source": "cached", **store}, "train": {**train, "output": str(tmp_path / "cached")}},
        {**common, "train": {**train, "output": str(tmp_path / "live")}},
        {**common, "train": {**train, **FILLED, "output": str(tmp_path / "filled")}},
    ]
    scoring = [{**common, "scores": store, "train": train}]
    cached, live, filled = run_ranks(
        "tests.support.jobs", "score_and_train", 2, recipe="tgdpo_tiny", scoring=scoring, jobs=jobs
    )
    for name in ("loss", "tgdpo/margins", "tgdpo/weight_std", "rewards/margins"):
        assert [line[name] for line in cached] == pytest.approx([line[name] for line in live], abs=1e-6), name
    assert [line["loss"] for line in filled] == pytest.approx([line["loss"] for line in live], abs=1e-6)
    # And what only fills micro-batches is counted: with the pairs' own tokens it makes whole micro-batches.
    data = load_prepared(next((tmp_path / "filled" / "data").glob("train-*")))
    for step, line in enumerate(filled):
        picked = global_batch(step, num_pairs=len(data), global_batch_size=4, seed=42, shuffle=True)
        filling = line["num_padding_tokens"]
        fed = tokens_read(data, picked, (0, 1), shared_prompts=True).sum()
        assert filling > 0 and (filling + fed) % FILLED["micro_batch_tokens"] == 0
    assert all(line["num_padding_tokens"] == 0 for line in live)


def test_adding_pairs_scores_only_these_and_leaves_what_is_there(
    checkpoint: Path, write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    """On two ranks: the second has nothing to do when one pair is added, none of them when all are there."""
    from tests.conftest import PAIRS
    from tgdpo_megatron.data.prepare import load_prepared
    from tgdpo_megatron.scores.store import load_scores, read_shards

    files = [write_pairs(tmp_path / f"{count}.jsonl", [*PAIRS[:count], PAIRS[0]]) for count in (4, 5)]
    shapes = [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"micro_batch_tokens": 64, "fixed_micro_batches": True}]
    jobs = [
        {
            "model": {"checkpoint": str(checkpoint), "guidance": str(checkpoint)},
            "loss": {"type": loss},
            "data": {"train": str(file)},
            "scores": {"path": str(tmp_path / "scores")},
            "train": train,
        }
        for file, loss, train in zip(
            [files[0], files[1], files[1], files[1]], ["dpo", "dpo", "dpo", "tgdpo"], [*shapes, shapes[0]], strict=True
        )
    ]
    first, second, third, fourth = run_ranks("tests.support.jobs", "score_all", 2, recipe="dpo_tiny", jobs=jobs)
    folder = tmp_path / "scores" / "train"
    contents = {path.name: path for path in folder.glob("scores-*")}
    assert set(first) < set(second) == set(third) < set(fourth) == set(contents)
    keys: dict[str, list[Any]] = {}
    for name, path in contents.items():
        (tmp_path / name).mkdir()
        shutil.copy(path, tmp_path / name)
        keys[name] = [key for key, _ in read_shards(tmp_path / name)]
    data = next(d for d in map(load_prepared, (tmp_path / "scores" / "data").iterdir()) if len(d) == 6)
    pairs = [data.hashes[pair].tobytes() for pair in range(6)]
    assert pairs[5] == pairs[0], "the first pair is there twice"
    both = ("reference", "guidance")
    added = [key for name in set(second) - set(first) for key in keys[name]]
    assert sorted(added) == [(pairs[4], side, "reference") for side in (0, 1)]
    assert len([key for name in first for key in keys[name]]) == 8, "two equal pairs are scored once"
    added = [key for name in set(fourth) - set(third) for key in keys[name]]
    assert sorted(added) == sorted((pair, side, "guidance") for pair in pairs[:5] for side in (0, 1))
    load_scores(folder, data, both)


POLITE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}"
    "{% if polite and message['role'] == 'user' %} Please.{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_a_run_records_what_its_template_was_given_and_refuses_scores_made_with_anything_else(
    checkpoint: Path, pairs_file: Path, tmp_path: Path
) -> None:
    import json

    import yaml

    from tgdpo_megatron.checkpoint.manifest import HF, read_manifest
    from tgdpo_megatron.data.prepare import load_prepared
    from tgdpo_megatron.data.tokenizer import load_tokenizer, template_hash

    (tmp_path / "polite.jinja").write_text(POLITE)
    data = {"train": str(pairs_file), "template": str(tmp_path / "polite.jinja")}
    common = {"model": {"checkpoint": str(checkpoint)}, "data": {**data, "chat_template_kwargs": {"polite": True}}}
    store = {"path": str(tmp_path / "scores")}
    run_ranks("tests.support.jobs", "score_all", 1, recipe="dpo_tiny", jobs=[{**common, "scores": store}])
    made = json.loads((tmp_path / "scores" / "train" / "manifest.json").read_text())
    assert made["chat_template_kwargs"] == {"polite": True}

    train = {"train_iters": 1, "global_batch_size": 2, "micro_batch_size": 1, "output": str(tmp_path / "run")}
    others: list[dict[str, Any]] = [
        {},
        {"chat_template_kwargs": {"polite": False}},
        {"chat_template_kwargs": {"po": 1}},
    ]
    jobs = [
        {**common, "scores": store, "train": train},
        *(
            {**common, "data": {**data, **other}, "scores": store, "train": {**train, "output": str(tmp_path / "no")}}
            for other in others
        ),
    ]
    taken, *refused = run_ranks("tests.support.jobs", "train_each", 1, recipe="dpo_tiny", jobs=jobs)
    assert taken == ""
    this_run = ("{}", "{'polite': False}")
    for sentence, now in zip(refused[:2], this_run, strict=True):
        assert (
            f"these scores were made with other data.chat_template_kwargs ({{'polite': True}}, this run has {now})"
            in (sentence)
        )
    assert refused[2] == "data.chat_template_kwargs: the chat template does not read 'po'; it reads polite."
    assert not (tmp_path / "no").exists()

    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    manifest = read_manifest(saved)
    assert manifest.chat_template_kwargs == {"polite": True}
    kept = load_tokenizer(saved / HF)
    assert kept.chat_template == POLITE and manifest.template == template_hash(kept), "the template itself is unchanged"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["chat_template_kwargs"] == {
        "polite": True
    }
    (place,) = (tmp_path / "run" / "data").iterdir()
    pairs = load_prepared(place)
    assert "Please." in kept.decode(pairs.sequence(0, 0)[: pairs.prompt_lengths[0]])
