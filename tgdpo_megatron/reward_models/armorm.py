"""ArmoRM (Wang et al., arXiv 2406.12845): 19 rewards, and a gate that weighs them by the prompt.

    rewards = W h_last                                    19 numbers, from the state of the last token
    gate    = softmax(MLP(h_prompt) / 10) · scale          19 weights, from the state where the prompt ends
    score   = Σ gate · (rewards M)                         M takes the length out of the rewards

h_prompt is the state of the first token of the last `<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n`.
The code that is published with the weights does not load in transformers 5; this is written from its description. The
heads compute in fp32, whatever the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel

from tgdpo_megatron.errors import UserError
from tgdpo_megatron.reward_models.conversations import ConversationModel
from tgdpo_megatron.reward_models.loading import load_templated_tokenizer, load_weights, longest
from tgdpo_megatron.reward_models.scorer import Tokens, padded, states_at

PROMPT_ENDS = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


class Gate(nn.Module):
    """The weights of the rewards, from a hidden state. Names of tensors are the published ones."""

    def __init__(self, config: LlamaConfig, rewards: int) -> None:
        super().__init__()
        hidden, layers = getattr(config, "gating_hidden_dim", 1024), getattr(config, "gating_n_hidden", 3)
        self.temperature = float(getattr(config, "gating_temperature", 10))
        self.logit_scale = nn.Parameter(torch.ones(1))
        sizes = [config.hidden_size, *[hidden] * layers, rewards]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes[:-1], sizes[1:], strict=True))

    def forward(self, state: Tensor) -> Tensor:
        """[B, h] -> [B, rewards]."""
        *hidden, last = self.layers
        for layer in hidden:
            state = layer(state).relu()
        return (last(state) / self.temperature).softmax(dim=-1) * self.logit_scale


class ArmoRMModel(LlamaPreTrainedModel):  # type: ignore[misc]  # transformers has no types
    """Llama with the regression layer, the transformation and the gate. Names of tensors are the published ones."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        rewards = getattr(config, "num_objectives", 19)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, rewards, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(rewards), requires_grad=False)
        self.gating = Gate(config, rewards)
        self.post_init()

    def forward(self, ids: Tensor, mask: Tensor, sequences: Sequence[Tokens]) -> Tensor:
        """The score of each conversation. [B, T] -> [B] fp32."""
        states = self.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        prompt, last = states_at(states, sequences).unbind(dim=1)
        return (self.gating(prompt) * (self.regression_layer(last) @ self.reward_transform_matrix)).sum(dim=-1)


class ArmoRM(ConversationModel):
    """ArmoRM. Its scores lie close together, and σ of their differences is no probability."""

    def __init__(self, model: Any, tokenizer: Any, longest: int) -> None:
        super().__init__(model, tokenizer, longest)
        self.prompt_ends: list[int] = tokenizer(PROMPT_ENDS, add_special_tokens=False)["input_ids"]

    def marks(self, ids: list[int]) -> tuple[int, ...]:
        """Where the prompt ends, and the last token."""
        size = len(self.prompt_ends)
        for place in range(len(ids) - size, -1, -1):
            if ids[place : place + size] == self.prompt_ends:
                return place, len(ids) - 1
        raise UserError("the chat template does not write Llama-3's header of an answer, at which ArmoRM's gate reads.")

    def numbers(self, sequences: Sequence[Tokens]) -> Tensor:
        """The score of each conversation. [B] fp32."""
        ids, mask = padded(sequences, 0, self.device)
        score: Tensor = self.model(ids, mask, sequences)
        return score


def load(folder: Path, device: torch.device) -> ArmoRM:
    """Load the ArmoRM of a folder.

    Raises:
        UserError: No tokenizer or template, or weights that are damaged or not ArmoRM's.
    """
    tokenizer = load_templated_tokenizer(folder)
    model = load_weights(ArmoRMModel, folder, device)
    for head in (model.regression_layer, model.gating):
        head.float()
    model.reward_transform_matrix.data = model.reward_transform_matrix.data.float()
    return ArmoRM(model, tokenizer, longest(model.config, tokenizer))
