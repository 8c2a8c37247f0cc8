"""Train a reward model on labelled pairs: the start model with a head of one label, by the Bradley-Terry loss.

    python -m bench.mini.scorer START LABELS FOLDER [--seed N]

This is plain torch and transformers; the result is an ordinary sequence classifier with one label. Prints the share of
held-out labels that it agrees with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

EPOCHS = 1
LR = 1e-3
HELD_OUT = 200
"""Labels that are not learned."""
_BATCH = 16
"""Pairs of a step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path, help="HuggingFace folder of a language model")
    parser.add_argument("labels", type=Path, help="JSON lines with prompt, chosen and rejected")
    parser.add_argument("folder", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="seed of the head and of the order (default: %(default)s)")
    parsed = parser.parse_args()
    rows = [json.loads(line) for line in parsed.labels.read_text(encoding="utf-8").splitlines()]
    agrees = train(parsed.start, rows, parsed.folder, parsed.seed)
    print(f"agrees with {agrees:.1%} of the held-out labels")


def train(start: Path, rows: list[dict[str, str]], folder: Path, seed: int) -> float:
    """Train and save a classifier. Returns the share of the held-out labels that its scores agree with."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(start, local_files_only=True)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        start, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32, local_files_only=True
    )
    pairs = [(_ids(tokenizer, row, "chosen"), _ids(tokenizer, row, "rejected")) for row in rows]
    learned, held_out = pairs[HELD_OUT:], pairs[:HELD_OUT]
    steps = EPOCHS * (len(learned) // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    for _ in range(EPOCHS):
        order = torch.randperm(len(learned)).tolist()
        for first in range(0, len(learned) - _BATCH + 1, _BATCH):
            margins = _margins(model, [learned[place] for place in order[first : first + _BATCH]])
            loss = torch.nn.functional.softplus(-margins).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        found = torch.cat([_margins(model, held_out[first : first + 50]) for first in range(0, HELD_OUT, 50)])
    return (found > 0).double().mean().item()


def _ids(tokenizer: Any, row: dict[str, str], side: str) -> list[int]:
    """The whole conversation, as the chat template writes it."""
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))


def _margins(model: Any, pairs: list[tuple[list[int], list[int]]]) -> Any:
    """Score of the first sequence less that of the second. [pairs]"""
    import torch

    sequences = [ids for side in zip(*pairs, strict=True) for ids in side]
    longest = max(map(len, sequences))
    ids = torch.tensor([ids + [model.config.pad_token_id] * (longest - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences])
    first, second = model(input_ids=ids, attention_mask=mask).logits[:, 0].chunk(2)
    return first - second


if __name__ == "__main__":
    main()
