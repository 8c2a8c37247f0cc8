"""Which Pythons, megatron-cores and Transformer Engines are accepted, and what is said of the others."""

from __future__ import annotations

import json
import os
import pickletools
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from tests.versions import environments, exchange, matrix
from tests.versions.environments import Environment
from tests.versions.matrix import run_matrix, table
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.platform import versions
from tgdpo_megatron.platform.versions import DIFFERENCES, MEGATRON, NAMES_NO_TRANSFORMER_ENGINE, PYTHONS
from tools.docs import versions as written_versions

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = metadata.version("megatron-core")
CHECKED = ", ".join(MEGATRON)
CHECK = """
from tgdpo_megatron.platform.checks import check_packages
from tgdpo_megatron.errors import one_sentence_errors
with one_sentence_errors():
    check_packages()
"""


def start(*folders: Path, packages: bool = True, code: str = CHECK, **variables: str) -> tuple[int, str]:
    """Run the checks in a process of its own.

    Args:
        folders: Where Python looks for packages first.
        packages: Whether it looks among the installed packages as well.
    """
    path = os.pathsep.join(map(str, [*folders, ROOT]))
    switches = [] if packages else ["-S"]
    done = subprocess.run(
        [sys.executable, *switches, "-c", code],
        env=os.environ | {"PYTHONPATH": path, versions.UNCHECKED: "", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """The installed packages but for megatron-core."""
    folder = tmp_path / "others"
    folder.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith("megatron"):
            (folder / path.name).symlink_to(path)
    return folder


def put_metadata(folder: Path, version: str) -> Path:
    info = folder / f"megatron_core-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {version}\n")
    return folder


def put_copy(folder: Path) -> Path:
    (folder / "megatron" / "core").mkdir(parents=True)
    (folder / "megatron" / "core" / "__init__.py").touch()
    return folder


# ---------------------------------------------------------------- megatron-core


def test_the_installed_megatron_core_is_a_checked_one() -> None:
    versions.check_megatron()
    assert INSTALLED in MEGATRON and f"{sys.version_info.major}.{sys.version_info.minor}" in MEGATRON[INSTALLED]


@pytest.mark.parametrize("version", ["0.15.3", "0.16.0", "0.20.0rc1", "1.0"])
def test_another_version_is_refused_with_those_that_were_checked(version: str, others: Path, tmp_path: Path) -> None:
    found = put_copy(put_metadata(tmp_path / "site", version))
    assert start(found, others, packages=False) == (
        2,
        f"error: megatron-core {version} was not checked with this project; install one of {CHECKED}, or set "
        "TGDPO_UNCHECKED_VERSIONS=1 to use it all the same.\n",
    )
    assert start(found, others, packages=False, TGDPO_UNCHECKED_VERSIONS="1") == (
        0,
        f"warning: megatron-core {version} was not checked with this project; numbers may be wrong.\n",
    )
    assert start(found, others, packages=False, TGDPO_UNCHECKED_VERSIONS="1", RANK="1") == (0, "")


@pytest.mark.parametrize(
    ("version", "near"), [("0.17.0", "0.17.1"), ("0.18.0rc1", "0.18.2"), ("0.19.5+4a91", "0.19.2")]
)
def test_another_patch_of_a_checked_version_is_warned_about(
    version: str, near: str, others: Path, tmp_path: Path
) -> None:
    found = put_copy(put_metadata(tmp_path / "site", version))
    assert start(found, others, packages=False) == (
        0,
        f"warning: megatron-core {version} was not checked with this project, but {near} was; numbers may be wrong.\n",
    )


def test_a_checked_version_that_was_built_from_its_source_is_accepted(others: Path, tmp_path: Path) -> None:
    found = put_copy(put_metadata(tmp_path / "site", "0.17.1+4a91bd2"))
    assert start(found, others, packages=False) == (0, "")


def test_none_is_refused_with_what_to_install(others: Path) -> None:
    assert start(others, packages=False) == (
        2,
        f"error: megatron-core is not installed; install one of {CHECKED}.\n",
    )


def test_two_are_refused_with_where_they_are(tmp_path: Path) -> None:
    """The first is used, whatever the other says."""
    second = put_copy(put_metadata(tmp_path / "site", "0.12.0"))
    installed = Path(sysconfig.get_path("purelib")).resolve()
    assert start(second, TGDPO_UNCHECKED_VERSIONS="1") == (
        2,
        f"error: megatron-core is on Python's path more than once (0.12.0 in {second}, {INSTALLED} in {installed}); "
        "uninstall all but one, or take the others off PYTHONPATH.\n",
    )


def test_a_second_copy_of_the_source_is_refused(tmp_path: Path) -> None:
    """As where PYTHONPATH names a folder of Megatron-LM: its code is used under the other's version."""
    code, said = start(put_copy(tmp_path / "Megatron-LM"))
    assert code == 2 and said.startswith(
        f"error: megatron-core is on Python's path more than once (one of no version in {tmp_path / 'Megatron-LM'}, "
    )


def test_one_without_metadata_is_refused_with_how_to_install_it(others: Path, tmp_path: Path) -> None:
    found = put_copy(tmp_path / "Megatron-LM")
    assert start(found, others, packages=False, TGDPO_UNCHECKED_VERSIONS="1") == (
        2,
        f"error: nothing says which version the megatron-core in {found} is; install it with pip (pip install "
        f"--no-deps {found}), or install one of {CHECKED} in its place.\n",
    )


def test_one_that_is_developed_in_another_folder_is_accepted(others: Path, tmp_path: Path) -> None:
    """`pip install --editable` leaves the metadata among the packages, and a line that names the folder."""
    put_metadata(tmp_path / "site", INSTALLED)
    copy = put_copy(tmp_path / "Megatron-LM")
    assert start(tmp_path / "site", copy, others, packages=False) == (0, "")


# ---------------------------------------------------------------- Python


@pytest.mark.parametrize("found", ["3.9.18", "3.10.13"])
def test_a_python_that_is_too_old_is_refused_whatever_was_asked_for(found: str) -> None:
    import_it = f"import sys; sys.version_info = {tuple(map(int, found.split('.')))}; import tgdpo_megatron"
    assert start(code=import_it, TGDPO_UNCHECKED_VERSIONS="1") == (
        2,
        f"error: Python {found} is too old for this project; use Python 3.11, 3.12 or 3.13.\n",
    )


def test_a_python_that_is_too_new_is_refused_unless_it_is_asked_for() -> None:
    import_it = "import sys; sys.version_info = (3, 14, 0); import tgdpo_megatron"
    assert start(code=import_it) == (
        2,
        "error: Python 3.14.0 was not checked with this project; use Python 3.11, 3.12 or 3.13, or set "
        "TGDPO_UNCHECKED_VERSIONS=1 to use it all the same.\n",
    )
    assert start(code=import_it, TGDPO_UNCHECKED_VERSIONS="1") == (
        0,
        "warning: Python 3.14.0 was not checked with this project; numbers may be wrong.\n",
    )


def test_a_refused_python_fails_the_import_and_not_the_process_that_goes_on_without() -> None:
    """As in a notebook, which would lose all that it has computed."""
    import_it = (
        "import sys; sys.version_info = (3, 10, 4)\n"
        "try:\n    import tgdpo_megatron.losses\n"
        "except ImportError as error:\n    raise ValueError(f'goes on: {error}')"
    )
    code, said = start(code=import_it)
    assert code == 1 and said.splitlines()[-1] == (
        "ValueError: goes on: Python 3.10.4 is too old for this project; use Python 3.11, 3.12 or 3.13."
    )


@pytest.mark.parametrize("module", ["tgdpo_megatron", "tools.runs"])
def test_a_program_on_a_refused_python_says_one_sentence(module: str) -> None:
    run_it = f"import runpy, sys; sys.version_info = (3, 10, 4); runpy.run_module({module!r}, run_name='__main__')"
    assert start(code=run_it) == (
        2,
        "error: Python 3.10.4 is too old for this project; use Python 3.11, 3.12 or 3.13.\n",
    )


def test_the_pythons_are_those_that_the_package_asks_for() -> None:
    asked = re.search(r'^requires-python = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    last = int(PYTHONS[-1].partition(".")[2])
    assert asked is not None and asked[1] == f">={PYTHONS[0]},<3.{last + 1}"


# ---------------------------------------------------------------- Transformer Engine


@pytest.mark.parametrize("found", ["1.13.0", "2.8.0", "of an unknown version"])
def test_a_transformer_engine_that_is_too_old_is_refused(found: str) -> None:
    below = "" if NAMES_NO_TRANSFORMER_ENGINE.holds else ",<2.12"
    with pytest.raises(UserError) as refused:
        versions.check_transformer_engine_version(found)
    assert str(refused.value) == (
        f"Transformer Engine {found} is not accepted with megatron-core {INSTALLED}, only >=2.9{below}; install one of "
        "those, or uninstall it to run on Megatron's local layers, or set TGDPO_UNCHECKED_VERSIONS=1 to use it all the "
        "same."
    )


@pytest.mark.parametrize("found", ["2.12.0", "2.20.2"])
def test_a_newer_transformer_engine_is_refused_where_megatron_core_does_so_and_else_warned_about(
    found: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "_said", set())
    newer = f"Transformer Engine {found} is newer than those that this project knows, which are below 2.12"
    if NAMES_NO_TRANSFORMER_ENGINE.holds:
        versions.check_transformer_engine_version(found)
        assert capsys.readouterr().err == f"warning: {newer}; numbers may be wrong.\n"
        return
    with pytest.raises(UserError, match=r"only >=2\.9,<2\.12; install one of those"):
        versions.check_transformer_engine_version(found)


def test_the_limits_of_transformer_engine_are_those_that_megatron_core_names_where_it_names_some() -> None:
    named = [text for text in metadata.requires("megatron-core") or () if text.startswith("transformer-engine")]
    limits = re.search(r"<([\d.]+),>=([\d.]+)", named[0])
    assert (limits is None) == NAMES_NO_TRANSFORMER_ENGINE.holds
    if limits is not None:
        oldest, first_too_new = versions.TRANSFORMER_ENGINE
        assert limits[2].startswith(oldest) and limits[1].startswith(first_too_new)


# ---------------------------------------------------------------- differences


def test_no_other_file_asks_which_megatron_core_is_installed() -> None:
    """It asks versions.py whether a difference holds. Reports and certificates only write the version down."""
    named = [
        path.relative_to(ROOT).as_posix()
        for folder in ("tgdpo_megatron", "recipes", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(
            r'version\(["\']megatron-core["\']\)|CHECKED_MEGATRON|megatron\.core\.__version__', path.read_text()
        )
    ]
    assert named == ["tgdpo_megatron/platform/versions.py"]


def test_differences_are_in_the_order_of_versions_that_exist() -> None:
    known = [".".join(version.split(".")[:2]) for version in MEGATRON]
    places = [known.index(difference.since) for difference in DIFFERENCES]
    assert places == sorted(places) and all(places)


@pytest.mark.parametrize("installed", ["0.16.1", "0.17.1", "0.18.2", "0.19.2", "0.20.0", "0.17.1+4a91bd2"])
def test_a_difference_holds_from_its_version_on(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "megatron", lambda: installed)
    minor = int(installed.split(".")[1])
    assert [difference.holds for difference in DIFFERENCES] == [
        minor >= int(difference.since.split(".")[1]) for difference in DIFFERENCES
    ]


def test_the_index_of_a_checkpoint_names_classes_of_torch_alone(checkpoint: Path) -> None:
    """Megatron's own loader unpickles it, and a class of one Python's library may lack in another's.

    Python 3.11.0 to 3.11.3 write members of torch's enums with `getattr`, which every Python has.
    """
    index = (checkpoint / "weights" / ".metadata").read_bytes()
    words = [argument for _, argument, _ in pickletools.genops(index) if isinstance(argument, str)]
    modules = {word for word in words if re.fullmatch(r"[a-z_]\w*(\.\w+)*", word) and word in sys.modules}
    assert "torch.distributed.checkpoint.metadata" in modules
    assert {module.partition(".")[0] for module in modules} <= {"torch", "collections", "builtins"}, modules
    assert "builtins" not in modules or "getattr" in words


# ---------------------------------------------------------------- make versions


def test_an_environment_that_cannot_be_made_fails_and_so_does_reading_what_it_would_have_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are run, but not all checkpoints are there."""
    uv = tmp_path / "uv" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text("#!/bin/sh\necho 'error: No interpreter found for Python 3.11' >&2\nexit 2\n")
    uv.chmod(0o755)
    monkeypatch.setattr(environments, "PLACE", tmp_path)
    found = list(run_matrix(tmp_path, "megatron-core 0.16.1"))
    assert [(row.check, row.passed) for row in found] == [("environment", False), ("reads them", False)]
    assert found[0].said == "error: No interpreter found for Python 3.11"
    assert found[1].said == "1 of 1 environments wrote none"
    assert "0 of 2 passed" in table(found) and "FAIL" in capsys.readouterr().out


def test_a_check_that_fails_is_a_row_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "PLACE", tmp_path)
    here = Environment("3.11", "0.16.1")
    here.program.parent.mkdir(parents=True)
    here.program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    here.program.chmod(0o755)
    tests = tmp_path / "test_one.py"
    tests.write_text(
        "import pytest\n\n\ndef test_it():\n    assert 1 == 1\n\n\n@pytest.mark.skip\ndef test_no(): ...\n"
    )
    check = matrix._tests(str(tests), "-p", "no:cacheprovider")
    assert matrix._judged(here, "unit tests", check).said == "1 passed, 1 skipped"
    tests.write_text("def test_it():\n    assert 1 == 2\n")
    row = matrix._judged(here, "unit tests", check)
    assert not row.passed and re.match(r"1 failed in .* \(see .*failed\.log\)", row.said)


def record_uv(place: Path, then: str = "") -> Path:
    """Put a program in the place of uv that writes down what it is asked for. Returns the file."""
    uv, asked = place / "uv" / "bin" / "uv", place / "asked.txt"
    uv.parent.mkdir(parents=True)
    uv.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n{then}\n')
    uv.chmod(0o755)
    return asked


def test_an_environment_is_made_equal_to_the_locks_and_loses_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "PLACE", tmp_path)
    asked = record_uv(tmp_path)
    here = Environment("3.12", "0.18.2")
    here.make()
    compiled = f"{here.folder}/packages.txt"
    locks = "requirements-dev.lock requirements-megatron-0.18.2.lock"
    assert asked.read_text().splitlines()[-2:] == [
        f"pip compile --python {here.program} --output-file {compiled} {locks} --quiet",
        f"pip sync --python {here.program} {compiled} --quiet",
    ]


def test_the_project_is_installed_from_a_copy_of_its_sources_beside_the_locks_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a console script that fails is a row that fails, with its last words."""
    monkeypatch.setattr(environments, "PLACE", tmp_path)
    here = Environment("3.12", "0.18.2")
    scripts = here.folder.with_name(f"{here.short}-installed") / "bin"
    script = f"mkdir -p {here.folder} {scripts}; cd {scripts}; printf '#!/bin/sh\\necho no such pairs; exit 2\\n' > "
    script += "tgdpo-tiny-model; chmod +x tgdpo-tiny-model"
    asked = record_uv(tmp_path, f'test "$1" = venv && exit; ls -a "$5" > {tmp_path}/sources.txt; {script}')
    row = matrix._judged(here, "pip install .", matrix.CHECKS["pip install ."])
    assert not row.passed and row.said == f"no such pairs (see {here.folder / 'failed.log'})"
    made, installed = asked.read_text().splitlines()
    assert made == f"venv --clear --python {here.program} {scripts.parent} --quiet"
    source, torch, megatron, _ = installed.split()[4:]
    assert torch in (ROOT / "requirements.lock").read_text().splitlines() and megatron == "megatron-core==0.18.2"
    assert Path(source) != ROOT
    copied = (tmp_path / "sources.txt").read_text().split()
    assert {"pyproject.toml", "setup.py", "tgdpo_megatron", "recipes", "tools", "conf", "slurm"} <= set(copied)
    assert [name for name in copied if name.startswith(".venv") or name in (".git", "build")] == []


def test_tests_that_passed_before_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "PLACE", tmp_path)
    record_uv(tmp_path)
    here = Environment("3.12", "0.18.2")
    here.program.parent.mkdir(parents=True)
    here.program.write_text("#!/bin/sh\necho '{\"at DP2\": 0.0}'\n")
    here.program.chmod(0o755)
    kept = [matrix.Result("3.12", "0.18.2", name, True, "", 1.0) for name in matrix.CHECKS if name != "continuing"]
    found = list(run_matrix(tmp_path, here.name, kept))
    assert [row.check for row in found] == ["environment", "writes checkpoints", "reads them", "continuing"]
    assert all(row.passed for row in found)


LINES = [{"iteration": step, "loss": 1.0 / step, "grad_norm": 2.0, "rewards/margins": 0.1} for step in (1, 2, 3, 4)]


def test_a_reader_that_did_not_go_on_from_the_checkpoint_is_seen() -> None:
    """One that started anew finds the same numbers, but for more steps."""
    assert exchange.difference(LINES, LINES[2:]) == 0
    other = [*LINES[2:3], LINES[3] | {"grad_norm": 2.5}]
    assert exchange.difference(LINES, other) == pytest.approx(0.25)
    with pytest.raises(AssertionError, match="did not go on"):
        exchange.difference(LINES, LINES)


def test_checkpoints_are_exchanged_where_every_kind_of_part_is_split() -> None:
    split = [settings for _, settings in exchange.LAYOUTS.values() if len(settings) == 2]
    assert split == [{"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}]


@pytest.mark.parametrize(("largest", "said"), [(0.0, "0"), (2e-6, "2e-06")])
def test_the_difference_of_readers_is_said_as_a_reader_writes_it(
    largest: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "PLACE", tmp_path)
    here = Environment("3.12", "0.18.2")
    here.program.parent.mkdir(parents=True)
    here.program.write_text(f"#!/bin/sh\necho '{json.dumps({'one at DP2': 0.0, 'one at TP2PP2': largest})}'\n")
    here.program.chmod(0o755)
    assert matrix._read(here, tmp_path, [here], 1) == f"those of 1, largest difference {said}"


def test_every_checked_megatron_core_has_an_environment_and_so_has_every_python() -> None:
    assert {environment.megatron for environment in environments.ENVIRONMENTS} == set(MEGATRON)
    assert {environment.python for environment in environments.ENVIRONMENTS} == set(PYTHONS)


def test_the_table_of_the_page_shows_what_failed_and_what_was_not_run_or_reached(tmp_path: Path) -> None:
    results = tmp_path / "versions.json"
    row = {"python": "3.12", "megatron": "0.18.2", "check": "unit tests", "passed": True, "said": "9 passed"}
    other = row | {"megatron": "0.19.2", "passed": False, "said": "2 failed"}
    machine = {"commit": "1b72d4e", "date": "2026-11-22", "cores": 2}
    rows = [row, row | {"check": "parity", "said": "good"}, other]
    checks = ["parity", "conversion", "unit tests"]
    results.write_text(json.dumps({"machine": machine, "checks": checks, "rows": rows}))
    assert written_versions(results).splitlines() == [
        "|  | 0.18.2, Python 3.12 | 0.19.2, Python 3.12 |",
        "| --- | --- | --- |",
        "| parity | good | not run |",
        "| conversion | not run | not run |",
        "| unit tests | 9 passed | **failed**: 2 failed |",
        "",
        "Commit 1b72d4e, 2026-11-22; 2 cores.",
    ]


def test_the_page_has_a_row_for_every_check_and_says_what_it_is() -> None:
    results = json.loads((ROOT / "results" / "versions.json").read_text())
    assert results["checks"] == list(matrix.NAMES) and {"commit", "date"} <= results["machine"].keys()
    assert {"other programs", "pip install ."} <= set(matrix.NAMES)
    page = (ROOT / "docs" / "requirements.md").read_text()
    assert re.findall(r"^- \*\*(.*?)\*\*: ", page, flags=re.MULTILINE) == list(matrix.NAMES)


def test_the_page_says_how_many_differences_need_two_ways() -> None:
    code = "".join(path.read_text() for path in (ROOT / "tgdpo_megatron").rglob("*.py"))
    words = {3: "three", 4: "four", 5: "five"}
    said = f"Only {words[len(set(re.findall(r'([A-Z_]+)[.]holds', code)))]} of them need two ways in the code"
    assert said in " ".join((ROOT / "docs" / "requirements.md").read_text().split())
