"""Queue every stage of a run as a Slurm job that starts once the one before it has succeeded.

python -m tools.submit (--recipe NAME | --conf FILE) model.checkpoint=MODEL data.train=PAIRS [train.output=FOLDER]
                       [--from STAGE] [--until STAGE] [--dry-run] [key=value ...] [guidance.key=value ...]

  --from STAGE           leave out the stages before this one, which have finished
  --until STAGE          leave out the stages after this one
  --alphas 0.25,0.5,1    in place of train and export a stage sweep: an array of jobs, one for each α and β,
  --betas 0.05,0.1       all from the same scores
  --dry-run              check settings and local files, print the sbatch commands, and queue nothing

The stages are those of recipes.align, with the same settings and in the same folders, after two that need no GPU:
prepare (the pairs), convert (the models), guidance (its training), score, train (or sweep), export. Those that the
settings make unnecessary are left out. The scripts in slurm/ hold what each asks for; cluster.nodes and
cluster.gpus_per_node say how many GPUs. Queued again, a stage that was stopped goes on where it was.

What sbatch asks of everyone, such as an account, is given in variables: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS
(docs/cluster.md). Prints the id and the log of each job, and keeps the ids in jobs.json in the output folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from recipes.align import Stage, check_early, check_layouts, stages_of
from recipes.settings import Command, changed, read_command_line
from tgdpo_megatron.checkpoint import sources
from tgdpo_megatron.commands import ROOT
from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.data.hub_splits import hub_split
from tgdpo_megatron.data.prepare import is_prepared
from tgdpo_megatron.data.read import source_files
from tgdpo_megatron.errors import CommandLine, UserError, one_sentence_errors
from tgdpo_megatron.hub import model_id
from tgdpo_megatron.run_folder import check_writable

STAGES = ("prepare", "convert", "guidance", "score", "train", "sweep", "export")
"""In the order in which they run."""
_NAMES = {"guidance": "guidance", "scores": "score", "policy": "train", "hf": "export"}
"""Name of a stage in recipes.align -> its name here."""
JOBS = "jobs.json"
"""File in the output folder: id -> stage of the jobs that were queued last."""
_SCRIPTS = {"guidance": "train"}
"""Stage -> the script that runs it, where that is not called after it."""
_ON_GPUS = ("guidance", "score", "train", "sweep")
_NOT_TOKENISED = {"train", "weights", "validation", "validation_share", "shuffle"}
"""Settings of pairs that do not change how a file of them is tokenised."""


@dataclass(frozen=True)
class Job:
    """One job of Slurm.

    Attributes:
        stage: One of STAGES.
        arguments: What its script hands to the program.
        tasks: Jobs of an array; 0 for a job that is none.
    """

    stage: str
    arguments: tuple[str, ...]
    tasks: int = 0

    def log(self, output: Path) -> Path:
        """Where it writes what it says, with sbatch's sign for the id of the job."""
        return output / "logs" / f"{self.stage}-{'%A_%a' if self.tasks else '%j'}.log"

    def sbatch(self, command: Command, output: Path, *, after: str | None) -> list[str]:
        """The command that queues it.

        Args:
            after: Id of the job that must succeed first.
        """
        options = ["--parsable", f"--job-name={self.stage}", f"--output={self.log(output)}"]
        if self.stage in _ON_GPUS:
            nodes = command.config.cluster.nodes or 1
            options += [f"--nodes={nodes}", f"--gpus-per-node={command.processes}"]
        if self.tasks:
            options += [f"--array=0-{self.tasks - 1}"]
        if after is not None:
            options += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
        folder, here = _folder_of_scripts()
        options += [] if here else [f"--export=ALL,TGDPO_SLURM={folder}"]
        return ["sbatch", *options, str(folder / f"{_SCRIPTS.get(self.stage, self.stage)}.sbatch"), *self.arguments]


def _folder_of_scripts() -> tuple[Path, bool]:
    """The scripts of the current folder, where it has any, else those that came with this program; whether it has."""
    here = Path("slurm")
    return (here, True) if (here / "environment.sh").is_file() else (ROOT / "slurm", False)


def jobs_of(
    command: Command, stages: Sequence[Stage], output: Path, *, alphas: str | None, betas: str | None
) -> list[Job]:
    """The jobs of a run, in order.

    Args:
        stages: Those of recipes.align.
        alphas, betas: Values for a sweep, separated by commas; None without one.

    Raises:
        UserError: The loss does not take the values of the sweep.
    """
    jobs = [Job("prepare", arguments) for arguments in _prepared(command, output)]
    jobs.append(Job("convert", stages[0].arguments))
    jobs += [Job(_NAMES[stage.name], stage.arguments) for stage in stages]
    if alphas is None and betas is None:
        return jobs
    values = [_swept(command, "alpha", alphas), _swept(command, "beta", betas)]
    (trained,) = (job for job in jobs if job.stage == "train")
    arguments = (*map(",".join, values), str(output / "sweep"), *trained.arguments)
    sweep = Job("sweep", arguments, tasks=len(values[0]) * len(values[1]))
    return [job for job in jobs if job.stage not in ("train", "export")] + [sweep]


def _swept(command: Command, name: str, given: str | None) -> list[str]:
    """The values of an option of the loss; without a sweep over it, the one that is set.

    Raises:
        UserError: The loss has no such option, or does not take one of the values.
    """
    loss = command.config.loss
    if name not in loss.method.options:
        raise UserError(f"loss.type={loss.type} has no {name}; a sweep is over α and β of losses that have both.")
    values = _numbers(f"--{name}s", str(getattr(loss, name)) if given is None else given)
    for value in values:
        changed(command.config, [f"loss.{name}={value}"])
    return values


def _numbers(option: str, given: str) -> list[str]:
    """Numbers separated by commas, each in one form, such as 0.5 for .50: they name the folders of the runs.

    Raises:
        UserError: One is empty, or no number, or given twice.
    """
    values: list[str] = []
    for text in given.split(","):
        try:
            value = repr(float(text)).removesuffix(".0")
        except ValueError:
            raise UserError(f"{option} '{given}': '{text}' is no number; give numbers such as 0.5,1.") from None
        if value in values:
            raise UserError(f"{option} '{given}': {value} is given twice; each pair of values is one run.")
        values.append(value)
    return values


def _prepared(command: Command, output: Path) -> list[tuple[str, ...]]:
    """The arguments of tools.prepare_pairs for every source of pairs that is not prepared yet."""
    data, unset = command.config.data, DataConfig().model_dump(mode="json")
    settings = [
        f"data.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in data.model_dump(mode="json").items()
        if name not in _NOT_TOKENISED and value != unset[name]
    ]
    return [
        (str(source), str(command.config.model.checkpoint), str(folder), *settings)
        for source, folder in _folders(command, output).items()
    ]


def _folders(command: Command, output: Path) -> dict[Path, Path]:
    """Every source of pairs that is not prepared yet -> the folder in which it is then."""
    data = command.config.data
    several = len(data.sources) > 1
    names = {source: f"train-{place}" if several else "train" for place, source in enumerate(data.sources)}
    if data.validation is not None:
        names.setdefault(data.validation, "validation")
    return {source: output / "pairs" / name for source, name in names.items() if not is_prepared(source)}


def _with_prepared(job: Job, command: Command, folders: dict[Path, Path]) -> Job:
    """A job that reads the prepared pairs."""
    data = command.config.data
    train = [str(folders.get(source, source)) for source in data.sources]
    changes = [f"data.train={train[0] if isinstance(data.train, Path) else json.dumps(train)}"]
    if data.validation is not None:
        changes.append(f"data.validation={folders.get(data.validation, data.validation)}")
    return replace(job, arguments=(*job.arguments, *changes))


def selected(jobs: Sequence[Job], first: str, last: str, command: Command, output: Path) -> list[Job]:
    """The jobs of the stages from `first` to `last`. They read prepared pairs where these are, or will be, there.

    Raises:
        UserError: None is left, or the sweep is asked for without its values or left out with them.
    """
    sweeps = any(job.stage == "sweep" for job in jobs)
    for option, stage in (("--from", first), ("--until", last)):
        if stage == "sweep" and not sweeps:
            raise UserError(f"{option} sweep: a sweep needs --alphas or --betas.")
    chosen = [job for job in jobs if STAGES.index(first) <= STAGES.index(job.stage) <= STAGES.index(last)]
    if not chosen:
        there = ", ".join(dict.fromkeys(job.stage for job in jobs))
        raise UserError(f"--from {first} --until {last} leaves no stage; those of these settings are {there}.")
    if sweeps and chosen[-1].stage != "sweep":
        raise UserError(
            f"--alphas and --betas are for the sweep, which --until {last} leaves out; leave one of them out."
        )
    folders = _folders(command, output)
    if chosen[0].stage != "prepare" and not all(map(is_prepared, folders.values())):
        return chosen
    return [_with_prepared(job, command, folders) if job.stage in _ON_GPUS else job for job in chosen]


def check_here(command: Command, of_guidance: Sequence[str], stages: Sequence[Stage]) -> None:
    """Refuse what settings and the names of local files show. Nothing is read, and no hub is asked.

    Raises:
        UserError: A layout does not fit the GPUs, a local file is missing, or a setting is not the user's here.
    """
    for text in (*command.changes, *of_guidance):
        if text.partition("=")[0] == "train.resume":
            raise UserError(
                f"{text}: a queued training always goes on from its newest checkpoint, and starts in an empty folder; "
                "leave train.resume out, and choose another train.output to start anew."
            )
    check_layouts(stages)
    model, data = command.config.model, command.config.data
    for given in (model.checkpoint, model.reference, model.guidance):
        if given is not None and model_id(str(given)) is None:
            sources.find(given, needs="config")
    for source in (*data.sources, *([] if data.validation is None else [data.validation])):
        if hub_split(source) is None and not is_prepared(source):
            source_files(source)


def check_not_queued(output: Path) -> None:
    """Refuse a folder that jobs in the queue are going to write.

    Raises:
        UserError: Some are, or Slurm does not say.
    """
    path = output / JOBS
    if not path.is_file():
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: damaged; remove it once squeue --me shows no job of this folder.") from None
    done = subprocess.run(["squeue", "--me", "--noheader", "--format=%F"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"squeue does not say whether jobs of {output} are queued: {_last_line(done.stderr)}")
    if still := [job for job in known if job in done.stdout.split()]:
        shown = ", ".join(f"{job} ({known[job]})" for job in still)
        raise UserError(
            f"{output}: jobs for this folder are queued already: {shown}; wait for their end, or cancel them with "
            f"scancel {' '.join(still)}."
        )


def _last_line(said: str) -> str:
    """What a command of Slurm says last: the reason, after its warnings."""
    return (said.strip().splitlines() or ["it says nothing"])[-1].rpartition("error: ")[2]


def submit(jobs: Sequence[Job], command: Command, output: Path) -> None:
    """Queue jobs, each after the one before it. Where one is refused, those before it are cancelled.

    Raises:
        UserError: Slurm refuses a job.
    """
    logs = output / "logs"
    made = [folder for folder in (logs, output) if not folder.exists()]
    check_writable(logs)
    queued: dict[str, str] = {}
    for job in jobs:
        words = job.sbatch(command, output, after=next(reversed(queued), None))
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            if queued:
                subprocess.run(["scancel", *queued])
                (output / JOBS).unlink()
            with contextlib.suppress(OSError):  # a job that had begun has written there
                for folder in made:
                    folder.rmdir()
            raise UserError(f"Slurm refused the stage {job.stage}, so nothing is queued: {_last_line(done.stderr)}")
        number = done.stdout.strip().partition(";")[0]
        queued[number] = job.stage
        _keep(queued, output)
        log = str(job.log(output)).replace("%j", number).replace("%A", number)
        print(f"{number:<9} {job.stage:<9} {log}", flush=True)
    print(f"watch: squeue --me      cancel: scancel {' '.join(queued)}")


def _keep(queued: dict[str, str], output: Path) -> None:
    """Write the ids at once, so that they are known whenever this program is stopped."""
    part = output / f"{JOBS}.tmp"
    part.write_text(json.dumps(queued, indent=2), encoding="utf-8")
    os.replace(part, output / JOBS)


def _stage(text: str) -> str:
    """A stage by its name here or in recipes.align."""
    return _NAMES.get(text, text)


def main() -> None:
    with one_sentence_errors():
        own = CommandLine(prog="python -m tools.submit", add_help=False, allow_abbrev=False)
        own.add_argument("--from", dest="first", type=_stage, choices=STAGES, default=STAGES[0])
        own.add_argument("--until", dest="last", type=_stage, choices=STAGES, default=STAGES[-1])
        own.add_argument("--alphas")
        own.add_argument("--betas")
        own.add_argument("--dry-run", action="store_true")
        mine, others = own.parse_known_args(sys.argv[1:])
        of_guidance = [text.removeprefix("guidance.") for text in others if text.startswith("guidance.")]
        command = read_command_line(
            "tools.submit", __doc__, [text for text in others if not text.startswith("guidance.")]
        )
        output = command.config.train.output or Path("runs") / command.recipe
        stages = stages_of(command, of_guidance, output)
        jobs = jobs_of(command, stages, output, alphas=mine.alphas, betas=mine.betas)
        jobs = selected(jobs, mine.first, mine.last, command, output)
        check_here(command, of_guidance, stages)
        if mine.dry_run:
            befores = [None, *(f"<{job.stage}>" for job in jobs)]
            for job, before in zip(jobs, befores, strict=False):
                print(shlex.join(job.sbatch(command, output, after=before)))
            return
        if shutil.which("sbatch") is None:
            raise UserError("sbatch is not on this machine; submit from a login node of the cluster.")
        check_not_queued(output)
        check_early(command, stages)
        submit(jobs, command, output)


if __name__ == "__main__":
    main()
