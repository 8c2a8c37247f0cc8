"""The page that a training run leaves in its folder: what was run, what came out of it, and what to do next.

It is made from the files of the folder, so an interrupted or continued run has one as well.
"""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from tgdpo_megatron import __version__
from tgdpo_megatron.bounded import read_json
from tgdpo_megatron.checkpoint.certificate import NAME as CERTIFICATE
from tgdpo_megatron.checkpoint.certificate import read_certificate
from tgdpo_megatron.checkpoint.manifest import describe
from tgdpo_megatron.commands import as_called
from tgdpo_megatron.config import Config, LossConfig
from tgdpo_megatron.data.prepare import PreparedPairs, few
from tgdpo_megatron.data.tokenizer import special_texts
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families import parameters
from tgdpo_megatron.platform.clock import ACTIVITIES, WAITING
from tgdpo_megatron.report.curves import ACCURACY, Step, metric_chart
from tgdpo_megatron.report.metrics import warnings
from tgdpo_megatron.report.pace import SECONDS, SHARE, total_shares
from tgdpo_megatron.report.page import (
    Answer,
    Commands,
    Curves,
    Facts,
    Page,
    Sample,
    Section,
    Table,
    TokenPair,
    TokenPairs,
    build_page,
)
from tgdpo_megatron.report.plots import Chart, Line, Token
from tgdpo_megatron.report.run_files import pairs_of, read_metrics, settings_of
from tgdpo_megatron.report.terminal import all_tie, changed_settings
from tgdpo_megatron.report.tokens import (
    REWARD,
    kept_scores,
    rewards_from,
    start_of,
    start_tokenizer,
    viewed_pairs,
)
from tgdpo_megatron.report.viewer import ViewedResponse
from tgdpo_megatron.report.words import number, percent, plural
from tgdpo_megatron.run_folder import ANSWERS, REPORT, as_given, export_of, kept_sources, newest_checkpoint

SHOWN_PAIRS = 4
SHOWN_ACTIVITIES = 4
"""The largest are drawn over the run; the table has all."""
SHOWN_TOKENS = 300
"""Longer responses are shown up to here."""


@dataclass(frozen=True)
class _Run:
    """What is known of a run when its report is written.

    Attributes:
        held_out: None where the run had no held-out pairs.
        steps: The lines of metrics.jsonl, at least one of them of an optimizer step.
        world_size, command: As write_run_report takes them.
    """

    output: Path
    config: Config
    model: ModelDescription
    train: PreparedPairs
    held_out: PreparedPairs | None
    steps: list[dict[str, float]]
    checkpoint: Path | None
    world_size: int | None
    command: Sequence[str]

    @property
    def last(self) -> int:
        """The last optimizer step that was logged."""
        return int(self.steps[-1]["iteration"])

    @property
    def planned(self) -> int:
        """How many steps the run was to have."""
        return self.config.train.train_iters or self.last

    @property
    def ended(self) -> bool:
        """Whether it had them all."""
        return self.last >= self.planned

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """The held-out numbers, without their prefix."""
        return [
            {name.removeprefix("eval/"): value for name, value in step.items() if name.startswith("eval/")}
            | {"iteration": step["iteration"]}
            for step in self.steps
            if "eval/loss" in step
        ]


def write_run_report(
    output: Path,
    *,
    world_size: int | None = None,
    command: Sequence[str] = (),
) -> Path | None:
    """Write `report.html` into the folder of a run. Called on one rank, once the run's metrics are written.

    Args:
        output: The folder of the run.
        world_size: Number of ranks; None where it is not known.
        command: The words of the command that started the run, without which the report does not say how to go on.

    Returns:
        The file; None for a run that ended before it logged an optimizer step.

    Raises:
        UserError: A file that the run was made from is gone or was changed.
    """
    steps = read_metrics(output)
    if not any("loss" in step for step in steps):
        return None
    config = settings_of(output)
    run = _Run(
        output,
        config,
        describe(start_of(config)),
        pairs_of(output, config, "train"),
        pairs_of(output, config, "validation") if config.data.holds_out else None,
        steps,
        newest_checkpoint(output),
        world_size,
        command,
    )
    path = output / REPORT
    part = path.with_suffix(".tmp")
    part.write_text(build_page(_page(run)), encoding="utf-8")
    os.replace(part, path)
    return path


def _page(run: _Run) -> Page:
    return Page(
        title=f"Run report: {run.output.name}",
        summary=[_what_was_trained(run), _what_came_out(run)],
        sections=[
            Section("What was run", [Facts(_facts(run))]),
            Section("Curves", [Curves(_charts(run)), Curves(_small_charts(run), small=True)]),
            Section("Where the time went", _time(run.steps)),
            Section(*_results(run)),
            Section("Health of the token rewards", _health(run.config.loss, run.steps)),
            Section("What the token rewards say", _token_pairs(run)),
            Section("Answers to held-out prompts", _samples(run)),
            Section("Data", _data(run)),
            Section("What to do next", [Commands([as_called(line) for line in _commands(run)])]),
            Section(
                "Settings that differ from the defaults",
                [Facts(_settings(as_given(run.config, kept_sources(run.output))))],
            ),
            Section("Versions", [Facts(versions())]),
        ],
    )


# ---------------------------------------------------------------- in words


def _what_was_trained(run: _Run) -> str:
    steps = plural(run.last, "step") if run.ended else f"{run.last} of {run.planned} steps"
    stopped = "" if run.ended else " The run stopped early."
    learned = "preference pairs" if run.config.loss.method.compares else "chosen answers"
    return (
        f"A language model of {_size(run.model)} weights was trained with {run.config.loss.type} on "
        f"{len(run.train):,} {learned}, for {steps} of {plural(run.config.train.global_batch_size, 'pair')}.{stopped}"
    )


def _what_came_out(run: _Run) -> str:
    evaluations = run.evaluations
    if not evaluations:
        first, last = run.steps[0], run.steps[-1]
        return (
            f"No pairs were held out. On the pairs that it learned from, the loss went from {number(first['loss'])} to "
            f"{number(last['loss'])}."
        )
    first, last = evaluations[0], evaluations[-1]
    of = f"On {plural(len(run.held_out or ()), 'held-out pair')}, which it did not learn from, "
    if ACCURACY not in last:
        return f"{of}the loss {_from_to(first, last, 'loss', number)}."
    return (
        f"{of}the share in which it prefers the chosen answer {_from_to(first, last, ACCURACY, percent)}, "
        f"and the loss {_from_to(first, last, 'loss', number)}."
    )


def _from_to(first: Step, last: Step, name: str, words: Callable[[float], str]) -> str:
    """`went from A (step 10) to B (step 40)`."""
    if first is last:
        return f"is {words(last[name])}"
    begin = "a tie in all pairs" if name == ACCURACY and all_tie(first) else words(first[name])
    return f"went from {begin} (step {first['iteration']:.0f}) to {words(last[name])} (step {last['iteration']:.0f})"


def _facts(run: _Run) -> list[tuple[str, str]]:
    config, loss = run.config, run.config.loss
    epochs = run.steps[-1].get("epoch", run.last * config.train.global_batch_size / len(run.train))
    places = {"checkpoint": config.model.checkpoint, "guidance": config.model.guidance}
    names = {role: str(place) for role, place in places.items() if place}
    names |= {role: str(source) for role, source in kept_sources(run.output).items()}
    names.setdefault("reference", str(config.model.reference or names["checkpoint"]))
    models = [(name, names[name]) for name in ("reference", "guidance") if name in names and name in loss.frozen_models]
    scored = [("frozen models", f"scored before, in {config.scores.path}")] if config.scores.cached else []
    return [
        ("method", f"{loss.type}: {loss.method.meaning}"),
        ("model", f"{names['checkpoint']}: {_describe(run.model)}"),
        *models,
        *scored,
        ("training pairs", _files(run.train)),
        ("held-out pairs", _files(run.held_out) if run.held_out else "none"),
        (
            "steps",
            f"{run.last:,} of {run.planned:,}, each of {plural(config.train.global_batch_size, 'pair')}: "
            f"{epochs:.3g} times through the training pairs",
        ),
        ("learning rate", f"{config.optimizer.lr:g} at its peak"),
        ("layout", _layout(run)),
        ("precision", config.train.precision + (f", FP8 {config.train.fp8}" if config.train.fp8 else "")),
        *_pace(run.steps),
        ("checkpoint", str(run.checkpoint) if run.checkpoint else "none was saved"),
        *_proofs(run.checkpoint),
    ]


def _pace(steps: Sequence[Step]) -> list[tuple[str, str]]:
    """The usual speed of a step, as far as it was measured."""
    words = {
        "perf/seconds_per_step": "{:.3g} s a step",
        "perf/tokens_per_second": "{:,.0f} tokens a second",
        "perf/mfu": "{:.1%} of the GPUs' peak (MFU)",
    }
    known = {name: [step[name] for step in steps if name in step] for name in words}
    medians = [words[name].format(median(values)) for name, values in known.items() if values]
    return [("pace", f"{', '.join(medians)}; medians")] if medians else []


def _proofs(checkpoint: Path | None) -> list[tuple[str, str]]:
    """What is known of the checkpoint's conversions: the certificate of its start, and where it was exported."""
    if checkpoint is None:
        return []
    found = []
    if (checkpoint / CERTIFICATE).is_file():
        certificate = read_certificate(checkpoint)
        words = f"{certificate.largest_difference:.1e} nats, over {plural(certificate.tokens, 'token')}"
        found.append(("certificate", f"the start's log-probs differ from HuggingFace's by at most {words}"))
    if exported := export_of(checkpoint):
        found.append(("exported", str(exported)))
    return found


def _files(pairs: PreparedPairs) -> str:
    return "; ".join(f"{file.source}: {plural(file.pairs, 'pair')}" for file in pairs.files)


def _layout(run: _Run) -> str:
    parallel = run.config.parallel
    sizes = {"tensor": parallel.tensor_model_parallel_size, "pipeline": parallel.pipeline_model_parallel_size}
    if parallel.context_parallel_size > 1:
        sizes["context"] = parallel.context_parallel_size
    processes = ""
    if run.world_size is not None:
        sizes["data"] = run.world_size // parallel.model_parallel_size
        processes = plural(run.world_size, "process")
    words = " × ".join(f"{name} {size}" for name, size in sizes.items())
    if run.world_size == 1:
        return processes
    return (f"{processes}: " if processes else "") + words + (", sequence parallel" * parallel.sequence_parallel)


def _describe(model: ModelDescription) -> str:
    return f"{_size(model)} weights in {plural(model.num_layers, 'layer')} of width {model.hidden_size:,}"


def _size(model: ModelDescription) -> str:
    """The number of weights, in words."""
    weights = parameters(model)
    for size, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if weights >= size:
            return f"{weights / size:.3g} {name}"
    return f"{weights:.0f}"


# ---------------------------------------------------------------- curves and results


def _charts(run: _Run) -> list[Chart]:
    """Curves, each on axes that compare like with like."""
    steps = run.steps
    charts = [metric_chart("Loss", "mean over pairs", {"": (steps, "loss")})]
    if run.config.loss.method.compares:
        sides = {side: (steps, f"rewards/{side}") for side in ("chosen", "rejected")}
        charts += [
            metric_chart("Reward margin", "chosen − rejected, mean over pairs", {"": (steps, "rewards/margins")}),
            metric_chart("Reward accuracy", "share of pairs", {"": (steps, ACCURACY)}, percent),
            metric_chart("Rewards of chosen and rejected responses", "mean over pairs", sides),
        ]
    return charts


def _small_charts(run: _Run) -> list[Chart]:
    """Curves of what drives the training, which are looked at less often."""
    charts = [
        metric_chart("Gradient norm", "before clipping", {"": (run.steps, "grad_norm")}),
        metric_chart("Learning rate", "", {"": (run.steps, "learning_rate")}, "{:.3g}".format),
        metric_chart("Pace", "tokens a second", {"": (run.steps, "perf/tokens_per_second")}),
    ]
    return [chart for chart in charts if chart.lines]  # runs of earlier versions have no pace


def _time(steps: Sequence[Step]) -> list[Any]:
    """How the run's time divides into activities: as a table, and over the run. Empty where this was not measured."""
    shares = {activity: share for activity, share in total_shares(steps).items() if share > 0}
    if not shares:
        return []
    known = [step for step in steps if SECONDS in step]
    whole = sum(step[SECONDS] for step in known)
    rows = [
        [ACTIVITIES[activity], percent(share), f"{share * whole:,.1f} s"]
        for activity, share in sorted(shares.items(), key=lambda item: -item[1])
    ]
    note = "Means over the ranks, up to the last line of metrics.jsonl."
    if longest := max(step[f"{SHARE}{WAITING}_max"] for step in known):
        note += f" Between two lines one rank waited for others for at most {percent(longest)} of the time."
    largest = sorted(shares, key=lambda activity: -shares[activity])[:SHOWN_ACTIVITIES]
    steps_of = [step["iteration"] for step in known]
    lines = [
        Line(ACTIVITIES[activity], steps_of, [step[f"{SHARE}{activity}"] for step in known], False, colour)
        for colour, activity in enumerate(largest)
    ]
    chart = Chart("The largest shares", "optimizer step", "of the time since the line before", lines, shares=True)
    return [Table(["activity", "share", "time"], rows, note), Curves([chart], small=True)]


_RESULTS = {
    "loss": "loss",
    ACCURACY: "reward accuracy",
    "rewards/margins": "reward margin",
    "rewards/chosen": "chosen reward",
    "rewards/rejected": "rejected reward",
    "logps/chosen": "chosen log-prob, nats",
    "logps/rejected": "rejected log-prob, nats",
}


def _results(run: _Run) -> tuple[str, list[Any]]:
    """The heading and the table of held-out results, or of training batches where nothing was held out."""
    found: Sequence[Step] = run.evaluations or run.steps
    last = found[-1]
    shown = [found[0], last] if len(found) > 1 else [last]

    def cell(step: Step, name: str) -> str:
        if name != ACCURACY:
            return number(step[name])
        return "all ties" if all_tie(step) else percent(step[name])

    rows = [[words, *(cell(step, name) for step in shown)] for name, words in _RESULTS.items() if name in last]
    notes = []
    if ACCURACY in last:
        notes.append("Reward accuracy is the share of pairs whose chosen response has the higher reward.")
        notes.append(
            "A reward is β times how much likelier the model finds a response than its reference does."
            if "reference" in run.config.loss.method.reads
            else "A reward is the model's mean log-prob of a response's tokens, times the scale of the method."
        )
    best = min(found, key=lambda step: step["loss"])
    if not run.evaluations:
        notes.append("Set data.validation to see how the model does on pairs that it did not learn from.")
    elif best["loss"] < last["loss"]:
        notes.append(
            f"The held-out loss was lowest at step {best['iteration']:.0f}, with {number(best['loss'])}. Where it "
            "rises while the training loss falls, the model learns its training pairs by heart."
        )
    heading = "Results on held-out pairs" if run.evaluations else "Results on training batches"
    return heading, [Table(["", *(f"step {step['iteration']:.0f}" for step in shown)], rows, " ".join(notes))]


# ---------------------------------------------------------------- token rewards


def _health(loss: LossConfig, steps: Sequence[Step]) -> list[str]:
    """What the token rewards of the run are like, in sentences. Empty for a loss without token rewards."""
    known = [step for step in steps if "token_rewards/std" in step]
    if not known:
        return []
    last = known[-1]
    shares = [f"{_share(last['token_rewards/zero_frac'])} zero"]
    if loss.reward_options.get("reward_clip") or loss.reward_options.get("reward_squash"):
        shares.append(f"{_share(last['token_rewards/limit_frac'])} at their limit")
    sentences = [
        f"In the last step they had a spread (standard deviation) of {number(last['token_rewards/std'])} around a mean "
        f"of {number(last['token_rewards/mean'])}; {' and '.join(shares)}."
    ]
    moved = [step for step in known if "token_rewards/correlation" in step and not all_tie(step)]
    if moved:
        now = moved[-1]["token_rewards/correlation"]
        was = f" (step {moved[0]['iteration']:.0f}: {moved[0]['token_rewards/correlation']:.2f})"
        sentences.append(
            f"Their correlation with the model's own rewards for the same tokens is {now:.2f}"
            f"{was if len(moved) > 1 else ''}; the more the model follows them, the nearer it comes to 1."
        )
    if "tgdpo/weight_std" in last:
        sentences.append(
            f"The token weights that TGDPO makes of them have a spread of {number(last['tgdpo/weight_std'])} around 1; "
            "with a spread of 0, TGDPO is DPO."
        )
    found: dict[str, list[tuple[int, str]]] = {}
    for step in known:
        for name, sentence in warnings(loss, step).items():
            found.setdefault(name, []).append((int(step["iteration"]), sentence))
    warned = [
        f"Warning in {plural(len(when), 'step')} of {len(known)}, first in step {when[0][0]}: {when[0][1]}"
        for when in found.values()
    ]
    flat = last.get("tgdpo/weight_std", 1.0) < 0.01
    verdict = "The token weights hardly differ from 1, so this run is nearly DPO; a larger loss.beta_r or loss.alpha "
    verdict += "makes the token rewards count."
    healthy = [] if warned else [verdict if flat else "The token rewards look healthy."]
    return [" ".join([*healthy, *sentences]), *warned]


def _share(share: float) -> str:
    return f"{percent(share)} are" if share else "none is"


def _token_pairs(run: _Run) -> list[Any]:
    """The first pairs token by token, held-out ones if there are any, where their token rewards are in files."""
    loss = run.config.loss
    if loss.reward_source in (None, "chosen"):  # nothing, or the same for all tokens of a response
        return []
    part, data = ("validation", run.held_out) if run.held_out else ("train", run.train)
    pairs = range(min(SHOWN_PAIRS, len(data)))
    try:
        rewards = rewards_from(run.config, data, pairs, kept_scores(run.output, run.config, part, data, pairs))
        tokenizer = start_tokenizer(run.config)
    except UserError as error:  # the scores may be gone since; the rest of the report does not need them
        return [f"They cannot be shown: {error}"]
    if rewards is None:
        return [as_called(f"python -m tools.view {run.output} shows them: live rewards are not kept with a run.")]
    viewed = viewed_pairs(tokenizer, data, pairs, {REWARD: rewards})
    shown = [TokenPair(pair.prompt, _tokens(pair.chosen), _tokens(pair.rejected), pair.name) for pair in viewed]
    words = (
        f"The first {'held-out' if run.held_out else 'training'} pairs, each token shaded by its reward r̂ from "
        f"{_SOURCES[loss.reward_source]}: blue where it speaks for the token, orange where it speaks against it."
    )
    return [words, TokenPairs(shown, special_texts(tokenizer))]


_SOURCES = {"guidance": "the guidance model", "contrastive": "contrastive prompts", "file": "your reward file"}


def _tokens(response: ViewedResponse) -> list[Token]:
    values = response.numbers[REWARD]
    shown = [Token(text, reward) for text, reward in zip(response.tokens, values, strict=True)][:SHOWN_TOKENS]
    left = len(values) - len(shown)
    return shown + ([Token(f" … {left:,} more", 0.0)] if left else [])


def _samples(run: _Run) -> list[Sample]:
    """What the model answered to held-out prompts, where it was asked."""
    path = run.output / ANSWERS
    given = read_json(path, what="file of answers") if path.is_file() else []
    special = special_texts(start_tokenizer(run.config)) if given else []
    return [
        Sample(
            answer["prompt"],
            answer["chosen"],
            [Answer(f"{when} training", answer[when]) for when in ("before", "after") if when in answer],
            special,
        )
        for answer in given
    ]


# ---------------------------------------------------------------- data, commands, settings


def _data(run: _Run) -> list[Any]:
    parts = {"training": run.train.summary} | ({"held out": run.held_out.summary} if run.held_out else {})
    rows = [
        [
            words,
            f"{summary.rows:,}",
            f"{summary.pairs:,}",
            f"{sum(map(len, summary.dropped.values())):,}",
            f"{summary.prompts_cut:,}",
            f"{summary.responses_cut:,}",
            f"{summary.response_tokens / max(1, 2 * summary.pairs):,.0f}",
            f"{summary.longest_sequence:,}",
        ]
        for words, summary in parts.items()
    ]
    columns = (
        "pairs",
        "rows read",
        "kept",
        "dropped",
        "prompts cut",
        "responses cut",
        "tokens a response",
        "longest sequence",
    )
    dropped = [
        f"{words}: {plural(len(numbers), 'row')} dropped because {reason} (row {few(numbers)})."
        for words, summary in parts.items()
        for reason, numbers in summary.dropped.items()
    ]
    return [Table(columns, rows), *dropped]


def _commands(run: _Run) -> list[str]:
    lines = []
    if run.command and not run.ended:
        words = [word for word in run.command if not word.startswith("train.resume=")]
        where = f"from {run.checkpoint.name}" if run.checkpoint else "from the start: no checkpoint was saved"
        lines += [f"# go on {where}", shlex.join([*words, "train.resume=true"])]
    if run.checkpoint is not None and export_of(run.checkpoint) is None:
        lines += [
            "# a HuggingFace folder of the trained model",
            shlex.join(["python", "-m", "tools.convert_megatron_to_hf", str(run.checkpoint), str(run.output / "hf")]),
        ]
    if run.checkpoint is not None:
        lines += [
            "# every pair token by token, with the model's own rewards before and after",
            shlex.join(["python", "-m", "tools.view", str(run.output), *["--validation"] * bool(run.held_out)]),
        ]
    if (run.output / "tensorboard").is_dir():
        lines += ["# the curves, live", shlex.join(["tensorboard", "--logdir", str(run.output / "tensorboard")])]
    if run.command and run.ended:
        words = [word for word in run.command if word.partition("=")[0] not in ("train.output", "train.resume")]
        lines += ["# this run again, into another folder", shlex.join([*words, f"train.output={run.output}-again"])]
    return lines


def _settings(config: Config) -> list[tuple[str, str]]:
    groups = (line.partition(": ") for line in changed_settings(config))
    return [(group, values) for group, _, values in groups]


def versions() -> list[tuple[str, str]]:
    """What computed the run: packages and the machine."""
    import torch

    packages = []
    for name in ("torch", "megatron-core", "transformers", "transformer-engine"):
        try:
            packages.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return [
        ("tgdpo_megatron", __version__),
        ("Python", platform.python_version()),
        *packages,
        ("machine", f"{device}, {plural(os.cpu_count() or 1, 'CPU core')}"),
    ]
