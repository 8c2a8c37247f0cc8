"""All stages of the demo, from made-up data to the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tools.demo.journal import (
    BETA,
    BETA_R,
    NOISE,
    PREFERENCE_LR,
    RUNS,
    SFT_LR,
    VOCAB_SIZE,
    Effort,
    Journal,
    Quality,
    read_metrics,
)
from tools.demo.report import write_report
from tools.marked_pairs import Row, read_rows


def demo(output: Path, effort: Effort, seed: int) -> None:
    """Run every stage, write report.html, demo.json and figure.svg."""
    journal = Journal(output, seed)
    journal.memory.start()
    data = output / "data"
    with journal.stage("Make pairs whose wrong words are known, and noisy examples"):
        sizes = (f"--train={effort.train}", f"--validation={effort.validation}", f"--sft={effort.sft}")
        journal.run("tools.marked_pairs", data, f"--seed={seed}", f"--noise={NOISE}", *sizes)
        train, validation = read_rows(data / "train.jsonl"), read_rows(data / "validation.jsonl")
        print(f"   {effort.sft} examples, {len(train)} pairs to train on, {len(validation)} held out; for instance")
        print(f"   {train[0].prompt}  chosen: {train[0].chosen}  rejected: {train[0].rejected}")

    with journal.stage(f"Make a small random Llama and fine-tune it on examples of which {NOISE:.0%} are wrong (SFT)"):
        _make_model(output / "hf" / "start", train, seed)
        _fine_tune(journal, effort, output, seed)
        print(f"   {_headline(output / RUNS['sft'])}")
    with journal.stage("Align it: DPO as guidance, token scores, TGDPO; tensor 2 × pipeline 2 on four processes"):
        _align(journal, effort, output, seed, *_FOUR_PROCESSES)
        print(f"   DPO    {_headline(output / RUNS['dpo'])}\n   TGDPO  {_headline(output / RUNS['tgdpo'])}")
    with journal.stage("Load the three exported models in transformers and compare them"):
        _export(journal, output)
        found = [_measure_all(output, validation)]
    if effort.starts > 1:
        with journal.stage(f"The same from {effort.starts - 1} other starts, side by side, with one process each"):
            others = [output / f"start-{number}" for number in range(2, effort.starts + 1)]
            seeds = range(seed + 1, seed + effort.starts)
            for folder, its_seed in zip(others, seeds, strict=True):
                _make_model(folder / "hf" / "start", train, its_seed)
            journal.threads = max(1, (os.cpu_count() or 1) // len(others))
            with ThreadPoolExecutor() as pool:
                list(pool.map(partial(_all_again, journal, effort), others, seeds))
            found += [_measure_all(folder, validation) for folder in others]

    with journal.stage("Write the report"):
        table = write_report(journal, effort, validation, found)
    print(f"\n{table}\n\nreport: {output / 'report.html'}")
    print(f"whole demo: {sum(journal.stages.values()):.0f} s, {journal.memory.peak / 2**30:.1f} GiB at its peak")


_FOUR_PROCESSES = (
    "--nproc-per-node=4",
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
    "train.micro_batch_size=8",
)


def _all_again(journal: Journal, effort: Effort, folder: Path, seed: int) -> None:
    """Everything that is trained, from a model that was made in `folder`."""
    _fine_tune(journal, effort, folder, seed)
    _align(journal, effort, folder, seed)
    _export(journal, folder)


def _fine_tune(journal: Journal, effort: Effort, folder: Path, seed: int) -> None:
    data = journal.output / "data"
    journal.run("tools.convert_hf_to_megatron", folder / "hf" / "start", folder / "start")
    journal.run(
        "recipes.train",
        "--recipe=sft_tiny",
        f"model.checkpoint={folder / 'start'}",
        f"data.train={data / 'sft.jsonl'}",
        f"data.validation={data / 'validation.jsonl'}",
        f"train.output={folder / RUNS['sft']}",
        f"train.train_iters={effort.sft_iters}",
        f"train.eval_interval={5 * effort.eval_interval}",
        f"train.seed={seed}",
        f"optimizer.lr={SFT_LR}",
    )


def _align(journal: Journal, effort: Effort, folder: Path, seed: int, *layout: str) -> None:
    """Train the guidance, score, train the policy, export it."""
    data = journal.output / "data"
    journal.run(
        "recipes.align",
        "--recipe=tgdpo_tiny",
        *(layout or ("train.micro_batch_size=32",)),
        f"model.checkpoint={folder / RUNS['sft']}",
        f"data.train={data / 'train.jsonl'}",
        f"data.validation={data / 'validation.jsonl'}",
        f"train.output={folder / 'aligned'}",
        f"train.train_iters={effort.preference_iters}",
        f"train.eval_interval={effort.eval_interval}",
        f"train.seed={seed}",
        f"optimizer.lr={PREFERENCE_LR}",
        f"loss.beta={BETA}",
        f"loss.beta_r={BETA_R}",
        f"guidance.optimizer.lr={PREFERENCE_LR}",
        f"guidance.loss.beta={BETA}",
    )


def _export(journal: Journal, folder: Path) -> None:
    """Export the other two models as well."""
    for name in ("sft", "dpo"):
        journal.run("tools.convert_megatron_to_hf", folder / RUNS[name], folder / "hf" / name)


def _measure_all(folder: Path, rows: Sequence[Row]) -> dict[str, Quality]:
    exported = {"sft": folder / "hf" / "sft", "dpo": folder / "hf" / "dpo", "tgdpo": folder / "aligned" / "hf"}
    return {name: measure(path, rows) for name, path in exported.items()}


def measure(hf_folder: Path, rows: Sequence[Row]) -> Quality:
    """Load an exported model with transformers, compute log-probs of both responses, and generate greedy answers."""
    import torch
    from transformers import AutoModelForCausalLM

    from tgdpo_megatron.data.tokenizer import encode_prompt, encode_response, load_tokenizer

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
    """Log-prob of each sequence's tokens from its start position on, nats. [n] fp32."""
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
    from tools.make_tiny_model import make_model, train_tokenizer

    texts = [text for row in rows for text in (row.prompt, row.chosen, row.rejected)]
    # Every digit is a token, so that a wrong digit is a token of its own.
    tokenizer = train_tokenizer(texts, vocab_size=VOCAB_SIZE, merge_digits=False)
    make_model(folder, tokenizer, seed=seed)
    print(f"   {folder}: 4 layers of width 128, {len(tokenizer)} tokens")


def _headline(run: Path) -> str:
    """Training and held-out loss of the last step, with held-out accuracy and margin where there are any."""
    last = read_metrics(run)[-1]
    words = f"loss {last['loss']:.3f} nats, held out {last['eval/loss']:.3f}"
    if "eval/rewards/accuracies" in last:
        accuracy, margin = last["eval/rewards/accuracies"], last["eval/rewards/margins"]
        words += f"; held-out reward accuracy {accuracy:.1%}, margin {margin:.2f}"
    return words
