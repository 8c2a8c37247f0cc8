"""The whole product on made-up data with known mistakes, the way a user runs it, ending in an HTML report.

A small Llama is fine-tuned on examples of which many are wrong, then repaired with preference pairs: DPO gives the
guidance model, TGDPO (tensor × pipeline parallel, four processes) the result. Every program is started as a process
of its own; the commands are printed and can be run by hand.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tgdpo_megatron.errors import CommandLine, UserError, one_sentence_errors
from tgdpo_megatron.report.page import Answer, Page, Sample, Table, TokenPair, build_page, reward_limit
from tgdpo_megatron.report.plots import Chart, Line, Token, figure_svg
from tools.marked_pairs import Row, read_rows

MARKER = ".made-by-tools-demo"
SFT_LR = 4e-3
BETA = 1.0
BETA_R = 0.5
# Gentle: with more steps or a higher rate the preference losses keep falling while both answers' log-probs sink.
PREFERENCE_LR = 1e-4
NOISE = 0.45
VOCAB_SIZE = 1000
MODELS = {"sft": "SFT (before)", "dpo": "DPO (the guidance)", "tgdpo": "TGDPO (after)"}


@dataclass(frozen=True)
class Effort:
    """How much data and how many steps. Batches are 32 pairs."""

    train: int = 2000
    validation: int = 200
    sft: int = 4000
    sft_iters: int = 600
    preference_iters: int = 60
    eval_interval: int = 10


FAST = Effort(train=200, validation=20, sft=400, sft_iters=15, preference_iters=6, eval_interval=3)


class PeakMemory(threading.Thread):
    """Samples the memory of this process and all below it; shared pages count once (PSS)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        this = psutil.Process()
        while True:
            total = 0
            for process in [this, *this.children(recursive=True)]:
                with suppress(psutil.Error):  # it ended in between
                    total += process.memory_full_info().pss
            self.peak = max(self.peak, total)
            time.sleep(0.5)


@dataclass
class Journal:
    """What the demo did: the commands, how long each stage took, the folder everything is kept in."""

    output: Path
    seed: int
    commands: list[str] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    """Name -> seconds."""
    memory: PeakMemory = field(default_factory=lambda: PeakMemory())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Number, name and time one stage."""
        print(f"\n{len(self.stages) + 1}. {name}", flush=True)
        started = time.monotonic()
        yield
        self.stages[name] = time.monotonic() - started
        print(f"   took {self.stages[name]:.0f} s", flush=True)

    def run(self, module: str, *arguments: str | Path) -> None:
        """Run one of the programs and keep what it says in the folder's `logs`.

        Raises:
            UserError: The program failed.
        """
        command = ["python", "-m", module, *map(str, arguments)]
        self.commands.append(shlex.join(command))
        print(f"   $ {self.commands[-1]}", flush=True)
        log = self.output / "logs" / f"{len(self.commands):02}-{module}.log"
        with log.open("w") as file:
            # A person sees the progress bars; a pipe gets none.
            errors = None if sys.stderr.isatty() else file
            environment = os.environ | {"PYTHONWARNINGS": "ignore"}
            code = subprocess.call([sys.executable, *command[1:]], stdout=file, stderr=errors, env=environment)
        if code:
            print("".join(log.read_text().splitlines(keepends=True)[-15:]), file=sys.stderr)
            raise UserError(f"{module} ended with exit code {code}; all it said is in {log}.")


@dataclass(frozen=True)
class Quality:
    """One exported model on the held-out pairs.

    Attributes:
        margins: Log-prob of the chosen minus that of the rejected response, nats. One per pair.
        answers: Greedy answers. One per pair.
        exact: Whether the answer is the chosen response, to the letter. One per pair.
    """

    margins: list[float]
    answers: list[str]
    exact: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen response is the likelier one."""
        return _mean([margin > 0 for margin in self.margins])


def demo(output: Path, effort: Effort, seed: int) -> None:
    """Run every stage, write report.html, demo.json and figure.svg."""
    journal = Journal(output, seed)
    journal.memory.start()
    data, scores, start = output / "data", output / "scores", output / "megatron" / "start"
    training, held_out = f"data.train={data / 'train.jsonl'}", f"data.validation={data / 'validation.jsonl'}"
    preference = (
        training,
        held_out,
        f"train.train_iters={effort.preference_iters}",
        f"train.eval_interval={effort.eval_interval}",
        f"optimizer.lr={PREFERENCE_LR}",
        f"loss.beta={BETA}",
    )

    with journal.stage("Make pairs whose wrong words are known, and noisy examples"):
        sizes = (f"--train={effort.train}", f"--validation={effort.validation}", f"--sft={effort.sft}")
        journal.run("tools.marked_pairs", data, f"--seed={seed}", f"--noise={NOISE}", *sizes)
        train, validation = read_rows(data / "train.jsonl"), read_rows(data / "validation.jsonl")
        print(f"   {effort.sft} examples, {len(train)} pairs to train on, {len(validation)} held out; for instance")
        print(f"   {train[0].prompt}  chosen: {train[0].chosen}  rejected: {train[0].rejected}")

    with journal.stage("Make a small random Llama and convert it to Megatron"):
        _make_model(output / "hf" / "start", train, seed)
        journal.run("tools.convert_hf_to_megatron", output / "hf" / "start", start)

    with journal.stage(f"Fine-tune it on examples of which {NOISE:.0%} are wrong (SFT)"):
        journal.run(
            "recipes.train",
            "--recipe=sft_tiny",
            f"model.checkpoint={start}",
            f"data.train={data / 'sft.jsonl'}",
            held_out,
            f"train.output={output / 'sft'}",
            f"train.train_iters={effort.sft_iters}",
            f"train.eval_interval={5 * effort.eval_interval}",
            f"optimizer.lr={SFT_LR}",
        )
        sft = _last_checkpoint(output / "sft", effort.sft_iters)
        print(f"   {_headline(output / 'sft')}")

    with journal.stage("Train the guidance model from it (DPO)"):
        journal.run(
            "recipes.train",
            "--recipe=dpo_tiny",
            f"model.checkpoint={sft}",
            f"train.output={output / 'dpo'}",
            "train.micro_batch_size=32",
            *preference,
        )
        guidance = _last_checkpoint(output / "dpo", effort.preference_iters)
        print(f"   {_headline(output / 'dpo')}")

    with journal.stage("Score every token with the SFT and the guidance model, on two processes"):
        journal.run(
            "recipes.score",
            "--recipe=tgdpo_tiny",
            "--nproc-per-node=2",
            "parallel.tensor_model_parallel_size=2",
            f"model.checkpoint={sft}",
            f"model.guidance={guidance}",
            training,
            held_out,
            f"scores.path={scores}",
            "train.micro_batch_size=32",
        )

    with journal.stage("Train with TGDPO, tensor parallel 2 × pipeline parallel 2, on four processes"):
        journal.run(
            "recipes.train",
            "--recipe=tgdpo_tiny",
            "--nproc-per-node=4",
            "parallel.tensor_model_parallel_size=2",
            "parallel.pipeline_model_parallel_size=2",
            "parallel.sequence_parallel=true",
            f"model.checkpoint={sft}",
            "scores.source=cached",
            f"scores.path={scores}",
            f"train.output={output / 'tgdpo'}",
            "train.micro_batch_size=8",
            *preference,
            f"loss.beta_r={BETA_R}",
        )
        policy = _last_checkpoint(output / "tgdpo", effort.preference_iters)
        print(f"   {_headline(output / 'tgdpo')}")

    with journal.stage("Export the three models to HuggingFace, load them there and compare"):
        qualities = {}
        for name, checkpoint in (("sft", sft), ("dpo", guidance), ("tgdpo", policy)):
            journal.run("tools.convert_megatron_to_hf", checkpoint, output / "hf" / name)
            qualities[name] = measure(output / "hf" / name, validation)

    with journal.stage("Write the report"):
        table = write_report(journal, effort, validation, qualities)
    print(f"\n{table}\n\nreport: {output / 'report.html'}")
    print(f"whole demo: {sum(journal.stages.values()):.0f} s, {journal.memory.peak / 2**30:.1f} GiB at its peak")


def measure(hf_folder: Path, rows: Sequence[Row]) -> Quality:
    """Load an exported model with transformers, compare its two responses' log-probs, let it answer greedily."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from tgdpo_megatron.data.tokenizer import encode_prompt, encode_response, load_tokenizer

    disable_progress_bar()
    tokenizer = load_tokenizer(hf_folder)
    model = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32, local_files_only=True).eval()
    margins, answers = [], []
    with torch.no_grad():
        for first in range(0, len(rows), 50):
            some = rows[first : first + 50]
            prompts, sequences, starts = [], [], []
            for row in some:
                messages = [{"role": "user", "content": row.prompt}]
                text, prompt = encode_prompt(tokenizer, messages)
                prompts.append(prompt)
                for response in (row.chosen, row.rejected):
                    sequences.append(prompt + encode_response(tokenizer, messages, text, response))
                    starts.append(len(prompt))
            logps = _response_logps(model, sequences, starts)
            margins += (logps[0::2] - logps[1::2]).tolist()
            answers += _greedy(model, tokenizer, prompts)
    return Quality(margins, answers, [answer == row.chosen for answer, row in zip(answers, rows, strict=True)])


def _response_logps(model: Any, sequences: Sequence[list[int]], starts: Sequence[int]) -> Any:
    """Log-prob of what follows position `start` in each sequence, nats. [n] fp32."""
    import torch

    longest = max(map(len, sequences))
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences])
    lengths = torch.tensor([[len(ids)] for ids in sequences])
    places = torch.arange(longest)
    logits = model(tokens, attention_mask=(places < lengths).long()).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    counted = (places[1:] >= torch.tensor(starts)[:, None]) & (places[1:] < lengths)
    return (logps * counted).sum(dim=1)


def _greedy(model: Any, tokenizer: Any, prompts: Sequence[list[int]]) -> list[str]:
    """Greedy answers, as text."""
    import torch

    longest = max(map(len, prompts))
    tokens = torch.tensor([[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    made = model.generate(tokens, attention_mask=mask, max_new_tokens=40, do_sample=False)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in made[:, longest:]]


def _make_model(folder: Path, rows: Sequence[Row], seed: int) -> None:
    from tools.make_tiny_model import make_llama, train_tokenizer

    texts = [text for row in rows for text in (row.prompt, row.chosen, row.rejected)]
    # Digits apart, so that a wrong digit is a token of its own.
    tokenizer = train_tokenizer(texts, vocab_size=VOCAB_SIZE, merge_digits=False)
    make_llama(folder, tokenizer, seed=seed)
    print(f"   {folder}: 4 layers of width 128, {len(tokenizer)} tokens")


def _last_checkpoint(run: Path, iteration: int) -> Path:
    return run / "checkpoints" / f"iter-{iteration:07d}"


def _read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _headline(run: Path) -> str:
    """Training and held-out loss of the last step, and held-out accuracy where there is one."""
    last = _read_metrics(run)[-1]
    words = f"loss {last['loss']:.3f} nats, held out {last['eval/loss']:.3f}"
    if "eval/rewards/accuracies" in last:
        accuracy, margin = last["eval/rewards/accuracies"], last["eval/rewards/margins"]
        words += f"; held-out reward accuracy {accuracy:.1%}, margin {margin:.2f}"
    return words


def write_report(journal: Journal, effort: Effort, rows: Sequence[Row], qualities: dict[str, Quality]) -> str:
    """Write report.html, figure.svg and demo.json; return the comparison as lines of text."""
    output = journal.output
    comparison = _comparison(qualities)
    by_kind = _exact_match_by_kind(rows, qualities)
    charts = _charts(output)
    token_pairs = read_token_pairs(output, rows)
    auroc, wrong, right = _how_well_rewards_find_mistakes(token_pairs)
    shown = [next(place for place, row in enumerate(rows) if row.kind == kind) for kind in dict.fromkeys(_kinds(rows))]
    shown_pairs = [token_pairs[place] for place in shown]
    settings = _settings(journal, effort)
    before, after = qualities["sft"], qualities["tgdpo"]
    page = Page(
        title="TGDPO on Megatron: the demo",
        summary=[
            "A small language model, fine-tuned on question-and-answer examples of which "
            f"{NOISE:.0%} were wrong, was corrected with preference pairs: DPO gave a guidance model, and TGDPO, "
            "which weighs every token by that guidance, the final model, trained with tensor parallelism 2 × "
            "pipeline parallelism 2 on four processes.",
            f"On {len(rows)} held-out prompts, answers that match the expected text to the letter went from "
            f"{_mean(before.exact):.1%} to {_mean(after.exact):.1%}, and pairs whose right answer is the likelier "
            f"one from {before.accuracy:.1%} to {after.accuracy:.1%}.",
        ],
        tables=[
            ("Before and after", comparison),
            ("Exact match by kind of question", _kinds_table(by_kind, rows)),
        ],
        charts=charts,
        token_pairs=shown_pairs,
        token_notes=[
            f"The colour is the token reward r̂ = {BETA_R} × (log-prob under the guidance − log-prob under the SFT "
            "model), in nats, of one held-out pair of each kind; TGDPO lets disliked tokens of rejected answers and "
            "liked tokens of chosen ones weigh more.",
            f"Over the rejected answers of all {len(rows)} held-out pairs, −r̂ ranks a token known to be wrong above "
            f"one that is right with probability {auroc:.3f} (AUROC over {wrong} wrong and {right} right tokens; "
            "0.5 would be chance). Nothing told the models which tokens are wrong.",
        ],
        samples=[
            Sample(
                rows[place].prompt,
                rows[place].chosen,
                [
                    Answer(MODELS[name], quality.answers[place], quality.exact[place])
                    for name, quality in qualities.items()
                ],
            )
            for place in _samples(rows)
        ],
        data_notes=_data_notes(output),
        commands=[
            "# hf/start was made with train_tokenizer and make_llama of tools.make_tiny_model",
            *journal.commands,
        ],
        settings=settings,
    )
    (output / "report.html").write_text(build_page(page), encoding="utf-8")
    _write_figure(output, charts, shown_pairs)
    summary = {
        "comparison": {
            MODELS[name]: {
                "accuracy": quality.accuracy,
                "logp_margin_nats": _mean(quality.margins),
                "reward_margin": _reward_margin(quality, before),
                "exact_match": _mean(quality.exact),
            }
            for name, quality in qualities.items()
        },
        "exact_match_by_kind": by_kind,
        "wrong_token_auroc": auroc,
        "stage_seconds": journal.stages,
        "peak_memory_gib": journal.memory.peak / 2**30,
        "settings": dict(settings),
        "effort": asdict(effort),
        "commands": journal.commands,
    }
    (output / "demo.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return _as_text(comparison)


def read_token_pairs(output: Path, rows: Sequence[Row]) -> list[TokenPair]:
    """The held-out pairs token by token, with r̂ from the cached scores and the known mistakes."""
    from tgdpo_megatron.data.prepare import load_prepared
    from tgdpo_megatron.data.tokenizer import load_tokenizer
    from tgdpo_megatron.losses import CHOSEN, REJECTED
    from tgdpo_megatron.scores.store import load_scores

    tokenizer = load_tokenizer(output / "hf" / "sft")
    data = load_prepared(next((output / "scores" / "data").glob("validation-*")))
    scores = load_scores(output / "scores" / "validation", data, ("reference", "guidance"))
    pairs = []
    for pair, number in enumerate(data.rows):
        row = rows[number - 1]
        sides = []
        for side, spans in ((CHOSEN, []), (REJECTED, row.wrong)):
            joined = scores.join([pair], [side])
            rewards = (BETA_R * (joined["guidance"] - joined["reference"])).tolist()
            texts = [tokenizer.decode([token]) for token in data.sequence(pair, side)[data.prompt_lengths[pair] :]]
            sides.append(_marked(texts, rewards, spans))
        pairs.append(TokenPair(row.prompt, *sides))
    return pairs


def _marked(texts: Sequence[str], rewards: Sequence[float], spans: Sequence[Sequence[int]]) -> list[Token]:
    """Tokens with their rewards; wrong are those that share a character with a span."""
    tokens, start = [], 0
    for text, reward in zip(texts, rewards, strict=True):
        end = start + len(text)
        tokens.append(Token(text, reward, any(first < end and start < last for first, last in spans)))
        start = end
    return tokens


def _how_well_rewards_find_mistakes(pairs: Sequence[TokenPair]) -> tuple[float, int, int]:
    """AUROC of −r̂ for wrong against right tokens of rejected responses, and how many there are of each."""
    tokens = [token for pair in pairs for token in pair.rejected]
    wrong = [-token.reward for token in tokens if token.wrong]
    right = [-token.reward for token in tokens if not token.wrong]
    return area_under_roc(wrong, right), len(wrong), len(right)


def area_under_roc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive scores above a negative, ties counting half: the Mann-Whitney rank sum."""
    ranked = sorted([(value, True) for value in positive] + [(value, False) for value in negative])
    rank_sum, first = 0.0, 0
    while first < len(ranked):
        last = first
        while last < len(ranked) and ranked[last][0] == ranked[first][0]:
            last += 1
        mean_rank = (first + 1 + last) / 2  # ranks count from 1; tied values share their mean
        rank_sum += mean_rank * sum(is_positive for _, is_positive in ranked[first:last])
        first = last
    n = len(positive)
    return (rank_sum - n * (n + 1) / 2) / (n * len(negative))


def _comparison(qualities: dict[str, Quality]) -> Table:
    before = qualities["sft"]
    rows = [
        [
            MODELS[name],
            f"{quality.accuracy:.1%}",
            f"{_mean(quality.margins):.2f}",
            f"{_reward_margin(quality, before):.2f}",
            f"{_mean(quality.exact):.1%}",
        ]
        for name, quality in qualities.items()
    ]
    return Table(
        ("model", "preference accuracy", "log-prob margin (nats)", "reward margin", "exact match"),
        rows,
        "Held-out pairs, exported models in transformers, fp32. Accuracy: the chosen answer is likelier than the "
        "rejected one. Margin: log-prob of the chosen minus log-prob of the rejected answer, mean over pairs; reward "
        f"margin: β = {BETA} times how far that margin moved from the SFT model's. Exact match: the greedy answer is "
        "the chosen one to the letter. The curves show reward accuracy instead: the share of pairs whose margin grew "
        "over the SFT model's. Steps and rates were chosen by looking at the held-out pairs of seed 0; other seeds "
        "(--seed) are the fairer measure, and one run cannot rank DPO and TGDPO.",
    )


def _reward_margin(quality: Quality, before: Quality) -> float:
    return BETA * (_mean(quality.margins) - _mean(before.margins))


def _exact_match_by_kind(rows: Sequence[Row], qualities: dict[str, Quality]) -> dict[str, dict[str, float]]:
    """Kind -> model -> share of exact answers."""
    shares = {}
    for kind in sorted(set(_kinds(rows))):
        places = [place for place, row in enumerate(rows) if row.kind == kind]
        shares[kind] = {
            MODELS[name]: _mean([quality.exact[place] for place in places]) for name, quality in qualities.items()
        }
    return shares


def _kinds_table(by_kind: dict[str, dict[str, float]], rows: Sequence[Row]) -> Table:
    kinds = _kinds(rows)
    lines = [
        [kind, str(kinds.count(kind)), *(f"{share:.1%}" for share in shares.values())]
        for kind, shares in by_kind.items()
    ]
    return Table(("kind", "prompts", *MODELS.values()), lines)


def _charts(output: Path) -> list[Chart]:
    """Loss of all three runs, reward margin and accuracy of the two preference runs."""
    runs = {name: _read_metrics(output / name) for name in MODELS}
    preference = {"DPO": runs["dpo"], "TGDPO": runs["tgdpo"]}
    return [
        _chart("Fine-tuning (SFT)", "loss (nats per token)", "loss", {"SFT": runs["sft"]}),
        _chart("Preference loss", "loss (nats)", "loss", preference),
        _chart("Reward margin", "mean β·log-ratio, chosen − rejected", "rewards/margins", preference),
        _chart("Reward accuracy", "share of pairs with margin > 0", "rewards/accuracies", preference),
    ]


def _chart(title: str, y_label: str, metric: str, runs: dict[str, list[dict[str, float]]]) -> Chart:
    lines = []
    for colour, (name, steps) in enumerate(runs.items()):
        for key, words, held_out in ((metric, "training", False), (f"eval/{metric}", "held out", True)):
            points = [(step["iteration"], step[key]) for step in steps if key in step]
            x, y = [point[0] for point in points], [point[1] for point in points]
            lines.append(Line(f"{name}, {words}", x, y, held_out, colour))
    return Chart(title, "optimizer step", y_label, lines)


def _write_figure(output: Path, charts: Sequence[Chart], pairs: Sequence[TokenPair]) -> None:
    """The picture of the README: margin and accuracy over one rejected answer of each family."""
    labelled = [(pair.prompt, pair.rejected) for pair in pairs]
    caption = "Token reward of rejected answers (orange: the guidance dislikes it; underlined: known to be wrong)"
    (output / "figure.svg").write_text(figure_svg(charts[2:], labelled, reward_limit(pairs), caption))


def _samples(rows: Sequence[Row], each: int = 2) -> list[int]:
    """The first rows of each kind: taken by place, not by how well they came out."""
    return [
        place
        for kind in sorted(set(_kinds(rows)))
        for place in [place for place, row in enumerate(rows) if row.kind == kind][:each]
    ]


def _kinds(rows: Sequence[Row]) -> list[str]:
    return [row.kind for row in rows]


def _data_notes(output: Path) -> list[str]:
    """What the trainers said about their data: rows kept, rows dropped and why."""
    from tgdpo_megatron.data.prepare import load_prepared

    folders = {
        "Examples for SFT": (output / "sft", "train"),
        "Preference pairs": (output / "tgdpo", "train"),
        "Held-out pairs": (output / "tgdpo", "validation"),
    }
    prepared = {words: next((run / "data").glob(f"{part}-*")) for words, (run, part) in folders.items()}
    return [f"{words}: {load_prepared(folder).summary.sentences()}" for words, folder in prepared.items()]


def _settings(journal: Journal, effort: Effort) -> list[tuple[str, str]]:
    import megatron.core
    import torch
    import transformers

    return [
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("megatron-core", megatron.core.__version__),
        ("transformers", transformers.__version__),
        ("machine", f"{platform.machine()}, {os.cpu_count()} cores"),
        ("seed", str(journal.seed)),
        ("wrong SFT examples", f"{NOISE:.0%}"),
        ("β, β_r", f"{BETA}, {BETA_R}"),
        ("steps", f"SFT {effort.sft_iters}, DPO and TGDPO {effort.preference_iters} each, 32 pairs a step"),
        ("seconds", ", ".join(f"{seconds:.0f} ({stage})" for stage, seconds in journal.stages.items())),
        ("every other setting", "config.yaml in the folders sft, dpo and tgdpo beside this file"),
    ]


def _as_text(table: Table) -> str:
    """A table in aligned columns."""
    lines = [list(table.columns), *map(list, table.rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(table.columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not place else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _claim(output: Path, *, overwrite: bool) -> None:
    """Make the output folder, and delete an earlier demo's only where that was asked for.

    Raises:
        UserError: The folder is in use, is not a demo's, or cannot be written.
    """
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise UserError(f"{output}: is not empty; choose another --output, or give --overwrite to delete it.")
        if not (output / MARKER).is_file():
            raise UserError(f"{output}: was not made by this demo and is not deleted; choose another --output.")
        shutil.rmtree(output)
    try:
        for name in ("hf", "logs"):
            (output / name).mkdir(parents=True)
        (output / MARKER).touch()
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}).") from None


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(prog="python -m tools.demo", description=__doc__)
        parser.add_argument(
            "--output", type=Path, default=Path("runs/demo"), help="folder to make (default: %(default)s)"
        )
        parser.add_argument("--overwrite", action="store_true", help="delete an earlier demo in that folder")
        parser.add_argument(
            "--seed", type=int, default=0, help="of the data and the first weights (default: %(default)s)"
        )
        parser.add_argument(
            "--fast", action="store_true", help="few steps: shows that everything runs, teaches nothing"
        )
        parsed = parser.parse_args()
        _claim(parsed.output, overwrite=parsed.overwrite)
        demo(parsed.output, FAST if parsed.fast else Effort(), parsed.seed)


if __name__ == "__main__":
    main()
