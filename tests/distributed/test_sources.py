"""HuggingFace models are converted once, into a cache that is named by their content."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.hub import ROOT, Repo, environment, files_of, put_into_cache
from tgdpo_megatron.cache import locked, sha256_of, write_json
from tgdpo_megatron.checkpoint.convert import _identity
from tgdpo_megatron.checkpoint.located import convert_models, find_models
from tgdpo_megatron.checkpoint.sources import content_hash, converted, find
from tgdpo_megatron.config import Config, DataConfig, ModelConfig, ParallelConfig
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.run_folder import with_kept_data


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TGDPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---------------------------------------------------------------- hashes of files


def test_a_hash_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    for _ in range(2):  # read, and remembered
        assert sha256_of(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()


def test_a_file_that_has_not_changed_is_not_read_again(tmp_path: Path) -> None:
    """Other bytes of the same size, time and inode are not noticed, which only a look at them would."""
    file = tmp_path / "file"
    file.write_bytes(b"content")
    before, status = sha256_of(file), file.stat()
    with file.open("r+b") as opened:
        opened.write(b"CONTENT")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sha256_of(file) == before


@pytest.mark.parametrize("change", ["time", "size", "inode"])
def test_a_file_that_has_changed_is_read_again(change: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    sha256_of(file)
    status = file.stat()
    content = b"CONTENT+" if change == "size" else b"CONTENT"
    (tmp_path / "other").write_bytes(content)
    if change == "inode":
        os.replace(tmp_path / "other", file)
    else:
        file.write_bytes(content)
    later = 10**9 if change == "time" else 0
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + later))
    assert sha256_of(file) == hashlib.sha256(content).hexdigest()


def test_weights_in_the_cache_of_a_hub_are_known_by_their_name(tmp_path: Path) -> None:
    """The hub's name is taken without a look at the content, which is another here."""
    folder = put_into_cache(Repo("a/b", {"model.safetensors": b"weights", "config.json": b"{}"}), tmp_path)
    weights, config = folder / "model.safetensors", folder / "config.json"
    weights.resolve().write_bytes(b"other")
    assert sha256_of(weights) == hashlib.sha256(b"weights").hexdigest()
    assert sha256_of(config) == hashlib.sha256(b"{}").hexdigest()


def test_two_programs_that_remember_hashes_at_once_do_not_meet(tmp_path: Path) -> None:
    """Also where their process ids are the same, as in containers that share a cache; here they are threads."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_json(tmp_path / "file.json", [number] * 1000), range(400)))
    assert len(json.loads((tmp_path / "file.json").read_text())) == 1000
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_cache_on_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"/lock: .*\(Operation not supported\); set TGDPO_CACHE to a folder"):  # noqa: SIM117
        with locked(tmp_path / "lock", "waiting"):
            pass


def test_a_damaged_memory_of_hashes_is_made_anew(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    before = sha256_of(tmp_path / "file")
    (cache / "hashes.json").write_text("{")
    assert sha256_of(tmp_path / "file") == before and json.loads((cache / "hashes.json").read_text())


# ---------------------------------------------------------------- identity of a model


@pytest.mark.parametrize(
    ("file", "same"),
    [
        *(("config.json", False), ("tokenizer.json", False), ("chat_template.jinja", False)),
        *(("model.safetensors", False), ("README.md", True), ("pytorch_model.bin", True)),
        *(("additional_chat_templates/tool_use.jinja", False), ("additional_chat_templates/code.py", True)),
    ],
)
def test_what_a_conversion_reads_decides_about_its_folder(
    file: str, same: bool, hf_model: Path, tmp_path: Path
) -> None:
    """And whether a conversion that was interrupted goes on."""
    first, other = (shutil.copytree(hf_model, tmp_path / name, copy_function=shutil.copy2) for name in "ab")
    for folder in (first, other):
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("one")
        os.utime(folder / "additional_chat_templates" / "tool_use.jinja", (0, 0))
    identities = [_identity([], {}, first, [first / "model.safetensors"])]
    with (other / file).open("ab") as opened:
        opened.write(b" ")
    identities.append(_identity([], {}, other, [other / "model.safetensors"]))
    assert (content_hash(other) == content_hash(first)) == same == (identities[0] == identities[1])


def test_a_model_has_the_same_checkpoint_in_a_folder_and_in_the_cache_of_a_hub(hf_model: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(hf_model, tmp_path / "copied")
    snapshot = put_into_cache(Repo("acme/tiny", files_of(hf_model)), tmp_path / "hub")
    assert content_hash(hf_model) == content_hash(copied) == content_hash(snapshot)


def test_a_checkpoint_and_a_folder_of_neither_kind_are_left_as_they_are(checkpoint: Path, tmp_path: Path) -> None:
    for folder in (checkpoint, tmp_path):
        assert converted(find(folder)) == folder


# ---------------------------------------------------------------- checks before a conversion


def changed(hf_model: Path, folder: Path, **config: object) -> Path:
    shutil.copytree(hf_model, folder)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return folder


def without(hf_model: Path, folder: Path, name: str) -> Path:
    shutil.copytree(hf_model, folder)
    (folder / name).unlink()
    return folder


def sharded(hf_model: Path, folder: Path, index: str) -> Path:
    shutil.copytree(hf_model, folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda hf, to: changed(hf, to, architectures=["Mamba"]), "architecture 'Mamba' is not supported"),
        (lambda hf, to: without(hf, to, "tokenizer.json"), "no tokenizer.json there; save the tokenizer"),
        (lambda hf, to: without(hf, to, "model.safetensors"), "no model.safetensors there; other formats"),
        (
            lambda hf, to: sharded(hf, to, '{"weight_map": {"a": "part-1.safetensors"}}'),
            "the index of the weights names part-1.safetensors, which is not there; download it again",
        ),
        (
            lambda hf, to: sharded(hf, to, '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
            "the index names a twice",
        ),
        (
            lambda hf, to: sharded(hf, to, '{"weight_map": {"a": "../m.safetensors"}}'),
            "index of the weight shards is dam",
        ),
        (lambda hf, to: sharded(hf, to, "{"), r"model\.safetensors\.index\.json line 1: not valid JSON"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_before_it_is_converted(
    spoil: Callable[[Path, Path], Path], words: str, hf_model: Path, tmp_path: Path, cache: Path
) -> None:
    folder = spoil(hf_model, tmp_path / "spoilt")
    with pytest.raises(UserError, match=words) as refused:
        convert_models(Config(model=ModelConfig(checkpoint=folder)))
    assert str(refused.value).startswith(str(folder)) and not cache.exists()


def test_a_layout_is_checked_before_a_conversion(hf_model: Path, cache: Path) -> None:
    config = Config(model=ModelConfig(checkpoint=hf_model), parallel=ParallelConfig(tensor_model_parallel_size=4))
    with pytest.raises(UserError, match="does not divide the model's 2 key-value heads"):
        convert_models(config)
    assert not cache.exists()


# ---------------------------------------------------------------- a run that is continued


def test_a_run_goes_on_with_the_commit_that_it_began_with(hf_model: Path, tmp_path: Path) -> None:
    """Though main is another commit by now."""
    hub_cache, run = tmp_path / "hf" / "hub", tmp_path / "run"
    older, newer = (Repo("acme/tiny", {**files_of(hf_model), "README.md": text}) for text in (b"older", b"newer"))
    put_into_cache(older, hub_cache)
    put_into_cache(newer, hub_cache)
    run.mkdir()
    (run / "sources.json").write_text(
        json.dumps({"checkpoint": {"given": "acme/tiny", "commit": older.commit, "checkpoint": "elsewhere"}})
    )
    script = f"""
from pathlib import Path
from tgdpo_megatron.config import Config, ModelConfig
from tgdpo_megatron.checkpoint.located import find_models
from tgdpo_megatron.run_folder import kept_commits
for run in (Path({str(run)!r}), None):
    print(find_models(Config(model=ModelConfig(checkpoint="acme/tiny")), kept_commits(run))["checkpoint"].commit)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(tmp_path), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [older.commit, newer.commit]


def test_a_run_goes_on_with_the_data_set_that_it_began_with(tmp_path: Path) -> None:
    """A revision that is given stays as it is, and so does a name that the run did not read."""
    parts = [{"source": f"acme/prefs:{split}", "commit": commit} for split, commit in (("a", "1"), ("b", "2"))]
    for name, summary in {
        "train-1": {"source": "acme/prefs:a, acme/prefs:b", "commit": "1, 2", "parts": parts},
        "validation-1": {"source": "acme/other@3", "commit": "3", "parts": []},
        "validation-2": {"source": "pairs.jsonl", "commit": "", "parts": []},
    }.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "data" / "validation-2" / "summary.json").write_text("{")

    def kept(train: list[str], validation: str | None = None) -> list[str]:
        data = DataConfig(train=[Path(name) for name in train], validation=validation and Path(validation))
        found = with_kept_data(Config(data=data), tmp_path).data
        return [str(path) for path in (*found.sources, *([found.validation] if found.validation else []))]

    assert kept(["acme/prefs:a", "acme/prefs:b"], "acme/other") == ["acme/prefs@1:a", "acme/prefs@2:b", "acme/other@3"]
    others = ["acme/prefs@v1:a", "acme/prefs:c", "pairs.jsonl"]
    assert kept(others) == others
    assert with_kept_data(Config(data=DataConfig(train=Path("acme/other"))), tmp_path).data.train == Path(
        "acme/other@3"
    )
    assert with_kept_data(Config(data=DataConfig(train=Path("acme/other"))), None).data.train == Path("acme/other")


def test_the_first_model_must_be_given() -> None:
    with pytest.raises(UserError, match="^model.checkpoint is not set; give the model to start from"):
        find_models(Config())
