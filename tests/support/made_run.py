"""The folder of a run that was never trained: everything that a report is made from."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tgdpo_megatron import preflight
from tgdpo_megatron.checkpoint.manifest import HF
from tgdpo_megatron.config import Config, LossConfig, complete, load
from tgdpo_megatron.config.steps import on_device
from tgdpo_megatron.data.prepare import PreparedPairs, prepare_pairs
from tgdpo_megatron.data.tokenizer import load_tokenizer
from tgdpo_megatron.platform.clock import ACTIVITIES
from tgdpo_megatron.scores.store import Key, write_scores_manifest, write_shard


def make_run(
    folder: Path,
    checkpoint: Path,
    pairs: Path,
    *,
    steps: int = 6,
    held_out: bool = True,
    ended: bool = True,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Make the folder of a run; return it.

    Args:
        checkpoint: What the run started from. It is also what it ends with.
        pairs: Both its training and its held-out pairs.
        steps: Steps in its metrics. All pairs tie at the first. It was evaluated before it and at every second one.
        ended: Whether these are all its steps. Otherwise it planned as many again.
        changes: Settings that differ from those of TGDPO with cached scores.
    """
    settings: dict[str, Any] = {
        "model": {"checkpoint": str(checkpoint), "guidance": str(checkpoint)},
        "loss": {"type": "tgdpo"},
        "scores": {"source": "cached", "path": str(folder.parent / f"{folder.name}-scores")},
        "data": {"train": str(pairs), "validation": str(pairs) if held_out else None, "max_length": 128},
        "train": {"output": str(folder), "train_iters": steps if ended else 2 * steps, "global_batch_size": 2},
    }
    for group, values in (changes or {}).items():
        settings[group] = settings[group] | values
    config = on_device(complete(load(Config(), settings, where="test"), where="test"), "cpu")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    first = 0 if held_out else 1  # step 0 has held-out numbers only
    lines = [made_up_line(config.loss, step, held_out and step % 2 == 0) for step in range(first, steps + 1)]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines if line.keys() > {"iteration"})
    )
    tokenizer = load_tokenizer(checkpoint / HF)
    for part in ("train", "validation")[: 1 + held_out]:
        data = prepare_pairs(config.data, pairs, tokenizer, folder / "data" / f"{part}-0")
        if config.scores.cached:
            _score(config, data, Path(str(config.scores.path)) / part)
    if ended:
        shutil.copytree(checkpoint, folder / "checkpoints" / f"iter-{steps:07d}")
    return folder


def made_up_line(loss: LossConfig, step: int, evaluated: bool) -> dict[str, float]:
    """One line of metrics.jsonl, whose numbers have more digits than a page shows. Step 0 is before training."""
    line: dict[str, float] = {"iteration": step}
    if step:
        line |= _numbers(loss, updates=step - 1)
        line |= {"grad_norm": 1 / step, "learning_rate": 1e-6 * step, "num_tokens": 200.0}
        line |= {"perf/seconds_per_step": 0.25, "perf/tokens_per_second": 1600.0, "perf/tflops_per_rank": 0.0125}
        shares = {"policy": 0.5, "frozen": 0.25, "waiting": 0.125, "saving": 0.125}
        line |= {f"perf/share_{activity}": shares.get(activity, 0.0) for activity in ACTIVITIES}
        line |= {"perf/seconds": 2.0, "perf/share_waiting_max": 0.1875}
    if evaluated:
        line |= {f"eval/{name}": 0.9 * value for name, value in _numbers(loss, updates=step).items()}
    return line


def _numbers(loss: LossConfig, updates: int) -> dict[str, float]:
    margin = 0.1234567 * updates
    numbers: dict[str, float] = {"loss": math.log1p(math.exp(-margin)), "logps/chosen": -40.123456 + updates}
    if loss.method.compares:
        numbers |= {
            "logps/rejected": -50.654321 - updates,
            "rewards/chosen": 0.75 * margin,
            "rewards/rejected": -0.25 * margin,
            "rewards/margins": margin,
            "rewards/accuracies": min(0.9375, 0.6 + 0.04 * updates) if updates else 0.0,
        }
    if loss.reward_source:
        numbers |= {
            "token_rewards/mean": 0.012345,
            "token_rewards/std": 0.314159,
            "token_rewards/zero_frac": 0.02,
            "token_rewards/limit_frac": 0.0,
            "token_rewards/correlation": 0.1 * updates,
        }
    return numbers


def _score(config: Config, data: PreparedPairs, folder: Path) -> None:
    """Write made-up scores: −1 for every token under the reference, −1 + n/10 for the n-th under the guidance."""
    folder.mkdir(parents=True)
    write_scores_manifest(folder, preflight.scores_manifest(config, preflight.check_models(config), data))
    scores = {}
    for pair in range(len(data)):
        for side in (0, 1):
            length = data.response_length(pair, side)
            reference = np.full(length, -1.0, dtype=np.float32)
            ramp = np.arange(length, dtype=np.float32) / 10
            for name, values in (("reference", reference), ("guidance", reference + ramp)):
                scores[Key(data.hashes[pair].tobytes(), side, name)] = values
    write_shard(folder, scores)
