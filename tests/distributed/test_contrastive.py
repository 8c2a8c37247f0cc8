"""Contrastive scores are the log-probs HuggingFace gives the same response after the rendered contrastive prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.program import run_ranks

ROWS: list[dict[str, Any]] = [
    {
        "prompt": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Name a colour."},
            {"role": "assistant", "content": "Blue."},
            {"role": "user", "content": "And {response} more?"},
        ],
        "chosen": [{"role": "assistant", "content": "Red is a {instruction}."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
    {
        "prompt": [{"role": "user", "content": "Say hello."}],
        "chosen": [{"role": "assistant", "content": "Hello there!"}],
        "rejected": [{"role": "assistant", "content": "Why should I?"}],
    },
    {
        "prompt": [{"role": "user", "content": "Say hello."}],
        "chosen": [{"role": "assistant", "content": "Too long to be quoted: " + "x" * 100}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
]
ROWS.append(ROWS[1])
PROMPTS = {
    "refine": ("Task: {i}\nDraft: {r}\nImprove it.", "Task: {i}\nDraft: {r}\nSpoil it."),
    "direct": ("{i}\nAnswer well.", "{i}\nAnswer badly."),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one process": (1, {}, {"micro_batch_size": 1}),
    "CP2": (2, {"context_parallel_size": 2}, {"micro_batch_size": 2}),
    "TP2×PP2": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
        {"micro_batch_tokens": 256},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_contrastive_scores_are_huggingfaces_log_probs(
    layout: str,
    hf_model: Path,
    checkpoint: Path,
    tokenizer: Any,
    write_pairs: Callable[..., Path],
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    from tgdpo_megatron.data.prepare import load_prepared
    from tgdpo_megatron.scores.store import load_scores

    ranks, parallel, train = LAYOUTS[layout]
    jobs = []
    for mode, (better, worse) in PROMPTS.items():
        file = tmp_path / f"{mode}.yaml"
        lines = [f"{side}: {text.format(i='{instruction}', r='{response}')!r}" for side, text in
                 (("better", better), ("worse", worse))]  # fmt: skip
        file.write_text("\n".join(lines).replace("'", '"'))
        jobs.append(
            {
                "model": {"checkpoint": str(checkpoint)},
                "parallel": parallel,
                "loss": {"type": "simpo_reg"},
                "data": {"train": str(write_pairs(tmp_path / "pairs.jsonl", ROWS)), "max_length": 200},
                "scores": {"path": str(tmp_path / mode), "contrastive_prompts": str(file)},
                "train": train,
            }
        )
    run_ranks("tests.support.jobs", "score_all", ranks, recipe="dpo_tiny", jobs=jobs)

    model = AutoModelForCausalLM.from_pretrained(hf_model)
    data = load_prepared(next((tmp_path / "refine" / "data").iterdir()))
    shut_out = 0
    for mode, templates in PROMPTS.items():
        scores = load_scores(tmp_path / mode / "train", data, ("better", "worse"))
        for pair, row in enumerate(ROWS):
            for side in (0, 1):
                answer = row[("chosen", "rejected")[side]][0]["content"]
                ids = data.sequence(pair, side)[data.prompt_lengths[pair] :].astype(np.int64)
                whole = [
                    np.concatenate([rendered(tokenizer, row["prompt"], template, answer), ids])
                    for template in templates
                ]
                found = scores.join([pair], [side])
                for name, sequence in zip(("better", "worse"), whole, strict=True):
                    expected = np.zeros(len(ids))
                    if max(map(len, whole)) <= 256:  # the model's positions
                        expected = log_probs(model, sequence, len(ids))
                    np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-5)
                shut_out += max(map(len, whole)) > 256
    assert shut_out == 1, "one response is too long where it is quoted"


def rendered(tokenizer: Any, prompt: list[dict[str, str]], template: str, answer: str) -> np.ndarray:
    last = prompt[-1] | {"content": template.format(i=prompt[-1]["content"], r=answer)}
    text = tokenizer.apply_chat_template([*prompt[:-1], last], tokenize=False, add_generation_prompt=True)
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"])


def log_probs(model: Any, sequence: np.ndarray, last: int) -> np.ndarray:
    ids = torch.from_numpy(sequence)
    with torch.no_grad():
        logps = torch.log_softmax(model(ids[None]).logits[0, -last - 1 : -1], dim=-1)
    return logps.gather(1, ids[-last:, None])[:, 0].numpy()
