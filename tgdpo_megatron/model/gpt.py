"""Megatron's GPT over flat batches, carrying frozen models through its own pipeline schedule.

Legend: T tokens, H hidden size, k models (the policy first), R labelled tokens. Under sequence parallelism
hidden states hold T / tensor-parallel size tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from tgdpo_megatron.data.batch import Batch
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.head import labelled_logprobs
from tgdpo_megatron.model.local_layers import Segments


class PreferenceGPT(GPTModel):  # type: ignore[misc]
    """One pipeline chunk of the policy, and the same chunk of each frozen model beside it.

    Between stages the hidden states of all models travel stacked, [T, k, H], so one schedule serves them all;
    on the last stage they meet in one distributed head.
    """

    description: ModelDescription  # set by build_model
    uses_transformer_engine: bool = False  # set by build_model
    frozen: tuple[PreferenceGPT, ...] = ()  # set by carry
    divergence: bool = False  # set by carry
    received: Any = None  # set by Megatron before every forward

    def carry(self, frozen: Sequence[PreferenceGPT], *, divergence: bool = False) -> None:
        """Take frozen models of the same depth and width along. They get no graph, gradient or optimizer state.

        With `divergence`, the last stage also gives the policy's divergence from the first of them.

        Kept in a tuple, outside torch's module tree: Megatron's data parallelism, optimizer and checkpoints
        see the policy alone.
        """
        for model in frozen:
            model.requires_grad_(False).eval()
        self.frozen = tuple(frozen)
        self.divergence = divergence

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Megatron hands over what the previous stage sent. [T, k, H], or None on the first stage."""
        (self.received,) = input_tensor

    def forward(self, batch: Batch) -> Tensor:
        """Run this chunk for all models.

        Returns:
            Stacked hidden states [T, k, H] in the model's dtype; on the last stage, log-probs of the labelled
            tokens, nats, [k, R] fp32, and the divergence in one more row if asked for. Only the policy's part, and
            the divergence, carry gradient.
        """
        models = (self, *self.frozen)
        states = [self.decode(batch, self._received(0))]
        with torch.no_grad():
            states += [model.decode(batch, self._received(place)) for place, model in enumerate(self.frozen, start=1)]
        if not self.post_process:
            return torch.cat(states, dim=1) if self.frozen else states[0]
        return labelled_logprobs(
            [(state, model.output_weight()) for state, model in zip(states, models, strict=True)],
            batch.predictors,
            batch.labels,
            vocab_size=self.description.vocab_size,
            sequence_parallel=self.config.sequence_parallel,
            group=self.pg_collection.tp,
            divergence=self.divergence,
        )

    def decode(self, batch: Batch, received: Tensor | None) -> Tensor:
        """This model's layers on this stage. Returns hidden states [T, 1, H]."""
        hidden = self.embedding(batch.tokens[None], batch.positions[None]) if self.pre_process else None
        if received is not None:
            self.decoder.set_input_tensor(received)
        rotary, boundaries = self._rotary_and_boundaries(batch)
        output: Tensor = self.decoder(
            hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=boundaries
        )
        return output

    def output_weight(self) -> Tensor:
        """The output matrix on this rank. [padded vocabulary / tensor-parallel size, H]."""
        weight: Tensor
        if self.share_embeddings_and_output_weights and self.pre_process:
            weight = self.embedding.word_embeddings.weight
        else:
            weight = self.output_layer()  # gives its weight, see build_model
        return weight

    def _received(self, place: int) -> Tensor | None:
        return None if self.received is None else self.received[:, place : place + 1]

    def _rotary_and_boundaries(self, batch: Batch) -> tuple[Tensor, PackedSeqParams]:
        # Lengths are rounded up so that Megatron's cache of rotary tables, keyed by length, is hit.
        table = self.rotary_pos_emb(-(-batch.longest_segment // 256) * 256)  # [length, 1, 1, channels]
        if not self.uses_transformer_engine:
            return table[batch.positions], Segments(batch.segment_lengths)
        boundaries = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.longest_segment,
            max_seqlen_kv=batch.longest_segment,
        )
        return table, boundaries
