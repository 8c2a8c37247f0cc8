"""TRL's DPOTrainer against our DPO step: the same model, the same token ids, 4 pairs to a step.

    python -m bench.speed.trl

TRL is installed only for this, into a folder of its own (in runs/, or where TGDPO_TRL says), on top of our torch,
transformers and datasets, so that both sides run the same. Process CPU seconds of a whole step at one thread, with
the reference live and with its log-probs computed before training. Losses are asserted equal. There is no target: the
rows say what a user of TRL would gain.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.files import program
from bench.ours import Ours, make_checkpoints
from bench.pairs import NO_DATA, real_file, real_pairs, real_tokenizer
from bench.process import cpu_seconds, one_rank
from bench.rows import Row, paired, skipped
from bench.speed.trl_worker import PAIRS_PER_STEP
from tgdpo_megatron.config import LossConfig
from tgdpo_megatron.losses import CHOSEN, REJECTED

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("trl==1.16.0", "accelerate==1.15.0")
STEPS, LOSS_LIMIT = 4, 1e-4
NAME = "DPO step, TRL {} / ours {}"


def measure() -> list[Row]:
    """Rows against TRL."""
    source = real_file()
    if source is None:
        return [skipped("DPO step, TRL / ours", NO_DATA)]
    try:
        packages = _install(Path(os.environ.get("TGDPO_TRL", ROOT / "runs" / "trl")))
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        return [skipped("DPO step, TRL / ours", f"TRL cannot be installed: {_last_line(error)}")]
    with tempfile.TemporaryDirectory() as name, one_rank():
        folder = Path(name)
        checkpoints = make_checkpoints(folder)
        tokenizer = real_tokenizer(source)
        data = real_pairs(source, tokenizer, 512, folder / "pairs")
        pairs = list(range(PAIRS_PER_STEP * (1 + STEPS)))
        hf = checkpoints.hf["policy"].parent
        tokenizer.save_pretrained(hf / "policy")
        (hf / "pairs.json").write_text(json.dumps([_ids(data, pair) for pair in pairs]))
        theirs = {how: _run(packages, hf, how) for how in ("live", "precomputed")}

        rows = []
        for how, cached in (("live", False), ("precomputed", True)):
            ours = Ours(data, checkpoints, cached=cached, loss=LossConfig(type="dpo", beta=0.1))
            if cached:
                ours.cache_scores(pairs)
            seconds, difference = [], 0.0
            for step, wanted in enumerate(theirs[how]["losses"]):
                spent, loss = cpu_seconds(ours.step, pairs[PAIRS_PER_STEP * step : PAIRS_PER_STEP * (step + 1)])
                difference = max(difference, abs(loss - wanted))
                seconds.append(spent)
            assert difference < LOSS_LIMIT, f"losses differ by {difference:.1e}"
            rows.append(
                paired(
                    NAME.format(how, "cached" if cached else "live"),
                    theirs[how]["seconds"][1:],  # the first step warms up
                    seconds[1:],
                    note=f"TRL {PACKAGES[0].split('==')[1]}, losses equal to {difference:.0e}",
                )
            )
    return rows


def _install(folder: Path) -> Path:
    """A folder with TRL in it, and what it needs beyond our own packages; made if it is not there."""
    installed = folder / "installed"  # written last, so that half an installation is not taken for one
    if not installed.is_file() or installed.read_text() != " ".join(PACKAGES):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command = [*pip, "--no-deps", "--upgrade", "--target", str(folder), *PACKAGES]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        installed.write_text(" ".join(PACKAGES))
    return folder


def _last_line(error: subprocess.CalledProcessError | subprocess.TimeoutExpired) -> str:
    return (str(error.stderr or "").strip().splitlines() or ["no answer"])[-1]


def _ids(data: Any, pair: int) -> dict[str, list[int]]:
    """A pair as TRL keeps it after tokenising."""
    prompt = int(data.prompt_lengths[pair])
    chosen, rejected = (data.sequence(pair, side).tolist() for side in (CHOSEN, REJECTED))
    return {"prompt_ids": chosen[:prompt], "chosen_ids": chosen[prompt:], "rejected_ids": rejected[prompt:]}


def _run(packages: Path, folder: Path, how: str) -> dict[str, list[float]]:
    """The worker's result."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    environment["PYTHONPATH"] = str(packages)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # this process is a rank; TRL's is not
        environment.pop(name, None)
    command = [sys.executable, "-W", "ignore", "-P", str(Path(__file__).with_name("trl_worker.py")), str(folder), how]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    program(__doc__, measure)
