"""Optimizer steps of TRL's DPOTrainer, run by bench.speed.trl in TRL's own environment; imports nothing of ours.

    python -P bench/speed/trl_worker.py FOLDER live|precomputed

FOLDER holds HuggingFace models in policy/ and reference/ and token ids in pairs.json. Prints, as JSON on the last
line, process CPU seconds between the ends of successive steps, and each step's loss.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

PAIRS_PER_STEP = 4


def run(folder: Path, *, precomputed: bool) -> dict[str, list[float]]:
    """Train over all pairs once, in order."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    seconds: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.process_time()
            seconds.append(now - self.last)
            self.last = now

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            losses.extend([logs["loss"]] if logs and "loss" in logs else [])

    class Prepared(DPOTrainer):  # type: ignore[misc]
        """The pairs are tokenised already, as our product does it."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    models = [
        LlamaForCausalLM.from_pretrained(folder / role, dtype=torch.float32, attn_implementation="sdpa")
        for role in ("policy", "reference")
    ]
    trainer = Prepared(
        models[0],
        ref_model=models[1],
        args=DPOConfig(
            output_dir=str(folder / "output"),
            per_device_train_batch_size=PAIRS_PER_STEP,
            precompute_ref_log_probs=precomputed,
            precompute_ref_batch_size=PAIRS_PER_STEP,
            train_sampling_strategy="sequential",
            num_train_epochs=1,
            learning_rate=7e-7,
            lr_scheduler_type="constant",
            beta=0.1,
            max_length=512,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(json.loads((folder / "pairs.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        callbacks=[Clock()],
    )
    trainer.train()
    return {"seconds": seconds, "losses": losses}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), precomputed=sys.argv[2] == "precomputed")))
