"""Open a reward model: find its folder, see which kind it is, and load it with every tensor accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgdpo_megatron.bounded import read_json, shown
from tgdpo_megatron.checkpoint.sources import Source, check_unconverted, content_hash, find
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.reward_models.scorer import BATCH_TOKENS, RewardModel, Scorer

if TYPE_CHECKING:
    import torch

CLASSIFIER = "ForSequenceClassification"
"""How transformers' names of sequence classifiers end."""
OTHERS = ("LlamaForRewardModelWithGating", "DebertaV2PairRM")
"""What ArmoRM and PairRM call themselves in config.json."""


def identify(given: Path) -> dict[str, str]:
    """The `name` and the `fingerprint` of a reward model: a hash of all files that its scores depend on.

    Raises:
        UserError: There is no such model, it lacks files, or it is of another kind.
    """
    source = _found(given)
    return {"name": str(given), "fingerprint": content_hash(source.folder)}


def open_scorer(given: Path, *, batch_tokens: int = BATCH_TOKENS, device: torch.device | str | None = None) -> Scorer:
    """Load a reward model.

    Args:
        given: A HuggingFace folder, or a name on a hub.
        batch_tokens: Most tokens that go through the model together, padding included. It changes scores by rounding
            alone.
        device: Default: the first GPU, or the CPU where there is none.

    Raises:
        UserError: As identify; or its weights are damaged or not those of its kind, it has no chat template, or there
            is no such device.
    """
    source = _found(given)
    try:
        model = _loaded(kind_of(source.folder), source.folder, device)
    except UserError as error:
        raise source.refusal(str(error)) from error
    return Scorer(model, **identify(given), batch_tokens=batch_tokens)


def _found(given: Path) -> Source:
    source = find(Path(given))
    check_unconverted(source)
    try:
        kind_of(source.folder)
    except UserError as error:
        raise source.refusal(str(error)) from error
    return source


def kind_of(folder: Path) -> str:
    """Which kind of reward model a folder holds: one of OTHERS, or the name of a sequence classifier.

    Raises:
        UserError: It holds another kind of model, or a classifier with more than one label.
    """
    config = read_json(folder / "config.json", what="configuration of a model")
    names = config.get("architectures") if isinstance(config, dict) else None
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if name in OTHERS:
        return name
    if not name.endswith(CLASSIFIER):
        raise UserError(
            f"{folder}: holds {shown(name) if name else 'a model without a name'}, which is no reward model that is "
            f"known; known are sequence classifiers with one label (…{CLASSIFIER}), ArmoRM and PairRM."
        )
    labels = config.get("id2label")
    number = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    if number != 1:
        raise UserError(f"{folder}: the classifier has {shown(number)} labels; a reward model has one, the score.")
    return name


def _loaded(kind: str, folder: Path, device: torch.device | str | None) -> RewardModel:
    from tgdpo_megatron.checkpoint.hf_models import device_of

    load: Any
    if kind == OTHERS[0]:
        from tgdpo_megatron.reward_models.armorm import load
    elif kind == OTHERS[1]:
        from tgdpo_megatron.reward_models.pairrm import load
    else:
        from tgdpo_megatron.reward_models.classifier import load
    model: RewardModel = load(folder, device_of(device))
    return model
