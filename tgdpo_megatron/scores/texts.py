"""The text of tokenised pairs, read again: what contrastive prompts quote and character spans are counted in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from tgdpo_megatron.config import FormatName
from tgdpo_megatron.data.formats import TextPair, read_pairs
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.tokenizer import encode_prompt, encode_response
from tgdpo_megatron.errors import UserError


def read_texts(data: PreparedPairs) -> list[TextPair]:
    """The text of every pair, in the order of the data.

    Raises:
        UserError: The file is not there any more, or has lost a row.
    """
    source = Path(data.summary.source)
    if not source.exists():
        raise UserError(
            f"{source}: the pairs were tokenised from there and their text is needed, but it is gone; put it back, or "
            "prepare the pairs again from where it is now."
        )
    texts = {text.row: text for text in read_pairs(source, cast(FormatName, data.summary.format)).pairs}
    for pair in range(len(data)):
        if int(data.rows[pair]) not in texts:
            raise _changed(data, pair)
    return [texts[row] for row in data.rows.tolist()]


def check_text(data: PreparedPairs, pair: int, text: TextPair, tokenizer: Any) -> None:
    """Check that a text still gives the ids that were made from it.

    Raises:
        UserError: It was edited since.
    """
    prompt_text, prompt = encode_prompt(tokenizer, text.messages)
    for side, response in enumerate((text.chosen, text.rejected)):
        ids = data.sequence(pair, side).tolist()
        length = int(data.prompt_lengths[pair])
        # A prompt that was cut has lost its start, but kept a BOS: all but the first id are its end.
        if ids[1:length] != prompt[len(prompt) - length + 1 :] or ids[length:] != encode_response(
            tokenizer, text.messages, prompt_text, response
        ):
            raise _changed(data, pair)


def _changed(data: PreparedPairs, pair: int) -> UserError:
    return UserError(
        f"{data.summary.source}: {data.name(pair)} is not the text that was tokenised; prepare the pairs again."
    )
