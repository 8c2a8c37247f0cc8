"""The certificate of a checkpoint: what shows that its weights are those of the HuggingFace model it came from.

FOLDER/certificate.json records what was converted, what came out, and by how much the log-probs of the two differ.
checkpoint/certify.py writes it. A checkpoint that a run saves carries the certificate of the checkpoint that the run
started from, under its own fingerprint. The seal protects against mistakes, not against forgery.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tgdpo_megatron.bounded import parse_json, read_text
from tgdpo_megatron.checkpoint.manifest import HF, CheckpointManifest, read_manifest, wrong_field
from tgdpo_megatron.errors import UserError

NAME = "certificate.json"
LIMIT, SHARE = 1e-3, 3e-5
"""Largest difference of a token log-prob, nats, in fp32; where log-probs are large, as a share of the largest. A
mistake of a conversion is larger by far: where two heads have each other's place, log-probs change by tenths."""


@dataclass(frozen=True)
class Certificate:
    """What was compared, and what was found."""

    family: str
    source: dict[str, str]
    """File of the HuggingFace model -> SHA-256: its config.json and its weights."""
    weights: str
    """Fingerprint of the checkpoint's weights, as in its manifest."""
    weights_bf16: str
    """The same after rounding to bf16."""
    config: str
    """SHA-256 of the checkpoint's hf/config.json."""
    dtype: str
    """Dtypes of the checkpoint's weights. Both models computed in fp32 from weights of these dtypes."""
    largest_difference: float
    """Largest absolute difference of a token log-prob, nats."""
    limit: float
    """Up to which difference rounding explains it, nats."""
    tokens: int
    """Number of token log-probs compared."""
    versions: dict[str, str]
    """Package -> version that took part."""
    trained_from: str | None = None
    """For a checkpoint of a run: fingerprint of the compared checkpoint that its training began with."""
    seal: str = ""
    """SHA-256 of all the fields above."""

    def sealed(self) -> Certificate:
        """The same certificate with its seal."""
        content = {name: value for name, value in asdict(self).items() if name != "seal"}
        return replace(self, seal=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest())


def write_certificate(folder: Path, certificate: Certificate) -> None:
    """Write a certificate, with its seal, into a checkpoint folder."""
    (folder / NAME).write_text(json.dumps(asdict(certificate.sealed()), indent=2), encoding="utf-8")


def hand_on(start: Path, folder: Path, manifest: CheckpointManifest) -> None:
    """Give a checkpoint that a run saves the certificate of the run's start, if that is valid."""
    try:
        check_certificate(start, read_manifest(start))
        before = read_certificate(start)
    except UserError:  # model.require_certificate=false accepted it
        return
    after = replace(
        before,
        weights=manifest.weights,
        weights_bf16=manifest.weights_bf16,
        config=config_hash(folder),
        dtype=manifest.dtype,
        trained_from=before.trained_from or before.weights,
    )
    write_certificate(folder, after)


def read_certificate(folder: Path) -> Certificate:
    """Read the certificate of a checkpoint.

    Raises:
        UserError: There is none, it cannot be read, or it was altered.
    """
    path = folder / NAME
    if not path.is_file():
        raise UserError(
            f"{folder}: the checkpoint has no certificate, so nothing shows that it gives HuggingFace's log-probs; "
            f"{_again(folder).removesuffix('.')}, or set model.require_certificate=false."
        )
    text = read_text(path, what="certificate")
    try:
        found = Certificate(**parse_json(text, where=str(path)))
    except (TypeError, UserError):
        raise UserError(f"{path}: not a certificate; {_again(folder)}") from None
    if wrong := wrong_field(found):
        raise UserError(f"{path}: {wrong} cannot be {getattr(found, wrong)!r:.50}; {_again(folder)}")
    if found.sealed() != found:
        raise UserError(f"{path}: the certificate was altered; {_again(folder)}")
    return found


def check_certificate(folder: Path, manifest: CheckpointManifest) -> None:
    """Refuse a checkpoint whose certificate is missing, altered, or of other files.

    The weights themselves are compared with the manifest's fingerprint when they are loaded.

    Raises:
        UserError: The checkpoint is refused; the sentence says why.
    """
    found = read_certificate(folder)
    path = folder / NAME
    if (found.weights, found.weights_bf16) != (manifest.weights, manifest.weights_bf16):
        raise UserError(f"{path}: the certificate is of other weights than the checkpoint's; {_again(folder)}")
    if found.config != config_hash(folder):
        raise UserError(f"{path}: the certificate is of another {HF}/config.json; {_again(folder)}")
    if not found.largest_difference <= found.limit:
        raise UserError(
            f"{path}: log-probs differ from HuggingFace's by {found.largest_difference:.2g} nats, more than the "
            f"{found.limit:.2g} that rounding explains; convert the model again."
        )


def limit_for(largest: float) -> float:
    """The largest difference that rounding explains, nats, given the largest absolute log-prob."""
    return max(LIMIT, SHARE * largest)


def config_hash(folder: Path) -> str:
    """SHA-256 of the config.json in a checkpoint folder."""
    return hashlib.sha256((folder / HF / "config.json").read_bytes()).hexdigest()


def _again(folder: Path) -> str:
    if (folder / "manifest.json").is_file() and read_manifest(folder, with_index=False).iteration is not None:
        return "certify the checkpoint that the run started from before the run, with python -m tools.certify."
    return f"make one with python -m tools.certify HF_FOLDER {folder}."
