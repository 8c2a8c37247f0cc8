"""A small Gemma-2 goes from a HuggingFace folder to an exported one by the paper's recipe, at TP2×PP2."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]


def program(module: str, *arguments: str, cache: Path) -> str:
    """Run a program to its end, and return what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TGDPO_CACHE": str(cache)}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_hf_model: Callable[..., Path], pairs_file: Path) -> Path:
    """A folder with start/, and run/ with its exports."""
    folder = tmp_path_factory.mktemp("gemma2")
    for seed, name in enumerate(("start", "guidance")):
        make_hf_model(folder / name, family="gemma2", tie_word_embeddings=True, seed=seed)
    shared = ["--recipe=tgdpo_gemma2_2b", f"model.checkpoint={folder / 'start'}", f"data.train={pairs_file}"]
    shared += ["data.max_length=64", "parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=2"]
    shared += ["parallel.sequence_parallel=false", "--nproc-per-node=2", f"scores.path={folder / 'scores'}"]
    cache = folder / "cache"
    program("recipes.score", *shared, f"model.guidance={folder / 'guidance'}", cache=cache)
    training = ["train.global_batch_size=4", "train.train_iters=4", "train.export_interval=2", "optimizer.lr=1e-3"]
    training += ["scores.source=cached", f"train.output={folder / 'run'}", "train.report=false"]
    program("recipes.train", *shared, *training, cache=cache)
    return folder


def test_every_export_is_the_checkpoint_of_its_step(run: Path, tmp_path: Path) -> None:
    from tgdpo_megatron.checkpoint.convert import megatron_to_hf

    exports = sorted(path.name for path in (run / "run" / "hf").iterdir())
    assert exports == ["iter-0000002", "iter-0000004"]
    assert exports == sorted(path.name for path in (run / "run" / "checkpoints").iterdir())
    megatron_to_hf(run / "run" / "checkpoints" / "iter-0000002", tmp_path / "hf")
    exported, again = (
        load_file(folder / "model.safetensors") for folder in (run / "run" / "hf" / "iter-0000002", tmp_path / "hf")
    )
    assert exported.keys() == again.keys() and all(torch.equal(exported[name], again[name]) for name in exported)


def test_the_last_export_loads_with_its_tokenizer_and_has_learned(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run / "run" / "hf" / "iter-0000004"
    start, trained = (AutoModelForCausalLM.from_pretrained(place) for place in (run / "start", folder))
    before, after = dict(start.named_parameters()), dict(trained.named_parameters())
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    messages = [{"role": "user", "content": "hello"}]
    ours, theirs = (AutoTokenizer.from_pretrained(place) for place in (folder, run / "start"))
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)


def test_the_checkpoints_of_the_run_have_certificates_that_name_their_start(run: Path) -> None:
    from tgdpo_megatron.checkpoint.certificate import check_certificate, read_certificate
    from tgdpo_megatron.checkpoint.manifest import read_manifest

    for checkpoint in (run / "run" / "checkpoints").iterdir():
        check_certificate(checkpoint, read_manifest(checkpoint))
        assert read_certificate(checkpoint).trained_from == read_manifest(checkpoint).reference
