"""Megatron checkpoints, and the folders of runs that are to go on."""

from __future__ import annotations

import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from tests.faults.inputs.entry import BadInput, cut, edit_json, export, remove, train

NEWEST = "run/checkpoints/iter-0000002"
GO_ON = "continue it as it was, start a new run, or go on all the same with train.resume_with_changes=true."
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
    leaves = ("run/lock", *more.pop("leaves", ()))  # type: ignore[misc]
    return BadInput(name, train(*RESUMED, *changes), says, leaves=leaves, **more)  # type: ignore[arg-type]


def _of_an_earlier_version(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """The newest checkpoint has no checksums, and keeps no settings beside those of the run; then a change is made.

    Of a checkpoint with checksums such a change is damage, and the run goes on from the one before it.
    """

    def make(folder: Path) -> None:
        for name in ("SHA256SUMS", "config.yaml"):
            (folder / NEWEST / name).unlink()
        edit_json(f"{NEWEST}/manifest.json", sums=None)(folder)
        change(folder)

    return make


def _settings(content: str) -> Callable[[Path], None]:
    return _of_an_earlier_version(lambda folder: (folder / "run" / "config.yaml").write_text(content) and None)


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
    BadInput(
        "no model given",
        train(given=("data.train=pairs.jsonl",)),
        "model.checkpoint is not set; give the model to start from.",
    ),
    BadInput("a checkpoint that is not there", export("no"), "no: no such checkpoint folder."),
    BadInput(
        "a HuggingFace folder to export",
        export("hf"),
        "hf: this is a HuggingFace model; convert it with python -m tools.convert_hf_to_megatron "
        "HF_FOLDER MEGATRON_FOLDER.",
    ),
    BadInput(
        "an empty folder for a model",
        train("model.checkpoint=empty"),
        "empty: neither a HuggingFace model (no config.json) nor a Megatron checkpoint of this project "
        "(no manifest.json).",
        make=lambda folder: (folder / "empty").mkdir(),
    ),
    manifest(
        "a manifest that is no JSON", "{", "megatron/manifest.json: not a checkpoint manifest; convert the model again."
    ),
    manifest(
        "a manifest that is a list", [], "megatron/manifest.json: not a checkpoint manifest; convert the model again."
    ),
    manifest(
        "a manifest nested 100,000 deep",
        "[" * 100_000,
        "megatron/manifest.json: not a checkpoint manifest; convert the model again.",
    ),
    manifest(
        "a manifest with 5,000 digits",
        '{"format": ' + "9" * 5000 + "}",
        "megatron/manifest.json: not a checkpoint manifest; convert the model again.",
    ),
    manifest(
        "a manifest of another format",
        {"format": 1, "weights": "", "dtype": "", "tokenizer": "", "template": ""},
        "megatron/manifest.json: the checkpoint has format 1, but this version reads format 2; convert "
        "the model again.",
    ),
    BadInput(
        "a manifest with another fingerprint",
        train(),
        "megatron/certificate.json: the certificate is of other weights than the checkpoint's; make one "
        "with python -m tools.certify HF_FOLDER megatron.",
        make=edit_json("megatron/manifest.json", weights="0" * 64),
    ),
    BadInput(
        "no index", train(), "megatron: the checkpoint has no weights.", make=remove("megatron/weights/.metadata")
    ),
    BadInput(
        "an index of no bytes",
        export(),
        "megatron/weights/.metadata: the checkpoint's index is damaged (the pickle ends too early).",
        files={"megatron/weights/.metadata": b""},
    ),
    BadInput(
        "an index that was cut",
        export(),
        "megatron/weights/.metadata: the checkpoint's index is damaged (the pickle ends too early).",
        make=cut("megatron/weights/.metadata", 0.5),
    ),
    BadInput(
        "an index that calls a program",
        export(),
        "megatron/weights/.metadata: the checkpoint's index is damaged (it has something else where a "
        "Metadata belongs).",
        files={"megatron/weights/.metadata": pickle.dumps(_Calls())},
    ),
    BadInput(
        "an index that is an empty mapping",
        export(),
        "megatron/weights/.metadata: the checkpoint's index is damaged (it has something else where a "
        "Metadata belongs).",
        files={"megatron/weights/.metadata": pickle.dumps({})},
    ),
    BadInput(
        "an index that is an empty ordered mapping",
        export(),
        "megatron/weights/.metadata: the checkpoint's index is damaged (it has something else where a "
        "Metadata belongs).",
        files={"megatron/weights/.metadata": pickle.dumps(OrderedDict())},
    ),
    BadInput(
        "no common part",
        train(),
        "megatron/weights/common.pt: this part of the checkpoint cannot be read (no such file).",
        make=remove("megatron/weights/common.pt"),
        late=True,
    ),
    BadInput(
        "a common part that calls a program",
        train(),
        "megatron/weights/common.pt: this part of the checkpoint cannot be read (it is not a file of "
        "torch.save (File is not a zip file)).",
        files={"megatron/weights/common.pt": pickle.dumps(_Calls())},
        late=True,
    ),
    BadInput(
        "weights that are missing",
        export(),
        "megatron/weights/__0_0.distcp: this part of the checkpoint cannot be read (no such file).",
        make=remove("megatron/weights/__0_0.distcp"),
    ),
    BadInput(
        "weights that were cut",
        export(),
        "megatron/weights/__0_0.distcp: this part of the checkpoint cannot be read (it ends before a "
        "block that the index places in it).",
        make=cut("megatron/weights/__0_0.distcp", 0.6),
    ),
    BadInput(
        "a flipped bit in the weights",
        train(),
        "megatron: the weights are not those that the manifest names; the checkpoint was altered.",
        make=_flip("megatron/weights/__0_0.distcp", 0.5),
        late=True,
    ),
    BadInput("no configuration in a checkpoint", train(), "megatron/hf: no such model folder.", make=_without_hf),
    BadInput(
        "no certificate",
        train(),
        "megatron: the checkpoint has no certificate, so nothing shows that it gives HuggingFace's "
        "log-probs; make one with python -m tools.certify HF_FOLDER megatron, or set "
        "model.require_certificate=false.",
        make=remove("megatron/certificate.json"),
    ),
    BadInput(
        "a certificate that was edited",
        train(),
        "megatron/certificate.json: the certificate was altered; make one with python -m tools.certify "
        "HF_FOLDER megatron.",
        make=edit_json("megatron/certificate.json", largest_difference=0.0),
    ),
    BadInput(
        "a certificate nested 100,000 deep",
        train(),
        "megatron/certificate.json: not a certificate; make one with python -m tools.certify HF_FOLDER megatron.",
        files={"megatron/certificate.json": "[" * 100_000},
    ),
    BadInput(
        "an export over files of the user",
        export(),
        "out: already there and not empty; choose another folder.",
        files={"out/mine.txt": "mine"},
    ),
    # Runs that go on.
    resumed(
        "another loss in a run that goes on",
        f"{NEWEST}: the run has loss.beta=0.1, not 0.2; {GO_ON}",
        "loss.beta=0.2",
        late=True,
    ),
    resumed(
        "another seed in a run that goes on",
        f"{NEWEST}: the run has train.seed=42, not 7; {GO_ON}",
        "train.seed=7",
        late=True,
    ),
    resumed(
        "other pairs in a run that goes on",
        f"{NEWEST}: the run had other pairs than now; {GO_ON}",
        make=_other_pairs,
        leaves=("run/data/*",),
        late=True,
    ),
    resumed(
        "settings of a run that are gone",
        "run/config.yaml: no such settings file of a run.",
        make=_of_an_earlier_version(remove("run/config.yaml")),
        late=True,
    ),
    resumed(
        "settings of a run that are empty",
        "run/config.yaml: the settings of the run were altered; they are no groups of settings any more.",
        make=_settings(""),
        late=True,
    ),
    resumed(
        "settings of a run with an alias bomb",
        "run/config.yaml: has more than 100,000 values, with its aliases written out; this is too many.",
        make=_settings(f"a: &a [1]\nb: [{'*a, ' * 60_000}]\n"),
        late=True,
    ),
    BadInput(
        "an iteration of a run in words",
        export(NEWEST),
        f"{NEWEST}/manifest.json: iteration cannot be 'two'; convert the model again.",
        make=edit_json(f"{NEWEST}/manifest.json", iteration="two"),
    ),
]
