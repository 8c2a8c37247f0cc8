"""A checkpoint is the same thing on a GPU and on a CPU, with Transformer Engine and without; a run continues."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.gpu_where import HAVE_TRANSFORMER_ENGINE, LOCAL, TRANSFORMER_ENGINE, on_cpu, on_gpu

IDS = [1, 40, 7, 250, 12, 3, 200]
SAVED = "checkpoints/iter-0000002"


def job(folder: Path, checkpoint: Path, pairs: Path, *, iterations: int = 2, **train: Any) -> dict[str, Any]:
    return {
        "model": {"checkpoint": str(checkpoint)},
        "loss": {"type": "dpo"},
        "data": {"train": str(pairs)},
        "optimizer": {"lr": 1e-3, "lr_warmup_iters": 0},
        "train": {
            "output": str(folder),
            "train_iters": iterations,
            "save_interval": 2,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            **train,
        },
    }


WRITERS = {
    "GPU, fp32": (LOCAL, "fp32"),
    "GPU, bf16": (LOCAL, "bf16"),
    "GPU, Transformer Engine": (TRANSFORMER_ENGINE, "bf16"),
    "CPU, fp32": (None, "fp32"),
}
"""Who writes a checkpoint: layers on the GPU, or the CPU; the precision of its training."""


@pytest.fixture(scope="module")
def log_probs(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, pairs_file: Path
) -> dict[tuple[str, str], torch.Tensor]:
    """(who wrote, who reads) -> log-probs of the whole vocabulary after each of IDS. Reading checks the certificate."""
    folder = tmp_path_factory.mktemp("checkpoints")
    writers = {name: of for name, of in WRITERS.items() if of[0] != TRANSFORMER_ENGINE or HAVE_TRANSFORMER_ENGINE}
    runs = {name: job(folder / name, checkpoint, pairs_file, precision=of[1]) for name, of in writers.items()}
    for layers in {of[0] for of in writers.values()} - {None}:
        mine = [runs[name] for name, of in writers.items() if of[0] == layers]
        on_gpu("train_all", layers=layers, recipe="dpo_tiny", jobs=mine)

    def look(writer: str, reader: str, precision: str) -> dict[str, Any]:
        output = str(folder / f"{writer} by {reader}")
        return {"folder": str(folder / writer / SAVED), "ids": IDS, "parallel": {}, "output": output} | {
            "precision": precision
        }

    on_cpu(
        "train_and_look",
        recipe="dpo_tiny",
        job=runs["CPU, fp32"],
        looks=[look(name, "CPU", "fp32") for name in writers],
    )
    looks = [look(name, "GPU", "fp32") for name in writers]
    looks.append(look("CPU, fp32", "GPU, bf16", "bf16"))
    on_gpu("looks", layers=LOCAL, module="tests.support.gpu_jobs", looks=looks)
    if HAVE_TRANSFORMER_ENGINE:
        by_engine = [look(name, TRANSFORMER_ENGINE, "bf16") for name in writers]
        on_gpu("looks", layers=TRANSFORMER_ENGINE, module="tests.support.gpu_jobs", looks=by_engine)
    return {tuple(path.name.split(" by ")): torch.load(path) for path in folder.glob("* by *")}  # type: ignore[misc]


@pytest.mark.parametrize("writer", WRITERS)
def test_what_one_side_writes_both_read_alike(writer: str, log_probs: dict[tuple[str, str], torch.Tensor]) -> None:
    if writer == "GPU, Transformer Engine" and not HAVE_TRANSFORMER_ENGINE:
        pytest.skip("Transformer Engine is not installed")
    gpu, cpu = log_probs[writer, "GPU"], log_probs[writer, "CPU"]
    assert len(gpu) == len(IDS)
    torch.testing.assert_close(gpu, cpu, rtol=0, atol=1e-4)  # fp32 sums in another order


@pytest.mark.parametrize("reader", ["GPU, bf16", TRANSFORMER_ENGINE])
def test_bf16_reads_what_the_cpu_wrote_in_fp32(reader: str, log_probs: dict[tuple[str, str], torch.Tensor]) -> None:
    """Logits of size up to 4 have steps of 2^-6 in bf16, and weights are rounded to 8 bits."""
    if reader == TRANSFORMER_ENGINE and not HAVE_TRANSFORMER_ENGINE:
        pytest.skip("Transformer Engine is not installed")
    exact, found = log_probs["CPU, fp32", "CPU"], log_probs["CPU, fp32", reader]
    torch.testing.assert_close(found, exact, rtol=0, atol=0.1)
    assert not torch.equal(found, exact)


def test_a_continued_run_is_the_run_that_was_not_stopped(
    arithmetic: tuple[str, str], checkpoint: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Bit for bit, if two runs that are not stopped are; else as close as those two, by a factor of ten."""
    layers, precision = arithmetic
    names = ["whole", "again", "continued"]
    runs = [job(tmp_path / name, checkpoint, pairs_file, iterations=4, precision=precision) for name in names[:2]]
    whole, again = on_gpu("train_all", layers=layers, recipe="dpo_tiny", jobs=runs)
    shutil.copytree(tmp_path / "whole", tmp_path / "continued")
    shutil.rmtree(tmp_path / "continued" / "checkpoints" / "iter-0000004")
    resumed = job(tmp_path / "continued", checkpoint, pairs_file, iterations=4, precision=precision, resume=True)
    (continued,) = on_gpu("train_all", layers=layers, recipe="dpo_tiny", jobs=[resumed])
    assert len(continued) == len(whole) == 4
    paths = {name: tmp_path / name / "checkpoints/iter-0000004/manifest.json" for name in names}
    weights = {name: json.loads(path.read_text())["weights"] for name, path in paths.items()}
    if weights["whole"] == weights["again"]:
        assert weights["continued"] == weights["whole"]
    else:  # then the losses and gradient norms below speak for the weights that gave them
        assert any(one != other for one, other in zip(whole, again, strict=True))
    for name in ("loss", "grad_norm", "rewards/margins"):
        noise = max(abs(one[name] - other[name]) for one, other in zip(whole, again, strict=True))
        noise = noise or (0.0 if weights["whole"] == weights["again"] else 1e-6)  # two may agree by chance
        for one, other in zip(whole, continued, strict=True):
            assert other[name] == pytest.approx(one[name], abs=10 * noise, rel=0), name


def test_a_run_goes_on_with_the_other_kind_of_layers_and_its_adam(
    layers: str, checkpoint: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Certificates and optimizer state are those of the weights, not of what computes with them."""
    other = TRANSFORMER_ENGINE if HAVE_TRANSFORMER_ENGINE and layers == LOCAL else LOCAL
    whole = job(tmp_path / "whole", checkpoint, pairs_file, iterations=4, precision="bf16")
    (expected,) = on_gpu("train_all", layers=layers, recipe="dpo_tiny", jobs=[whole])
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "iter-0000004")
    whole["train"]["resume"] = True
    (found,) = on_gpu("train_all", layers=other, recipe="dpo_tiny", jobs=[whole])
    assert len(found) == len(expected) == 4
    for one, then in zip(expected[2:], found[2:], strict=True):
        # bf16 products round differently: log-probs of -100 nats a response by tenths, of which beta takes a tenth.
        assert then["loss"] == pytest.approx(one["loss"], abs=5e-2)
        assert then["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.1)
