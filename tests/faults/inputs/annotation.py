"""Annotation: reward models that are none, answers that are damaged, settings without meaning, and files in the way."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults.inputs.entry import BadInput, cut, edit_json, remove
from tests.faults.inputs.environment import full
from tests.support.reward_models import answered

BEGUN = ("out.jsonl", "out.report.json")
"""What a run leaves that ended in the midst of its work: so far it made no pair."""


def annotate(*more: str, scorer: str = "scorer", answers: tuple[str, ...] = ("answers.jsonl",)) -> tuple[str, ...]:
    """The command of an annotation to `out.jsonl`."""
    return ("tools.annotate", scorer, *answers, "--output", "out.jsonl", *more)


def weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes the reward model's weights."""

    def make(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "scorer" / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "scorer" / "model.safetensors", metadata={"format": "pt"})

    return make


def _not_finite(tensors: dict[str, Any]) -> None:
    tensors["score.weight"][0, 7] = math.nan


def lines(*rows: Any) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def _begun_with_a_margin(folder: Path) -> None:
    """What a run with another margin leaves that was stopped before it made a pair."""
    from tgdpo_megatron.checkpoint.sources import content_hash
    from tgdpo_megatron.reward_models.annotation import Report, settings_of
    from tgdpo_megatron.reward_models.pairing import Rules

    scorer = {"name": "scorer", "fingerprint": content_hash(folder / "scorer")}
    settings = settings_of(scorer, [folder / "answers.jsonl"], Rules(margin=0.5))
    (folder / "out.report.json").write_text(json.dumps(asdict(Report(settings))), encoding="utf-8")
    (folder / "out.jsonl").touch()


def _trained(folder: Path) -> None:
    shutil.copytree(folder / "scorer", folder / "trained" / "hf")


ENTRIES = [
    BadInput(
        "a scorer that is not there",
        annotate(scorer="nowhere/at/all"),
        "nowhere/at/all: no such folder; a model on a hub is named ORGANISATION/NAME or ORGANISATION/NAME@REVISION.",
    ),
    BadInput(
        "a language model as the scorer",
        annotate(scorer="hf"),
        "hf: holds 'LlamaForCausalLM', which is no reward model that is known; known are sequence classifiers with one "
        "label (…ForSequenceClassification), ArmoRM and PairRM.",
    ),
    BadInput(
        "a Megatron checkpoint as the scorer",
        annotate(scorer="megatron"),
        "megatron: no config.json there; give a folder with a HuggingFace model.",
    ),
    BadInput(
        "a folder around the scorer",
        annotate(scorer="trained"),
        "trained: no config.json there; give trained/hf, which has one.",
        make=_trained,
    ),
    BadInput(
        "a classifier with three labels",
        annotate(),
        "scorer: the classifier has 3 labels; a reward model has one, the score.",
        make=edit_json("scorer/config.json", id2label={"0": "a", "1": "b", "2": "c"}),
    ),
    BadInput(
        "a classifier that says nothing of its labels",
        annotate(),
        "scorer: the classifier has 2 labels; a reward model has one, the score.",
        make=edit_json("scorer/config.json", id2label=..., label2id=...),
    ),
    BadInput(
        "a scorer without a template",
        annotate(),
        "scorer: the tokenizer has no chat template, without which it is not known how the reward model reads a "
        "conversation; save its template there, as chat_template.jinja.",
        make=remove("scorer/chat_template.jinja"),
    ),
    BadInput(
        "a scorer without its head",
        annotate(),
        "scorer: the weights lack score.weight, so this is no LlamaForSequenceClassification.",
        make=weights(lambda tensors: tensors.pop("score.weight")),
    ),
    BadInput(
        "a scorer whose weights are cut",
        annotate(),
        "scorer/model.safetensors: this weight shard is damaged or truncated (*); download it again.",
        make=cut("scorer/model.safetensors", 0.5),
    ),
    BadInput(
        "a score that is not finite",
        annotate(),
        "answers.jsonl prompt 1: scorer gives an answer the score nan, which is not finite; use another reward model, "
        "or weights of it in a wider dtype.",
        make=weights(_not_finite),
        leaves=BEGUN,
    ),
    BadInput(
        "answers that are not there",
        annotate(answers=("nothing.jsonl",)),
        "nothing.jsonl: no such file of answers.",
    ),
    BadInput(
        "preference pairs in place of answers",
        annotate(answers=("pairs.jsonl",)),
        "pairs.jsonl line 1: no field 'prompt'; give a file that tools.sample wrote.",
    ),
    BadInput(
        "a damaged line far behind",
        annotate(answers=("bad.jsonl",)),
        "bad.jsonl line 3: not valid JSON (*).",
        files={"bad.jsonl": lines(answered("a", ["b", "c"]), answered("d", ["e", "f"])) + '{"prompt": \n'},
    ),
    BadInput(
        "JSON that is not SimPO's",
        annotate(answers=("other.json",)),
        "other.json row 1: expected a text as 'prompt', and texts as 'all_generated_responses' or one as "
        "'generated_text', as SimPO's scripts write them; give a file that tools.sample wrote, or one of SimPO's.",
        files={"other.json": [{"prompt": "a", "response": "b"}]},
    ),
    BadInput(
        "runs over the same prompts in another order",
        annotate(answers=("one.jsonl", "two.jsonl")),
        "two.jsonl prompt 2: is another prompt than one.jsonl prompt 2; files of the same prompts must have them in "
        "the same order.",
        files={
            "one.jsonl": lines(*(answered(prompt, ["b", "c"]) for prompt in "ade")),
            "two.jsonl": lines(*(answered(prompt, ["b", "c"]) for prompt in "aed")),
        },
    ),
    BadInput(
        "answers of two models together",
        annotate(answers=("one.jsonl", "two.jsonl")),
        "two.jsonl prompt 1: the answers are another model's than those of one.jsonl prompt 1; annotate them apart.",
        files={name: lines(answered("a", ["b", "c"], model=name)) for name in ("one.jsonl", "two.jsonl")},
    ),
    BadInput(
        "answers of two temperatures together",
        annotate(answers=("one.jsonl", "two.jsonl")),
        "two.jsonl prompt 1: was sampled with temperature 1.2, and one.jsonl prompt 1 with 0.8; annotate them apart.",
        files={
            name: lines(answered("a", ["b", "c"], sampling={"temperature": temperature}))
            for name, temperature in {"one.jsonl": 0.8, "two.jsonl": 1.2}.items()
        },
    ),
    BadInput(
        "a device that is not there to score on",
        annotate("--device", "cuda:99"),
        "--device cuda:99: cannot be used (*); give another, such as cpu.",
    ),
    BadInput(
        "a negative margin",
        annotate("--margin", "-0.5"),
        "--margin -0.5 is refused: it should be 0 or a positive number.",
    ),
    BadInput(
        "a margin that is no number",
        annotate("--margin", "nan"),
        "--margin nan is refused: it should be 0 or a positive number.",
    ),
    BadInput(
        "batches of no tokens",
        annotate("--batch-tokens", "0"),
        "--batch-tokens 0: give 1 or more.",
    ),
    BadInput(
        "a choice of answers that is not known",
        annotate("--pick", "worst-best"),
        "command line: --pick 'worst-best' is refused: it should be one of *; see python -m tools.annotate --help.",
    ),
    BadInput(
        "another file in the way of pairs",
        annotate(),
        "out.jsonl: is there already, without out.report.json; choose another --output.",
        files={"out.jsonl": "something else\n"},
    ),
    BadInput(
        "pairs that were begun with another margin",
        annotate(),
        "out.jsonl: was begun with margin 0.5, and now it is 0.0; give the same again, or another --output.",
        make=_begun_with_a_margin,
    ),
    BadInput(
        "a damaged report of an annotation",
        annotate(),
        "out.report.json: this report is damaged; delete it and out.jsonl.",
        files={"out.jsonl": "{}\n", "out.report.json": "[]"},
    ),
    full(
        "a full disk for pairs",
        "disk/out.jsonl: cannot be written (No space left on device); the pairs so far are kept: mend that, and give "
        "the same command again.",
        4096,
        ("tools.annotate", "scorer", "answers.jsonl", "--output", "disk/out.jsonl"),
        leaves=("disk/*",),
    ),
]
