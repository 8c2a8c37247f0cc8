"""Score sampled answers with a reward model, and make pairs of them that data.train takes as they are.

    python -m tools.annotate Skywork/Skywork-Reward-V2-Llama-3.1-8B answers.jsonl --output pairs.jsonl
    python -m tools.annotate RLHFlow/ArmoRM-Llama3-8B-v0.1 seed-13.jsonl seed-21.jsonl --output pairs.jsonl

The answers are files of tools.sample, or of SimPO's scripts (all_outputs.json, output_SEED.json). Files that begin with
the same prompt are runs over the same prompts, whose answers are put together; others follow each other. A run that was
stopped goes on when the same command is given again. Beside the pairs, a report counts and names what was left out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tgdpo_megatron.errors import CommandLine, at_least, one_sentence_errors, smaller_batches
from tgdpo_megatron.reward_models.annotation import Report, annotate, begun, report_file, settings_of
from tgdpo_megatron.reward_models.candidates import read_candidates
from tgdpo_megatron.reward_models.opening import identify, open_scorer
from tgdpo_megatron.reward_models.pairing import LEFT_OUT, PICKS, Rules
from tgdpo_megatron.reward_models.scorer import BATCH_TOKENS


def closing(report: Report, output: Path, scorer: str, seconds: float, read: int) -> str:
    """What was made and what was left out, in a few lines.

    Args:
        seconds, read: How long this run took, and how many tokens the reward model read in it.
    """
    rate = f" ({read / seconds:,.0f} tokens/s)" if read else ""
    lines = [
        f"{output}: {report.pairs:,} pairs of {report.prompts:,} prompts with {report.answers:,} answers, scored by "
        f"{scorer}{rate}"
    ]
    for reason, counted in report.prompts_left_out.items():
        if counted["number"]:
            ids = ", ".join(prompt[:12] for prompt in counted["first"][:3])
            more = ", …" if counted["number"] > 3 else ""
            lines.append(f"left out {counted['number']:>8,} prompts: {LEFT_OUT[reason]} ({ids}{more})")
    for reason, number in report.answers_left_out.items():
        if number:
            words = {"too_long": "too long for the reward model"}.get(reason, reason)
            lines.append(f"left out {number:>8,} answers: {words}")
    if not report.pairs and "too_few" in report.prompts_left_out and report.answers_left_out["unfinished"]:
        lines.append(
            "there are no pairs because answers are unfinished: sample with a larger --max-new-tokens, or give "
            "--keep-unfinished and another --output"
        )
    return "\n".join([*lines, f"report: {report_file(output)}"])


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(
            prog="python -m tools.annotate",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("scorer", type=Path, help="reward model: a HuggingFace folder, or a name on a hub")
        parser.add_argument("answers", type=Path, nargs="+", help="files of answers")
        parser.add_argument("--output", type=Path, required=True, help="file of pairs to make, such as pairs.jsonl")
        parser.add_argument(
            "--pick",
            choices=PICKS,
            default=Rules.pick,
            help="the rejected answer: the worst, or any worse one at random (default: %(default)s)",
        )
        parser.add_argument(
            "--margin",
            type=float,
            default=Rules.margin,
            help="smallest difference of the two scores (default: any that is not 0)",
        )
        parser.add_argument(
            "--keep-unfinished",
            action="store_true",
            help="let answers take part that reached their largest length, as SimPO does",
        )
        parser.add_argument("--seed", type=int, default=Rules.seed, help="of best-random (default: %(default)s)")
        parser.add_argument(
            "--batch-tokens",
            type=int,
            default=BATCH_TOKENS,
            help="most tokens that are scored together, padding included (default: %(default)s)",
        )
        parser.add_argument("--device", help="such as cuda:1; default: the first GPU, or the CPU")
        parsed = parser.parse_args()
        rules = Rules(parsed.pick, parsed.margin, parsed.keep_unfinished, parsed.seed)
        rules.check()
        at_least(parsed, batch_tokens=1)
        run(parsed.scorer, parsed.answers, parsed.output, rules, parsed.batch_tokens, parsed.device)


def run(
    scorer: Path, answers: list[Path], output: Path, rules: Rules, batch_tokens: int, device: str | None = None
) -> None:
    """Annotate, with progress on the way and some lines at the end. All inputs are checked before the model is loaded.

    Raises:
        UserError: A wrong input; what was made before is kept.
    """
    from tqdm import tqdm

    from tgdpo_megatron.run_folder import check_writable

    check_writable(output.parent)
    prompts = sum(1 for _ in read_candidates(answers))
    settings = settings_of(identify(scorer), answers, rules)
    report = begun(output, settings)
    opened = None if report.complete else open_scorer(scorer, batch_tokens=batch_tokens, device=device)
    started = time.monotonic()
    if opened:
        # Prompts come in blocks that may take minutes: the bar is also drawn where none is done, and the time left
        # follows from the mean since the start.
        done = report.prompts
        bar = tqdm(initial=done, total=prompts, desc="scoring", unit="prompt", mininterval=1, miniters=0, smoothing=0)
        with bar, smaller_batches(batch_tokens):

            def told(more_prompts: int, tokens: int) -> None:
                bar.set_postfix_str(f"{opened.tokens / (time.monotonic() - started):,.0f} tokens/s", refresh=False)
                bar.update(more_prompts)

            report = annotate(read_candidates(answers), opened, output, settings, rules, told=told)
    read = opened.tokens if opened else 0
    print(closing(report, output, str(scorer), time.monotonic() - started, read))


if __name__ == "__main__":
    main()
