"""Small models and files shared by all tests. Nothing here reaches a network or a GPU."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import numpy as np
import pytest

# A script's background, or nohup, starts programs that ignore these signals, and whatever a test starts would as well.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

pytest_plugins = ["tests.support.in_process"]

ROOT = Path(__file__).resolve().parent.parent

PAIRS = [
    {"instruction": "Add 2 and 3.", "chosen": "The sum is 5.", "rejected": "The sum is 6."},
    {"instruction": "Name a colour.", "chosen": "Blue is a colour.", "rejected": "A stone."},
    {"instruction": "What is the capital of France?", "chosen": "Paris.", "rejected": "It is Rome, I think."},
    {"instruction": "Say hello.", "chosen": "Hello there!", "rejected": "No."},
    {"instruction": "Write the word tree.", "chosen": "tree", "rejected": "The word is house."},
    {"instruction": "Add 4 and 4.", "chosen": "The sum is 8.", "rejected": "The sum is 9, or 10."},
]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Models that tests convert stay out of the user's cache."""
    os.environ["TGDPO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Numbers computed in float64 by an independent program, gradients checked by finite differences."""
    numbers: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "golden.json").read_text())
    return numbers


@pytest.fixture(scope="session")
def write_pairs() -> Callable[..., Path]:
    """A function that writes rows (PAIRS by default) as a .jsonl file."""

    def write(path: Path, rows: Sequence[Any] = PAIRS) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory, write_pairs: Callable[..., Path]) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer whose chat template writes the BOS and closes turns with <|end|>."""
    from tools.make_tiny_model import train_tokenizer

    return train_tokenizer([text for row in PAIRS for text in row.values()] * 2, vocab_size=330)


@pytest.fixture(scope="session")
def make_hf_model(tokenizer: Any) -> Callable[..., Path]:
    """A function that saves a random Llama (2 layers, width 64, 4 query and 2 key-value heads) and its tokenizer."""
    from tools.make_tiny_model import make_model

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256}

    def make(folder: Path, **shape: Any) -> Path:
        make_model(folder, tokenizer, **(sizes | shape))
        return folder

    return make


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory, make_hf_model: Callable[..., Path]) -> Path:
    """An ordinary HuggingFace folder, fp32, untied. Read it, do not change it."""
    return make_hf_model(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, hf_model: Path) -> Path:
    """The same model as a Megatron checkpoint. Read it, do not change it."""
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron

    folder = tmp_path_factory.mktemp("megatron") / "model"
    hf_to_megatron(hf_model, folder)
    return folder


@pytest.fixture(scope="session")
def prepared_by_hand() -> Callable[..., Any]:
    """A function that makes PreparedPairs of given ids: (prompt, chosen, rejected) for each pair."""
    from tgdpo_megatron.data.prepare import PreparedPairs, Summary, pair_hash

    def make(pairs: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]]) -> PreparedPairs:
        sequences = [
            np.array([*prompt, *side], dtype=np.int32)
            for prompt, chosen, rejected in pairs
            for side in (chosen, rejected)
        ]
        hashes = [pair_hash(len(pair[0]), sequences[2 * place : 2 * place + 2]) for place, pair in enumerate(pairs)]
        return PreparedPairs(
            tokens=np.concatenate(sequences),
            starts=np.cumsum([0, *map(len, sequences)]).astype(np.int64),
            prompt_lengths=np.array([len(prompt) for prompt, _, _ in pairs], dtype=np.int32),
            hashes=np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, 32),
            rows=np.arange(1, len(pairs) + 1, dtype=np.int64),
            summary=Summary(source="by-hand.jsonl", pairs=len(pairs)),
        )

    return make


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """A function that finds a file of real preference data, or skips the test.

    The folder is named by TGDPO_DATA; without it, `../shared/data` beside the repository is tried.
    """

    def find(name: str) -> Path:
        path = Path(os.environ.get("TGDPO_DATA") or ROOT.parent / "shared" / "data") / name
        if not path.is_file():
            pytest.skip(f"real data not found at {path}; set TGDPO_DATA to its folder")
        return path

    return find
