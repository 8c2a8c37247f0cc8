"""A HuggingFace model is converted once, by a program of its own, whoever wants it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.hub import ROOT
from tgdpo_megatron.cache import cache_folder, locked, mended_by_deletion
from tgdpo_megatron.checkpoint.certificate import check_certificate
from tgdpo_megatron.checkpoint.located import convert_models
from tgdpo_megatron.checkpoint.manifest import read_manifest
from tgdpo_megatron.checkpoint.sources import Source, content_hash, converted, find
from tgdpo_megatron.config import Config, ModelConfig
from tgdpo_megatron.errors import UserError

CONVERT = """
import sys
from pathlib import Path
from tgdpo_megatron.checkpoint.sources import converted, find
from tgdpo_megatron.errors import one_sentence_errors
with one_sentence_errors():
    print(converted(find(Path(sys.argv[1]))))
"""
HOLD = """
import sys, time
from pathlib import Path
from tgdpo_megatron.cache import locked
with locked(Path(sys.argv[1]), ""):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TGDPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def filled(hf_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the model's conversion."""
    folder = tmp_path_factory.mktemp("filled") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TGDPO_CACHE", str(folder))
        converted(find(hf_model))
    return folder


@pytest.fixture
def made(filled: Path, cache: Path, hf_model: Path) -> Path:
    """The conversion in a copy of that cache."""
    shutil.copytree(filled, cache)
    return converted(find(hf_model))


def start(given: Path, **changes: str) -> subprocess.Popen[str]:
    """Another program that wants the checkpoint of a model."""
    command = [sys.executable, "-c", CONVERT, str(given)]
    changes = {"TGDPO_CACHE": os.environ["TGDPO_CACHE"], "OMP_NUM_THREADS": "1", **changes}
    env = {**os.environ, **changes}
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_model_is_converted_once(
    hf_model: Path, checkpoint: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Into what the converter makes of it by hand."""
    first = converted(find(hf_model))
    assert f"{hf_model}: converting once, to {first}" in capfd.readouterr().err
    times = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert first.parent == cache / "checkpoints" and read_manifest(first) == read_manifest(checkpoint)
    assert converted(find(hf_model)) == first and capfd.readouterr().err == ""
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == times


def test_a_conversion_in_a_rank_is_no_rank_itself(hf_model: Path, checkpoint: Path) -> None:
    """It would wait for the others."""
    place = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    out, err = start(hf_model, **place, SLURM_NTASKS="4", SLURM_STEP_ID="0").communicate(timeout=120)
    assert read_manifest(Path(out.strip())) == read_manifest(checkpoint), err


def test_the_sentence_of_the_conversion_is_ours_and_nothing_is_left(
    hf_model: Path, tmp_path: Path, cache: Path
) -> None:
    """It speaks of the model by the name that the user gave it."""
    broken = shutil.copytree(hf_model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^acme/tiny \(commit abc\): model.norm.weight holds numbers that are not fin"):
        converted(Source(Path("acme/tiny"), broken, commit="abc"))
    assert [path.suffix for path in (cache / "checkpoints").iterdir()] == [".lock"]


def test_several_programs_at_once_convert_a_model_once(hf_model: Path) -> None:
    """They wait for one another, and say so."""
    target = cache_folder() / "checkpoints" / content_hash(hf_model)[:32]
    with locked(target.with_name(f"{target.name}.lock"), ""):
        programs = [start(hf_model) for _ in range(2)]
        for program in programs:
            assert program.stderr is not None
            assert f"waiting for {target}" in program.stderr.readline()
        assert not target.exists()
    results = [program.communicate(timeout=120) for program in programs]
    assert [out.strip() for out, _ in results] == [str(target)] * 2
    assert sum("converting once" in err for _, err in results) == 1


def test_a_conversion_that_is_interrupted_leaves_nothing_running_and_is_begun_anew(hf_model: Path) -> None:
    program = start(hf_model)
    assert program.stderr is not None and "converting once" in program.stderr.readline()
    conversions = wait_for(lambda: psutil.Process(program.pid).children())
    program.send_signal(signal.SIGINT)
    assert program.wait(timeout=60) == 130
    assert not psutil.wait_procs(conversions, timeout=30)[1]
    assert (converted(find(hf_model)) / "manifest.json").is_file()


def wait_for(look: Callable[[], list[psutil.Process]]) -> list[psutil.Process]:
    """What there is to see, as soon as there is something."""
    until = time.monotonic() + 60
    while not (seen := look()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return seen


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    began = time.monotonic()
    with locked(path, "waiting"):
        assert time.monotonic() - began < 10


def test_a_checkpoint_whose_manifest_cannot_be_read_is_made_again(made: Path, hf_model: Path, checkpoint: Path) -> None:
    """As a loss of power leaves it: with its name, and without its content."""
    (made / "manifest.json").write_bytes(b"")
    assert read_manifest(converted(find(hf_model))) == read_manifest(checkpoint)


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_conversion_in_the_cache_without_a_valid_certificate_is_made_again(
    content: str | None, made: Path, hf_model: Path, checkpoint: Path
) -> None:
    certificate = made / "certificate.json"
    certificate.unlink()
    if content is not None:
        certificate.write_text(content)
    again = convert_models(Config(model=ModelConfig(checkpoint=hf_model)))[0].model.checkpoint
    assert again == certificate.parent
    check_certificate(again, read_manifest(checkpoint))


def test_a_checkpoint_whose_weights_are_damaged_in_the_cache_may_be_deleted_and_is_then_made_again(
    made: Path, hf_model: Path
) -> None:
    config = Config(model=ModelConfig(checkpoint=hf_model))
    with pytest.raises(UserError, match=f"damaged; or delete {made}, since"), mended_by_deletion(made):
        raise UserError(f"{made}: damaged.")
    with pytest.raises(UserError, match="damaged.$"), mended_by_deletion(hf_model):
        raise UserError(f"{hf_model}: damaged.")
    shutil.rmtree(made)
    assert convert_models(config)[0].model.checkpoint == made


def test_every_role_takes_a_huggingface_folder(hf_model: Path, checkpoint: Path) -> None:
    model = ModelConfig(checkpoint=checkpoint, reference=hf_model, guidance=hf_model)
    located, found = convert_models(Config(model=model))
    assert located.model.checkpoint == checkpoint and located.model.reference == located.model.guidance
    assert {role: source.given for role, source in found.items()} == {
        "checkpoint": checkpoint,
        "reference": hf_model,
        "guidance": hf_model,
    }
    assert read_manifest(located.model.reference or Path()) == read_manifest(checkpoint)
