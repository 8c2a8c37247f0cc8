"""Questions of benchmarks, files of answers, and models that are compared."""

from __future__ import annotations

import json
from typing import Any

from tests.faults.inputs.entry import BadInput

QUESTION = {"question_id": 81, "category": "math", "turns": ["Add 2 and 3.", "Add 4."]}


def questions(
    name: str, rows: list[Any], says: str, *options: str, benchmark: str = "mt-bench", **more: Any
) -> BadInput:
    """A file of questions with something wrong."""
    content = "".join(json.dumps(row) + "\n" for row in rows)
    command = ("tools.answers", benchmark, "hf", "q.jsonl", "--output", "out", "--max-new-tokens", "4", *options)
    return BadInput(name, command, says, files={"q.jsonl": content, **more.pop("files", {})}, **more)


def compared(name: str, says: str, *arguments: str, **more: Any) -> BadInput:
    """A comparison with something wrong."""
    return BadInput(name, ("tools.compare", "--output", "out", *arguments), says, **more)


def answered(prompt: str, n: int = 1, **more: Any) -> str:
    """A line of a file of answers."""
    of_answers = {
        "all_generated_responses": ["Five."] * n,
        "finish_reasons": ["stop"] * n,
        "num_tokens": [3] * n,
        "seeds": [0] * n,
    }
    named: dict[str, Any] = {"prompt": prompt, "format_prompt": prompt, "prompt_id": "0", "model": {}, "source": {}}
    return json.dumps({**named, **of_answers, "sampling": {}, **more}) + "\n"


def given(name: str, other: str, says: str) -> BadInput:
    """Files of answers of which the second is wrong; the first answers two prompts."""
    files = {"a.jsonl": answered("Add 2 and 3.") + answered("Name a colour."), "b.jsonl": other}
    arguments = ("a=hf", "b=hf", "--answers", "a.jsonl", "b.jsonl")
    return compared(name, says, *arguments, files=files, leaves=("out/",))


ENTRIES = [
    questions(
        "a question that is there twice",
        [QUESTION, QUESTION],
        "q.jsonl line 2: has the id 81 of line 1; give each question its own.",
    ),
    questions(
        "a question without an id",
        [{"category": "math", "turns": ["a", "b"]}],
        "q.jsonl line 1: the question has no question_id; give the questions of mt-bench as they are published.",
    ),
    questions(
        "a question of one turn where two are asked",
        [{**QUESTION, "turns": ["a"]}],
        "q.jsonl line 1: the question has 1 turn, and MT-Bench's have two; give the questions of mt-bench as they are "
        "published.",
    ),
    questions("no questions", [], "q.jsonl: holds no questions."),
    questions(
        "questions of another benchmark",
        [QUESTION],
        "q.jsonl line 1: instruction is no text; give the questions of alpaca-eval as they are published.",
        benchmark="alpaca-eval",
    ),
    questions(
        "a dialect where there is one",
        [QUESTION],
        "--dialect uid is refused: mt-bench has only one; leave it out.",
        "--dialect",
        "uid",
    ),
    questions(
        "a model's name that is a path",
        [QUESTION],
        "--model-id '../m' is refused: it names a file, so letters, digits, '.', '_' and '-' only.",
        "--model-id",
        "../m",
    ),
    questions(
        "a question longer than the model",
        [{**QUESTION, "turns": ["word " * 400, "b"]}],
        "question 81, turn 1: the prompt has * tokens, and the model takes 256 together with its answer; leave the "
        "question out.",
        leaves=("out/*",),
        late=True,
    ),
    compared("a comparison on nothing", "nothing to compare on: give --pairs, or --prompts, or both.", "hf", "a=hf"),
    compared(
        "a comparison of one model",
        "a comparison needs the model that was started from and at least one other; give both.",
        *("hf", "--pairs", "pairs.jsonl"),
    ),
    compared(
        "two models of one name",
        "hf: another model is called so, too; name one of them, as in NAME=hf.",
        *("hf", "hf", "--pairs", "pairs.jsonl"),
    ),
    compared(
        "a Megatron checkpoint among models that are compared",
        "megatron: is a Megatron checkpoint; export it first (python -m tools.convert_megatron_to_hf megatron FOLDER), "
        "and compare the folder.",
        *("hf", "megatron", "--pairs", "pairs.jsonl"),
    ),
    compared(
        "a file of a model that is compared",
        "hf/config.json: is a file; give the folder that it is in, hf.",
        *("hf", "hf/config.json", "--pairs", "pairs.jsonl"),
    ),
    compared(
        "prompts and their answers",
        "--prompts and --answers: give prompts to answer, or the files of their answers, not both.",
        *("hf", "a=hf", "--prompts", "pairs.jsonl", "--answers", "a.jsonl", "b.jsonl"),
    ),
    compared(
        "settings of a sampling that was done before",
        "--temperature 0.7: says how prompts are answered, and none are given with --prompts; leave it out.",
        *("hf", "a=hf", "--temperature", "0.7", "--answers", "a.jsonl", "b.jsonl"),
    ),
    compared(
        "a language model as a scorer",
        "hf: holds 'LlamaForCausalLM', which is no reward model that is known; known are sequence classifiers with one "
        "label (…ForSequenceClassification), ArmoRM and PairRM.",
        *("hf", "a=hf", "--prompts", "pairs.jsonl", "--scorer", "hf"),
    ),
    compared(
        "a reward model among models that are compared",
        "scorer: holds 'LlamaForSequenceClassification', which is no language model; give the models that answer, and "
        "a reward model with --scorer.",
        *("hf", "scorer", "--prompts", "pairs.jsonl"),
    ),
    compared(
        "a setting after the files of answers",
        "--answers … data.template=none: is a setting, not a file; give it before --answers.",
        *("hf", "a=hf", "--answers", "a.jsonl", "b.jsonl", "data.template=none"),
    ),
    compared(
        "no KL divergence where there is none",
        "--no-kl: a KL divergence is made of answers, and there are none; leave it out.",
        *("hf", "a=hf", "--pairs", "pairs.jsonl", "--no-kl"),
    ),
    compared(
        "a device that is not there to compare on",
        "--device cuda:99: cannot be used (*); give another, such as cpu.",
        *("hf", "a=hf", "--pairs", "pairs.jsonl", "--device", "cuda:99"),
        leaves=("out/",),
    ),
    given(
        "answers that lack a prompt",
        answered("Add 2 and 3."),
        "b.jsonl: lacks answers to 1 prompt of a.jsonl, such as 'Name a colour.'; sample them, or leave them out of "
        "both files.",
    ),
    given(
        "answers to a prompt twice",
        2 * answered("Add 2 and 3."),
        "b.jsonl: answers 'Add 2 and 3.' twice; leave one of them out.",
    ),
    given(
        "more answers to one prompt than to another",
        answered("Add 2 and 3.") + answered("Name a colour.", 2),
        "b.jsonl: has 1 answer to one prompt and 2 answers to another; give as many.",
    ),
    given(
        "answers of another model",
        answered("Add 2 and 3.") + answered("Name a colour.", model={"name": "runs/dpo/hf", "fingerprint": "0" * 64}),
        "b.jsonl: has answers of runs/dpo/hf, whose files are not those of b now; give one file for each model, in the "
        "order of the models, or sample the answers again.",
    ),
]
