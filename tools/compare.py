"""Compare models with the one that they started from: on held-out pairs, and by a reward model on their own answers.

    python -m tools.compare START MODEL [MODEL ...] --output FOLDER --pairs held_out.jsonl
    python -m tools.compare START MODEL [MODEL ...] --output FOLDER --prompts prompts.jsonl --scorer REWARD_MODEL

A model is a HuggingFace folder or a name on a hub, and may be given another name in the tables: dpo=runs/dpo/hf. Every
model answers the prompts; FOLDER keeps the answers, so that the same command goes on where it was stopped, and another
reward model needs no new ones. FOLDER also gets comparison.json and comparison.html. What the numbers mean is in
docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.settings import changed
from tgdpo_megatron.config import Config, DataConfig
from tgdpo_megatron.errors import CommandLine, UserError, at_least, one_sentence_errors, smaller_batches
from tgdpo_megatron.evaluation.models import Model, find_models
from tgdpo_megatron.report.words import plural
from tgdpo_megatron.reward_models.opening import identify, open_scorer
from tgdpo_megatron.sampling.engine import Sampling, max_length_of

if TYPE_CHECKING:
    from tgdpo_megatron.data.prepare import PreparedPairs
    from tgdpo_megatron.evaluation.comparison import AnswerNumbers
    from tgdpo_megatron.sampling.answers import Answered

SAMPLED: dict[str, float | None] = {
    "n": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 1024,
    "max_prompt_tokens": None,
    "seed": 0,
    "batch_size": 32,
}
"""Options that say how prompts are answered -> what they are where they are not given."""


def main() -> None:
    with one_sentence_errors():
        parsed = _parser().parse_intermixed_args()
        data = changed(Config(), [given for given in parsed.models if given.startswith("data.")]).data
        _check(parsed)
        vars(parsed).update({name: usual for name, usual in SAMPLED.items() if getattr(parsed, name) is None})
        at_least(parsed, n=1, seed=0, batch_size=1, batch_tokens=1)
        settings = Sampling(temperature=parsed.temperature, top_p=parsed.top_p, max_new_tokens=parsed.max_new_tokens)
        settings.check()
        given = [given for given in parsed.models if not given.startswith("data.")]
        models = find_models(given, data, of_same_tokens=parsed.pairs is not None)
        if parsed.scorer:
            identify(parsed.scorer)  # what is no reward model is refused before hours of sampling
        from tgdpo_megatron.run_folder import check_writable

        pairs = held_out(parsed.pairs, models[0], data) if parsed.pairs else None
        check_writable(parsed.output)
        compare(models, pairs, files_of_answers(models, parsed, settings, data), parsed)


def _check(parsed: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        UserError: They do not.
    """
    if not (parsed.pairs or parsed.prompts or parsed.answers):
        raise UserError("nothing to compare on: give --pairs, or --prompts, or both.")
    if parsed.prompts and parsed.answers:
        raise UserError("--prompts and --answers: give prompts to answer, or the files of their answers, not both.")
    if parsed.scorer and not (parsed.prompts or parsed.answers):
        raise UserError(f"--scorer {parsed.scorer}: scores answers; give --prompts to answer, or files with --answers.")
    if parsed.no_kl and not (parsed.prompts or parsed.answers):
        raise UserError("--no-kl: a KL divergence is made of answers, and there are none; leave it out.")
    for given in map(str, parsed.answers or ()):
        if given.startswith("data."):
            raise UserError(f"--answers … {given}: is a setting, not a file; give it before --answers.")
    for name in SAMPLED:
        if not parsed.prompts and getattr(parsed, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(parsed, name)}: says how prompts are answered, and none are "
                "given with --prompts; leave it out."
            )


def held_out(path: Path, start: Model, data: DataConfig) -> PreparedPairs:
    """Held-out pairs, tokenised as for training, but within the model's own length.

    Raises:
        UserError: As prepare_pairs.
    """
    from tgdpo_megatron.data.prepare import tokenised

    longest = min(data.max_length, max_length_of(start.source))
    pairs = tokenised(data.model_copy(update={"max_length": longest}), path, start.tokenizer)
    print(pairs.summary.sentences())
    return pairs


def files_of_answers(
    models: Sequence[Model], parsed: argparse.Namespace, settings: Sampling, data: DataConfig
) -> dict[str, Path]:
    """The files of every model's answers, sampled or given, by the names of the models; empty without prompts.

    Raises:
        UserError: There are not as many files as models, or sampling fails.
    """
    if parsed.answers:
        if len(parsed.answers) != len(models):
            raise UserError(
                f"--answers: {plural(len(parsed.answers), 'file')} for {len(models)} models; give one for each, in "
                "their order."
            )
        return {model.name: path for model, path in zip(models, parsed.answers, strict=True)}
    files = {model.name: parsed.output / "answers" / model.file for model in models} if parsed.prompts else {}
    for model in models if files else ():
        _sample(model, files[model.name], parsed, settings, data)
    return files


def _sample(model: Model, file: Path, parsed: argparse.Namespace, settings: Sampling, data: DataConfig) -> None:
    from tgdpo_megatron.data.prepare import few
    from tgdpo_megatron.sampling.engine import open_engine
    from tgdpo_megatron.sampling.kept_ids import KeepsIds, ids_file
    from tgdpo_megatron.sampling.prompts import encode_prompts, read_prompts
    from tgdpo_megatron.sampling.sampler import sample

    prompts = read_prompts(parsed.prompts, data)
    engine = open_engine(
        model.source.given,
        template=data.template,
        chat_template_kwargs=data.chat_template_kwargs,
        batch_size=parsed.batch_size,
        device=parsed.device,
    )
    encoded = encode_prompts(
        prompts, engine.tokenizer, data, max_length=engine.max_length, max_prompt_tokens=parsed.max_prompt_tokens
    )
    tally, _ = sample(KeepsIds(engine, ids_file(file)), encoded, file, settings=settings, n=parsed.n, seed=parsed.seed)
    left_out = "".join(f"; left out: {reason} (row {few(rows)})" for reason, rows in prompts.left_out.items())
    print(f"{file}: {tally.prompts} prompts, {tally.answers} answers{left_out}")


def compare(
    models: Sequence[Model],
    pairs: PreparedPairs | None,
    files: Mapping[str, Path],
    parsed: argparse.Namespace,
) -> None:
    """Measure everything, print the tables, and write comparison.json and comparison.html.

    Args:
        files: Of every model's answers, as files_of_answers gives them.
    """
    from tgdpo_megatron.checkpoint.hf_models import device_of
    from tgdpo_megatron.data.tokenizer import special_texts
    from tgdpo_megatron.evaluation.comparison import as_json, compared, rows, rows_of_differences
    from tgdpo_megatron.evaluation.comparison_page import INTERVALS, page
    from tgdpo_megatron.evaluation.gathering import answer_numbers, read_aligned, scores_of, with_log_probs
    from tgdpo_megatron.evaluation.origins import check_origins
    from tgdpo_megatron.sampling.kept_ids import ids_file, read_ids

    device, answers = device_of(parsed.device), read_aligned(files)
    notes = check_origins(models, answers, files)
    kept = {name: read_ids(ids_file(path)) for name, path in files.items()}
    with smaller_batches(parsed.batch_tokens):
        pairs_of, ratios, left_out = with_log_probs(
            models, pairs, {} if parsed.no_kl else answers, kept, device=device, batch_tokens=parsed.batch_tokens
        )
    notes += left_out
    scores, start_scores, is_bradley_terry, refused = dict[str, Any](), dict[str, Any](), False, 0
    made_with = _made_with(models, pairs, answers, parsed)
    if parsed.scorer:
        scorer = open_scorer(parsed.scorer, batch_tokens=parsed.batch_tokens, device=device)
        is_bradley_terry = scorer.is_bradley_terry
        with smaller_batches(parsed.batch_tokens):
            scores, start_scores, refused = scores_of(answers, scorer)
        made_with["reward model"] = f"{scorer.name}, fingerprint {scorer.fingerprint}"
    numbers = {
        name: answer_numbers(
            some, scores=scores.get(name), start_scores=start_scores.get(name), log_ratios=ratios.get(name)
        )
        for name, some in answers.items()
    }
    notes += _not_scored(numbers, refused) if parsed.scorer else []
    comparison = compared(pairs_of, numbers, is_bradley_terry=is_bradley_terry)
    for table in filter(None, (rows(comparison), rows_of_differences(comparison))):
        print("", *_aligned(table), sep="\n")
    print("", INTERVALS, *notes, sep="\n")
    numbers_of = {"pairs": len(pairs or ()), "prompts": len(answers[models[0].name]) if answers else 0}
    content = {"made_with": made_with, **numbers_of, "notes": notes, **as_json(comparison)}
    _write(parsed.output / "comparison.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    html = page(
        comparison,
        made_with=made_with,
        notes=notes,
        answers=answers,
        numbers=numbers,
        special=special_texts(models[0].tokenizer),
    )
    _write(parsed.output / "comparison.html", html)
    print(f"{parsed.output / 'comparison.html'}: open it in a browser")


def _not_scored(numbers: Mapping[str, AnswerNumbers], refused: int) -> list[str]:
    """Sentences on prompts without scores.

    Args:
        refused: How many of them the reward model's template does not take.
    """
    from tgdpo_megatron.evaluation.comparison import with_scores

    scored = with_scores(numbers)
    reasons = {
        "have an answer that is too long for the reward model": len(scored) - int(scored.sum()) - refused,
        "have turns that the reward model's chat template does not take": refused,
    }
    return [
        f"{number} of {len(scored)} prompts {reason}; no number that is made of scores counts them."
        for reason, number in reasons.items()
        if number
    ]


def _made_with(
    models: Sequence[Model], pairs: PreparedPairs | None, answers: dict[str, list[Answered]], parsed: argparse.Namespace
) -> dict[str, str]:
    """What was compared, and how: names and values in words."""
    found = {f"model {model.name}": str(model.source) for model in models}
    if pairs is not None:
        found["pairs"] = f"{len(pairs)} of {parsed.pairs}, {pairs.summary.read_as()}"
    for name, some in answers.items():
        settings = {**some[0].sampling, **some[0].model}
        found[f"answers of {name}"] = ", ".join(f"{key} {value}" for key, value in settings.items())
    return found


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            [f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))]
        )
        for first, *cells in table
    ]


def _write(path: Path, text: str) -> None:
    half = path.with_name(f"{path.name}.tmp")
    half.write_text(text, encoding="utf-8")
    half.replace(path)


def _parser() -> CommandLine:
    parser = CommandLine(
        prog="python -m tools.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = {name: f"(default: {value})" for name, value in SAMPLED.items()}
    parser.add_argument(
        "models",
        nargs="+",
        metavar="[NAME=]MODEL | data.key=value",
        help="the start first, then the models; and how pairs and prompts are read, as in training",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder for answers and results")
    parser.add_argument("--pairs", type=Path, help="held-out pairs, in any form that data.train takes")
    parser.add_argument("--prompts", type=Path, help="prompts to answer, in any form that tools.sample takes")
    parser.add_argument(
        "--answers", type=Path, nargs="+", metavar="FILE", help="in place of --prompts: each model's answers, in order"
    )
    parser.add_argument("--no-kl", action="store_true", help="no KL divergence, for which every model is loaded")
    parser.add_argument("--scorer", type=Path, metavar="REWARD_MODEL", help="folder or name on a hub")
    parser.add_argument("--n", type=int, help=f"answers to each prompt {usual['n']}")
    parser.add_argument("--temperature", type=float, help=f"only 1 gives a KL divergence {usual['temperature']}")
    parser.add_argument("--top-p", type=float, help=f"only 1 gives a KL divergence {usual['top_p']}")
    parser.add_argument("--max-new-tokens", type=int, help=f"longest answer {usual['max_new_tokens']}")
    parser.add_argument(
        "--max-prompt-tokens", type=int, help="leave longer prompts out; default: refuse what is too long"
    )
    parser.add_argument("--seed", type=int, help=f"of the sampling {usual['seed']}")
    parser.add_argument("--batch-size", type=int, help=f"answers sampled at once {usual['batch_size']}")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens scored at once (default: %(default)s)")
    parser.add_argument("--device", help="such as cuda:1; default: the first GPU, or the CPU")
    return parser


if __name__ == "__main__":
    main()
