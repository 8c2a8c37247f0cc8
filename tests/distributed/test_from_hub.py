"""A training and a scoring that are given names on a hub, on several ranks that another launcher started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import PAIRS
from tests.support.hub import Repo, environment, files_of, put_into_cache, run, serve
from tgdpo_megatron.checkpoint.manifest import read_manifest
from tgdpo_megatron.data.prepare import load_prepared

pytestmark = pytest.mark.long

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
SETTINGS = [
    *(
        "--recipe=dpo_tiny",
        "parallel.tensor_model_parallel_size=2",
        "data.max_length=64",
        "optimizer.lr_warmup_iters=0",
    ),
    *("train.global_batch_size=2", "train.micro_batch_size=1", "model.checkpoint=acme/tiny", "data.train=acme/prefs"),
]


@pytest.fixture(scope="module")
def done(hf_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Repo, Repo]:
    """The folder of a run of two steps on two ranks, and what was said."""
    home = tmp_path_factory.mktemp("hub")
    model = Repo("acme/tiny", files_of(hf_model))
    pairs = "".join(json.dumps(row) + "\n" for row in PAIRS).encode()
    prefs = Repo("acme/prefs", {"train.jsonl": pairs}, kind="dataset")
    with serve(model, prefs) as hub:
        output = f"train.output={home / 'run'}"
        said = run(*(*TORCHRUN, "recipes.train", *SETTINGS, "train.train_iters=2", output), env=environment(home, hub))
    assert said.returncode == 0, said.stderr
    return home, said.stderr, model, prefs


def test_one_rank_downloads_and_converts(done: tuple[Path, str, Repo, Repo]) -> None:
    said = done[1]
    assert said.count("acme/tiny: downloading from") == 1 and said.count("acme/tiny: converting once") == 1
    assert said.count("acme/prefs: downloading from") == 1


def test_the_run_keeps_the_names_and_the_commits(done: tuple[Path, str, Repo, Repo], checkpoint: Path) -> None:
    home, _, model, prefs = done
    settings = yaml.safe_load((home / "run" / "config.yaml").read_text())
    assert settings["model"]["checkpoint"] == "acme/tiny" and settings["data"]["train"] == "acme/prefs"
    kept = json.loads((home / "run" / "sources.json").read_text())["checkpoint"]
    assert (kept["given"], kept["commit"]) == ("acme/tiny", model.commit)
    (pairs,) = (home / "run" / "data").iterdir()
    assert load_prepared(pairs).summary.commit == prefs.commit
    (trained,) = (home / "run" / "checkpoints").iterdir()
    assert read_manifest(trained).reference == read_manifest(checkpoint).weights
    assert f"acme/tiny (commit {model.commit})" in (home / "run" / "report.html").read_text()


def test_a_run_goes_on_without_network_where_the_cache_lies_elsewhere(done: tuple[Path, str, Repo, Repo]) -> None:
    """Another launcher, and another cache of converted models. The data set has moved on in the hub's cache."""
    home, *_ = done
    pairs = "".join(json.dumps(row) + "\n" for row in reversed(PAIRS)).encode()
    newer = Repo("acme/prefs", {"train-00000-of-00001.jsonl": pairs}, kind="dataset")
    put_into_cache(newer, home / "hf" / "hub")
    more = ["--nproc-per-node=2", "train.train_iters=3", "train.resume=true", f"train.output={home / 'run'}"]
    said = run("-m", "recipes.train", *SETTINGS, *more, env=environment(home, TGDPO_CACHE=str(home / "moved")))
    assert said.returncode == 0 and "acme/tiny: converting once" in said.stderr, said.stderr
    assert (home / "run" / "checkpoints" / "iter-0000003").is_dir()


def test_a_run_is_viewed_though_the_cache_was_emptied(done: tuple[Path, str, Repo, Repo]) -> None:
    home, *_ = done
    env = environment(home, TGDPO_CACHE=str(home / "third"))
    kept = home / "run" / "sources.json"
    kept.write_text(kept.read_text().replace(str(home / "moved"), "/gone").replace(str(home / "tgdpo"), "/gone"))
    said = run("-m", "tools.view", str(home / "run"), env=env)
    assert said.returncode == 0 and (home / "run" / "view.html").is_file(), said.stderr


def test_scores_are_made_of_names_too(done: tuple[Path, str, Repo, Repo]) -> None:
    home, *_ = done
    output = f"scores.path={home / 'scores'}"
    said = run(*TORCHRUN, "recipes.score", *SETTINGS, output, env=environment(home))
    assert said.returncode == 0 and "6 pairs were scored now" in said.stdout, said.stderr
    assert json.loads((home / "scores" / "sources.json").read_text())["checkpoint"]["given"] == "acme/tiny"


def test_a_refusal_of_the_first_rank_ends_all_in_one_sentence(tmp_path: Path) -> None:
    said = run(*TORCHRUN, "recipes.train", *SETTINGS, f"train.output={tmp_path / 'run'}", env=environment(tmp_path))
    assert said.returncode != 0 and "error: acme/tiny: no such file or folder" in said.stderr
    assert not (tmp_path / "run").exists()
