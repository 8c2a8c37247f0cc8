"""How much GPU memory a configuration needs, what would lower it, and which layouts fit: before anything is built.

Takes what recipes.train takes, and

  --memory GIB        what one GPU has; default: the GPU present, if there is one
  --model FOLDER      HuggingFace folder, of which only config.json is read; default: model.checkpoint
  --transformer-engine  layers of Transformer Engine, which keep less than the local ones; with train.fp8 they are its

Bytes of the fullest rank with the longest pairs that the settings allow, by arithmetic (tgdpo_megatron/memory.py). The
exit code is 0 whether it fits or not: the answer is in the output.
"""

import math
import sys
from pathlib import Path
from typing import Any

from recipes.settings import read_command_line
from tgdpo_megatron.config import Config, check_batch_layout
from tgdpo_megatron.errors import CommandLine, UserError, one_sentence_errors
from tgdpo_megatron.model.description import ModelDescription, check_fp8_sizes, check_model_layout
from tgdpo_megatron.model.families import read_description
from tgdpo_megatron.planning.memory import GIB, ROOM, Plan, plan, size
from tgdpo_megatron.planning.remedies import layouts, remedies

LAYOUTS_SHOWN = 5


def table(needs: Plan) -> str:
    """Parts by phase, GiB."""
    parts = list(dict.fromkeys(part for phase in needs.phases for part in phase.parts))
    widths = [len(phase.name) for phase in needs.phases]
    left = max(map(len, parts))

    def line(name: str, cells: list[str]) -> str:
        return f"{name:<{left}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    rows = [
        line(part, [f"{phase.parts[part] / GIB:.2f}" if part in phase.parts else "" for phase in needs.phases])
        for part in parts
    ]
    heading = line("GiB", [phase.name for phase in needs.phases])
    return "\n".join([heading, *rows, line("together", [f"{phase.bytes / GIB:.2f}" for phase in needs.phases])])


def report(
    config: Config, description: ModelDescription, *, ranks: int, memory: int | None, transformer_engine: bool
) -> str:
    """Everything that the program prints."""
    parallel, train = config.parallel, config.train
    where: dict[str, Any] = {"world_size": ranks, "transformer_engine": transformer_engine}
    needs = plan(config, description, **where)
    data_parallel = ranks // parallel.model_parallel_size
    lines = [
        f"{ranks} ranks: TP{parallel.tensor_model_parallel_size} PP{parallel.pipeline_model_parallel_size} "
        f"DP{data_parallel}, {train.precision}, train.recompute={train.recompute}, scores.source="
        f"{config.scores.source}, {needs.tokens} tokens at once; pipeline stage {needs.stage} is the fullest",
        "",
        table(needs),
        "",
    ]
    if memory is not None:
        spare = memory - needs.bytes
        verdict = f"fits, {size(spare)} are left" if spare >= 0 else f"does not fit, {size(-spare)} are missing"
        if spare >= 0 and needs.bytes > ROOM * memory:
            verdict += f": tight, since CUDA, libraries and gaps take up to {1 - ROOM:.0%}"
        lines.append(f"{size(needs.bytes)} of {size(memory)}: {verdict}")
    found = remedies(config, description, available=memory, **where)
    lines += ["", "less memory:", *(f"  {remedy.sentence()}" for remedy in found)] if found else []
    if memory is not None:
        fitting = layouts(config, description, available=round(ROOM * memory), **where)[:LAYOUTS_SHOWN]
        lines += ["", f"layouts of {ranks} ranks that fit {ROOM:.0%} of it, fastest first (an estimate):"]
        lines += [f"  {size(fits.bytes):>9}  {settings}" for settings, fits in fitting] or ["  none"]
    return "\n".join(lines)


def _description(model: Path | None, config: Config) -> ModelDescription:
    if model is not None:
        return read_description(model)
    if config.model.checkpoint is None:
        raise UserError("model.checkpoint is not set; give it, or --model with a HuggingFace folder.")
    from tgdpo_megatron.checkpoint.manifest import describe, read_manifest  # loads torch

    read_manifest(config.model.checkpoint)
    return describe(config.model.checkpoint)


def _gpu() -> int | None:
    """Bytes of the GPU present."""
    import torch

    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def main() -> None:
    with one_sentence_errors():
        own = CommandLine(prog="python -m tools.plan", add_help=False, allow_abbrev=False)
        own.add_argument("--memory", type=float)
        own.add_argument("--model", type=Path)
        own.add_argument("--transformer-engine", action="store_true")
        mine, others = own.parse_known_args(sys.argv[1:])
        config, ranks = read_command_line("tools.plan", __doc__, others)
        if mine.memory is not None and not 0 < mine.memory < math.inf:
            raise UserError(f"--memory must be a number of GiB above 0, not {mine.memory}.")
        description = _description(mine.model, config)
        check_model_layout(description, config.parallel)
        check_batch_layout(config, world_size=ranks)
        check_fp8_sizes(description, config)
        engine = mine.transformer_engine or config.train.fp8 is not None  # nothing else computes in FP8
        memory = round(mine.memory * GIB) if mine.memory is not None else _gpu()
        print(report(config, description, ranks=ranks, memory=memory, transformer_engine=engine))


if __name__ == "__main__":
    main()
