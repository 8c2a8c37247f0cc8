"""Conversions that are killed, crowded out or run out of space: nothing looks whole, and the same command goes on."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.faults.test_bad_inputs import ROOT, Said, assert_refused, end_of, environment

pytestmark = pytest.mark.long

TO_MEGATRON, TO_HF = "tools.convert_hf_to_megatron", "tools.convert_megatron_to_hf"


@pytest.fixture(scope="module")
def models(hf_model: Path, checkpoint: Path) -> dict[str, Path]:
    """What each program converts."""
    return {TO_MEGATRON: hf_model, TO_HF: checkpoint}


class Conversion:
    """A conversion in small parts, as a program that runs."""

    def __init__(
        self, module: str, *arguments: str | Path, stop_after: int | None = None, limit: int | None = None
    ) -> None:
        self.mark, self.partial = uuid.uuid4().hex, Path(f"{arguments[1]}.partial")
        self.process = psutil.Popen(
            [sys.executable, "-m", "tests.support.small_parts", module, *map(str, arguments)],
            cwd=ROOT,
            env=environment(self.mark, OMP_NUM_THREADS="1", STOP_AFTER=str(stop_after or "")),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
        )

    def wait_for_its_stop(self) -> None:
        """Wait until it has stopped itself, in the midst of the work."""
        end = time.monotonic() + 60
        while self.process.status() != psutil.STATUS_STOPPED:
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.02)

    def parts(self) -> list[Path]:
        return list((self.partial / ".conversion").glob("[0-9]*.json"))

    def said(self) -> Said:
        """What it said, at its end. Nothing of it may still run then."""
        out, err = self.process.communicate(timeout=120)
        left = end_of(self.mark)
        assert not left, f"still running: {left}"
        return Said(self.process.returncode, out, err, 0)


@pytest.fixture
def start() -> Iterator[Callable[..., Conversion]]:
    """A function that starts a conversion, which ends with the test. One that stops itself is returned stopped."""
    started: list[Conversion] = []

    def begin(*arguments: str | Path, stop_after: int | None = None, limit: int | None = None) -> Conversion:
        started.append(Conversion(str(arguments[0]), *arguments[1:], stop_after=stop_after, limit=limit))
        if stop_after:
            started[-1].wait_for_its_stop()
        return started[-1]

    yield begin
    for conversion in started:
        end_of(conversion.mark)


def result(folder: Path) -> object:
    """What a conversion has made, to compare."""
    if (folder / "manifest.json").is_file():
        return json.loads((folder / "manifest.json").read_text())
    return {name: (tensor.dtype, tensor.tolist()) for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.fixture(scope="module")
def whole(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What each program makes when nothing happens."""
    from tgdpo_megatron.checkpoint.convert import megatron_to_hf

    megatron_to_hf(models[TO_HF], tmp_path_factory.mktemp("whole") / "hf")
    return {TO_MEGATRON: result(models[TO_HF]), TO_HF: result(models[TO_MEGATRON])}


@pytest.mark.parametrize(("module", "processes"), [(TO_MEGATRON, 1), (TO_HF, 1), (TO_MEGATRON, 2)])
def test_a_killed_conversion_leaves_no_target_and_goes_on(
    module: str,
    processes: int,
    models: dict[str, Path],
    whole: dict[str, object],
    start: Callable[..., Conversion],
    tmp_path: Path,
) -> None:
    """The processes that share the work end with the program, and the lock as well."""
    command = (module, models[module], tmp_path / "made", "--processes", str(processes))
    first = start(*command, stop_after=3)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    gone = time.monotonic() + 10
    while psutil.pid_exists(first.process.pid) or any_left(first.mark):
        assert time.monotonic() < gone, "a process of the conversion outlives its program"
        time.sleep(0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["made.partial"]
    assert not (tmp_path / "made.partial" / "config.json").exists()
    assert not (tmp_path / "made.partial" / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in first.parts()}
    again = start(*command, stop_after=len(finished) + 1)
    assert finished.items() <= {path: path.stat().st_mtime_ns for path in again.parts()}.items(), "done twice"
    again.process.resume()
    said = again.said()
    assert said.code == 0 and f"going on from {len(finished)} finished parts" in said.err, said.err
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert result(tmp_path / "made") == whole[module]
    assert not (tmp_path / "made" / ".conversion").exists()


def any_left(mark: str) -> bool:
    """Whether a process of a conversion still runs."""
    for process in psutil.process_iter():
        try:
            if mark in process.environ().values() and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except psutil.Error:
            continue
    return False


def test_processes_that_are_killed_end_the_conversion_in_a_sentence(
    models: dict[str, Path], whole: dict[str, object], start: Callable[..., Conversion], tmp_path: Path
) -> None:
    command = (TO_HF, models[TO_HF], tmp_path / "made", "--processes", "2")
    first = start(*command, stop_after=1)  # a program that has stopped hands out no more parts
    workers = [child for child in first.process.children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    for worker in workers:  # had one been left, it could do all that remains before anyone looks for the other
        worker.kill()
    first.process.resume()
    kept = f"what is finished stays in {tmp_path / 'made.partial'}, and the same command goes on from it."
    assert_refused(first.said(), "a process of the conversion was killed", kept)
    assert start(*command).said().code == 0
    assert result(tmp_path / "made") == whole[TO_HF]


def test_two_conversions_to_one_folder_do_not_mix(
    models: dict[str, Path], whole: dict[str, object], start: Callable[..., Conversion], tmp_path: Path
) -> None:
    first = start(TO_MEGATRON, models[TO_MEGATRON], tmp_path / "made", stop_after=1)
    assert_refused(
        start(TO_MEGATRON, models[TO_MEGATRON], tmp_path / "made").said(),
        f"{tmp_path / 'made'}: another conversion to this folder is running",
    )
    first.process.resume()
    assert first.said().code == 0
    assert result(tmp_path / "made") == whole[TO_MEGATRON]


def test_work_of_another_dtype_is_thrown_away_with_a_sentence(
    models: dict[str, Path], start: Callable[..., Conversion], tmp_path: Path
) -> None:
    first = start(TO_MEGATRON, models[TO_MEGATRON], tmp_path / "made", "--dtype", "bf16", stop_after=3)
    first.process.send_signal(signal.SIGINT)
    first.process.resume()
    said = first.said()
    assert said.code == 130 and said.err == "error: interrupted.\n" and (tmp_path / "made.partial").is_dir(), said.err
    other = start(TO_MEGATRON, models[TO_MEGATRON], tmp_path / "made", "--dtype", "fp32").said()
    assert other.code == 0 and "unfinished, but of another model, dtype or version" in other.err, other.err
    assert json.loads((tmp_path / "made" / "manifest.json").read_text())["dtype"] == "float32"


def test_a_file_that_cannot_be_written_to_its_end_is_a_sentence_and_finished_parts_are_kept(
    models: dict[str, Path], whole: dict[str, object], start: Callable[..., Conversion], tmp_path: Path
) -> None:
    """The system refuses to write beyond 20 kB to a file, which the index of so many parts needs in the end."""
    command = (TO_MEGATRON, models[TO_MEGATRON], tmp_path / "made")
    said = start(*command, limit=20_000).said()
    assert_refused(said, "cannot be written", "File too large", "the same command goes on from it.")
    assert [path.name for path in tmp_path.iterdir()] == ["made.partial"]
    assert start(*command).said().code == 0
    assert result(tmp_path / "made") == whole[TO_MEGATRON]


@pytest.mark.parametrize(("module", "limit"), [(TO_MEGATRON, 1_000), (TO_HF, 20_000)])
def test_where_nothing_could_be_written_nothing_is_left(
    module: str, limit: int, models: dict[str, Path], start: Callable[..., Conversion], tmp_path: Path
) -> None:
    """The first is refused in the midst of torch's writer, which does not say why."""
    said = start(module, models[module], tmp_path / "made", limit=limit).said()
    assert_refused(said, "cannot be written", "File too large")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_before_anything_is_written(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The system says that 1,000 bytes are free."""
    import shutil

    from tgdpo_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
    from tgdpo_megatron.errors import UserError

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    for convert, source in ((hf_to_megatron, models[TO_MEGATRON]), (megatron_to_hf, models[TO_HF])):
        with pytest.raises(UserError, match=r"0\.00 GB are still to be written, but only 0\.00 GB are free there"):
            convert(source, tmp_path / "made")
        assert list(tmp_path.iterdir()) == []


def test_files_of_the_user_where_the_work_would_be_are_left_alone(models: dict[str, Path], tmp_path: Path) -> None:
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron
    from tgdpo_megatron.errors import UserError

    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"made\.partial: this folder is needed, but holds files of something else"):
        hf_to_megatron(models[TO_MEGATRON], tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made.partial"]
    assert [path.name for path in (tmp_path / "made.partial").iterdir()] == ["thesis.tex"]


def test_an_empty_folder_becomes_the_target(models: dict[str, Path], tmp_path: Path) -> None:
    from tgdpo_megatron.checkpoint.convert import megatron_to_hf

    (tmp_path / "made").mkdir()
    megatron_to_hf(models[TO_HF], tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made"] and (tmp_path / "made" / "config.json").is_file()


def test_an_unknown_number_of_processes_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    from tests.faults.test_bad_inputs import say

    said = say(TO_MEGATRON, str(models[TO_MEGATRON]), str(tmp_path / "made"), "--processes", "0")
    assert_refused(said, "--processes 0: at least one process has to work")


def test_a_place_where_nobody_may_write_is_refused(models: dict[str, Path]) -> None:
    """Not even root may write to /proc."""
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
    from tgdpo_megatron.errors import UserError

    for convert, source in ((hf_to_megatron, models[TO_MEGATRON]), (megatron_to_hf, models[TO_HF])):
        with pytest.raises(UserError, match=r"^/proc/made: cannot be written"):
            convert(source, Path("/proc/made"))


def test_memory_of_a_conversion_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """200 MB in shards of 50 MB. Either way takes less than twice the largest tensor, of 67 MB, and the comparison for
    the certificate less than three times, since it computes in fp32."""
    from bench.speed.convert import make_checkpoint

    shape = {"hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 3, "vocab_size": 16384}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
    assert make_checkpoint(tmp_path / "hf", shape | heads, 50 * 10**6) > 200 * 10**6
    command = [sys.executable, "-m", "tests.support.conversion_memory", *map(str, (tmp_path / "hf", tmp_path))]
    done = subprocess.run(command, cwd=ROOT, env=environment(""), capture_output=True, check=True)
    grown = {way: int(number) for way, number in json.loads(done.stdout).items()}
    assert grown.keys() == {"to Megatron", "to HuggingFace", "certificate"}
    largest = 16384 * 2048 * torch.bfloat16.itemsize
    limits = {"to Megatron": 2, "to HuggingFace": 2, "certificate": 6}
    assert all(0 < grown[way] < times * largest for way, times in limits.items()), grown
