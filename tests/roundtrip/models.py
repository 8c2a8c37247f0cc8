"""Which models go to Megatron and back, and what is left of them?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from tests.parity.models import FAMILIES, make_model
from tgdpo_megatron.errors import UserError

VOCABULARY, TOKENS = 300, 40


@dataclass(frozen=True)
class Made:
    """One model."""

    family: str
    tied: bool
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.family}, {'tied' if self.tied else 'untied'}, {self.dtype}"

    def folder(self, root: Path) -> Path:
        return root / self.name.replace(", ", "-")


MODELS = [Made(family, tied, dtype) for family in FAMILIES for tied in (False, True) for dtype in ("fp32", "bf16")]


def token_ids() -> list[int]:
    """Random tokens; longer than the models' windows."""
    ids: list[int] = np.random.default_rng(5).integers(0, VOCABULARY, TOKENS).tolist()
    return ids


def there_and_back(made: Made, folder: Path) -> bool:
    """Write hf/, megatron/ and back/; whether back/ has hf/'s tensors, bit for bit, and no other."""
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf

    model = make_model(MODELS.index(made), made.family, made.tied)
    model.to(torch.float32 if made.dtype == "fp32" else torch.bfloat16).save_pretrained(folder / "hf")
    hf_to_megatron(folder / "hf", folder / "megatron")
    megatron_to_hf(folder / "megatron", folder / "back")
    before, after = (load_file(folder / place / "model.safetensors") for place in ("hf", "back"))
    return before.keys() == after.keys() and all(
        before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before
    )


@torch.no_grad()
def huggingfaces(folder: Path) -> torch.Tensor:
    """Log-probs of the tokens after the first by the exported model, as transformers loads it. [T - 1] fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "back", dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor(token_ids())
    logps = model(ids[None]).logits[0, :-1].log_softmax(dim=-1)
    return logps.gather(1, ids[1:, None])[:, 0]


def tampering_is_refused(folder: Path) -> bool:
    """Whether the certificate is valid, and no longer after its difference or its fingerprint was edited."""
    from tgdpo_megatron.checkpoint.certificate import NAME, check_certificate
    from tgdpo_megatron.checkpoint.manifest import read_manifest

    checkpoint, manifest = folder / "megatron", read_manifest(folder / "megatron")
    check_certificate(checkpoint, manifest)
    original = (checkpoint / NAME).read_text()
    refused = 0
    for edit in ({"largest_difference": 0.0}, {"weights": "0" * 64}):
        (checkpoint / NAME).write_text(json.dumps(json.loads(original) | edit))
        try:
            check_certificate(checkpoint, manifest)
        except UserError:
            refused += 1
    (checkpoint / NAME).write_text(original)
    check_certificate(checkpoint, manifest)
    return refused == 2
