"""Count the tokens of a file of preference pairs, so that the benchmark can run on pairs that are as long.

    python -m bench.lengths PAIRS.json [--output bench/lengths.csv]

Only numbers are written: for each pair the tokens of its prompt, with the chat template around it, and of its chosen
and its rejected response, with the token that ends each. Nothing is cut off. The tokenizer is a byte-level BPE trained
on the same pairs. The file in this folder is of 75 English pairs from LLaMA-Factory's demonstration set.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np

from bench.pairs import LENGTHS
from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.data.formats import read_pairs
from tgdpo_megatron.data.prepare import prepare_pairs
from tools.make_tiny_model import train_tokenizer

VOCABULARY = 2048
"""Of the tokenizer that counts."""
NOTHING_CUT = 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="preference pairs in any format that training reads")
    parser.add_argument("--output", type=Path, default=LENGTHS, help="default: %(default)s")
    parsed = parser.parse_args()
    texts = [text for pair in read_pairs(parsed.pairs).pairs for text in pair.texts]
    counted = count_tokens(parsed.pairs, train_tokenizer(texts, vocab_size=VOCABULARY))
    with parsed.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("prompt", "chosen", "rejected"))
        writer.writerows(counted.tolist())
    print(f"{parsed.output}: {len(counted)} pairs")


def count_tokens(pairs: Path, tokenizer: object, max_length: int = NOTHING_CUT) -> np.ndarray:
    """Tokens of prompt, chosen and rejected response of each pair, as the product prepares it. [N, 3]"""
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_pairs(DataConfig(max_length=max_length), pairs, tokenizer, Path(folder))
    responses = np.diff(data.starts).reshape(-1, 2) - data.prompt_lengths[:, None]
    return np.column_stack([data.prompt_lengths, responses])


if __name__ == "__main__":
    main()
