"""Models and data sets by their names on a hub: what is found in its cache, what is downloaded, what is said if not."""

from __future__ import annotations

import io
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.conftest import PAIRS
from tests.support.hub import TOKEN, Hub, Repo, environment, files_of, put_into_cache, run, serve
from tgdpo_megatron.checkpoint.manifest import read_manifest
from tgdpo_megatron.checkpoint.sources import find
from tgdpo_megatron.data.hub_splits import hub_split

NEEDED = {
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
}
DANGEROUS = {
    "modeling_llama.py": b"raise SystemExit('code of a repository ran')",
    "pytorch_model.bin": b"a pickle",
    "original/model.safetensors": b"another form of the weights",
    "tokenizer.pkl": b"another pickle",
    "additional_chat_templates/code.py": b"raise SystemExit('code of a repository ran')",
}
TOOL_USE = "additional_chat_templates/tool_use.jinja"
"""A second chat template, in its folder."""
FIND = """
import sys
from pathlib import Path
from tgdpo_megatron.checkpoint.sources import find
from tgdpo_megatron.errors import one_sentence_errors
with one_sentence_errors():
    source = find(Path(sys.argv[1]))
    print(source.folder, source.commit, "torch" in sys.modules)
"""
READ = """
import json, sys
from pathlib import Path
from tgdpo_megatron.data.read import commit_of, read_rows
from tgdpo_megatron.errors import one_sentence_errors
with one_sentence_errors():
    rows = read_rows(Path(sys.argv[1]))
    print(json.dumps([commit_of(Path(sys.argv[1])), rows]))
"""
SOON = 30
"""Seconds. A program that repeats its question needs longer, even on an idle machine."""


def as_parquet(rows: list[dict[str, str]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: train_prefs, path: data/train_prefs-*}
  - {split: test_prefs, path: data/test_prefs-*}
---
"""
PREFS = Repo(
    "acme/prefs",
    {
        "README.md": CARD,
        "load.py": b"raise SystemExit('code of a data set ran')",
        "data/train_prefs-00000-of-00002.parquet": as_parquet(PAIRS[:2]),
        "data/train_prefs-00001-of-00002.parquet": as_parquet(PAIRS[2:5]),
        "data/test_prefs-00000-of-00001.parquet": as_parquet(PAIRS[5:]),
    },
    kind="dataset",
)
LINES = Repo("acme/lines", {"train.jsonl": b'{"a": "2024-01-01"}\n{"a": "x"}\n'}, kind="dataset")
CONFIGS = Repo(
    "acme/configs",
    {
        "README.md": b"---\nconfigs: [{config_name: en, data_files: en/*}, {config_name: de, data_files: de/*}]\n---\n",
        "en/train.jsonl": b'{"a": "one"}\n',
        "de/train.jsonl": b'{"a": "eins"}\n',
    },
    kind="dataset",
)


@pytest.fixture(scope="module")
def files(hf_model: Path) -> dict[str, bytes]:
    return {**files_of(hf_model), TOOL_USE: b"{{ messages }}"}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    sharded = {name: content for name, content in files.items() if name != "model.safetensors"}
    with serve(
        Repo("acme/tiny", {**files, **DANGEROUS}, tags=("main", "v1", "refs/pr/1")),
        Repo("acme/gated", files, gated=True),
        Repo("acme/pickled", {**sharded, **DANGEROUS}),
        PREFS,
        LINES,
        CONFIGS,
    ) as served:
        yield served


def found(given: str, env: dict[str, str]) -> tuple[Path, str]:
    """The folder and the commit of a model, found by another program, which must not have loaded torch."""
    done = run("-c", FIND, given, env=env)
    assert done.returncode == 0, done.stderr
    folder, commit, torch_loaded = done.stdout.splitlines()[-1].split()
    assert torch_loaded == "False"
    return Path(folder), commit


def refusal(script: str, given: str, env: dict[str, str]) -> str:
    """What another program says of a name that it refuses."""
    started = time.monotonic()
    done = run("-c", script, given, env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert done.stderr.count("error: ") == 1 and time.monotonic() - started < SOON, done.stderr
    return done.stderr


def rows(given: str, env: dict[str, str]) -> tuple[str, list[Any]]:
    """The commit and the rows of a split, read by another program."""
    done = run("-c", READ, given, env=env)
    assert done.returncode == 0, done.stderr
    commit, numbered = json.loads(done.stdout.splitlines()[-1])
    return commit, numbered


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("revision", ["", "@main", "@v1", "@refs/pr/1", "@COMMIT"])
def test_only_weights_and_texts_of_a_model_are_downloaded(
    revision: str, hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    repo = hub.repos[0]
    folder, commit = found(f"acme/tiny{revision.replace('COMMIT', repo.commit)}", environment(tmp_path, hub))
    assert hub.fetched == NEEDED
    assert commit == repo.commit and files_of(folder) == {name: files[name] for name in NEEDED}


def test_a_model_in_the_cache_is_found_without_a_network(files: dict[str, bytes], tmp_path: Path) -> None:
    repo = Repo("acme/tiny", files, tags=("main", "v1"))
    folder = put_into_cache(repo, tmp_path / "hf" / "hub")
    for given in ("acme/tiny", "acme/tiny@v1", f"acme/tiny@{repo.commit}"):
        assert found(given, environment(tmp_path)) == (folder, repo.commit)


def test_what_was_downloaded_is_not_asked_for_again(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    """Though main has moved on the hub."""
    older = found("acme/tiny", environment(tmp_path, hub))
    hub.repos[0] = Repo("acme/tiny", {**files, "README.md": b"newer"})
    hub.requests.clear()
    assert found("acme/tiny", environment(tmp_path, hub)) == older and hub.requests == []


def test_what_others_put_into_the_cache_is_taken_though_main_has_moved(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    """The hub does not have that commit any more, so that its files are not known."""
    older = Repo("acme/tiny", {**files, "README.md": b"older"})
    put_into_cache(older, tmp_path / "hf" / "hub")
    assert found("acme/tiny", environment(tmp_path, hub))[1] == older.commit != hub.repos[0].commit
    assert hub.fetched == set()


@pytest.mark.parametrize("lacking", ["chat_template.jinja", "tokenizer_config.json", "tokenizer.json", TOOL_USE])
def test_what_others_left_out_of_the_cache_is_fetched(lacking: str, hub: Hub, tmp_path: Path) -> None:
    """Without its template a model would be given another one in silence."""
    put_into_cache(hub.repos[0], tmp_path / "hf" / "hub", only=tuple(NEEDED - {lacking}))
    folder, commit = found("acme/tiny", environment(tmp_path, hub))
    assert hub.fetched == {lacking} and (folder / lacking).is_file() and commit == hub.repos[0].commit
    hub.requests.clear()
    assert found("acme/tiny", environment(tmp_path, hub)) == (folder, commit) and hub.requests == []


def test_without_network_a_cache_that_is_known_to_lack_the_template_is_refused(hub: Hub, tmp_path: Path) -> None:
    """What changes nothing may be missing."""
    folder, _ = found("acme/tiny", environment(tmp_path, hub))
    (folder / "generation_config.json").unlink()
    assert found("acme/tiny", environment(tmp_path))[0] == folder
    (folder / "chat_template.jinja").unlink()
    said = refusal(FIND, "acme/tiny", environment(tmp_path))
    assert f"models--acme--tiny does not hold all that is needed of revision {folder.name}, and HF_HUB_OFF" in said


def test_without_network_a_model_without_tokenizer_in_the_cache_is_refused(hub: Hub, tmp_path: Path) -> None:
    put_into_cache(hub.repos[0], tmp_path / "hf" / "hub", only=tuple(NEEDED - {"tokenizer.json"}))
    assert "does not hold all that is needed" in refusal(FIND, "acme/tiny", environment(tmp_path))


def test_shards_have_the_names_that_the_index_gives_them(files: dict[str, bytes], tmp_path: Path) -> None:
    """No code among them."""
    index = {"weight_map": {"a": "weights-1.safetensors", "b": "code.py"}}
    sharded = {name: content for name, content in files.items() if name != "model.safetensors"}
    sharded |= {"weights-1.safetensors": b"1", "code.py": b"1", "model-extra.safetensors": b"1"}
    sharded["model.safetensors.index.json"] = json.dumps(index).encode()
    with serve(Repo("acme/sharded", sharded)) as hub:
        found("acme/sharded", environment(tmp_path, hub))
    more = {"weights-1.safetensors", "model.safetensors.index.json"}
    assert hub.fetched == NEEDED - {"model.safetensors"} | more


@pytest.mark.parametrize("there", [("config.json",), tuple(NEEDED - {"model.safetensors"})], ids=len)
def test_a_model_of_which_the_cache_holds_a_part_is_completed(there: tuple[str, ...], hub: Hub, tmp_path: Path) -> None:
    put_into_cache(hub.repos[0], tmp_path / "hf" / "hub", only=there)
    found("acme/tiny", environment(tmp_path, hub))
    assert hub.fetched == NEEDED - set(there)


def test_without_network_the_sentence_says_what_was_looked_for_and_where(tmp_path: Path) -> None:
    said = refusal(FIND, "acme/tiny@v1", environment(tmp_path))
    place = tmp_path / "hf" / "hub" / "models--acme--tiny"
    assert said.startswith(
        f"error: acme/tiny@v1: no such file or folder, no {place} in the hub's cache, and HF_HUB_OFF"
    )


def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    said = refusal(FIND, "acme/tiny", environment(tmp_path, HF_HUB_OFFLINE="0"))
    assert "and http://127.0.0.1:9 cannot be reached ([Errno 111] Connection refused); fill the cache where" in said


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    """It takes the connection, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        said = refusal(FIND, "acme/tiny", environment(tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=address))
    assert f"{address} cannot be reached (timed out)" in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("acme/none", "has no model of that name, or a private one; mend the name, or set HF_TOKEN"),
        ("acme/tiny@v2", "/acme/tiny has no revision 'v2'; give a branch, a tag or a commit of it"),
        ("acme/gated", "acme/gated: the model is gated; accept its terms at http://127.0.0.1"),
        ("acme/prefs", "has no model of that name"),
        ("acme/a..b", "acme/a..b: no such file or folder, and no name on a hub"),
        ("nowhere", "no such folder; a model on a hub is named ORGANISATION/NAME or"),
        ("/nowhere/tiny", "/nowhere/tiny: no such folder; a model on a hub is named"),
        ("acme/tiny@", "acme/tiny@: no such folder; a model on a hub is named"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused(given: str, words: str, hub: Hub, tmp_path: Path) -> None:
    assert words in refusal(FIND, given, environment(tmp_path, hub))


def test_a_gated_model_is_downloaded_with_the_token_of_an_account_that_may(hub: Hub, tmp_path: Path) -> None:
    assert found("acme/gated", environment(tmp_path, hub, HF_TOKEN=TOKEN))[1] == hub.repos[1].commit


def test_a_model_of_pickles_alone_is_refused_without_its_pickles(hub: Hub, tmp_path: Path) -> None:
    done = run(
        "-m", "recipes.train", "--recipe=dpo_tiny", "model.checkpoint=acme/pickled", env=environment(tmp_path, hub)
    )
    assert done.returncode == 2 and "acme/pickled: no model.safetensors there; other formats" in done.stderr
    assert not hub.fetched & set(DANGEROUS)


def test_a_folder_that_is_there_is_no_name_on_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find(Path("acme/tiny")).folder == Path("acme/tiny")


def test_the_converter_takes_a_name_too(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "made"
    done = run("-m", "tools.convert_hf_to_megatron", "acme/tiny@v1", str(target), env=environment(tmp_path, hub))
    assert done.returncode == 0, done.stderr
    assert read_manifest(target).weights == read_manifest(checkpoint).weights
    assert (target / "hf" / TOOL_USE).is_file()


def test_a_plan_downloads_no_more_than_the_shape(hub: Hub, tmp_path: Path) -> None:
    done = run("-m", "tools.plan", "--recipe=dpo_tiny", "model.checkpoint=acme/tiny", env=environment(tmp_path, hub))
    assert done.returncode == 0 and hub.fetched == {"config.json"}, done.stderr


def test_tokens_are_listed_with_no_more_than_the_tokenizer(hub: Hub, pairs_file: Path, tmp_path: Path) -> None:
    done = run("-m", "tools.tokens", str(pairs_file), "acme/tiny", "--row=3", env=environment(tmp_path, hub))
    assert done.returncode == 0 and done.stdout.startswith('     3  chosen        0  "Pa"'), done.stderr
    assert hub.fetched == NEEDED - {"model.safetensors"}


# ---------------------------------------------------------------- data sets


def test_a_split_is_the_rows_of_its_files_in_order(hub: Hub, tmp_path: Path) -> None:
    commit, numbered = rows("acme/prefs:train_prefs", environment(tmp_path, hub))
    assert commit == PREFS.commit and numbered == [[number, row] for number, row in enumerate(PAIRS[:5], start=1)]


def test_only_the_split_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    rows("acme/prefs:test_prefs", environment(tmp_path, hub))
    assert hub.fetched == {"README.md", "data/test_prefs-00000-of-00001.parquet"}


def test_a_split_that_was_read_once_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    """Another split of the same data set does, though the cache lists its files."""
    first = rows("acme/prefs@main:train_prefs", environment(tmp_path, hub))
    assert rows("acme/prefs@main:train_prefs", environment(tmp_path)) == first
    said = refusal(READ, "acme/prefs@main:test_prefs", environment(tmp_path))
    assert (
        "datasets--acme--prefs does not hold all that is needed of revision main, and HF_HUB_OFFLINE=1 forbids" in said
    )


def test_a_data_set_that_others_put_into_the_cache_is_read_from_there(tmp_path: Path) -> None:
    """Where the names of its files show that none is missing."""
    put_into_cache(PREFS, tmp_path / "hf" / "hub")
    assert rows("acme/prefs:test_prefs", environment(tmp_path)) == (PREFS.commit, [[1, PAIRS[5]]])
    put_into_cache(LINES, tmp_path / "hf" / "hub")
    said = refusal(READ, "acme/lines", environment(tmp_path))
    assert "datasets--acme--lines does not hold all that is needed, and HF_HUB_OFFLINE=1 forbids" in said


def test_a_part_of_a_split_in_the_cache_is_not_taken_for_the_split(hub: Hub, tmp_path: Path) -> None:
    """Refused without network, and completed with one, at the commit of the cache."""
    there = ("README.md", "data/train_prefs-00001-of-00002.parquet")
    put_into_cache(PREFS, tmp_path / "hf" / "hub", only=there)
    said = refusal(READ, "acme/prefs:train_prefs", environment(tmp_path))
    assert "does not hold all that is needed" in said and not (tmp_path / "tgdpo").exists()
    _, numbered = rows("acme/prefs:train_prefs", environment(tmp_path, hub))
    assert [row for _, row in numbered] == PAIRS[:5] and hub.fetched == {"data/train_prefs-00000-of-00002.parquet"}
    assert rows("acme/prefs:train_prefs", environment(tmp_path))[1] == numbered


def test_texts_are_not_taken_for_dates(hub: Hub, tmp_path: Path) -> None:
    """As the datasets library would; the only split need not be named."""
    assert rows("acme/lines", environment(tmp_path, hub))[1] == [[1, {"a": "2024-01-01"}], [2, {"a": "x"}]]


def test_a_configuration_is_chosen_by_its_name(hub: Hub, tmp_path: Path) -> None:
    assert rows("acme/configs:de/train", environment(tmp_path, hub))[1] == [[1, {"a": "eins"}]]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("acme/prefs", "holds the splits train_prefs, test_prefs; give one of them, such as acme/prefs:train_prefs."),
        ("acme/prefs:train", "acme/prefs:train: no split 'train'; there are train_prefs, test_prefs."),
        ("acme/prefs:x/train_prefs", "no configuration 'x'; there are default."),
        ("acme/configs:train", "has the configurations en, de; give one, such as acme/configs:en/train."),
        ("acme/prefs@v2:train_prefs", "/datasets/acme/prefs has no revision 'v2'"),
        ("acme/none:train", "has no data set of that name, or a private one"),
        ("acme/tiny:train", "has no data set of that name"),
    ],
)
def test_a_split_that_is_not_there_is_refused(given: str, words: str, hub: Hub, tmp_path: Path) -> None:
    assert words in refusal(READ, given, environment(tmp_path, hub))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("{folder}/secret.jsonl", "datasets does not find its splits"),
        ("{hub}/acme/secret.jsonl", "its README names files that are not the data set's own"),
        ("hf://datasets/acme/secret/train.jsonl", "its README names files that are not the data set's own"),
    ],
)
def test_a_data_set_that_names_files_outside_of_itself_is_refused(place: str, words: str, tmp_path: Path) -> None:
    """Before anybody is asked for them."""
    (tmp_path / "secret.jsonl").write_text('{"a": "mine"}\n')
    files = {"train.jsonl": b'{"a": "b"}\n'}
    with serve() as hub:
        named = place.format(folder=tmp_path, hub=hub.url)
        files["README.md"] = f"---\nconfigs:\n- {{config_name: default, data_files: '{named}'}}\n---\n".encode()
        hub.repos.append(Repo("acme/evil", files, kind="dataset"))
        assert words in refusal(READ, "acme/evil", environment(tmp_path, hub))
        assert not any("secret" in request for request in hub.requests)


def test_a_readme_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    files = {"README.md": b"---\na: [\n---\n", "train.jsonl": b'{"a": "b"}\n'}
    with serve(Repo("acme/broken", files, kind="dataset")) as hub:
        said = refusal(READ, "acme/broken", environment(tmp_path, hub))
    assert "acme/broken: the head of its README cannot be read" in said


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("a/b", ("a/b", None, None, None)),
        ("a/b@v1", ("a/b", "v1", None, None)),
        ("a/b:train", ("a/b", None, None, "train")),
        ("a/b@refs/pr/1:en/train", ("a/b", "refs/pr/1", "en", "train")),
    ],
)
def test_the_parts_of_a_name_are_told_apart(given: str, parts: tuple[str | None, ...]) -> None:
    split = hub_split(Path(given))
    assert split is not None
    assert (split.named.repo, split.named.revision, split.config, split.split) == parts


@pytest.mark.parametrize(
    "given", ["a/b.jsonl", "a/b.parquet", "a/b.json.gz", "a", "a/b/c", "/a/b", "../b", "a/b:", "a/b:c/d/e"]
)
def test_a_path_is_no_name(given: str) -> None:
    assert hub_split(Path(given)) is None


# ---------------------------------------------------------------- several at once


def test_two_programs_that_want_the_same_model_at_once_both_get_it(hub: Hub, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: found("acme/tiny", environment(tmp_path, hub)), range(2)))
    assert both[0] == both[1]
