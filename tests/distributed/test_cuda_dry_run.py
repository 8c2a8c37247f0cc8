"""What can be known about a GPU without one: on which device tensors are made, and who waits for whom."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.program import run_ranks

pytestmark = pytest.mark.long

PROGRAM = "tests.support.cuda_dry_run"
on_a_pretended_gpu = partial(run_ranks, PROGRAM, program=PROGRAM)

Jobs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def jobs(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, pairs_file: Path, make_hf_model: Callable[..., Path]
) -> Jobs:
    """TGDPO with two live models, two steps of two micro-batches in bf16; and others that differ from it as named."""
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron

    folder = tmp_path_factory.mktemp("gpu")

    def job(**changes: dict[str, Any]) -> dict[str, Any]:
        settings: dict[str, dict[str, Any]] = {
            "model": {"checkpoint": str(checkpoint), "guidance": str(checkpoint)},
            "loss": {"type": "tgdpo"},
            "data": {"train": str(pairs_file), "max_length": 128},
            "optimizer": {"lr": 1e-3, "lr_warmup_iters": 1},
            "train": {"train_iters": 2, "global_batch_size": 4, "micro_batch_size": 2, "precision": "bf16"},
        }
        for group, values in copy.deepcopy(changes).items():
            settings[group] = settings.get(group, {}) | values
        return settings

    scores = {"path": str(folder / "scores")}
    packed = {"micro_batch_tokens": 128, "fixed_micro_batches": True}
    two_tensor = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    overlapped = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    without_guidance = {"guidance": None}
    made = {
        "plain": job(),
        "more micro-batches": job(train={"micro_batch_size": 1}),
        "more steps": job(train={"train_iters": 3}),
        "saved on the way": job(train={"save_interval": 1}),
        "divergence": job(loss={"type": "tdpo2"}, model=without_guidance, train={"recompute": "full"}),
        "scoring": job(scores=scores),
        "cached": job(scores=scores | {"source": "cached"}, train=packed | {"recompute": "selective"}),
        "tensor": job(parallel=two_tensor, loss={"type": "tdpo2"}, model=without_guidance, train={"recompute": "full"}),
        "pipeline": job(parallel={"pipeline_model_parallel_size": 2}),
        "data": job(optimizer=overlapped),
        "context": job(parallel={"context_parallel_size": 2}),
        "context in scoring": job(parallel={"context_parallel_size": 2}, scores={"path": str(folder / "split")}),
    }
    for family in ("gemma2", "gemma3_text"):
        start = make_hf_model(folder / f"{family}-hf", family=family, sliding_window=8)
        hf_to_megatron(start, folder / f"{family}-start")
        model = {"checkpoint": str(folder / f"{family}-start"), "guidance": str(folder / f"{family}-start")}
        made[family] = job(model=model)
    for name, settings in made.items():
        settings["train"]["output"] = str(folder / name)
    return made


@pytest.fixture(scope="module")
def one_rank(jobs: Jobs) -> Jobs:
    names = ["plain", "more micro-batches", "more steps", "saved on the way", "divergence", "cached"]
    names += ["gemma2", "gemma3_text"]
    found = on_a_pretended_gpu("run", 1, jobs=[jobs[name] for name in names], scoring=[jobs["scoring"]])
    return dict(zip(names, found, strict=True))


@pytest.fixture(scope="module")
def planted() -> dict[str, str]:
    found: dict[str, str] = on_a_pretended_gpu("planted", 1)
    return found


def test_jobs_run_and_no_operation_joins_two_devices(one_rank: Jobs) -> None:
    """A wrong device would have ended the job: reading, scoring, training, evaluating nothing, saving."""
    assert {name: job["metrics"]["iteration"] for name, job in one_rank.items()} == {
        name: 3 if name == "more steps" else 2 for name in one_rank
    }


def test_layouts_run_and_no_operation_joins_two_devices(jobs: Jobs) -> None:
    names = ["tensor", "pipeline", "data", "context"]
    found = on_a_pretended_gpu("run", 2, jobs=[jobs[name] for name in names], scoring=[jobs["context in scoring"]])
    assert [job["metrics"]["iteration"] for job in found] == [2, 2, 2, 2]


@pytest.fixture(scope="module")
def rounded(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plain job on a GPU whose torch does not give the sums of its products."""
    job = copy.deepcopy(jobs["plain"])
    job["train"]["output"] = str(tmp_path_factory.mktemp("rounded"))
    (found,) = on_a_pretended_gpu("run", 1, jobs=[job], scoring=[], keeps_sums=False)
    metrics: dict[str, Any] = found["metrics"]
    return metrics


LOSS_AND_OTHERS = ("loss", "grad_norm", "rewards/margins", "token_rewards/mean")


def test_the_pretence_changes_no_number(jobs: Jobs, tmp_path: Path) -> None:
    """Where logits are rounded on both sides, and attention is computed in the same way: each response with a prompt of
    its own."""
    pretended, real = (copy.deepcopy(jobs["plain"]) for _ in range(2))
    for name, job in (("pretended", pretended), ("real", real)):
        job["train"] |= {"output": str(tmp_path / name), "shared_prompts": False}
    (found,) = on_a_pretended_gpu("run", 1, jobs=[pretended], scoring=[], keeps_sums=False)
    ((*_, last),) = run_ranks("tests.support.jobs", "train_all", 1, recipe="dpo_tiny", jobs=[real])
    for name in LOSS_AND_OTHERS:
        assert found["metrics"][name] == pytest.approx(last[name], rel=1e-5), name


def test_a_whole_job_uses_the_sums_that_torch_gives(one_rank: Jobs, rounded: dict[str, Any]) -> None:
    """They differ from rounded ones by what bf16 is: half a step of 2^-8, relative."""
    differences = [abs(one_rank["plain"]["metrics"][name] / rounded[name] - 1) for name in ("loss", "grad_norm")]
    assert 0 < max(differences) < 2**-8


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_no_family_waits_for_the_device_where_llama_does_not(family: str, one_rank: Jobs) -> None:
    """Loading and saving wait once for each parameter, of which there are more."""
    files = [{wait.partition(":")[0] for wait in one_rank[name]["waits"]} for name in ("plain", family)]
    assert files[0] == files[1]


def waits(job: dict[str, Any]) -> Counter[str]:
    """What waited. How often a run looks whether its last save is done depends on the disk, and is left out."""
    return Counter(wait for wait in job["waits"] if not wait.startswith("saving.py"))


def test_a_micro_batch_never_waits_for_the_device(one_rank: Jobs) -> None:
    assert waits(one_rank["more micro-batches"]) == waits(one_rank["plain"])


def test_a_step_waits_for_the_device_twice(one_rank: Jobs) -> None:
    """For the gradient's norm, and for the sums that the ranks report."""
    more = waits(one_rank["more steps"]) - waits(one_rank["plain"])
    assert sorted(line.partition(":")[0] for line in more.elements()) == ["clip_grads.py", "metrics.py"]


def test_saving_takes_no_optimizer_state_back_to_the_device(one_rank: Jobs) -> None:
    """It would need room for all of it there at once."""
    of_a_save = ("shards.py", "saving.py", "distrib_optimizer.py")
    # The last save copies in its writing thread, where nothing is watched; the one before copies at once, all the same.
    waits = [wait for wait in one_rank["saved on the way"]["waits"] if wait.startswith(of_a_save)]
    assert any(wait.startswith("shards.py") for wait in waits), "the copies of what the rank owns"
    votes = "a list is read"  # how far each rank has written: one number of each
    assert {wait.rpartition(": ")[2] for wait in waits} - {votes} == {"copied to the host"}


def test_attention_builds_no_plan_for_each_length() -> None:
    """cuDNN's would, for every new segment length; it comes first on an H200 unless it is switched off."""
    assert on_a_pretended_gpu("attention_kernels", 1) == {"flash": True, "cudnn": False}


def test_what_is_wrong_on_a_gpu_is_noticed(planted: dict[str, str]) -> None:
    assert planted == {
        "a tensor made without its device": "WrongDeviceError",
        "a buffer of another device, in place": "WrongDeviceError",
        "a matrix product of both": "WrongDeviceError",
        "a backward pass of both": "WrongDeviceError",
        "a collective of the host's tensor": "WrongDeviceError",
        "an array of the device's tensor": "TypeError",
        "a number of the host": "",
        "a tensor made like another": "",
        "a view of a copy": "copied to the device",
        "a number read": "a number is read",
        "a choice made": "a number is read",
        "a list of numbers read": "numbers are read, one by one",
        "a boolean index": "a boolean index",
        "a copy that waits": "copied to the device",
        "a copy from memory that is not pinned": "copied from memory that is not pinned",
        "a copy that does not wait": "",
    }
