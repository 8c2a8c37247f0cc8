"""The text of tokenised pairs, read again. Contrastive prompts quote it, and spans of rewards count its characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from tgdpo_megatron.config import FormatName
from tgdpo_megatron.data.formats import TextPair, read_pairs
from tgdpo_megatron.data.hub_splits import hub_split
from tgdpo_megatron.data.prepare import PreparedPairs, encode_text
from tgdpo_megatron.data.truncation import fit
from tgdpo_megatron.errors import UserError


def read_texts(data: PreparedPairs) -> list[TextPair]:
    """The text of every pair, in the order of the data.

    Raises:
        UserError: The data file is gone, or a pair's row is gone from it.
    """
    texts: dict[str, dict[int, TextPair]] = {}
    for file in data.files:
        source = Path(file.source)
        if not source.exists() and hub_split(source) is None:
            raise UserError(
                f"{source}: the pairs were tokenised from this data and their text is needed, but the data is gone; "
                "put it back, or prepare the pairs again from its new path."
            )
        read = read_pairs(source, cast(FormatName, file.format), file.renamed)
        texts[file.source] = {text.row: text for text in read.pairs}
    found = []
    for pair, row in enumerate(data.rows.tolist()):
        text = texts[data.file_of(pair).source].get(row)
        if text is None:
            raise _changed(data, pair)
        found.append(text)
    return found


def check_text(data: PreparedPairs, pair: int, text: TextPair, tokenizer: Any) -> None:
    """Check that the text of a pair still gives the pair's token ids.

    Raises:
        UserError: The text was edited after it was tokenised.
    """
    summary = data.summary
    prompt, responses = encode_text(tokenizer, text)
    cut = fit(prompt, responses, summary.max_length, summary.truncation, tokenizer.bos_token_id)
    if cut is None or any(
        data.sequence(pair, side).tolist() != [*cut[0], *response] for side, response in enumerate(cut[1])
    ):
        raise _changed(data, pair)


def _changed(data: PreparedPairs, pair: int) -> UserError:
    return UserError(
        f"{data.file_of(pair).source}: {data.name(pair)} is not the text that was tokenised; prepare the pairs again."
    )
