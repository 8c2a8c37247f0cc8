"""Files of pairs, of rewards, of templates and of prompts."""

from __future__ import annotations

import gzip
from typing import Any

from tests.conftest import PAIRS
from tests.faults.inputs.entry import BadInput, score, train

GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
REWARDS = ("loss.type=tgdpo", "loss.token_rewards=file", "scores.reward_file=r.jsonl")
CONTRASTIVE = ("loss.type=tgdpo", "loss.token_rewards=contrastive", "scores.contrastive_prompts=p.yaml")


def pairs(name: str, file: str, content: Any, says: str, *changes: str) -> BadInput:
    """A file of pairs with something wrong."""
    return BadInput(name, train(f"data.train={file}", *changes), says, files={file: content})


def template(name: str, text: str | bytes, says: str, **more: Any) -> BadInput:
    """A chat template with something wrong."""
    return BadInput(name, train("data.template=t.jinja"), says, files={"t.jinja": text}, **more)


def rewards(name: str, content: str, says: str) -> BadInput:
    """A file of rewards with something wrong."""
    return BadInput(name, train("--recipe=tgdpo_tiny", *REWARDS), says, files={"r.jsonl": content})


def prompts(name: str, content: str, says: str) -> BadInput:
    """Contrastive prompts with something wrong."""
    return BadInput(name, score("--recipe=tgdpo_tiny", *CONTRASTIVE), says, files={"p.yaml": content})


ENTRIES = [
    BadInput(
        "no pairs given", ("recipes.train", "--recipe=dpo_tiny", "model.checkpoint=megatron", "train.output=out"), "?"
    ),
    BadInput("a file that is not there", train("data.train=no.jsonl"), "?"),
    BadInput("a folder of something else", train("data.train=hf"), "?"),
    pairs("an empty file", "p.jsonl", "", "?"),
    pairs("blank lines alone", "p.jsonl", "\n\n\n", "?"),
    pairs("an empty list", "p.json", "[]", "?"),
    pairs("a spreadsheet", "p.xlsx", b"PK\3\4", "?"),
    pairs("a line that is no JSON", "p.jsonl", GOOD + '{"prompt": "a", "chosen": \n', "?"),
    pairs("a line nested 100,000 deep", "p.jsonl", GOOD + "[" * 100_000 + "\n", "?"),
    pairs("a line with 5,000 digits", "p.jsonl", GOOD + '{"prompt": ' + "9" * 5000 + "}\n", "?"),
    pairs("a line that is a list", "p.jsonl", GOOD + "[1, 2]\n", "?"),
    pairs("a line in Latin-1", "p.jsonl", GOOD.encode() + b'{"prompt": "\xe9", "chosen": "b", "rejected": "c"}\n', "?"),
    pairs("half a surrogate pair", "p.jsonl", GOOD + GOOD.replace('"b"', '"\\ud800"'), "?"),
    pairs("an object in place of a list", "p.json", {"data": PAIRS}, "?"),
    pairs("columns of no format", "p.jsonl", '{"question": "a", "good": "b", "bad": "c"}\n', "?"),
    pairs("pairs of the KTO kind", "p.jsonl", '{"prompt": "a", "completion": "b", "label": true}\n', "?"),
    pairs("a chosen answer that is a number", "p.jsonl", GOOD + GOOD.replace('"b"', "7"), "?"),
    pairs("a rejected answer that is null", "p.jsonl", GOOD + GOOD.replace('"c"', "null"), "?"),
    pairs("a pair without rejected answer", "p.jsonl", GOOD + '{"prompt": "a", "chosen": "b"}\n', "?"),
    pairs("both answers the same in all pairs", "p.jsonl", 4 * GOOD.replace('"c"', '"b"'), "?"),
    pairs("empty answers in all pairs", "p.jsonl", 4 * GOOD.replace('"b"', '""').replace('"c"', '""'), "?"),
    pairs("a special token in a text", "p.jsonl", 4 * GOOD.replace('"b"', '"b<|end|>"'), "?"),
    pairs(
        "a role that no chat has",
        "p.jsonl",
        '{"prompt": [{"role": "boss", "content": "a"}], "chosen": "b", "rejected": "c"}\n',
        "?",
    ),
    pairs("a table with a cell too few", "p.csv", "prompt,chosen,rejected\na,b,c\na,b\n", "?"),
    pairs("a table separated by semicolons", "p.csv", "prompt;chosen;rejected\na;b;c\n", "?"),
    pairs("a table with a column twice", "p.csv", "prompt,chosen,chosen\na,b,c\n", "?"),
    pairs("a table with an open quote", "p.csv", 'prompt,chosen,rejected\na,b,"c\n', "?"),
    pairs("a gzip file that is none", "p.jsonl.gz", b"not compressed", "?"),
    pairs("a gzip file that was cut", "p.jsonl.gz", gzip.compress(1000 * GOOD.encode())[:-20], "?"),
    pairs("a Parquet file that was cut", "p.parquet", b"PAR1" + b"\0" * 100, "?"),
    pairs(
        "a saved folder whose part is missing",
        "p/state.json",
        {"_data_files": [{"filename": "a.arrow"}]},
        "?",
        "data.train=p",
    ),
    pairs("a saved folder described by a list nested deeply", "p/state.json", "[" * 100_000, "?", "data.train=p"),
    pairs("prepared pairs of an earlier version", "p/summary.json", {"version": 1}, "?", "data.train=p"),
    pairs("prepared pairs whose summary is nested deeply", "p/summary.json", "[" * 100_000, "?", "data.train=p"),
    pairs("another format than the file has", "p.jsonl", 4 * GOOD, "?", "data.format=hh_rlhf"),
    pairs("a format that is not known", "p.jsonl", 4 * GOOD, "?", "data.format=sharegpt"),
    pairs("a mapping to a column that is not there", "p.jsonl", 4 * GOOD, "?", "data.columns={prompt: ask}"),
    BadInput("held-out pairs that are not there", train("data.validation=no.jsonl"), "?"),
    BadInput("a data set on a hub, without network", train("data.train=nobody/pairs:train"), "?"),
    # Templates.
    BadInput("a template that is not there", train("data.template=t.jinja"), "?"),
    template("an empty template", "", "?"),
    template("a template in Latin-1", b"\xe9", "?"),
    template("a template that is no Jinja", "{% for %}", "?"),
    template(
        "a template that loops 10^10 times",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "?",
        seconds=30,
    ),
    template("a template that fills the memory", "{{ 'a' * 10 ** 10 }}", "?", seconds=30),
    template("a template that calls itself", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "?", seconds=30),
    template("a template that reaches for Python", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "?"),
    template("a template that raises", "{{ raise_exception('no') }}", "?"),
    template("a template that loses the answer", "{% for m in messages %}x{% endfor %}", "?"),
    # Rewards and prompts.
    BadInput("rewards that are not there", train("--recipe=tgdpo_tiny", *REWARDS), "?"),
    rewards("a line of rewards that is no JSON", "{\n", "?"),
    rewards("a line of rewards nested 100,000 deep", "[" * 100_000, "?"),
    rewards("rewards without a row", '{"chosen": [], "rejected": []}\n', "?"),
    rewards("rewards of a row that is not there", '{"row": 99, "chosen": [1], "rejected": [1]}\n', "?"),
    rewards("too few rewards for a response", '{"row": 1, "chosen": [1], "rejected": [1]}\n', "?"),
    rewards("a reward that is not finite", '{"row": 1, "chosen": [[0, 3, 1e999]], "rejected": []}\n', "?"),
    prompts("prompts that are no YAML", "better: [\n", "?"),
    prompts("prompts without a placeholder", "better: Be good.\nworse: Be bad.\n", "?"),
    prompts("prompts with an alias bomb", "better: &a [x, x]\nworse: [" + "*a, " * 60_000 + "*a]\n", "?"),
]
