"""What tools.sample is given: prompts, settings, engines, and files that hold something else already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.faults.inputs.entry import BadInput, edit_json, remove
from tests.faults.inputs.environment import full

ASKED = '{"prompt": "Say hello."}\n'
ANSWERED = {
    "prompt": "Say hello.",
    "format_prompt": "<|user|>Say hello.",
    "prompt_id": "00" * 32,
    "all_generated_responses": ["Hello."],
    "finish_reasons": ["stop"],
    "num_tokens": [3],
    "seeds": [5],
    "model": {"name": "hf", "fingerprint": "00" * 32},
    "sampling": {"engine": "http", "n": 1},
    "source": {"row": 1},
}


def sample(*options: str, model: str = "hf", prompts: str = "p.jsonl") -> tuple[str, ...]:
    """The command of a small sampling to `out.jsonl`."""
    return ("tools.sample", model, prompts, "--output=out.jsonl", "--n=1", "--max-new-tokens=4", *options)


def option(name: str, says: str, *options: str, **more: Any) -> BadInput:
    """A command line with something wrong, and prompts with nothing wrong."""
    return BadInput(name, sample(*options, **more), says, files={"p.jsonl": ASKED})


def asked(name: str, content: str, says: str, *options: str, file: str = "p.jsonl") -> BadInput:
    """A file of prompts with something wrong."""
    return BadInput(name, sample(*options, prompts=file), says, files={file: content})


def there(name: str, content: str | bytes, says: str) -> BadInput:
    """A file of answers with something else in it."""
    return BadInput(name, sample(), says, files={"p.jsonl": ASKED, "out.jsonl": content})


def _exported(folder: Path, *names: str) -> None:
    for name in names:
        shutil.copytree(folder / "hf", folder / "run" / "hf" / name)


ENTRIES = [
    BadInput(
        "no file of answers",
        ("tools.sample", "hf", "pairs.jsonl"),
        "command line: --output must be given; see python -m tools.sample --help.",
    ),
    option("no answers", "--n 0: give 1 or more.", "--n=0"),
    option(
        "a negative temperature",
        "temperature -1.0 is refused: it should be a number from 0 on; 0 takes the likeliest token.",
        "--temperature=-1",
    ),
    option(
        "a temperature that is no number",
        "temperature nan is refused: it should be a number from 0 on; 0 takes the likeliest token.",
        "--temperature=nan",
    ),
    option(
        "several answers at temperature 0",
        "--temperature 0: all 3 answers to a prompt would be the same; give --n 1, or a higher temperature.",
        "--temperature=0",
        "--n=3",
    ),
    option(
        "answers in a file that is named as SimPO's",
        "--output out.json: JSON lines are written; give a name that ends in .jsonl.",
        "--output=out.json",
    ),
    option(
        "an option by its name in Python",
        "command line: --max_new_tokens is called --max-new-tokens here; see python -m tools.sample --help.",
        "--max_new_tokens",
        "4",
    ),
    option(
        "an option by its name elsewhere",
        "command line: --num-samples is called --n here; see python -m tools.sample --help.",
        "--num-samples",
        "4",
    ),
    option(
        "top-p above 1", "top_p 1.5 is refused: it should be a probability above 0; 1 keeps every token.", "--top-p=1.5"
    ),
    option("top-k below 0", "top_k -1 is refused: it should be a number of tokens; 0 keeps every token.", "--top-k=-1"),
    option(
        "no room for an answer", "max_new_tokens 0 is refused: it should be at least one token.", "--max-new-tokens=0"
    ),
    option(
        "a part that is none", "--shard 0/4: give i/n, such as 1/4, 2/4, 3/4 and 4/4 for four parts.", "--shard=0/4"
    ),
    option(
        "more parts than prompts",
        "--shard 1/4: this part of the 1 prompts is empty; make fewer parts.",
        "--shard=1/4",
    ),
    option(
        "a setting that sampling does not read",
        "data.max_length=64: changes nothing where answers are sampled; settings here are "
        "data.chat_template_kwargs, data.columns, data.format, data.special_tokens, data.template.",
        "data.max_length=64",
    ),
    option(
        "a server without an address",
        "--engine http: say with --url where the server listens, such as http://localhost:8000.",
        "--engine=http",
    ),
    option(
        "an address for the other engine",
        "--url http://localhost:1: is read with --engine http; give that too.",
        "--url=http://localhost:1",
    ),
    option(
        "an address that is none",
        "--url localhost: is no server's address, such as http://localhost:8000.",
        "--engine=http",
        "--url=localhost",
    ),
    option(
        "a key in the address",
        "--url: give the key in the environment variable TGDPO_API_KEY, not in the address.",
        "--engine=http",
        "--url=http://me:secret@localhost:1",
    ),
    option(
        "a server that is down",
        "http://127.0.0.1:1: no server answers there (Connection refused); start one, or wait until it has loaded its "
        "model.",
        "--engine=http",
        "--url=http://127.0.0.1:1",
    ),
    option(
        "a device that is not there to sample on",
        "--device cuda:99: cannot be used (*); give another, such as cpu.",
        "--device=cuda:99",
    ),
    option("a model that is not there to sample from", "no: no such folder; a model on a hub is named *.", model="no"),
    option(
        "a Megatron checkpoint to sample from",
        "megatron: is a Megatron checkpoint; export it first (python -m tools.convert_megatron_to_hf megatron "
        "FOLDER), and sample from the folder.",
        model="megatron",
    ),
    option(
        "a run to sample from",
        "run: no config.json there; give a folder with a HuggingFace model.",
        model="run",
    ),
    BadInput(
        "a run whose export is meant",
        sample(model="run", prompts="pairs.jsonl"),
        "run: no config.json there; give run/hf/iter-0000002, which has one.",
        make=lambda folder: _exported(folder, "iter-0000001", "iter-0000002"),
    ),
    BadInput(
        "a model without weights to sample from",
        sample(prompts="pairs.jsonl"),
        "hf: no model.safetensors there; other formats than safetensors are not read, because they would have to be "
        "unpickled.",
        make=remove("hf/model.safetensors"),
    ),
    BadInput(
        "code that comes with a model",
        sample(prompts="pairs.jsonl"),
        "hf: the model cannot be loaded (*).",
        make=edit_json("hf/config.json", model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"}),
    ),
    option(
        "prompts that are not there", "no.jsonl: no such data file, and no data set on a hub, *.", prompts="no.jsonl"
    ),
    asked(
        "rows without a prompt",
        '{"text": 7}\n',
        "p.jsonl: no column holds a prompt, which is a string or turns; known names are prompt, question, query, "
        "instruction, input, context, messages, conversations, conversation, trajectory, and the first row has text; "
        "name it with data.columns={prompt: NAME}.",
    ),
    asked("an empty list of prompts", "\n\n", "p.txt: the file holds no prompts.", file="p.txt"),
    asked(
        "a prompt longer than the model",
        json.dumps({"prompt": "word " * 300}) + "\n",
        "p.jsonl line 1: the prompt has * tokens, and the model takes 256 with the answer; leave long prompts out with "
        "--max-prompt-tokens.",
    ),
    asked(
        "prompts that are all left out",
        ASKED,
        "p.jsonl: no prompt is left (1 left out: longer than 1 tokens).",
        "--max-prompt-tokens=1",
    ),
    asked(
        "a special token in a prompt",
        '{"prompt": "a <|end|>"}\n',
        "p.jsonl line 1: the prompt holds '<|end|>', a special token or a mark of a chat template; leave such prompts "
        "out with data.special_tokens=drop, or keep them with data.special_tokens=keep.",
    ),
    there(
        "answers of other settings",
        json.dumps(ANSWERED) + "\n",
        "out.jsonl line 1: was sampled with engine http, and this run has transformers; go on with the old one, or "
        "give another --output.",
    ),
    there(
        "a file of something else to go on with",
        json.dumps({"prompt": "a"}) + "\n",
        "out.jsonl line 1: no field 'format_prompt'; give a file that tools.sample wrote.",
    ),
    there("a file that is no JSON to go on with", "a\n", "out.jsonl line 1: not valid JSON (Expecting value)."),
    BadInput(
        "a folder in the place of the file of answers",
        sample(prompts="pairs.jsonl"),
        "out.jsonl: cannot be written (Is a directory).",
        make=lambda folder: (folder / "out.jsonl").mkdir(),
    ),
    full(
        "a full disk under the answers",
        "disk/out.jsonl: cannot be written (No space left on device); the answers so far are kept: mend that, and give "
        "the same command again.",
        4096,
        ("tools.sample", "hf", "pairs.jsonl", "--output=disk/out.jsonl", "--n=5", "--max-new-tokens=200"),
        leaves=("disk/*",),
    ),
]
