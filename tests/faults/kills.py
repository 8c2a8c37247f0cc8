"""Kills in the midst of small runs at TP2×PP2: every run goes on as if it had never been stopped.

A run is killed several times, each time at a moment and in a way drawn by chance, and is then let run to its end. What
it leaves is compared with what an uninterrupted run leaves, bit for bit: every line of metrics, the pairs of every
step, and every tensor of the last checkpoint with the optimizer's.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import PAIRS
from tests.faults.rows import Row
from tests.support.forked import RANKS, Job, in_a_process

STEPS = 16
GLOBAL_BATCH = 4
"""Pairs of a step. The epochs of 6 pairs end in the midst of a step."""
SAVE_INTERVAL = 4
KILLS_PER_RUN = 5
SHARE_OF_LAUNCHERS = 0.1
"""How many kills are of the product's own launcher, whose ranks take long to start."""
LAYOUT = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2")
MOMENTS = ("while it starts", "in a step", "in a save", "between a save and the next step")
MODES = ("cached", "live")
"""Where the token scores of the frozen models come from."""


@dataclass
class Kill:
    """One kill: when, and what was killed."""

    moment: str
    victim: str
    step: int
    """Lines of metrics that were written by then."""
    outlived: int = 0
    """Processes that were left when their launcher was killed."""


@dataclass
class World:
    """What all runs start from."""

    folder: Path
    arguments: dict[str, list[str]]
    """Mode -> command line, without train.output."""

    def command(self, mode: str, output: Path) -> list[str]:
        return [*self.arguments[mode], f"train.output={output}", "train.resume=true"]


def make_world(folder: Path) -> World:
    """A reference, a guidance, pairs, and the scores of both, in a folder."""
    in_a_process(partial(_make_models, folder))
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    common = [
        "--recipe=tgdpo_tiny",
        "--quiet",
        f"model.checkpoint={folder / 'reference-megatron'}",
        f"model.guidance={folder / 'guidance-megatron'}",
        f"data.train={pairs}",
        f"data.validation={pairs}",
        *LAYOUT,
    ]
    cached = [f"scores.path={folder / 'scores'}"]
    score = Job("recipes.score", [*common, *cached], folder / "score.log")
    assert score.end(patience=120) == [0] * RANKS, score.said()
    train = [
        *common,
        f"train.train_iters={STEPS}",
        f"train.global_batch_size={GLOBAL_BATCH}",
        "train.micro_batch_size=1",
        f"train.save_interval={SAVE_INTERVAL}",
        "train.eval_interval=5",
        "train.report=false",
        "train.keep_last=0",
        "optimizer.lr=1e-3",
    ]
    return World(folder, {"cached": [*train, *cached], "live": train})


def _make_models(folder: Path) -> None:
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron
    from tools.make_tiny_model import make_model, train_tokenizer

    tokenizer = train_tokenizer([text for row in PAIRS for text in row.values()] * 2, vocab_size=330)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
    }
    for seed, name in enumerate(("reference", "guidance")):
        make_model(folder / name, tokenizer, seed=seed, **sizes)
        hf_to_megatron(folder / name, folder / f"{name}-megatron")


def run_whole(world: World, mode: str) -> Path:
    """The folder of a run that nobody disturbs."""
    output = world.folder / f"whole-{mode}"
    job = Job("recipes.train", world.command(mode, output), world.folder / f"whole-{mode}.log")
    assert job.end(patience=300) == [0] * RANKS, job.said()
    return output


def run_killed(world: World, mode: str, seed: int, whole: Path, kills: int = KILLS_PER_RUN) -> tuple[Row, int]:
    """Kill a run several times, let it end, and compare it with the uninterrupted run.

    Returns:
        The row, and the number of kills.
    """
    output = world.folder / f"killed-{mode}-{seed}"
    chance = random.Random(f"{mode} {seed}")
    done, wrong, began = list[Kill](), list[str](), time.monotonic()
    for number in range(kills):
        moment = chance.choice(MOMENTS)
        start = _launched if chance.random() < SHARE_OF_LAUNCHERS else _forked
        killed = start(world, mode, output, moment, chance, number)
        if killed is None:  # the run ended before the moment came
            break
        done.append(killed)
        if killed.outlived:
            wrong.append(f"{killed.outlived} processes outlived their launcher")
    log = world.folder / f"{output.name}-last.log"
    job = Job("recipes.train", world.command(mode, output), log)
    codes = job.end(patience=300)
    if codes != [0] * RANKS:
        wrong.append(f"the last start ended with {codes}: {job.said()[-500:]}")
    else:
        wrong += differences(whole, output)
    name = f"run {seed}: " + ", ".join(f"{kill.victim} {kill.moment} (after {kill.step} steps)" for kill in done)
    said = "other than the uninterrupted run" if wrong else "as the uninterrupted run, bit for bit"
    subject = f"kills at TP2×PP2, {mode} scores"
    return Row(subject, name, not wrong, said, time.monotonic() - began, "; ".join(wrong)), len(done)


def _forked(world: World, mode: str, output: Path, moment: str, chance: random.Random, number: int) -> Kill | None:
    log = world.folder / f"{output.name}-{number}.log"
    job = Job("recipes.train", world.command(mode, output), log)
    victims = chance.choice([[rank] for rank in range(RANKS)] + [list(range(RANKS))])
    came = _wait_for(moment, output, chance, lambda: len(job.running()) == RANKS)
    step = _lines(output)
    for rank in victims if came else []:
        job.kill(rank)
    job.end(patience=chance.choice([0.0, 0.2, 2.0]))
    if not came:
        return None
    return Kill(moment, f"rank {victims[0]}" if len(victims) == 1 else "all ranks", step)


def _launched(world: World, mode: str, output: Path, moment: str, chance: random.Random, number: int) -> Kill | None:
    """The same with the product's own launcher, which is killed itself. Its ranks must end with it."""
    log = world.folder / f"{output.name}-{number}.log"
    command = [sys.executable, "-m", "recipes.train", f"--nproc-per-node={RANKS}", *world.command(mode, output)]
    with log.open("w") as file:
        launcher = psutil.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    came = _wait_for(moment, output, chance, lambda: launcher.poll() is None)
    step = _lines(output)
    family = launcher.children(recursive=True) if came else []
    with contextlib.suppress(psutil.NoSuchProcess):  # the run has ended before the moment came
        launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        process.kill()
    return Kill(moment, "the launcher", step, outlived=len(alive)) if came else None


def _wait_for(moment: str, output: Path, chance: random.Random, runs: Any) -> bool:
    """Wait for the moment, and a little longer, by chance. False where the run ended before."""
    if moment == MOMENTS[0]:
        last = time.monotonic() + chance.uniform(0, 2)
        while runs() and time.monotonic() < last:
            time.sleep(0.002)
        return bool(runs())
    before, saved = _lines(output), _saved(output)
    lines = before + chance.randint(1, 8)
    came = {
        MOMENTS[1]: lambda: _lines(output) >= lines,
        MOMENTS[2]: lambda: any(output.glob("checkpoints/*.tmp")),
        MOMENTS[3]: lambda: bool(_saved(output) - saved),
    }[moment]
    while runs() and not came():
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.15 if moment == MOMENTS[2] else 0.05))
    return bool(runs())


def _lines(output: Path) -> int:
    path = output / "metrics.jsonl"
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _saved(output: Path) -> set[str]:
    return {path.name for path in output.glob("checkpoints/iter-*") if path.suffix != ".tmp"}


# ---------------------------------------------------------------- what must be equal


def differences(whole: Path, other: Path) -> Iterator[str]:
    """What a run left that another did not leave, in words."""
    expected, found = (_metrics(run) for run in (whole, other))
    if [line["iteration"] for line in found] != [line["iteration"] for line in expected]:
        yield "metrics of other steps"
    for one, another in zip(expected, found, strict=False):
        if names := [name for name in one if one[name] != another.get(name)]:
            yield f"step {one['iteration']}: {', '.join(names)}"
    yield from _samples_lost_or_repeated(other)
    last = f"checkpoints/iter-{STEPS:07d}"
    weights = [tensors(run / last) for run in (whole, other)]
    if weights[0] != weights[1]:
        names = [name for name in weights[0] if weights[0][name] != weights[1].get(name)]
        yield f"{len(names)} tensors of the last checkpoint, such as {', '.join(names[:3])}"


def _metrics(output: Path) -> list[dict[str, float]]:
    """Every line of metrics, without what depends on the clock."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def _samples_lost_or_repeated(output: Path) -> Iterator[str]:
    """Whether every pair was seen once in each epoch, by the pairs that the run says it consumed."""
    steps = [json.loads(line) for line in (output / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    if [step["iteration"] for step in steps] != list(range(1, STEPS + 1)):
        yield "samples of other steps"
    seen = [pair for step in steps for pair in step["pairs"]]
    for epoch in range(len(seen) // len(PAIRS)):
        counted = Counter(seen[epoch * len(PAIRS) : (epoch + 1) * len(PAIRS)])
        if set(counted.values()) != {1}:
            yield f"epoch {epoch + 1} saw its pairs {dict(counted)} times"


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint, as bytes, by its name; read by torch's own tools."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found: dict[str, Any] = {}
    _load_state_dict(
        found,
        storage_reader=FileSystemReader(checkpoint / "weights"),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    flat = dict(_flat(found))
    return {
        name: value.contiguous().view(torch.uint8).numpy().tobytes()
        for name, value in flat.items()
        if isinstance(value, torch.Tensor)
    }


def _flat(state: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def kills(world: World, whole: dict[str, Path], number: int) -> Iterator[Row]:
    """Runs of both modes in turn, until there were so many kills.

    Args:
        whole: Mode -> the folder of the uninterrupted run.
    """
    done, seed, each = 0, 0, min(KILLS_PER_RUN, -(-number // len(MODES)))
    while done < number:
        mode = MODES[seed % len(MODES)]
        row, killed = run_killed(world, mode, seed // len(MODES), whole[mode], min(each, number - done))
        done += killed
        seed += 1
        yield row
