"""Megatron checkpoints, and the folders of runs that are to go on."""

from __future__ import annotations

import pickle
import shutil
from collections import OrderedDict
from pathlib import Path

from tests.faults.inputs.entry import BadInput, cut, edit_json, export, remove, train

NEWEST = "run/checkpoints/iter-0000002"
RESUMED = ("train.output=run", "train.save_interval=1", "train.resume=true", "train.train_iters=4")


class _Calls:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> object:
        import os

        return os.system, ("touch called",)


def manifest(name: str, content: object, says: str) -> BadInput:
    """A manifest with something wrong."""
    return BadInput(name, train(), says, files={"megatron/manifest.json": content})


def resumed(name: str, says: str, *changes: str, **more: object) -> BadInput:
    """A run that is to go on, with something wrong."""
    return BadInput(name, train(*RESUMED, *changes), says, **more)  # type: ignore[arg-type]


def _flip(name: str, place: float) -> object:
    def make(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(place * len(content))] ^= 0x55
        (folder / name).write_bytes(content)

    return make


def _other_pairs(folder: Path) -> None:
    pairs = folder / "pairs.jsonl"
    pairs.write_text(pairs.read_text().replace("Blue", "Green"))


def _without_hf(folder: Path) -> None:
    shutil.rmtree(folder / "megatron" / "hf")


ENTRIES = [
    BadInput("no model given", train(given=("data.train=pairs.jsonl",)), "?"),
    BadInput("a checkpoint that is not there", export("no"), "?"),
    BadInput("a HuggingFace folder to export", export("hf"), "?"),
    BadInput(
        "an empty folder for a model",
        train("model.checkpoint=empty"),
        "?",
        make=lambda folder: (folder / "empty").mkdir(),
    ),
    manifest("a manifest that is no JSON", "{", "?"),
    manifest("a manifest that is a list", [], "?"),
    manifest("a manifest nested 100,000 deep", "[" * 100_000, "?"),
    manifest("a manifest with 5,000 digits", '{"format": ' + "9" * 5000 + "}", "?"),
    manifest(
        "a manifest of another format", {"format": 1, "weights": "", "dtype": "", "tokenizer": "", "template": ""}, "?"
    ),
    BadInput(
        "a manifest with another fingerprint", train(), "?", make=edit_json("megatron/manifest.json", weights="0" * 64)
    ),
    BadInput("no index", train(), "?", make=remove("megatron/weights/.metadata")),
    BadInput("an index of no bytes", export(), "?", files={"megatron/weights/.metadata": b""}),
    BadInput("an index that was cut", export(), "?", make=cut("megatron/weights/.metadata", 0.5)),
    BadInput(
        "an index that calls a program", export(), "?", files={"megatron/weights/.metadata": pickle.dumps(_Calls())}
    ),
    BadInput(
        "an index that is an empty mapping", export(), "?", files={"megatron/weights/.metadata": pickle.dumps({})}
    ),
    BadInput(
        "an index that is an empty ordered mapping",
        export(),
        "?",
        files={"megatron/weights/.metadata": pickle.dumps(OrderedDict())},
    ),
    BadInput("no common part", train(), "?", make=remove("megatron/weights/common.pt")),
    BadInput(
        "a common part that calls a program", train(), "?", files={"megatron/weights/common.pt": pickle.dumps(_Calls())}
    ),
    BadInput("weights that are missing", export(), "?", make=remove("megatron/weights/__0_0.distcp")),
    BadInput("weights that were cut", export(), "?", make=cut("megatron/weights/__0_0.distcp", 0.6)),
    BadInput("a flipped bit in the weights", train(), "?", make=_flip("megatron/weights/__0_0.distcp", 0.5)),
    BadInput("no configuration in a checkpoint", train(), "?", make=_without_hf),
    BadInput("no certificate", train(), "?", make=remove("megatron/certificate.json")),
    BadInput(
        "a certificate that was edited",
        train(),
        "?",
        make=edit_json("megatron/certificate.json", largest_difference=0.0),
    ),
    BadInput("a certificate nested 100,000 deep", train(), "?", files={"megatron/certificate.json": "[" * 100_000}),
    BadInput("an export over files of the user", export(), "?", files={"out/mine.txt": "mine"}),
    # Runs that go on.
    resumed("a run that is not there", "?", "train.output=nowhere"),
    resumed("a run that is finished", "?", "train.train_iters=2"),
    resumed("another loss in a run that goes on", "?", "loss.beta=0.2"),
    resumed("another seed in a run that goes on", "?", "train.seed=7"),
    resumed("other pairs in a run that goes on", "?", make=_other_pairs, leaves=("run/data/*",)),
    resumed("settings of a run that are gone", "?", make=remove("run/config.yaml")),
    resumed("settings of a run that are empty", "?", files={"run/config.yaml": ""}),
    resumed(
        "settings of a run with an alias bomb", "?", files={"run/config.yaml": f"a: &a [1]\nb: [{'*a, ' * 60_000}]\n"}
    ),
    resumed("an iteration in words", "?", make=edit_json(f"{NEWEST}/manifest.json", iteration="two")),
]
