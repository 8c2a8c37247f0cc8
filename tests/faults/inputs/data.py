"""Files of pairs, of rewards, of templates and of prompts."""

from __future__ import annotations

import gzip
from typing import Any

from tests.conftest import PAIRS
from tests.faults.inputs.entry import BadInput, score, train

GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
REWARDS = ("loss.type=tgdpo", "loss.token_rewards=file", "scores.reward_file=r.jsonl")
CONTRASTIVE = ("loss.type=tgdpo", "loss.token_rewards=contrastive", "scores.contrastive_prompts=p.yaml")


def pairs(name: str, file: str, content: Any, says: str, *changes: str, **more: Any) -> BadInput:
    """A file of pairs with something wrong."""
    return BadInput(name, train(f"data.train={file}", *changes), says, files={file: content}, **more)


def template(name: str, text: str | bytes, says: str, **more: Any) -> BadInput:
    """A chat template with something wrong."""
    return BadInput(name, train("data.template=t.jinja"), says, files={"t.jinja": text}, **more)


def rewards(name: str, content: str, says: str, **more: Any) -> BadInput:
    """A file of rewards with something wrong."""
    return BadInput(name, train("--recipe=tgdpo_tiny", *REWARDS), says, files={"r.jsonl": content}, **more)


def prompts(name: str, content: str, says: str) -> BadInput:
    """Contrastive prompts with something wrong."""
    return BadInput(name, score("--recipe=tgdpo_tiny", *CONTRASTIVE), says, files={"p.yaml": content})


ENTRIES = [
    BadInput(
        "no pairs given",
        ("recipes.train", "--recipe=dpo_tiny", "model.checkpoint=megatron", "train.output=out"),
        "data.train is not set; give a file of preference pairs, a saved datasets folder, or a data set on a hub.",
    ),
    BadInput(
        "a file that is not there",
        train("data.train=no.jsonl"),
        "no.jsonl: no such data file, and no data set on a hub, which is "
        "ORGANISATION/NAME[@REVISION][:[CONFIG/]SPLIT].",
    ),
    BadInput(
        "a folder of something else",
        train("data.train=hf"),
        "hf: neither a folder of prepared pairs (summary.json, pairs.safetensors) nor a saved datasets "
        "folder (state.json); give one of these, or a .json, .jsonl, .csv or .tsv file, perhaps "
        "compressed as .gz or .zst, a .parquet file.",
    ),
    pairs("an empty file", "p.jsonl", "", "p.jsonl: the file is empty."),
    pairs("blank lines alone", "p.jsonl", "\n\n\n", "p.jsonl: the file holds no pairs."),
    pairs("an empty list", "p.json", "[]", "p.json: the file holds no pairs."),
    pairs(
        "a spreadsheet",
        "p.xlsx",
        b"PK\3\4",
        "p.xlsx: pairs are read from a .json, .jsonl, .csv or .tsv file, perhaps compressed as .gz or "
        ".zst, a .parquet file or a saved datasets folder, not from '.xlsx'.",
    ),
    pairs(
        "a line that is no JSON",
        "p.jsonl",
        GOOD + '{"prompt": "a", "chosen": \n',
        "p.jsonl line 2: not valid JSON (Expecting value).",
    ),
    pairs(
        "a line nested 100,000 deep",
        "p.jsonl",
        GOOD + "[" * 100_000 + "\n",
        "p.jsonl line 2: lists or objects are nested too deeply.",
    ),
    pairs(
        "a line with 5,000 digits",
        "p.jsonl",
        GOOD + '{"prompt": ' + "9" * 5000 + "}\n",
        "p.jsonl line 2: holds an integer of thousands of digits.",
    ),
    pairs(
        "a line that is a list",
        "p.jsonl",
        GOOD + "[1, 2]\n",
        "p.jsonl line 2: expected an object with named columns, found list; the data is read as trl.",
    ),
    pairs(
        "a line in Latin-1",
        "p.jsonl",
        GOOD.encode() + b'{"prompt": "\xe9", "chosen": "b", "rejected": "c"}\n',
        "p.jsonl: byte 60 is not UTF-8 text.",
    ),
    pairs(
        "half a surrogate pair",
        "p.jsonl",
        GOOD + GOOD.replace('"b"', '"\\ud800"'),
        "train.global_batch_size=4 is more than the 1 pairs of p.jsonl; lower it.",
    ),
    pairs(
        "an object in place of a list", "p.json", {"data": PAIRS}, "p.json: expected a JSON list of pairs, found dict."
    ),
    pairs(
        "columns of no format",
        "p.jsonl",
        '{"question": "a", "good": "b", "bad": "c"}\n',
        "p.jsonl: not a known format of preference pairs; with 'data.columns={prompt: question, chosen: "
        "good, rejected: bad}' it is read as trl; the first row has question (string), good (string), "
        "bad (string).",
    ),
    pairs(
        "pairs of the KTO kind",
        "p.jsonl",
        '{"prompt": "a", "completion": "b", "label": true}\n',
        "p.jsonl: holds single answers marked good or bad (data for KTO), not preference pairs, which "
        "have two answers to each prompt; the first row has prompt (string), completion (string), label "
        "(bool).",
    ),
    pairs(
        "a chosen answer that is a number",
        "p.jsonl",
        GOOD + GOOD.replace('"b"', "7"),
        "p.jsonl line 2: 'chosen' must hold string, found int; the data is read as trl.",
    ),
    pairs(
        "a rejected answer that is null",
        "p.jsonl",
        GOOD + GOOD.replace('"c"', "null"),
        "p.jsonl line 2: rejected missing; the row has prompt, chosen, rejected; the data is read as trl.",
    ),
    pairs(
        "a pair without rejected answer",
        "p.jsonl",
        GOOD + '{"prompt": "a", "chosen": "b"}\n',
        "p.jsonl line 2: rejected missing; the row has prompt, chosen; the data is read as trl.",
    ),
    pairs(
        "both answers the same in all pairs",
        "p.jsonl",
        4 * GOOD.replace('"c"', '"b"'),
        "p.jsonl: no pair is left to train on (4 dropped: chosen and rejected are the same; the data is read as trl).",
        late=True,
    ),
    pairs(
        "empty answers in all pairs",
        "p.jsonl",
        4 * GOOD.replace('"b"', '""').replace('"c"', '""'),
        "p.jsonl: no pair is left to train on (4 dropped: the chosen response is empty; the data is read as trl).",
        late=True,
    ),
    pairs(
        "a special token in a text",
        "p.jsonl",
        4 * GOOD.replace('"b"', '"b<|end|>"'),
        "p.jsonl line 1: the text holds '<|end|>', a special token or a mark of a chat template; if the "
        "template is written in the texts already, take them as they are with data.template=none; else "
        "leave such rows out with data.special_tokens=drop, or keep them with data.special_tokens=keep.",
        late=True,
    ),
    pairs(
        "a role that no chat has",
        "p.jsonl",
        '{"prompt": [{"role": "boss", "content": "a"}], "chosen": "b", "rejected": "c"}\n',
        "p.jsonl line 1: 'prompt' has a turn of role 'boss'; known are system, user, human, assistant, "
        "gpt, bot, model; the data is read as nemo_rl_binary.",
    ),
    pairs(
        "a table with a cell too few",
        "p.csv",
        "prompt,chosen,rejected\na,b,c\na,b\n",
        "p.csv row 2: 2 cells, where the first line names 3 columns.",
    ),
    pairs(
        "a table separated by semicolons",
        "p.csv",
        "prompt;chosen;rejected\na;b;c\n",
        "p.csv: its cells seem to be separated by ';'; separate them by commas.",
    ),
    pairs(
        "a table with a column twice",
        "p.csv",
        "prompt,chosen,chosen\na,b,c\n",
        "p.csv: the first line names a column twice.",
    ),
    pairs(
        "a table with an open quote",
        "p.csv",
        'prompt,chosen,rejected\na,b,"c\n',
        "p.csv line 2: not valid CSV (unexpected end of data).",
    ),
    pairs(
        "a gzip file that is none",
        "p.jsonl.gz",
        b"not compressed",
        "p.jsonl.gz: cannot be uncompressed (Not a gzipped file (b'no')).",
    ),
    pairs(
        "a gzip file that was cut",
        "p.jsonl.gz",
        gzip.compress(1000 * GOOD.encode())[:-20],
        "p.jsonl.gz: cannot be uncompressed (Compressed file ended before the end-of-stream marker was reached).",
    ),
    pairs(
        "a Parquet file that was cut",
        "p.parquet",
        b"PAR1" + b"\0" * 100,
        "p.parquet: cannot be read (Parquet magic bytes not found in footer).",
    ),
    pairs(
        "a saved folder whose part is missing",
        "p/state.json",
        {"_data_files": [{"filename": "a.arrow"}]},
        "p/a.arrow: this part of the saved dataset is missing.",
        "data.train=p",
    ),
    pairs(
        "a saved folder described by a list nested deeply",
        "p/state.json",
        "[" * 100_000,
        "p/state.json: lists or mappings are nested more than 100 deep.",
        "data.train=p",
    ),
    pairs(
        "prepared pairs of an earlier version",
        "p/summary.json",
        {"version": 1},
        "p: the pairs were prepared by another version of this program; prepare them again.",
        "data.train=p",
        late=True,
    ),
    pairs(
        "prepared pairs whose summary is nested deeply",
        "p/summary.json",
        "[" * 100_000,
        "p/summary.json: lists or mappings are nested more than 100 deep.",
        "data.train=p",
        late=True,
    ),
    pairs(
        "another format than the file has",
        "p.jsonl",
        4 * GOOD,
        "p.jsonl: data.format=hh_rlhf needs chosen (transcript), rejected (transcript); the first row "
        "has prompt (string), chosen (string), rejected (string).",
        "data.format=hh_rlhf",
    ),
    pairs(
        "a format that is not known",
        "p.jsonl",
        4 * GOOD,
        "command line: data.format='sharegpt' is refused: it should be 'trl', 'trl_messages', "
        "'trl_implicit_prompt', 'trl_implicit_prompt_messages', 'llama_factory', "
        "'llama_factory_sharegpt', 'llama_factory_openai', 'ultrafeedback_binarized', 'nemo_rl', "
        "'nemo_rl_binary', 'hh_rlhf', 'hh_rlhf_prompt', 'pairs', 'pairs_of_conversations', "
        "'scored_lists', 'llama_factory_output', 'swift_messages', 'swift_rejected_messages', "
        "'openai_preference', 'lmflow', 'vertex_gemini', 'amazon_nova', 'paddlenlp', "
        "'helpsteer2_preference', 'helpsteer3_preference', 'pku_saferlhf', 'shp', 'halos', 'webgpt', "
        "'summarize_from_feedback', 'alpaca_farm', 'arena', 'arena_table', 'ultrafeedback' or 'nectar'.",
        "data.format=sharegpt",
    ),
    pairs(
        "a mapping to a column that is not there",
        "p.jsonl",
        4 * GOOD,
        "p.jsonl: data.columns names the column 'ask', which no row has; known are prompt, chosen, rejected.",
        "data.columns={prompt: ask}",
    ),
    BadInput(
        "held-out pairs that are not there",
        train("data.validation=no.jsonl"),
        "no.jsonl: no such data file, and no data set on a hub, which is "
        "ORGANISATION/NAME[@REVISION][:[CONFIG/]SPLIT].",
    ),
    BadInput(
        "a data set on a hub, without network",
        train("data.train=nobody/pairs:train"),
        "nobody/pairs:train: no such file or folder, no */huggingface/hub/datasets--nobody--pairs in the "
        "hub's cache, and HF_HUB_OFFLINE=1 forbids asking https://huggingface.co; set HF_HUB_OFFLINE=0, "
        "or fill the cache where there is a network.",
    ),
    # Templates.
    BadInput(
        "a template that is not there",
        train("data.template=t.jinja"),
        "data.template=t.jinja: no such file; give a Jinja chat template, or none for texts as they are.",
    ),
    template("an empty template", "", "data.template=t.jinja: the file is empty."),
    template("a template in Latin-1", b"\xe9", "data.template=t.jinja: the file is not UTF-8 text."),
    template(
        "a template that is no Jinja",
        "{% for %}",
        "data.template=t.jinja: the chat template has a mistake in line 1 (Expected an expression, got "
        "'end of statement block'); mend it.",
        late=True,
    ),
    template(
        "a template that loops 10^10 times",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "data.template=t.jinja: the chat template did not finish a conversation within 10 seconds; mend it.",
        seconds=60,
        late=True,
    ),
    template(
        "a template that fills the memory",
        "{{ 'a' * 10 ** 10 }}",
        "data.template=t.jinja: the chat template takes more than 1024 MiB of memory; mend it.",
        seconds=60,
        late=True,
    ),
    template(
        "a template that calls itself",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "data.template=t.jinja: the chat template fails (RecursionError: maximum recursion depth exceeded); mend it.",
        seconds=60,
        late=True,
    ),
    template(
        "a template that reaches for Python",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "data.template=t.jinja: the chat template refuses the conversation (access to attribute "
        "'__class__' of 'str' object is unsafe.); mend it.",
        late=True,
    ),
    template(
        "a template that raises",
        "{{ raise_exception('no') }}",
        "data.template=t.jinja: the chat template refuses the conversation (no); mend it.",
        late=True,
    ),
    template(
        "a template that loses the answer",
        "{% for m in messages %}x{% endfor %}",
        "data.template=t.jinja: the chat template loses the assistant's answer; give "
        "data.template=FILE.jinja that writes it.",
        late=True,
    ),
    # Rewards and prompts.
    BadInput(
        "rewards that are not there",
        train("--recipe=tgdpo_tiny", *REWARDS),
        "scores.reward_file=r.jsonl: no such file.",
    ),
    rewards("a line of rewards that is no JSON", "{\n", "r.jsonl line 1: not valid JSON.", late=True),
    rewards("a line of rewards nested 100,000 deep", "[" * 100_000, "r.jsonl line 1: not valid JSON.", late=True),
    rewards(
        "rewards without a row",
        '{"chosen": [], "rejected": []}\n',
        "r.jsonl line 1: 'row' must be the number of the pair's row in the data file.",
        late=True,
    ),
    rewards(
        "rewards of a row that is not there",
        '{"row": 99, "chosen": [1], "rejected": [1]}\n',
        "r.jsonl: no rewards for row 1 of pairs.jsonl; add a line for that row.",
        late=True,
    ),
    rewards(
        "too few rewards for a response",
        '{"row": 1, "chosen": [1], "rejected": [1]}\n',
        "r.jsonl line 1: the chosen response of row 1 of pairs.jsonl has 6 tokens, its end-of-turn token "
        "included, but 1 rewards.",
        late=True,
    ),
    rewards(
        "a reward that is not finite",
        '{"row": 1, "chosen": [[0, 3, 1e999]], "rejected": []}\n',
        "r.jsonl line 1: the chosen response of row 1 of pairs.jsonl has a reward that is not a finite number (inf).",
        late=True,
    ),
    prompts(
        "prompts that are no YAML",
        "better: [\n",
        "p.yaml line 2: not valid YAML (expected the node content, but found '<stream end>').",
    ),
    prompts(
        "prompts without a placeholder",
        "better: Be good.\nworse: Be bad.\n",
        "p.yaml: the template 'better' has no placeholder {instruction}; put it where the task goes.",
    ),
    prompts(
        "prompts with an alias bomb",
        "better: &a [x, x]\nworse: [" + "*a, " * 60_000 + "*a]\n",
        "p.yaml: has more than 100,000 values, with its aliases written out; this is too many.",
    ),
]
