"""Run the whole TGDPO job on a file of pairs: make a model, train the guidance, score, train, export.

    python -m tools.real_run PAIRS [--output runs/real] [--steps 30]

The run shows that every program works on these pairs, and that cached and live scores train the same model. The model
is small and random, so what it learns says little. Each command is printed before it runs.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

from tgdpo_megatron.errors import USER_ERROR, CommandLine, UserError, one_sentence_errors

LAYOUT = [
    "--nproc-per-node=4",
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
]


def real_run(pairs: Path, output: Path, *, steps: int) -> dict[str, float]:
    """Run everything, and return the largest differences found.

    Returns:
        `step 0 − ln 2`: |loss − ln 2| before the first update, cached and live.
        `cached − live`: largest difference of the losses of all steps.

    Raises:
        UserError: The output folder is in use, or a program failed.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: already there and not empty; choose another folder.")
    output.mkdir(parents=True, exist_ok=True)
    common = [
        f"model.checkpoint={output / 'start'}",
        f"data.train={pairs}",
        "data.max_length=512",
        "train.global_batch_size=4",
        "train.micro_batch_size=1",
        f"train.train_iters={steps}",
        "optimizer.lr_warmup_iters=3",
    ]
    guidance = output / "guidance"
    trained = f"checkpoints/iter-{steps:07d}"
    _run("tools.make_tiny_model", str(pairs), str(output / "start-hf"))
    _run("tools.convert_hf_to_megatron", str(output / "start-hf"), str(output / "start"))
    _run("recipes.train", "--recipe=dpo_tiny", *common, f"train.output={guidance}")
    guided = [*common, f"model.guidance={guidance / trained}"]
    _run("recipes.score", "--recipe=tgdpo_tiny", *guided, f"scores.path={output / 'scores'}")
    cached = ["scores.source=cached", f"scores.path={output / 'scores'}"]
    for source, settings in (("cached", cached), ("live", [])):
        _run("recipes.train", "--recipe=tgdpo_tiny", *LAYOUT, *guided, *settings, f"train.output={output / source}")
    _run("tools.convert_megatron_to_hf", str(output / "cached" / trained), str(output / "aligned-hf"))
    losses = {source: _losses(output / source) for source in ("cached", "live")}
    return {
        "step 0 − ln 2": max(abs(values[0] - math.log(2)) for values in losses.values()),
        "cached − live": max(abs(a - b) for a, b in zip(losses["cached"], losses["live"], strict=True)),
    }


def _run(module: str, *arguments: str) -> None:
    command = ["python", "-m", module, *arguments]
    print("\n$ " + " ".join(command), flush=True)
    done = subprocess.run([sys.executable, *command[1:]], check=False)
    if done.returncode == USER_ERROR:
        raise UserError(f"{module} refused its input; see above.")
    if done.returncode:
        sys.exit(f"error: {module} ended with exit code {done.returncode}; see above.")


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(prog="python -m tools.real_run", description=__doc__.splitlines()[0])
        parser.add_argument("pairs", type=Path, help="pairs, in any form that data.train takes")
        parser.add_argument(
            "--output", type=Path, default=Path("runs/real"), help="folder to make (default: %(default)s)"
        )
        parser.add_argument(
            "--steps", type=int, default=30, help="optimizer steps of each training (default: %(default)s)"
        )
        parsed = parser.parse_args()
        differences = real_run(parsed.pairs, parsed.output, steps=parsed.steps)
        print("\n" + "\n".join(f"{name}: {value:.1e}" for name, value in differences.items()))
        print(f"aligned model: {parsed.output / 'aligned-hf'}")


if __name__ == "__main__":
    main()
