"""What is run in each environment, and a table of what came of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.parity.rows import IN_TESTS, LIMITS
from tests.versions.environments import ENVIRONMENTS, ROOT, Environment, NoEnvironmentError

WORKERS = "2"
"""Files of tests at once."""
EXCHANGED = 1e-5
"""Largest relative difference between what a writer finds after its checkpoint and what a reader finds: versions may
add numbers up in another order, and Adam magnifies that."""


@dataclass
class Result:
    """What came of a check in an environment."""

    python: str
    megatron: str
    check: str
    passed: bool
    said: str
    seconds: float


class FailedError(Exception):
    """A check failed. The message says how."""


def run_matrix(folder: Path, only: str = "", kept: Sequence[Result] = ()) -> Iterator[Result]:
    """Run every environment whose name contains `only`, and give each result as it comes.

    What takes long, the unit tests, comes last. Where an environment cannot be made, nothing else is run in it.

    Args:
        kept: Results of CHECKS that are not run again.
    """
    done = {(result.python, result.megatron, result.check) for result in kept}
    chosen = [environment for environment in ENVIRONMENTS if only in environment.name]
    made, writers = [], []
    for environment in chosen:
        yield (found := _judged(environment, "environment", _made))
        if found.passed:
            made.append(environment)
            yield (found := _judged(environment, "writes checkpoints", lambda here: _written(here, folder)))
            writers += [environment] if found.passed else []
    for environment in chosen:
        yield _judged(environment, "reads them", lambda here: _read(here, folder, writers, len(chosen)))
    for name, check in CHECKS.items():
        for environment in made:
            if (environment.python, environment.megatron, name) not in done:
                yield _judged(environment, name, check)


def as_shown(results: Sequence[Result]) -> list[Result]:
    """Environments in their order, and in each the checks in theirs."""
    order = [environment.name for environment in ENVIRONMENTS]
    return sorted(
        results,
        key=lambda result: (
            order.index(Environment(result.python, result.megatron).name),
            NAMES.index(result.check),
        ),
    )


def _judged(environment: Environment, name: str, check: Callable[[Environment], str]) -> Result:
    started = time.monotonic()
    try:
        passed, said = True, check(environment)
    except (FailedError, NoEnvironmentError) as error:
        passed, said = False, str(error)
    result = Result(environment.python, environment.megatron, name, passed, said, time.monotonic() - started)
    print(f"  {environment.name}, {name}: {'pass' if passed else 'FAIL'} ({said}), {result.seconds:.0f} s", flush=True)
    return result


def _made(environment: Environment) -> str:
    environment.make()
    show = """
import importlib.metadata as metadata, torch
print("torch", torch.__version__, end="; ")  # with its build, which the metadata of a CUDA build leaves out
for name in ("triton", "numpy", "transformers"):
    try:
        print(name, metadata.version(name), end="; ")
    except metadata.PackageNotFoundError:
        pass
"""
    return _output(environment, "-c", show).splitlines()[-1].rstrip("; ")


def _tests(*paths: str) -> Callable[[Environment], str]:
    """Tests: how many passed and were skipped, each for a reason that `pytest -rs` shows."""

    def run(environment: Environment) -> str:
        said = _output(environment, "-m", "pytest", "-q", "-n", WORKERS, "--dist", "loadfile", *paths)
        return ", ".join(re.findall(r"\d+ (?:passed|skipped)", said.splitlines()[-1]))

    return run


def _parity(environment: Environment) -> str:
    """Layouts and losses against one HuggingFace process: how many, and the largest error over its limit."""
    file = environment.folder / "parity.json"
    _output(environment, "-m", "tests.parity", "--only", IN_TESTS, "--json", str(file))
    errors = [row["errors"] for row in json.loads(file.read_text())]
    largest = max(error / LIMITS[kind] for row in errors for kind, error in row.items())
    return f"{len(errors)} rows, largest error {largest:.2f} of its limit"


def _exchange(environment: Environment, what: str, folder: Path, *others: str) -> str:
    return _output(environment, "-m", "tests.versions.exchange", what, str(folder), environment.short, *others)


def _written(environment: Environment, folder: Path) -> str:
    _exchange(environment, "write", folder)
    return "at DP2 and at TP2×PP2, after two of four steps"


def _read(environment: Environment, folder: Path, writers: Sequence[Environment], asked: int) -> str:
    """Go on from every writer's checkpoint. Without one of them, nothing is known of the others."""
    if len(writers) < asked:
        raise FailedError(f"{asked - len(writers)} of {asked} environments wrote none")
    said = _exchange(environment, "read", folder, *(writer.short for writer in writers))
    found = json.loads(said.splitlines()[-1])
    if not all(difference <= EXCHANGED for difference in found.values()):
        raise FailedError(said)
    return f"those of {len(writers)}, largest difference {max(found.values()):.1g}"


def _installed(environment: Environment) -> str:
    """Install the project as users do, and train with its console scripts in an empty folder."""
    scripts = environment.install(environment.folder.with_name(f"{environment.short}-installed"))
    pairs = ROOT / "docs" / "example" / "pairs.jsonl"
    training = ("model.checkpoint=start", f"data.train={pairs}", "train.train_iters=2", "train.global_batch_size=8")
    with tempfile.TemporaryDirectory() as place:
        for script, *words in (
            ("tgdpo-tiny-model", str(pairs), "hf"),
            ("tgdpo-convert", "hf", "start"),
            ("tgdpo-train", "--recipe=dpo_tiny", "--nproc-per-node=2", *training, "train.output=run"),
        ):
            _said([str(scripts / script), *words], Path(place), scripts, environment.folder / "failed.log")
        steps = len((Path(place) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return f"{steps} steps of tgdpo-train, far from the repository"


CHECKS: dict[str, Callable[[Environment], str]] = {
    "parity": _parity,
    "continuing": _tests("tests/distributed/test_resume.py"),
    "conversion": _tests("tests/distributed/test_roundtrip.py"),
    "other programs": _tests("tests/distributed/test_other_programs.py"),
    "mended traps": _tests("tests/distributed/test_mended_traps.py"),
    "pip install .": _installed,
    "unit tests": _tests("tests/unit"),
}
NAMES = ("environment", "writes checkpoints", "reads them", *CHECKS)
"""All checks of an environment, in their order."""


def _output(environment: Environment, *arguments: str) -> str:
    """What a program of an environment says, run in the repository."""
    log = environment.folder / "failed.log"
    return _said([str(environment.program), *arguments], ROOT, environment.folder / "bin", log)


def _said(command: Sequence[str], folder: Path, programs: Path, log: Path) -> str:
    """What a command says in a folder, where the programs of an environment are found first.

    Raises:
        FailedError: It ends with another code than 0; the message has its last words. All that it said is in the log.
    """
    own = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTHON"))}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=variables | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    except OSError as error:
        raise FailedError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        log.write_text(done.stdout, encoding="utf-8")
        raise FailedError(f"{(done.stdout.strip().splitlines() or [''])[-1]} (see {log})")
    return done.stdout.strip()


def table(results: Sequence[Result]) -> str:
    """A part for each environment."""
    lines: list[str] = []
    for result in as_shown(results):
        name = Environment(result.python, result.megatron).name
        if name not in lines:
            lines += ["", name] if lines else [name]
        passed = "pass" if result.passed else "FAIL"
        lines.append(f"  {passed} {result.seconds:5.0f} s  {result.check}: {result.said}")
    passed = sum(result.passed for result in results)
    return "\n".join([*lines, "", f"{passed} of {len(results)} passed"])
