"""Sequence classifiers of transformers with one label, which is the score: the Skywork and Tülu kinds, and most others.

Such a model learns from pairs by −log σ(s_chosen − s_rejected), so that σ of a difference is a probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from tgdpo_megatron.reward_models.conversations import ConversationModel
from tgdpo_megatron.reward_models.loading import load_templated_tokenizer, load_weights, longest
from tgdpo_megatron.reward_models.scorer import Tokens, padded


class Classifier(ConversationModel):
    """A classifier whose one logit is the score."""

    is_bradley_terry = True

    def numbers(self, sequences: Sequence[Tokens]) -> Tensor:
        """The logit of each conversation. [B] float.

        transformers reads the score at the last token that is not the padding id, and without a padding id it takes one
        sequence at a time, of which it reads the last token. An id with which no sequence of a batch ends gives the
        same for many. A padding id that is no token, such as -1, is as good as none.
        """
        config = self.model.config.get_text_config()
        before = config.pad_token_id
        if before is None or not 0 <= before < self.vocabulary:
            last = {sequence.ids[-1] for sequence in sequences}
            config.pad_token_id = next(number for number in count() if number not in last)
        try:
            ids, mask = padded(sequences, config.pad_token_id, self.device)
            logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        finally:
            config.pad_token_id = before
        return logits[:, 0]


def load(folder: Path, device: torch.device) -> Classifier:
    """Load the classifier of a folder.

    Raises:
        UserError: No tokenizer or template, or weights that are damaged or not the classifier's.
    """
    tokenizer = load_templated_tokenizer(folder)
    model = load_weights(AutoModelForSequenceClassification, folder, device)
    return Classifier(model, tokenizer, longest(model.config, tokenizer))
