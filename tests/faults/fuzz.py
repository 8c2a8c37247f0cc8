"""python -m tests.faults.fuzz: damage checkpoints thousands of times, read each as the programs do, and watch.

A converted checkpoint is exported, and a run's is loaded for training. Whatever was done to the files, reading ends
with the numbers of before or with one sentence, in a bounded time and memory, and does nothing outside a fixed list:
imports no module, starts no program, compiles no code, opens no other file. Exported weights are those of before, since
their fingerprint is compared; numbers of the optimizer that became other numbers are for the checksums to notice.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import faulthandler
import gc
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.rows import Row

ROOT = Path(__file__).resolve().parents[2]
MUTATIONS = 5000
SECONDS = 3.0
"""Of the processor, for one reading."""
EXTRA_BYTES = 512 * 1024**2
"""That the process may take beside what it has before the first reading."""
NAMES = frozenset({("tgdpo_megatron.errors", "UserError"), ("tgdpo_megatron.checkpoint.failures", "NotReadError")})
"""What ranks unpickle of each other: why one of them cannot read its part."""


@dataclass
class Tally:
    """What one way of reading made of one kind of damage.

    Attributes:
        refused: Readings that ended with one sentence.
        same: Readings that gave the numbers of before.
        other: Readings that gave other numbers of the training state.
        slowest: Seconds of the processor.
        wrong: What should not have happened, in words, with the number of the mutation.
    """

    damage: str
    reading: str
    refused: int = 0
    same: int = 0
    other: int = 0
    slowest: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.wrong


def fuzz(mutations: int, seed: int = 0) -> list[Tally]:
    """Damage, read and watch in a process of its own.

    Raises:
        RuntimeError: The process ended otherwise than by finishing; the message names the damage before.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.faults.fuzz", f"--mutations={mutations}", f"--seed={seed}"]
        done = subprocess.run(
            [*command, f"--child={folder}"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        rows, last = Path(folder) / "rows.json", Path(folder) / "last"
        if done.returncode != 0 or not rows.is_file():
            what = last.read_text() if last.is_file() else "no damage yet"
            raise RuntimeError(f"the process ended with {done.returncode} at {what}:\n{done.stderr[-3000:]}")
        return [Tally(**row) for row in json.loads(rows.read_text())]


def foreign_checkpoints(_: Path, only: str) -> list[Row]:
    """The rows of `make faults`: one for each kind of damage and each reading."""
    return [
        Row(
            "checkpoints of strangers",
            f"{tally.damage}, {tally.reading}",
            tally.passed,
            f"refused {tally.refused}, as before {tally.same}, other state {tally.other}",
            tally.slowest,
            "; ".join(tally.wrong[:5]),
        )
        for tally in fuzz(MUTATIONS)
        if only in tally.damage or only in tally.reading
    ]


def table(rows: list[Tally]) -> str:
    """The rows in words."""
    lines = [
        "| damage | reading | refused | same | other state | slowest, s | wrong |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        counts = f"{row.refused} | {row.same} | {row.other} | {row.slowest:.2f} | {len(row.wrong)}"
        lines.append(f"| {row.damage} | {row.reading} | {counts} |")
    return "\n".join([*lines, *(f"{row.damage}, {row.reading}: {wrong}" for row in rows for wrong in row.wrong[:5])])


def _run(mutations: int, seed: int, folder: Path) -> list[Tally]:
    from tests.support.hostile import KINDS
    from tests.support.watched import Watch
    from tgdpo_megatron.platform.processes import job

    copy, marker = folder / "copy", folder / "called"
    with job("tests.faults.fuzz", processes=1, timeout_minutes=5) as ranks:
        converted, trained = _checkpoints(folder / "made", ranks)
        readings = {"export": (converted, _exporting(folder / "scratch")), "training": (trained, _loading(trained))}
        expected = {name: _undamaged(checkpoint, copy, read) for name, (checkpoint, read) in readings.items()}
        rows = [Tally(kind, name) for kind in KINDS for name in readings]
        watch = Watch(copy, folder / "scratch", NAMES)
        _bound_memory()
        for number in range(mutations):
            row = rows[number % len(rows)]
            checkpoint, read = readings[row.reading]
            (folder / "last").write_text(f"mutation {number}, {row.damage}, {row.reading}")
            shutil.copytree(checkpoint, copy)
            KINDS[row.damage](copy, random.Random(f"{seed} {number}"), marker)
            _one(row, number, watch, lambda read=read: read(copy), expected[row.reading])
            if marker.exists():
                row.wrong.append(f"mutation {number} had its code run")
                marker.rmdir()
            shutil.rmtree(copy)
            (folder / "elsewhere.distcp").unlink(missing_ok=True)
    return rows


def _undamaged(checkpoint: Path, copy: Path, read: Callable[[Path], str]) -> str:
    """What an undamaged copy is read as. What is imported late, and for a refusal, is imported here."""
    shutil.copytree(checkpoint, copy)
    read(copy)
    found = read(copy)
    (copy / "weights" / ".metadata").unlink()
    with contextlib.suppress(Exception):
        read(copy)
    codecs.lookup("cp437")  # of names in zip files
    shutil.rmtree(copy)
    return found


def _bound_memory() -> None:
    """Let this process take little more than it has."""
    gc.freeze()  # Megatron collects garbage at each loading, which takes long with all that is imported
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _one(row: Tally, number: int, watch: Any, read: Callable[[], str], expected: str) -> None:
    """Read once, and note what came of it."""
    from tests.support.hostile import REFUSED
    from tgdpo_megatron.errors import UserError

    began = time.process_time()
    with watch.watching() as seen:
        try:
            found, refusal = read(), None
        except UserError as error:
            found, refusal = "", str(error)
        except BaseException as error:
            watch.on = False
            row.wrong.append(f"mutation {number}: {type(error).__name__}: {str(error)[:300]}")
            return
    row.slowest = max(row.slowest, took := time.process_time() - began)
    row.refused += refusal is not None
    row.same += found == expected
    row.other += refusal is None and found != expected
    if seen:
        row.wrong.append(f"mutation {number} did {seen[:3]}")
    if took > SECONDS:
        row.wrong.append(f"mutation {number} took {took:.1f} s")
    if refusal is not None and (len(refusal) > 1500 or not refusal.endswith(".") or not refusal.isprintable()):
        row.wrong.append(f"mutation {number} was refused with {refusal[:300]!r}, which is no sentence")
    if row.damage in REFUSED and refusal is None:
        row.wrong.append(f"mutation {number} was read all the same")
    if row.reading == "export" and refusal is None and found != expected:
        row.wrong.append(f"mutation {number} changed the exported weights")


def _checkpoints(folder: Path, ranks: Any) -> tuple[Path, Path]:
    """A converted checkpoint, and that of a run's first step."""
    from megatron.core import parallel_state

    from recipes.settings import RECIPES
    from tests.conftest import PAIRS
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron
    from tgdpo_megatron.config import load
    from tgdpo_megatron.train import train
    from tools.make_tiny_model import make_model, train_tokenizer

    folder.mkdir()
    tokenizer = train_tokenizer([text for row in PAIRS for text in row.values()] * 2, vocab_size=330)
    make_model(folder / "hf", tokenizer, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    hf_to_megatron(folder / "hf", folder / "converted", certificate=False)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    train(load(RECIPES["dpo_tiny"](), _settings(folder), where="fuzz"), ranks)
    parallel_state.destroy_model_parallel()
    return folder / "converted", folder / "run" / "checkpoints" / "iter-0000001"


def _settings(folder: Path) -> dict[str, Any]:
    return {
        "model": {"checkpoint": str(folder / "converted"), "require_certificate": False},
        "loss": {"type": "dpo"},
        "data": {"train": str(folder / "pairs.jsonl")},
        "optimizer": {"lr": 1e-3, "lr_warmup_iters": 0},
        "train": {
            "output": str(folder / "run"),
            "train_iters": 1,
            "global_batch_size": 2,
            "micro_batch_size": 1,
            "precision": "fp32",
        },
    }


def _exporting(scratch: Path) -> Callable[[Path], str]:
    from tgdpo_megatron.checkpoint.convert import megatron_to_hf

    scratch.mkdir()

    def read(checkpoint: Path) -> str:
        try:
            megatron_to_hf(checkpoint, scratch / "hf")
            return hashlib.sha256((scratch / "hf" / "model.safetensors").read_bytes()).hexdigest()
        finally:
            for path in scratch.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return read


def _loading(checkpoint: Path) -> Callable[[Path], str]:
    """Loads into one model and optimizer, whose numbers are destroyed before."""
    import torch

    from recipes.settings import RECIPES
    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.checkpoint.state import load_training_state
    from tgdpo_megatron.config import load
    from tgdpo_megatron.engine import build_engine
    from tgdpo_megatron.pair_losses import PreferenceLoss
    from tgdpo_megatron.platform.processes import initialize_model_parallel

    config = load(RECIPES["dpo_tiny"](), _settings(checkpoint.parents[2]), where="fuzz")
    initialize_model_parallel(config.parallel, seed=1)
    engine = build_engine(config, describe(checkpoint), loss=PreferenceLoss(config), start=None, frozen=[])

    def numbers() -> list[Any]:
        states = [state for group in engine.optimizer.param_groups for state in group["params"]]
        return [*engine.chunks[0].parameters(), *states]

    def read(folder: Path) -> str:
        with torch.no_grad():
            for tensor in numbers():
                tensor.fill_(7)
        load_training_state(folder, engine.chunks, engine.optimizer, engine.scheduler)
        digest = hashlib.sha256()
        for tensor in numbers():
            digest.update(tensor.detach().float().numpy().tobytes())
        return digest.hexdigest()

    return read


def main() -> None:
    faulthandler.enable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=MUTATIONS, help="how often a checkpoint is damaged and read")
    parser.add_argument("--seed", type=int, default=0, help="another seed damages otherwise")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.child:
        rows = _run(parsed.mutations, parsed.seed, parsed.child)
        (parsed.child / "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
        return
    rows = fuzz(parsed.mutations, parsed.seed)
    print(table(rows))
    if parsed.json:
        parsed.json.write_text(json.dumps([asdict(row) | {"passed": row.passed} for row in rows], indent=2))
    sys.exit(0 if all(row.passed for row in rows) else 1)


if __name__ == "__main__":
    main()
