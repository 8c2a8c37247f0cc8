"""What the tests of this folder do on the ranks they start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tgdpo_megatron.platform.processes import Ranks


def steps(ranks: Ranks, *, folder: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two TGDPO steps of each row (settings of tests.parity.rows.Row, and `scores`) against HuggingFace's: losses, and
    the largest errors."""
    import torch

    from tests.parity.ranks import compare
    from tests.parity.rows import Row
    from tgdpo_megatron.platform.processes import initialize_model_parallel

    place = Path(folder)
    frozen = torch.load(place / "scores.pt", weights_only=False)
    expected = torch.load(place / "TGDPO.pt", weights_only=False)
    found = []
    for settings in rows:
        scores = settings.pop("scores")
        row = Row(**settings)
        if not found:
            initialize_model_parallel(row.config(place, scores).parallel, seed=1)
        losses, errors = compare(row, scores, place, frozen, expected, device=ranks.device)
        found.append({"losses": losses, "errors": errors})
    return found


def live_log_probs(ranks: Ranks, *, models: dict[str, str], policies: list[dict[str, Any]]) -> list[list[list[float]]]:
    """Log-probs of policy, reference and guidance that ride together, for each setting of the policy's training.

    All see one and the same pack, of a multiple of 16 tokens.
    """

    from bench.pairs import ultrafeedback_like
    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.config import Config, load
    from tgdpo_megatron.data.batch import make_batch
    from tgdpo_megatron.engine import build_engine, token_logps
    from tgdpo_megatron.pair_losses import PreferenceLoss
    from tgdpo_megatron.platform.processes import initialize_model_parallel

    policy, guidance = Path(models["checkpoint"]), Path(models["guidance"])
    description = describe(policy)
    data = ultrafeedback_like(3, longest=64, vocabulary=description.vocab_size)
    batch = make_batch(data, range(3), align=16).to(ranks.device)
    initialize_model_parallel(Config().parallel, seed=1)
    found = []
    for train in policies:
        config = load(Config(), {"train": {"precision": "bf16", "train_iters": 1, **train}}, where="test")
        loss = PreferenceLoss(config)
        engine = build_engine(config, description, loss=loss, start=policy, frozen=[policy, guidance])
        (logps,) = token_logps(engine.policy, [batch], config)
        found.append(logps.tolist())
    return found


def kernel_faults(ranks: Ranks, *, sizes: list[list[int]]) -> dict[str, list[str | None]]:
    """Why each attention kernel cannot be used, for each of some numbers of heads, key-value heads and channels."""
    from tgdpo_megatron.model.kernels import CANDIDATES, why_not

    return {
        name: [why_not(candidate, *size, ranks.device) for size in sizes]  # type: ignore[call-arg]
        for name, candidate in CANDIDATES.items()
    }


def plan_log_probs(ranks: Ranks, *, folder: str, precision: str) -> dict[str, Any]:
    """Log-probs of some pairs with shared prompts and with prompts apart, as one model computes them, and the gradient
    of their sum for the weight of the first norm; and the name of the model's attention kernel, "" without one."""
    import torch

    from bench.pairs import ultrafeedback_like
    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.checkpoint.state import load_weights
    from tgdpo_megatron.config import Config, load
    from tgdpo_megatron.data.batch import make_batch
    from tgdpo_megatron.engine import token_logps
    from tgdpo_megatron.model.build import build_model, transformer_config
    from tgdpo_megatron.platform.processes import initialize_model_parallel

    config = load(Config(), {"train": {"precision": precision}}, where="test")
    initialize_model_parallel(config.parallel, seed=1)
    description = describe(Path(folder))
    settings = transformer_config(description, config)
    chunks = build_model(description, settings)
    load_weights(chunks, Path(folder))
    data = ultrafeedback_like(8, longest=200, vocabulary=description.vocab_size)
    batches = [make_batch(data, range(8), shared_prompts=shared).to(ranks.device) for shared in (True, False)]
    shared, apart = (logps[0].tolist() for logps in token_logps(chunks, batches, config))
    (model,) = chunks
    norm = next(weight for name, weight in model.named_parameters() if "layers.0." in name and "norm" in name)
    gradients = []
    for batch in batches:
        model.set_input_tensor([None])
        gradients.append(torch.autograd.grad(model(batch).sum(), norm)[0].double().tolist())
    return {
        "shared": shared,
        "apart": apart,
        "gradients": gradients,
        "kernel": settings.kernel.__name__ if settings.kernel else "",
    }


def looks(ranks: Ranks, *, looks: list[dict[str, Any]]) -> None:
    """Save distributions of some checkpoints, as tests.support.jobs.distribution."""
    from tests.support.jobs import distribution

    for look in looks:
        distribution(ranks, **look)
