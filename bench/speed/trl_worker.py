"""Optimizer steps of TRL's DPOTrainer, run by bench.speed.trl with TRL in its path; imports nothing of the product.

    python -m bench.speed.trl_worker FOLDER live|precomputed

FOLDER holds HuggingFace models in policy/ and reference/, and settings and token ids in work.json. The trainer goes
over all pairs several times: the first time operations are counted, afterwards steps are timed. After each step the
worker prints the step as one line of JSON and waits for a line, so that the program above can run its own step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.speed.flops import counted_flops


def run(folder: Path, *, precomputed: bool) -> None:
    """Train over all pairs, in order, as many times as the work says."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # the trainer prints too
    work = json.loads((folder / "work.json").read_text(encoding="utf-8"))
    steps = len(work["pairs"]) // work["pairs_per_step"]
    operations: list[int] = []  # of each step of the first round

    class Report(TrainerCallback):  # type: ignore[misc]
        """Tells of each step, then waits."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.told = 0
            self.began = time.process_time()

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                step = {
                    "seconds": time.process_time() - self.began,
                    "loss": logs["loss"],
                    "operations": operations[self.told % steps],
                }
                self.told += 1
                print(json.dumps(step), file=answers, flush=True)
                if not sys.stdin.readline():
                    sys.exit("nobody listens any more")
                self.began = time.process_time()

    class Prepared(DPOTrainer):  # type: ignore[misc]
        """Counts the operations of the first round. The pairs are tokenised already, as our product does it."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def training_step(self, *inputs: Any) -> Any:
            step = super().training_step
            if len(operations) == steps:
                return step(*inputs)
            losses: list[Any] = []
            operations.append(counted_flops(lambda: losses.append(step(*inputs))))
            return losses[0]

    models = [
        LlamaForCausalLM.from_pretrained(folder / role, dtype=torch.float32, attn_implementation="sdpa")
        for role in ("policy", "reference")
    ]
    trainer = Prepared(
        models[0],
        ref_model=models[1],
        args=DPOConfig(
            output_dir=str(folder / "output"),
            per_device_train_batch_size=work["pairs_per_step"],
            precompute_ref_log_probs=precomputed,
            precompute_ref_batch_size=work["pairs_per_step"],
            train_sampling_strategy="sequential",
            num_train_epochs=work["rounds"],
            learning_rate=work["learning_rate"],
            lr_scheduler_type="constant",
            beta=work["beta"],
            max_length=work["longest"],
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(work["pairs"]),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        callbacks=[Report()],
    )
    trainer.train()


if __name__ == "__main__":
    run(Path(sys.argv[1]), precomputed=sys.argv[2] == "precomputed")
