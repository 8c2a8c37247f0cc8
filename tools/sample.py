"""Sample answers to prompts from a model: the first half of making preference pairs of its own answers.

    python -m tools.sample runs/start-hf docs/example/pairs.jsonl --output runs/answers.jsonl --max-new-tokens 64
    python -m tools.sample MODEL PROMPTS --output answers.jsonl --engine http --url http://localhost:8000
    python -m tools.sample MODEL PROMPTS --output answers-1.jsonl --shard 1/4

Prompts are pairs in any format that data.train takes, whose answers are not read; rows with a prompt (`prompt`,
`messages`, `instruction`, …); or a .txt file with a prompt in each line. A prompt that is there several times is
answered once. The file gets a line for each prompt, in their order. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from recipes.settings import changed
from tgdpo_megatron.config import Config, DataConfig
from tgdpo_megatron.data.prepare import few
from tgdpo_megatron.errors import CommandLine, UserError, at_least, one_sentence_errors
from tgdpo_megatron.sampling.engine import Engine, EngineName, Sampling, open_engine
from tgdpo_megatron.sampling.kept_ids import KeepsIds, ids_file
from tgdpo_megatron.sampling.prompts import Prompts, encode_prompts, read_prompts
from tgdpo_megatron.sampling.sampler import Tally, sample

READ = {"format", "columns", "template", "chat_template_kwargs", "special_tokens"}
"""Data settings that change prompts."""
USUAL_NAMES = {
    **dict.fromkeys(("--num-samples", "--num-return-sequences", "--num-generations"), "--n"),
    **dict.fromkeys(("--max-tokens", "--max-completion-tokens"), "--max-new-tokens"),
    "--max-prompt-length": "--max-prompt-tokens",
    "--base-url": "--url",
    "--max-concurrency": "--concurrency",
    "--served-model-name": "--served-model",
}
"""What vLLM, OpenAI's client, transformers, TRL and others call an option -> ours."""


def data_settings(changes: Sequence[str]) -> DataConfig:
    """The data settings, of which only those that change prompts may be given.

    Raises:
        UserError: Another setting, or a value that is refused.
    """
    for change in changes:
        group, _, name = change.partition("=")[0].partition(".")
        if group != "data" or name.partition(".")[0] not in READ:
            known = ", ".join(f"data.{name}" for name in sorted(READ))
            raise UserError(f"{change}: changes nothing where answers are sampled; settings here are {known}.")
    return changed(Config(), changes).data


def shard_of(prompts: Prompts, shard: str) -> None:
    """Leave the i-th of n parts of the prompts, where `shard` is i/n. Parts follow each other, so that files join.

    Each prompt's source says which part it is in, lest the file go on with another.

    Raises:
        UserError: `shard` is no such thing.
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--shard {shard}: give i/n, such as 1/4, 2/4, 3/4 and 4/4 for four parts.")
    part, parts = int(found[1]), int(found[2])
    count = len(prompts.asked)
    prompts.asked = prompts.asked[count * (part - 1) // parts : count * part // parts]
    if not prompts.asked:
        raise UserError(f"--shard {shard}: this part of the {count} prompts is empty; make fewer parts.")
    if parts > 1:
        for text in prompts.asked:
            prompts.sources[text.row]["shard"] = f"{part}/{parts}"


def report(output: Path, tally: Tally, before: Tally, seconds: float, left_out: dict[str, list[int]]) -> str:
    """What was sampled, and which rows were left out."""
    new = tally.tokens - before.tokens
    lines = [
        f"{output}: {tally.prompts} prompts, {tally.answers} answers, {tally.tokens} tokens; "
        f"{tally.unfinished / tally.answers:.1%} of the answers are unfinished",
        f"{new} new tokens in {seconds:.0f} s: {new / max(seconds, 1e-9):,.0f} tokens per second"
        if new
        else "nothing was left to do",
    ]
    return "\n".join(
        lines + [f"left out: {reason}: {len(rows)} (row {few(rows)})" for reason, rows in left_out.items()]
    )


def _parser() -> CommandLine:
    parser = CommandLine(
        prog="python -m tools.sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        others=USUAL_NAMES,
    )
    parser.add_argument("model", type=Path, help="HuggingFace folder, or a model's name on a hub")
    parser.add_argument("prompts", type=Path, help="pairs, rows with prompts, or a .txt file of prompts")
    parser.add_argument("changes", nargs="*", metavar="data.key=value", help="how prompts are read, as in training")
    parser.add_argument("--output", type=Path, required=True, help="file of answers (.jsonl) to write or go on with")
    said = "(default: %(default)s)"
    parser.add_argument("--n", type=int, default=5, help=f"answers to each prompt {said}")
    parser.add_argument("--temperature", type=float, default=0.8, help=f"0, with --n 1: the likeliest token {said}")
    parser.add_argument("--top-p", type=float, default=0.95, help=f"keep the likeliest tokens up to it; 1: all {said}")
    parser.add_argument("--top-k", type=int, default=0, help=f"keep so many of the likeliest tokens; 0: all {said}")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help=f"1: none {said}")
    parser.add_argument("--max-new-tokens", type=int, default=4096, help=f"longest answer {said}")
    parser.add_argument("--seed", type=int, default=0, help=f"seed from which every answer's own is made {said}")
    parser.add_argument(
        "--max-prompt-tokens", type=int, help="leave longer prompts out; default: refuse what is too long"
    )
    parser.add_argument("--shard", metavar="i/n", default="1/1", help="answer the i-th of n parts of the prompts")
    parser.add_argument(
        "--keep-ids",
        action="store_true",
        help="also write the answers' token ids, for the KL divergence of tools.compare",
    )
    parser.add_argument("--engine", choices=get_args(EngineName), default="transformers", help=f"who answers {said}")
    parser.add_argument("--batch-size", type=int, default=32, help=f"transformers: answers computed at once {said}")
    parser.add_argument("--device", help="such as cuda:1; default: the first GPU, or the CPU")
    parser.add_argument("--url", default="", help="http: where the server listens, such as http://localhost:8000")
    parser.add_argument("--served-model", default="", help="http: what the server calls the model; default: MODEL")
    parser.add_argument("--concurrency", type=int, default=64, help=f"http: requests under way at once {said}")
    parser.add_argument("--retries", type=int, default=6, help=f"http: further tries where a request fails {said}")
    return parser


def _check(parsed: argparse.Namespace) -> None:
    """Refuse numbers without meaning, a file of another kind, and options of the other engine."""
    at_least(parsed, n=1, seed=0, batch_size=1, concurrency=1, retries=0)
    if parsed.output.suffix != ".jsonl":
        raise UserError(f"--output {parsed.output}: JSON lines are written; give a name that ends in .jsonl.")
    if parsed.temperature == 0 and parsed.n > 1:
        raise UserError(
            f"--temperature 0: all {parsed.n} answers to a prompt would be the same; give --n 1, or a higher "
            "temperature."
        )
    if parsed.engine == "http" and not parsed.url:
        raise UserError("--engine http: say with --url where the server listens, such as http://localhost:8000.")
    if parsed.engine != "http" and parsed.url:
        raise UserError(f"--url {parsed.url}: is read with --engine http; give that too.")


def main() -> None:
    with one_sentence_errors():
        parsed = _parser().parse_intermixed_args()
        _check(parsed)
        settings = Sampling(
            temperature=parsed.temperature,
            top_p=parsed.top_p,
            top_k=parsed.top_k,
            repetition_penalty=parsed.repetition_penalty,
            max_new_tokens=parsed.max_new_tokens,
        )
        settings.check()
        data = data_settings(parsed.changes)
        prompts = read_prompts(parsed.prompts, data)
        shard_of(prompts, parsed.shard)
        engine: Engine = open_engine(
            parsed.model,
            engine=parsed.engine,
            url=parsed.url,
            served_model=parsed.served_model,
            template=data.template,
            chat_template_kwargs=data.chat_template_kwargs,
            batch_size=parsed.batch_size,
            concurrency=parsed.concurrency,
            retries=parsed.retries,
            device=parsed.device,
        )
        encoded = encode_prompts(
            prompts, engine.tokenizer, data, max_length=engine.max_length, max_prompt_tokens=parsed.max_prompt_tokens
        )
        if parsed.keep_ids:
            engine = KeepsIds(engine, ids_file(parsed.output))
        began = time.monotonic()
        tally, before = sample(engine, encoded, parsed.output, settings=settings, n=parsed.n, seed=parsed.seed)
        sys.stderr.flush()
        print(report(parsed.output, tally, before, time.monotonic() - began, prompts.left_out))


if __name__ == "__main__":
    main()
