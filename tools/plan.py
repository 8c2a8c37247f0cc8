"""Show how much GPU memory a configuration needs, what would lower it, and which layouts fit. Builds nothing.

Takes the same arguments as recipes.train, and also

  --memory GIB          memory of one GPU; default: that of the GPU in this machine, if there is one
  --model MODEL         HuggingFace folder, or the name of a model on a hub; default: model.checkpoint. Of either
                        only config.json is read
  --pairs FOLDER        folder of prepared pairs, as tools.prepare_pairs writes it: plan for its longest pairs, whose
                        shared prompts count once, and not for pairs of data.max_length
  --transformer-engine  plan for the layers of Transformer Engine, which keep less than the local layers and are
                        always used with train.fp8

The result is the memory of the fullest rank with the longest pairs, computed by
tgdpo_megatron/planning/memory.py. The exit code is 0 whether the configuration fits or not.
"""

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

from recipes.settings import read_command_line
from tgdpo_megatron.checkpoint import sources
from tgdpo_megatron.checkpoint.manifest import read_manifest
from tgdpo_megatron.commands import as_called
from tgdpo_megatron.config import Config, check_batch_layout, on_device
from tgdpo_megatron.errors import CommandLine, UserError, one_sentence_errors
from tgdpo_megatron.model.description import ModelDescription, check_fp8_sizes, check_model_layout
from tgdpo_megatron.model.families import family_of, parameters, read_description
from tgdpo_megatron.planning.disk import disk_need
from tgdpo_megatron.planning.load import load_of_pairs
from tgdpo_megatron.planning.memory import GIB, ROOM, LoadOf, Plan, plan, size
from tgdpo_megatron.planning.remedies import layouts, remedies
from tgdpo_megatron.report.words import plural

LAYOUTS_SHOWN = 5


def table(needs: Plan) -> str:
    """A table of the parts of each phase, in GiB."""
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
    config: Config,
    description: ModelDescription,
    *,
    ranks: int,
    memory: int | None,
    transformer_engine: bool,
    load_of: LoadOf | None = None,
) -> str:
    """Everything that this program prints."""
    config = on_device(config, "cuda")
    parallel, train = config.parallel, config.train
    where: dict[str, Any] = {"world_size": ranks, "transformer_engine": transformer_engine, "load_of": load_of}
    needs = plan(config, description, **where)
    data_parallel = ranks // parallel.model_parallel_size
    context = f"CP{parallel.context_parallel_size} " if parallel.context_parallel_size > 1 else ""
    lines = [
        f"{_described(description)}; {plural(ranks, 'rank')}: "
        f"TP{parallel.tensor_model_parallel_size} PP{parallel.pipeline_model_parallel_size} "
        f"{context}DP{data_parallel}, {train.precision}, train.recompute={train.recompute}, scores.source="
        f"{config.scores.source}, {needs.tokens} tokens at once; pipeline stage {needs.stage} is the fullest",
        "",
        table(needs),
        "",
    ]
    if memory is not None:
        spare = memory - needs.bytes
        verdict = f"fits, {size(spare)} are left" if spare >= 0 else f"does not fit, {size(-spare)} are missing"
        if spare >= 0 and needs.bytes > ROOM * memory:
            verdict += f", but CUDA, libraries and gaps between tensors take up to {1 - ROOM:.0%}"
        lines.append(f"{size(needs.bytes)} of {size(memory)}: {verdict}")
    found = remedies(config, description, available=memory, **where)
    lines += ["", f"on the disk: {disk_need(config, description).sentence()}"]
    lines += ["", "changes that need less memory:", *(f"  {remedy.sentence()}" for remedy in found)] if found else []
    if memory is not None:
        fitting = layouts(config, description, available=round(ROOM * memory), **where)[:LAYOUTS_SHOWN]
        lines += ["", f"layouts of {ranks} ranks that fit in {ROOM:.0%} of it, fastest first (estimated):"]
        lines += [f"  {size(fits.bytes):>9}  {settings}" for settings, fits in fitting] or ["  none"]
    return "\n".join(lines)


def _described(description: ModelDescription) -> str:
    count = parameters(description)
    words = f"{count / 1e9:.3g} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"
    return f"{family_of(description).title}, {words} parameters"


def _description(model: Path | None, config: Config) -> ModelDescription:
    given = model or config.model.checkpoint
    if given is None:
        raise UserError("model.checkpoint is not set; set it, or give --model with a HuggingFace model.")
    source = sources.find(given, needs="config")
    if source.is_converted:
        read_manifest(source.folder)
    return read_description(source.config_folder)


def _load_of(folder: Path) -> LoadOf:
    """What a micro-batch of the pairs of a folder holds at most."""
    from tgdpo_megatron.data.prepare import load_prepared  # brings what reads text, which other plans need not

    return partial(load_of_pairs, load_prepared(folder))


def _gpu() -> int | None:
    """Bytes of memory of this machine's GPU; None without a GPU."""
    import torch

    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def main() -> None:
    with one_sentence_errors():
        own = CommandLine(prog="python -m tools.plan", add_help=False, allow_abbrev=False)
        own.add_argument("--memory", type=float)
        own.add_argument("--model", type=Path)
        own.add_argument("--pairs", type=Path)
        own.add_argument("--transformer-engine", action="store_true")
        mine, others = own.parse_known_args(sys.argv[1:])
        command = read_command_line("tools.plan", __doc__, others)
        config, ranks = command.config, command.ranks
        if mine.memory is not None and not 0 < mine.memory < math.inf:
            raise UserError(f"--memory must be a number of GiB above 0, not {mine.memory}.")
        description = _description(mine.model, config)
        check_model_layout(description, config.parallel)
        check_batch_layout(config, world_size=ranks)
        check_fp8_sizes(description, config)
        engine = mine.transformer_engine or config.train.fp8 is not None  # nothing else computes in FP8
        memory = round(mine.memory * GIB) if mine.memory is not None else _gpu()
        load_of = _load_of(mine.pairs) if mine.pairs is not None else None
        found = report(config, description, ranks=ranks, memory=memory, transformer_engine=engine, load_of=load_of)
        print(as_called(found))


if __name__ == "__main__":
    main()
