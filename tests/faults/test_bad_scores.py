"""Cached scores that do not belong, and scoring that is killed: the real programs, started from a shell."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.faults.test_bad_inputs import ROOT, assert_refused, end_of, environment, say, settings, write_scores

FLIPS = {
    "a weight's last bit": "these scores were made with other weights of the reference (",
    "a token id": "no reference scores for row 5 of pairs.jsonl",
    "the template": "these scores were made with another chat template (",
    "the length limit": "these scores were made with another data.max_length (64, this run has 48)",
    "a byte of a shard": "was altered or damaged since it was written (its checksum differs)",
    "a pair of the store": "no reference scores for row ",
}


@pytest.mark.parametrize("flipped", FLIPS)
def test_scores_of_anything_else_are_refused_in_its_own_sentence(
    flipped: str,
    checkpoint: Path,
    hf_model: Path,
    pairs_file: Path,
    write_pairs: Callable[..., Path],
    tmp_path: Path,
) -> None:
    scores, model, pairs, changes = tmp_path / "scores", checkpoint, pairs_file, []
    write_scores(scores, checkpoint, pairs_file)
    shard = sorted(scores.glob("train/scores-*"))[2]
    if flipped == "a weight's last bit":
        model = converted(hf_model, tmp_path, flip_a_bit)
    elif flipped == "a token id":
        pairs = tmp_path / "pairs.jsonl"
        pairs.write_text(pairs_file.read_text().replace('"tree"', '"free"'))
    elif flipped == "the template":
        model = converted(hf_model, tmp_path, edit_template)
    elif flipped == "the length limit":
        changes = ["data.max_length=48"]
    elif flipped == "a byte of a shard":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    else:
        shard.unlink()
    said = say(
        "recipes.train",
        *settings(model, pairs, tmp_path / "run"),
        "scores.source=cached",
        f"scores.path={scores}",
        *changes,
    )
    assert_refused(said, FLIPS[flipped])
    assert not (tmp_path / "run").exists()


def converted(hf_model: Path, tmp_path: Path, change: Callable[[Path], None], *, certificate: bool = True) -> Path:
    """The model with something changed, as a checkpoint."""
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron

    shutil.copytree(hf_model, tmp_path / "hf")
    change(tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", certificate=certificate)
    return tmp_path / "megatron"


def flip_a_bit(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"].view(np.uint32)[3, 5] ^= 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_template(folder: Path) -> None:
    """No pair has blanks to trim: the token ids stay the same."""
    (template,) = (path for path in folder.glob("*.jinja") if " | trim" in path.read_text())
    template.write_text(template.read_text().replace(" | trim", ""))


# ---------------------------------------------------------------- while scoring


def values(folder: Path) -> dict[Any, np.ndarray]:
    from tgdpo_megatron.scores.store import read_shards

    return dict(read_shards(folder))


def test_scoring_that_is_killed_goes_on_and_ends_with_the_same_scores(
    checkpoint: Path, write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"instruction": f"Add {i} and 3.", "chosen": f"It is {i + 3}.", "rejected": "No."} for i in range(400)]
    pairs = write_pairs(tmp_path / "pairs.jsonl", rows)
    arguments = ["--recipe=dpo_tiny", f"model.checkpoint={checkpoint}", f"data.train={pairs}"]

    folder = tmp_path / "killed"
    shards = killed_after_a_shard([*arguments, f"scores.path={folder}", "train.micro_batch_size=1"], folder / "train")
    before = values(folder / "train")
    assert 0 < len(before) < 800, "killed in the middle"
    (folder / "train" / "scores-half.tmp").write_bytes(b"what a kill may leave")

    again = say("recipes.score", *arguments, f"scores.path={folder}", "train.micro_batch_size=32")
    assert again.code == 0, again.err
    assert f"{400 - len(before) // 2} pairs were scored now" in again.out
    assert all(path.read_bytes() == content for path, content in shards.items()), "what was there stays as it was"
    assert not list(folder.glob("train/*.tmp"))

    whole = say("recipes.score", *arguments, f"scores.path={tmp_path / 'whole'}", "train.micro_batch_size=32")
    assert whole.code == 0, whole.err
    expected, found = values(tmp_path / "whole" / "train"), values(folder / "train")
    assert found.keys() == expected.keys() and len(expected) == 800
    for key in expected:  # other micro-batches round differently
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=1e-5)


def killed_after_a_shard(arguments: list[str], folder: Path) -> dict[Path, bytes]:
    """Start scoring, kill it as soon as a shard is there; return the shards."""
    mark = uuid.uuid4().hex
    job = subprocess.Popen(
        [sys.executable, "-m", "recipes.score", *arguments],
        cwd=ROOT,
        env=environment(mark),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 120
        while not list(folder.glob("scores-*.safetensors")):
            assert job.poll() is None and time.monotonic() < end
            time.sleep(0.005)
        job.kill()
        assert job.wait() == -signal.SIGKILL
    finally:
        end_of(mark)
    return {path: path.read_bytes() for path in folder.glob("scores-*.safetensors")}


def test_a_log_prob_that_is_not_finite_ends_scoring_with_the_row(
    checkpoint: Path, hf_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Weights that are finite, but so large that what they give is not."""
    model = converted(hf_model, tmp_path, explode, certificate=False)
    folder = tmp_path / "scores"
    arguments = ["--recipe=dpo_tiny", f"data.train={pairs_file}", f"scores.path={folder}"]
    arguments.append("model.require_certificate=false")
    said = say("recipes.score", f"model.checkpoint={model}", *arguments)
    assert_refused(said, "the scores of row ", "of pairs.jsonl are not finite; check the frozen checkpoints")
    assert not list(folder.glob("train/scores-*"))
    manifest = json.loads((folder / "train" / "manifest.json").read_text())
    assert manifest["reference"] is not None


def test_contrastive_prompts_under_which_nothing_fits_are_refused_and_shorter_ones_may_follow(
    checkpoint: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """All rewards would be 0. The words are bytes to this tokenizer, the model has 256 positions."""
    folder = tmp_path / "scores"
    arguments = ["--recipe=dpo_tiny", "loss.type=simpo_reg", f"model.checkpoint={checkpoint}"]
    arguments += [f"data.train={pairs_file}", f"scores.path={folder}"]
    said = say("recipes.score", *arguments)
    assert_refused(said, "no response fits the model's 256 positions; prompts that do not quote", "direct.yaml")
    short = re.search(r"\((.*direct.yaml)\)", said.errors[0])
    assert short and say("recipes.score", *arguments, f"scores.contrastive_prompts={short[1]}").code == 0


def explode(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][:] = 3e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_training_run_is_not_taken_for_a_folder_of_scores(checkpoint: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Its config.yaml, which continuing depends on, would be overwritten."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("mine")
    said = say(
        "recipes.score",
        "--recipe=dpo_tiny",
        f"model.checkpoint={checkpoint}",
        f"data.train={pairs_file}",
        f"scores.path={run}",
    )
    assert_refused(said, f"{run}: is a training run, not a folder of scores; choose another scores.path")
    assert (run / "config.yaml").read_text() == "mine" and sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
    ]


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "config.yaml").write_text("{}")  # the settings of a run with all the defaults
    said = say("tools.view", str(tmp_path), "--output", str(tmp_path / "file" / "page.html"))
    assert_refused(said, f"{tmp_path / 'file'}: cannot be written")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_viewer_refuses_what_is_neither_a_run_nor_scores_and_scores_made_otherwise(
    checkpoint: Path, hf_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    assert_refused(say("tools.view", str(tmp_path)), f"{tmp_path}: neither a run nor a folder of scores")
    scores = tmp_path / "scores"
    said = say(
        "recipes.score",
        "--recipe=dpo_tiny",
        f"model.checkpoint={checkpoint}",
        f"data.train={pairs_file}",
        "data.max_length=64",
        f"scores.path={scores}",
    )
    assert said.code == 0, said.err
    other = converted(hf_model, tmp_path, flip_a_bit)
    for kept in (scores / "config.yaml", scores / "sources.json"):
        kept.write_text(kept.read_text().replace(str(checkpoint), str(other)))
    said = say("tools.view", str(scores))
    assert_refused(said, "these scores were made with other weights of the reference (")
    assert not (scores / "view.html").exists()


# ---------------------------------------------------------------- scores that only pretend


def test_a_first_loss_that_cannot_be_ends_the_run_before_the_first_update(
    checkpoint: Path, hf_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """The scores are of another model, and their manifest says that they are of this one."""
    from tgdpo_megatron.checkpoint.manifest import read_manifest

    other, scores = converted(hf_model, tmp_path, scale_the_head), tmp_path / "scores"
    write_scores(scores, other, pairs_file)
    manifest = scores / "train" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"reference": read_manifest(checkpoint).weights}))
    said = say(
        "recipes.train",
        *settings(checkpoint, pairs_file, tmp_path / "run"),
        "scores.source=cached",
        f"scores.path={scores}",
        "loss.type=dpo",
    )
    assert_refused(said, "the loss of the first step is ")
    assert "where loss.type=dpo gives 0.6931; nothing was updated" in said.err
    assert not (tmp_path / "run").exists()


def scale_the_head(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
