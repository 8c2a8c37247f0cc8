"""TRL's DPOTrainer against our DPO step: the same model, the same token ids, 4 pairs to a step.

    python -m bench.speed.trl

TRL is installed only for this, into a folder of its own (in runs/, or where TGDPO_TRL says), on top of our torch,
transformers and datasets, so that both sides run the same. Process CPU seconds of a whole step at one thread, with
the reference live and with its log-probs computed before training; a step of TRL's and one of ours in turn. Both go
over the batches three times: operations are counted the first time, steps are timed afterwards. Losses are asserted
equal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.files import program
from bench.ours import LEARNING_RATE, PAIRS_PER_STEP, Ours, make_checkpoints
from bench.pairs import with_real_lengths
from bench.process import cpu_seconds, one_rank
from bench.rows import Row, skipped
from bench.speed.flops import counted_flops
from bench.speed.limits import COUNTED, NEAR, Timed, within_limit
from tgdpo_megatron.config import LossConfig
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.losses import CHOSEN, REJECTED
from tools.make_tiny_model import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("trl==1.16.0", "accelerate==1.15.0")
STEPS, ROUNDS, LONGEST, BETA, LOSS_LIMIT = 3, 3, 512, 0.1, 1e-4
NAMES = {
    "live": "DPO step, CPU time: TRL's trainer against ours, reference model live on both sides",
    "precomputed": "DPO step, CPU time: TRL's trainer against ours, reference log-probs computed before on both sides",
}


def measure() -> Iterator[Row]:
    """Rows against TRL."""
    try:
        packages = _install(Path(os.environ.get("TGDPO_TRL", ROOT / "runs" / "trl")))
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        for name in NAMES.values():
            yield skipped(name, f"TRL cannot be installed: {_last_line(error)}")
        return
    with tempfile.TemporaryDirectory() as name, one_rank():
        checkpoints = make_checkpoints(Path(name))
        data = with_real_lengths(LONGEST)
        pairs = list(range(PAIRS_PER_STEP * STEPS))
        hf = checkpoints.hf["policy"].parent
        train_tokenizer([], vocab_size=300).save_pretrained(hf / "policy")  # TRL wants one; the pairs are token ids
        work = {
            "pairs": [_ids(data, pair) for pair in pairs],
            "rounds": ROUNDS,
            "pairs_per_step": PAIRS_PER_STEP,
            "longest": LONGEST,
            "learning_rate": LEARNING_RATE,
            "beta": BETA,
        }
        (hf / "work.json").write_text(json.dumps(work), encoding="utf-8")
        for how in NAMES:
            ours = Ours(data, checkpoints, cached=how == "precomputed", loss=LossConfig(type="dpo", beta=BETA))
            if how == "precomputed":
                ours.cache_scores(pairs)
            yield _row(how, ours, pairs, packages, hf)


def _row(how: str, ours: Ours, pairs: list[int], packages: Path, hf: Path) -> Row:
    batches = [pairs[first : first + PAIRS_PER_STEP] for first in range(0, len(pairs), PAIRS_PER_STEP)]
    here, there = Timed(), Timed()
    difference = 0.0
    for step, theirs in enumerate(_their_steps(how, packages, hf)):
        batch = batches[step % STEPS]
        if step < STEPS:
            here.cost += [counted_flops(ours.step, batch)]
            there.cost += [theirs["operations"]]
        else:
            spent, loss = cpu_seconds(ours.step, batch)
            here.seconds.append(spent)
            there.seconds.append(theirs["seconds"])
            difference = max(difference, abs(loss - theirs["loss"]))
    assert difference < LOSS_LIMIT, f"losses differ by {difference:.1e}"
    here.cost *= ROUNDS - 1
    there.cost *= ROUNDS - 1
    return within_limit(
        NAMES[how],
        there,
        here,
        at_most=False,
        share=NEAR,
        limit=COUNTED,
        note=f"TRL {PACKAGES[0].split('==')[1]}, losses equal to {difference:.0e}",
    )


def _install(folder: Path) -> Path:
    """A folder with TRL in it, and what it needs beyond our own packages; made if it is not there."""
    installed = folder / "installed"  # written last, so that half an installation is not taken for one
    if not installed.is_file() or installed.read_text(encoding="utf-8") != " ".join(PACKAGES):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command = [*pip, "--no-deps", "--upgrade", "--target", str(folder), *PACKAGES]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        installed.write_text(" ".join(PACKAGES), encoding="utf-8")
    return folder


def _last_line(error: subprocess.CalledProcessError | subprocess.TimeoutExpired) -> str:
    return (str(error.stderr or "").strip().splitlines() or ["no answer"])[-1]


def _ids(data: PreparedPairs, pair: int) -> dict[str, list[int]]:
    """A pair as TRL keeps it after tokenising."""
    prompt = int(data.prompt_lengths[pair])
    chosen, rejected = (data.sequence(pair, side).tolist() for side in (CHOSEN, REJECTED))
    return {"prompt_ids": chosen[:prompt], "chosen_ids": chosen[prompt:], "rejected_ids": rejected[prompt:]}


def _their_steps(how: str, packages: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """The worker's steps: seconds, loss and operations of each. The worker waits until the next one is wanted."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    environment["PYTHONPATH"] = str(packages)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # this process is a rank; TRL's is not
        environment.pop(name, None)
    command = [sys.executable, "-m", "bench.speed.trl_worker", str(folder), how]
    log = folder / f"{how}.log"
    pipe = subprocess.PIPE
    with (
        log.open("w", encoding="utf-8") as said,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=said, text=True) as worker,
    ):
        assert worker.stdin and worker.stdout
        for line in worker.stdout:
            yield json.loads(line)
            worker.stdin.write("go on\n")
            worker.stdin.flush()
    assert worker.returncode == 0, log.read_text(encoding="utf-8")[-3000:]


if __name__ == "__main__":
    program(__doc__, measure)
