"""Answer the questions of a public benchmark, and write the file that its judge reads.

    python -m tools.answers mt-bench runs/aligned/hf question.jsonl --output runs/answers

The questions are the benchmark's own file, which you bring. Answers are sampled as the benchmark asks: with MT-Bench's
temperatures by category and its two turns, with the settings of SimPO's authors for AlpacaEval 2, greedily for
Arena-Hard. FOLDER gets the file of answers and what they were made with, and the judge's command is printed. A command
that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

from recipes.settings import changed
from tgdpo_megatron.config import Config
from tgdpo_megatron.errors import CommandLine, UserError, at_least, one_sentence_errors
from tgdpo_megatron.evaluation.answer_files import Dialect, Form, form_of, judge
from tgdpo_megatron.evaluation.questions import READERS, Question, read_questions
from tgdpo_megatron.sampling.engine import EngineName, Sampling, open_engine

READ = ("data.template", "data.chat_template_kwargs")
"""Settings that change answers."""


def main() -> None:
    with one_sentence_errors():
        parsed = _parser().parse_intermixed_args()
        _check(parsed)
        data = changed(Config(), parsed.changes).data
        name = parsed.model_id or re.sub(r"[^\w.-]+", "-", parsed.model).strip("-.")
        if not re.fullmatch(r"[\w][\w.-]*", name):
            raise UserError(
                f"--model-id {name!r} is refused: it names a file, so letters, digits, '.', '_' and '-' only."
            )
        questions = read_questions(parsed.benchmark, parsed.questions)
        dialect = _dialect(parsed, questions)
        form = form_of(parsed.benchmark, dialect)
        settings = _settings(parsed, form, questions[0])
        settings.check()
        from tgdpo_megatron.evaluation.answering import answer
        from tgdpo_megatron.run_folder import check_writable

        check_writable(parsed.output)
        engine = open_engine(
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
        file = parsed.output / f"{name}{form.suffix}"
        unfinished = answer(
            engine,
            questions,
            form,
            lambda question: _settings(parsed, form, question),
            seed=parsed.seed,
            model=name,
            file=file,
            about={"benchmark": parsed.benchmark, "dialect": dialect},
        )
        total = sum(len(question.turns) for question in questions)
        print(f"{file}: {total} answers to {len(questions)} questions; {unfinished} of them are unfinished")
        if len(questions) not in form.usual:
            usual = " or ".join(map(str, form.usual))
            print(f"# {parsed.benchmark} has {usual} questions: a score on others is not the benchmark's.")
        print(*judge(parsed.benchmark, dialect, file, name, questions), sep="\n")


def _check(parsed: argparse.Namespace) -> None:
    """Refuse settings that change nothing, numbers without meaning, and options of the other engine.

    Raises:
        UserError: There is one.
    """
    for change in parsed.changes:
        if not change.startswith(READ):
            raise UserError(f"{change}: changes nothing here; settings are {' and '.join(READ)}.")
    at_least(parsed, seed=0, batch_size=1, concurrency=1, retries=0)
    if (parsed.engine == "http") != bool(parsed.url):
        raise UserError("--engine http and --url belong together: give both, such as --url http://localhost:8000.")


def _dialect(parsed: argparse.Namespace, questions: list[Question]) -> Dialect | None:
    """The dialect that is asked for, else that of the questions; None where a benchmark has only one.

    Raises:
        UserError: It is asked for where there is only one.
    """
    if parsed.benchmark == "arena-hard":
        return parsed.dialect or ("uid" if "uid" in questions[0].row else "question_id")
    if parsed.dialect:
        raise UserError(f"--dialect {parsed.dialect} is refused: {parsed.benchmark} has only one; leave it out.")
    return None


def _settings(parsed: argparse.Namespace, form: Form, question: Question) -> Sampling:
    """How the answers to a question are sampled."""
    usual = Sampling(form.temperature(question), form.top_p, max_new_tokens=form.max_new_tokens)
    given = {name: getattr(parsed, name) for name in ("temperature", "top_p", "max_new_tokens")}
    return replace(usual, **{name: value for name, value in given.items() if value is not None})


def _parser() -> CommandLine:
    parser = CommandLine(
        prog="python -m tools.answers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=sorted(READERS))
    parser.add_argument("model", help="HuggingFace folder, or a model's name on a hub")
    parser.add_argument("questions", type=Path, help="the benchmark's file of questions")
    parser.add_argument("changes", nargs="*", metavar="data.key=value", help="the chat template, as in training")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder for the files")
    parser.add_argument(
        "--model-id", metavar="NAME", help="what the files call the model; default: the model's own name"
    )
    parser.add_argument(
        "--dialect",
        choices=get_args(Dialect),
        help="what Arena-Hard's answers name a question by: uid since April 2025, question_id before; default: as in "
        "the questions",
    )
    parser.add_argument("--temperature", type=float, help="in place of the benchmark's")
    parser.add_argument("--top-p", type=float, help="in place of 1")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer; default: the benchmark's")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--engine", choices=get_args(EngineName), default="transformers")
    parser.add_argument("--url", default="", help="with --engine http: the server, such as http://localhost:8000")
    parser.add_argument("--served-model", default="", help="with --engine http: what the server calls the model")
    parser.add_argument("--batch-size", type=int, default=32, help="answers computed at once (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=64, help="with --engine http: requests under way at once")
    parser.add_argument(
        "--retries", type=int, default=6, help="with --engine http: further tries of a request (default: %(default)s)"
    )
    parser.add_argument("--device", help="such as cuda:1; default: the first GPU, or the CPU")
    return parser


if __name__ == "__main__":
    main()
