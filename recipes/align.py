"""From a start model to an aligned one: guidance, token scores, training and export in one command.

python -m recipes.align (--recipe NAME | --conf FILE) model.checkpoint=MODEL data.train=PAIRS [train.output=FOLDER]
                        [--nproc-per-node N] [key=value ...] [guidance.key=value ...]

Each stage is one of the programs that are also run by hand, and its command is printed as it runs. Stages that the
settings make unnecessary are left out: a guidance model is trained only where the loss needs one and model.guidance
names none, and tokens are scored only where the loss reads scores from files.
Stopped or failed, the same command goes on where it was. Settings of data, parallel, train and cluster go to all of
them, all others to the training alone; guidance.optimizer.lr=1e-6 and the like go to that of the guidance alone.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.settings import RECIPES, Command, read_command_line
from tgdpo_megatron.bounded import read_json
from tgdpo_megatron.commands import PYTHON, as_called
from tgdpo_megatron.config import check_batch_layout, check_layout
from tgdpo_megatron.errors import UNEXPECTED, USER_ERROR, UserError, code_of, one_sentence_errors
from tgdpo_megatron.platform.interrupts import asking
from tgdpo_megatron.platform.parents import PARENT
from tgdpo_megatron.preflight import PAIRS, check_pairs, find_and_check_models, required
from tgdpo_megatron.report.terminal import Loudness
from tgdpo_megatron.run_folder import REPORT, check_writable, is_finished

STATE = "align.json"
"""File in the output folder: the command of every stage that was begun, and whether it has finished."""
_SHARED = ("data", "parallel", "train", "cluster")
"""Groups of settings that all stages take."""


@dataclass(frozen=True)
class Stage:
    """One program of the chain.

    Attributes:
        name: A word for it, which also names its folder.
        module: The program, as in `python -m MODULE`.
        arguments: Its command line.
        run: The folder of a training, which continues where it stopped; None for other programs.
        made: The folder that another program makes whole or not at all; None where the program continues by itself.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    run: Path | None = None
    made: Path | None = None


def main() -> None:
    with one_sentence_errors():
        if "RANK" in os.environ:
            raise UserError("recipes.align starts ranks itself; give --nproc-per-node, and start it without torchrun.")
        align(sys.argv[1:])


def align(arguments: Sequence[str]) -> None:
    """Run every stage that is not finished yet.

    Raises:
        UserError: A setting is refused, or the output folder holds the stages of other settings.
        SystemExit: A stage failed, with the exit code of its program.
    """
    of_guidance = [text.removeprefix("guidance.") for text in arguments if text.startswith("guidance.")]
    others = [text for text in arguments if not text.startswith("guidance.")]
    command = read_command_line("recipes.align", __doc__, others)
    if command.ranks > command.processes:
        raise UserError("recipes.align runs on one node; on several, tools.submit queues its stages (docs/cluster.md).")
    output = command.config.train.output or Path("runs") / command.recipe
    stages = stages_of(command, of_guidance, output)
    check_early(command, stages)
    check_writable(output)
    chain = _Chain(output)
    for stage in stages:
        chain.run(stage)
    print(f"\naligned     {output / 'hf'}", flush=True)
    if (output / "policy" / REPORT).is_file():
        print(f"report      {output / 'policy' / REPORT}", flush=True)


def check_early(command: Command, stages: Sequence[Stage]) -> None:
    """Refuse what a later stage would refuse, as far as settings, models and pairs show it, before the first one runs.

    What is on a hub is downloaded.

    Raises:
        UserError: As the programs of the stages.
    """
    check_layouts(stages)
    find_and_check_models(command.config)
    check_pairs(command.config, batch=command.config.train.global_batch_size)


def check_layouts(stages: Sequence[Stage]) -> None:
    """Check that the number of ranks of every stage fits its layout and its batches.

    Raises:
        UserError: As the programs of the stages.
    """
    for stage in stages:
        if stage.module in ("recipes.train", "recipes.score"):
            given = read_command_line(stage.module, "", stage.arguments)
            check_layout(given.config, world_size=given.ranks)
            if stage.module == "recipes.train":
                check_batch_layout(given.config, world_size=given.ranks)


def stages_of(command: Command, of_guidance: Sequence[str], output: Path) -> list[Stage]:
    """The programs to run, in order.

    Args:
        of_guidance: Settings of the guidance's training alone, as key=value.
        output: Folder of all results.

    Raises:
        UserError: The start model or the pairs are not given, or a guidance model cannot be trained.
    """
    config = command.config
    start = required(config.model.checkpoint, "model.checkpoint", "the model to start from")
    required(next(iter(config.data.sources), None), "data.train", PAIRS)
    as_set = config.cluster.gpus_per_node or 1
    ranks = [f"--nproc-per-node={command.processes}"] if command.processes != as_set else []
    loudness = {Loudness.QUIET: ["--quiet"], Loudness.VERBOSE: ["--verbose"]}.get(command.loudness, [])
    policy = [f"--conf={command.conf}" if command.conf else f"--recipe={command.recipe}", *ranks]
    policy += [text for text in command.changes if text.partition("=")[0] not in _OWN]
    stages = []

    models = [f"model.checkpoint={start}"]
    models += [f"model.reference={config.model.reference}"] if config.model.reference else []

    guidance = config.model.guidance
    if "guidance" in config.loss.frozen_models and guidance is None:
        guidance = output / "guidance"
        recipe = f"--recipe={_guidance_recipe(command.recipe)}"
        settings = (*models, *_shared_settings(command), f"train.output={guidance}", *of_guidance)
        stages.append(Stage("guidance", "recipes.train", (recipe, *ranks, *loudness, *settings), run=guidance))
    elif of_guidance:
        raise UserError(f"guidance.{of_guidance[0]}: no guidance is trained, so there is nothing to set; leave it out.")
    frozen = [f"model.guidance={guidance}"] if guidance else []

    if _is_scored(command):
        scores = f"scores.path={config.scores.path or output / 'scores'}"
        stages.append(Stage("scores", "recipes.score", (*policy, *loudness, *models, *frozen, scores)))
        frozen = [scores]
    run = output / "policy"
    stages.append(
        Stage(
            "policy",
            "recipes.train",
            (*policy, *loudness, *models, *frozen, f"train.output={run}"),
            run=run,
        )
    )
    stages.append(Stage("hf", "tools.convert_megatron_to_hf", (str(run), str(output / "hf")), made=output / "hf"))
    return stages


def _is_scored(command: Command) -> bool:
    """Whether the training reads scores from files, which are to be written first."""
    config = command.config
    if not config.loss.log_prob_scores or "divergence" in config.loss.method.reads:
        return False
    in_file = command.experiment.get("scores", {}).get("source")
    given = [text.partition("=")[2] for text in command.changes if text.startswith("scores.source=")]
    if (given or [in_file])[-1] == "live":
        return False
    return config.scores.cached or config.loss.reward_source in ("guidance", "contrastive")


def _shared_settings(command: Command) -> list[str]:
    """The settings that were given and that all stages take, as key=value."""
    of_file = [
        f"{group}.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for group, settings in command.experiment.items()
        for name, value in settings.items()
    ]
    return [
        text
        for text in (*of_file, *command.changes)
        if text.partition(".")[0] in _SHARED and text.partition("=")[0] not in _OWN
    ]


_OWN = (
    *("model.checkpoint", "model.reference", "model.guidance"),
    *("train.output", "train.resume", "scores.path"),
)
"""Settings that this program gives to each stage."""


def _guidance_recipe(recipe: str) -> str:
    """The recipe that trains the guidance of a recipe: DPO with the same model and data.

    Raises:
        UserError: There is none.
    """
    found = recipe.replace("tgdpo_", "dpo_", 1)
    if found == recipe or found not in RECIPES:
        raise UserError(f"no recipe trains a guidance for {recipe}; give model.guidance.")
    return found


class _Chain:
    """What was done before in an output folder, kept in STATE.

    Attributes:
        ran: Whether a stage was run now, so that what later stages made before is out of date.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output / STATE
        self.known: dict[str, Any] = {}
        self.ran = False
        if self.path.is_file():
            self.known = read_json(self.path, what="list of stages")
            if not _is_list_of_stages(self.known):
                raise UserError(f"{self.path}: damaged; choose another train.output.")

    def run(self, stage: Stage) -> None:
        """Run a stage, or go on with it, unless it has finished.

        A training or a scoring that was begun with other settings is run again: the program itself refuses what does
        not belong to what is there.

        Raises:
            UserError: Something else was made of other inputs.
            SystemExit: It failed, with the exit code of its program.
        """
        command = ["python", "-m", stage.module, *stage.arguments]
        before = self.known.get(stage.name)
        changed = _that_matter(command) ^ _that_matter(before["command"]) if before is not None else set()
        if changed and stage.made is not None and stage.made.exists():
            raise UserError(
                f"{self.output}: its {stage.name} was made from something else ({', '.join(sorted(changed)[:4])}); "
                "choose another train.output, or repeat the command as it was."
            )
        done = before is not None and not changed and (before["finished"] or _is_finished(stage))
        if done and not self.ran:
            print(f"{stage.name}: finished before", flush=True)
            return
        if done and stage.made is not None:
            shutil.rmtree(stage.made, ignore_errors=True)  # made here, of what has changed since
        self._keep(stage, command, finished=False)
        resume = stage.run is not None and stage.run.exists()
        _call(stage, [*command, *(["train.resume=true"] if resume else [])])
        self.ran = True
        self._keep(stage, command, finished=True)

    def _keep(self, stage: Stage, command: list[str], *, finished: bool) -> None:
        self.known[stage.name] = {"command": command, "finished": finished}
        part = self.path.with_suffix(".tmp")
        part.write_text(json.dumps(self.known, indent=2), encoding="utf-8")
        os.replace(part, self.path)


def _is_list_of_stages(known: Any) -> bool:
    """Whether STATE holds what _Chain writes to it."""
    return isinstance(known, dict) and all(
        isinstance(stage, dict)
        and isinstance(stage.get("finished"), bool)
        and isinstance(stage.get("command"), list)
        and all(isinstance(word, str) for word in stage["command"])
        for stage in known.values()
    )


def _is_finished(stage: Stage) -> bool:
    """Whether a stage came to its end, as far as its folder tells."""
    return is_finished(stage.run) if stage.run else stage.made is not None and stage.made.exists()


_CHANGE_NOTHING = (
    *(
        "--quiet",
        "--verbose",
        "--nproc-per-node",
        "cluster.",
        "parallel.",
        "report.",
        "train.report",
        "train.log_interval",
    ),
    *("train.eval_interval", "train.save_", "train.micro_batch", "train.recompute", "train.distributed_timeout"),
)
"""How words of a command begin that change no result, up to rounding."""


def _that_matter(command: Sequence[str]) -> set[str]:
    """The words of a command without those that change no result."""
    return {word for word in command if not word.startswith(_CHANGE_NOTHING)}


def _call(stage: Stage, command: list[str]) -> None:
    """Print a command and run it. Signals are the program's to answer."""
    print(f"\n$ {as_called(shlex.join(command))}", flush=True)
    received: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, _: Any) -> None:
        received.append(number)
        if running:
            running[0].send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in asking()}
    try:
        # In a group of its own, so that Ctrl-C in a terminal reaches it once, from here.
        environment = os.environ | {PARENT: str(os.getpid())}
        running.append(subprocess.Popen([*PYTHON, *command[2:]], env=environment, process_group=0))
        if received:  # before the program had begun
            running[0].send_signal(received[-1])
        code = running[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not code and not received:
        return
    if code == USER_ERROR:
        ended = "refused its input; give the command again with what was wrong mended"
    elif received:
        ended = "was stopped; the same command, without train.resume, goes on from there"
    else:
        ended = "did not finish; the same command goes on from there"
    print(f"stage {stage.name} {ended}.", file=sys.stderr, flush=True)
    sys.exit(code if code > 0 else UNEXPECTED if code else code_of(received))


if __name__ == "__main__":
    main()
