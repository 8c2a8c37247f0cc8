"""Memory that really runs out: the programs under a limit of their address space, as `ulimit -v` sets it."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tgdpo_megatron.errors import ran_out_of_memory

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]
LOADED = """
import torch.distributed.elastic.multiprocessing.api, recipes.train, tgdpo_megatron.train, tgdpo_megatron.score
from pathlib import Path
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmPeak"].split()[0]) * 1024)
"""
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}


@pytest.fixture(scope="module")
def loaded() -> int:
    """Address space of a process that has loaded the program and done nothing. Bytes."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADED], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    return int(done.stdout)


def run(limit: int, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=lambda: limit_memory(limit),
    )


def limit_memory(limit: int) -> None:
    resource.setrlimit(
        resource.RLIMIT_STACK, (1 << 20, resource.RLIM_INFINITY)
    )  # threads' stacks are address space too
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def the_sentence(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return error


@pytest.fixture(scope="module")
def growing_pairs(tmp_path_factory: pytest.TempPathFactory, write_pairs: Callable[..., Path]) -> Path:
    """Two batches of 512 short pairs, then one of long ones."""
    short = {"instruction": "Add 2 and 3.", "chosen": "The sum is 5.", "rejected": "The sum is 6."}
    long = short | {"chosen": "The sum is 5. " * 40, "rejected": "The sum is 6. " * 40}
    return write_pairs(tmp_path_factory.mktemp("growing") / "pairs.jsonl", [short] * 1024 + [long] * 512)


@pytest.fixture(scope="module")
def settings(checkpoint: Path, growing_pairs: Path) -> tuple[str, ...]:
    return (
        "--recipe=dpo_tiny",
        f"model.checkpoint={checkpoint}",
        f"data.train={growing_pairs}",
        "data.max_length=250",
        "data.shuffle=false",
        "train.train_iters=3",
        "train.save_interval=1",
        "train.async_save=false",  # so that a checkpoint is whole before the next step begins
        "train.global_batch_size=512",
        "train.micro_batch_size=512",
        "optimizer.lr_warmup_iters=0",
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_that_runs_out_says_what_it_needs_and_what_helps_and_keeps_its_checkpoints(
    tmp_path: Path, settings: tuple[str, ...], loaded: int, ranks: int
) -> None:
    arguments = (*settings, f"train.output={tmp_path / 'run'}")
    layout = (f"--nproc-per-node={ranks}", f"parallel.tensor_model_parallel_size={ranks}")
    error = the_sentence(run(loaded + (1300 << 20), "recipes.train", *arguments, *layout))
    needed = re.search(r"needs up to ([\d.]+) GiB in 'forward and backward'", error)
    assert needed and float(needed[1]) > 1, error
    assert re.search(r"rank [01] ran out of memory: .* the rank can have [\d.]+ GiB; what would help: ", error), error
    assert error.count(" frees ") == 3 and "train.micro_batch_size=256 frees" in error, error
    whole = sorted(path.parent.name for path in (tmp_path / "run").glob("checkpoints/*/manifest.json"))
    assert whole == ["iter-0000001", "iter-0000002"] == sorted(os.listdir(tmp_path / "run" / "checkpoints"))
    if ranks == 1:  # what is offered does help
        remedied = ("train.resume=true", "train.micro_batch_size=64")
        done = run(loaded + (1300 << 20), "recipes.train", *arguments, *remedied)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, make_hf_model: Callable[..., Path]) -> Path:
    """A checkpoint of 56 million parameters in fp32."""
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron

    folder = tmp_path_factory.mktemp("wide")
    model = make_hf_model(folder / "hf", hidden_size=1024, intermediate_size=8192, num_attention_heads=8)
    hf_to_megatron(model, folder / "start")
    return folder / "start"


def test_scoring_that_runs_out_says_so(
    tmp_path: Path, wide: Path, write_pairs: Callable[..., Path], loaded: int
) -> None:
    numbers = [" ".join(str(number + place) for place in range(60)) for number in range(128)]
    rows = [{"instruction": "Count.", "chosen": text, "rejected": text[::-1]} for text in numbers]
    error = the_sentence(
        run(
            loaded + (1200 << 20),
            "recipes.score",
            "--recipe=dpo_tiny",
            f"model.checkpoint={wide}",
            f"data.train={write_pairs(tmp_path / 'pairs.jsonl', rows)}",
            "data.max_length=250",
            f"scores.path={tmp_path / 'scores'}",
            "scores.source=cached",
            "train.micro_batch_size=128",
        )
    )
    assert "rank 0 ran out of memory" in error and "GiB in 'scoring'" in error
    assert "train.micro_batch_size=64 frees" in error and "recompute" not in error


def test_a_model_too_large_to_build_is_refused_and_leaves_no_folder(
    tmp_path: Path, wide: Path, pairs_file: Path, loaded: int
) -> None:
    error = the_sentence(
        run(
            loaded + (600 << 20),
            "recipes.train",
            "--recipe=dpo_tiny",
            f"model.checkpoint={wide}",
            f"data.train={pairs_file}",
            "data.max_length=64",
            f"train.output={tmp_path / 'run'}",
            "train.global_batch_size=1",
            "train.micro_batch_size=1",
            "train.train_iters=20",
        )
    )
    assert "rank 0 ran out of memory" in error and "optimizer state" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_only_the_end_of_memory_is_called_so(error: Any, memory: bool) -> None:
    assert ran_out_of_memory(error) == memory


def test_what_torch_says_without_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert ran_out_of_memory(caught.value)
