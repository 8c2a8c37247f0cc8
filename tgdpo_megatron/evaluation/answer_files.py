"""The files that three public benchmarks judge: a model's answers in their forms, and the commands of their judges."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tgdpo_megatron.bounded import read_json, read_json_lines
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.evaluation.questions import Question

LARGEST = 2**28
"""Most bytes of a file of answers that is one list."""
Dialect = Literal["uid", "question_id"]
"""How Arena-Hard's files name a question: since April 2025, and before."""


@dataclass(frozen=True)
class Said:
    """A model's answers to the turns of one question.

    Attributes:
        tokens: Length of each answer in tokens of the model's own tokenizer.
        finish_reasons: `stop` or `length` for each answer, as the engine says.
        seconds: When the last was given, since 1970.
    """

    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    finish_reasons: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Form:
    """The file of one benchmark, in one dialect.

    Attributes:
        usual: How many questions the benchmark has.
        temperature: That of a question.
        top_p, max_new_tokens: Of all questions.
        row: What the file holds for a question: gets the question, the answers, and the model's name.
        key: The field of a row that names its question.
        as_list: Whether the file is one JSON list, rather than JSON lines.
    """

    usual: Sequence[int]
    temperature: Callable[[Question], float]
    top_p: float
    max_new_tokens: int
    row: Callable[[Question, Said, str], dict[str, Any]]
    key: str
    as_list: bool = False

    @property
    def suffix(self) -> str:
        return ".json" if self.as_list else ".jsonl"


_CREATIVE, _CAREFUL, _OTHER = 0.7, 0.1, 0.7
_TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), _CREATIVE),
    **dict.fromkeys(("stem", "humanities"), _CAREFUL),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
}
"""Category of MT-Bench -> temperature of its answers, as FastChat has them; _OTHER for a category of the user's own."""


def form_of(benchmark: str, dialect: Dialect | None = None) -> Form:
    """The form of a benchmark's file.

    Args:
        dialect: Of arena-hard; the others have only one.
    """
    if benchmark == "mt-bench":
        return Form((80,), lambda asked: _TEMPERATURES.get(asked.category, _OTHER), 1.0, 1024, _mt_bench, "question_id")
    if benchmark == "alpaca-eval":
        # What SimPO's authors, whom TGDPO follows, sample Llama-3's answers with.
        return Form((805,), lambda _: 0.9, 1.0, 4096, _alpaca_eval, "instruction", as_list=True)
    if dialect == "question_id":
        return Form((500,), lambda _: 0.0, 1.0, 4096, _arena_hard_before, "question_id")
    return Form((500, 750), lambda _: 0.0, 1.0, 4096, _arena_hard, "uid")


def written(form: Form, questions: Sequence[Question], said: Sequence[Said], model: str) -> str:
    """The content of the file."""
    rows = [form.row(question, answers, model) for question, answers in zip(questions, said, strict=True)]
    if form.as_list:
        return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def check_written(form: Form, path: Path, questions: Sequence[Question]) -> None:
    """Refuse a file that does not answer every question, in their order.

    Raises:
        UserError: It lacks questions, or cannot be read.
    """
    what = "file of answers"
    rows = (
        read_json(path, what=what, limit=LARGEST)
        if form.as_list
        else [row for _, row in read_json_lines(path, what=what)]
    )
    given = [row.get(form.key) if isinstance(row, dict) else None for row in (rows if isinstance(rows, list) else [])]
    asked = [question.turns[0] if form.as_list else question.id for question in questions]
    if given != asked:
        lacking = [str(question.id) for question, key in zip(questions, asked, strict=True) if key not in given]
        wrong = f"lacks answers to questions {', '.join(lacking[:8])}" if lacking else "answers them in another order"
        raise UserError(f"{path}: {wrong}; delete it, and give the same command again.")


def _mt_bench(question: Question, said: Said, model: str) -> dict[str, Any]:
    return {
        "question_id": question.id,
        "answer_id": _answer_id(question, said, model),
        "model_id": model,
        "choices": [{"index": 0, "turns": list(said.texts)}],
        "tstamp": said.seconds,
    }


def _alpaca_eval(question: Question, said: Said, model: str) -> dict[str, Any]:
    dataset = {"dataset": question.row["dataset"]} if "dataset" in question.row else {}
    return {**dataset, "instruction": question.turns[0], "output": said.texts[0], "generator": model}


def _arena_hard(question: Question, said: Said, model: str) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": question.turns[0]},
        {"role": "assistant", "content": {"answer": said.texts[0]}},
    ]
    return {
        "uid": question.id,
        "ans_id": _answer_id(question, said, model),
        "model": model,
        "messages": messages,
        "tstamp": said.seconds,
        "metadata": _markdown(said),
    }


def _arena_hard_before(question: Question, said: Said, model: str) -> dict[str, Any]:
    return {
        "question_id": question.id,
        "answer_id": _answer_id(question, said, model),
        "model_id": model,
        "choices": [{"index": 0, "turns": [{"content": said.texts[0]}]}],
        "tstamp": said.seconds,
        "conv_metadata": _markdown(said),
    }


def _answer_id(question: Question, said: Said, model: str) -> str:
    """Tells answers apart; the same answer has the same."""
    return hashlib.sha256(json.dumps([question.id, said.texts, model]).encode()).hexdigest()[:22]


def _markdown(said: Said) -> dict[str, Any]:
    """What Arena-Hard's control of style reads: length, and marks of Markdown outside of blocks of code."""
    text = re.sub("```[^`]*```", "", said.texts[0])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, flags=re.MULTILINE))

    return {
        "token_len": said.tokens[0],
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


# ---------------------------------------------------------------- judges


def judge(benchmark: str, dialect: Dialect | None, file: Path, model: str, questions: Sequence[Question]) -> list[str]:
    """How the benchmark's own judge is run on a file: what it needs, as lines that begin with #, and its commands."""
    if benchmark == "mt-bench":
        return [
            "# In fastchat/llm_judge of lm-sys/FastChat, with its data/mt_bench; needs openai<1 and OPENAI_API_KEY,",
            "# and takes only judges of a list of its own; gpt-4, the usual one, is no longer served.",
            f"cp {file.absolute()} data/mt_bench/model_answer/",
            f"python gen_judgment.py --model-list {model} --judge-model gpt-4 --parallel 2",
            f"python show_result.py --model-list {model}",
        ]
    if benchmark == "alpaca-eval":
        return [
            "# With the package alpaca-eval; REFERENCE.json are the baseline's answers, of the same form. Needs",
            "# OPENAI_API_KEY, or OPENAI_CLIENT_CONFIG_PATH for another server. The annotator's own model,",
            "# gpt-4-1106-preview, is no longer served: name an annotator whose model you can reach.",
            f"alpaca_eval --model_outputs {file.absolute()} --reference_outputs REFERENCE.json "
            "--annotators_config weighted_alpaca_eval_gpt4_turbo",
        ]
    version = "v2.0" if any("subcategory" in question.row for question in questions) else "v0.1"
    if dialect == "question_id":
        return [
            "# In lmarena/arena-hard-auto as it was before April 2025, with its data/arena-hard-v0.1. Put the judge",
            f"# and {model} into config/judge_config.yaml, and the judge's server into config/api_config.yaml;",
            "# gpt-4-1106-preview, the usual judge, is no longer served.",
            f"cp {file.absolute()} data/arena-hard-v0.1/model_answer/",
            "python gen_judgment.py --setting-file config/judge_config.yaml --endpoint-file config/api_config.yaml",
            "python show_result.py",
        ]
    bench = f"arena-hard-{version}"
    return [
        f"# In lmarena/arena-hard-auto, with its data/{bench}. Put the judge and {model} into config/{bench}.yaml, and",
        "# the judge's server into config/api_config.yaml; gpt-4-1106-preview, v0.1's judge, is no longer served.",
        "# The first command counts token_len again in gpt-4o's tokens, by which lengths are controlled.",
        f"python utils/add_markdown_info.py --dir {file.absolute().parent} --output-dir data/{bench}/model_answer",
        f"python gen_judgment.py --setting-file config/{bench}.yaml --endpoint-file config/api_config.yaml",
        *(
            f"python show_result.py -b {bench} -j JUDGE -c {category}"
            for category in dict.fromkeys(question.category for question in questions if question.category)
        ),
    ]
