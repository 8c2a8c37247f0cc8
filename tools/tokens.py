"""Print the response tokens that a reward file numbers: row, response, number of the token, text.

    python -m tools.tokens pairs.jsonl runs/start
    python -m tools.tokens pairs.jsonl runs/start --row 3
    python -m tools.tokens pairs.jsonl runs/start --json       # lines of a reward file, with texts in place of numbers

The tokens are those of training: give the same data settings, such as data.max_length=512. The last token of a response
closes its turn, unless the response was cut, and gets a number as well. Rows that training leaves out are named on
stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.settings import changed
from tgdpo_megatron.checkpoint.sources import find
from tgdpo_megatron.config import Config, DataConfig
from tgdpo_megatron.data.formats import read_pairs
from tgdpo_megatron.data.prepare import PreparedPairs, few, is_prepared, prepare_pairs
from tgdpo_megatron.data.tokenizer import token_texts
from tgdpo_megatron.errors import CommandLine, UserError, one_sentence_errors

SIDES = ("chosen", "rejected")


def response_tokens(
    data: PreparedPairs, tokenizer: Any, row: int | None = None
) -> Iterator[tuple[int, list[list[str]]]]:
    """Row, and the texts of the tokens of both responses, for every pair or for that of one row.

    Raises:
        UserError: There is no such row, or training leaves it out.
    """
    rows = data.rows.tolist()
    if row is not None and row not in rows:
        reasons = [reason for reason, dropped in data.summary.dropped.items() if row in dropped]
        why = f"training leaves it out ({reasons[0]})" if reasons else "there is no such row; rows count from 1"
        raise UserError(f"--row {row}: {why}.")
    for pair in range(len(data)) if row is None else (rows.index(row),):
        start = int(data.prompt_lengths[pair])
        yield rows[pair], [token_texts(tokenizer, data.sequence(pair, side)[start:].tolist()) for side in (0, 1)]


def as_json(row: int, texts: list[list[str]]) -> str:
    """A line of a reward file, with the texts of the tokens where the rewards will be."""
    return json.dumps({"row": row, **dict(zip(SIDES, texts, strict=True))}, ensure_ascii=False)


def as_lines(row: int, texts: list[list[str]]) -> str:
    """A line for each token."""
    return "\n".join(
        f"{row:>6}  {side:<8}  {number:>5}  {json.dumps(text, ensure_ascii=False)}"
        for side, of_side in zip(SIDES, texts, strict=True)
        for number, text in enumerate(of_side)
    )


def tokenizer_folder(given: Path) -> Path:
    """The folder of a tokenizer: a HuggingFace folder itself, that in the cache of a hub, or the one in a checkpoint.

    Raises:
        UserError: There is no tokenizer.
    """
    folder = find(given, needs="tokenizer").config_folder
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{given}: no tokenizer.json there; give a checkpoint, or a HuggingFace folder with its tokenizer."
        )
    return folder


def prepared(source: Path, tokenizer_from: Path, settings: DataConfig) -> tuple[PreparedPairs, Any]:
    """The pairs as training tokenises them, and the tokenizer. What is wrong with the files is found out first.

    Raises:
        UserError: What prepare_pairs refuses, or no tokenizer.
    """
    folder = tokenizer_folder(tokenizer_from)
    if not is_prepared(source):
        read_pairs(source, settings.format, settings.columns)
    from tgdpo_megatron.data.tokenizer import tokenizer_for

    tokenizer = tokenizer_for(folder, settings)
    with tempfile.TemporaryDirectory() as made:
        return prepare_pairs(settings, source, tokenizer, Path(made)), tokenizer


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(
            prog="python -m tools.tokens",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("pairs", type=Path, help="pairs, in any form that data.train takes")
        parser.add_argument("checkpoint", type=Path, help="model with the tokenizer, as model.checkpoint")
        parser.add_argument("changes", nargs="*", metavar="data.key=value", help="data settings, as in training")
        parser.add_argument("--row", type=int, help="print only the pair of this row, or of this line of a .jsonl file")
        parser.add_argument("--json", action="store_true", help="print one JSON object for each row")
        parsed = parser.parse_intermixed_args()
        settings = changed(Config(), parsed.changes).data
        data, tokenizer = prepared(parsed.pairs, parsed.checkpoint, settings)
        for reason, rows in data.summary.dropped.items() if parsed.row is None else ():
            print(f"left out: {reason} (row {few(rows)})", file=sys.stderr)
        for row, texts in response_tokens(data, tokenizer, parsed.row):
            print(as_json(row, texts) if parsed.json else as_lines(row, texts))


if __name__ == "__main__":
    main()
