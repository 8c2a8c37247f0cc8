"""Megatron's GPT over flat batches, with frozen models that run beside the policy in the same pipeline schedule.

Legend: t tokens of a context-parallel rank, H hidden size, k models (the policy first), R labelled tokens of all
context-parallel ranks. Under sequence parallelism hidden states hold t / tensor-parallel size tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from tgdpo_megatron.config.constants import round_up
from tgdpo_megatron.data.batch import Batch
from tgdpo_megatron.model.attention import PlanParams
from tgdpo_megatron.model.context import gather_labelled
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.greedy import likeliest_tokens
from tgdpo_megatron.model.head import labelled_logprobs
from tgdpo_megatron.platform.clock import FROZEN


class PreferenceGPT(GPTModel):  # type: ignore[misc]
    """One pipeline chunk of the policy, with the same chunk of each frozen model.

    Stages send the hidden states of all models as one stacked tensor, [t, k, H], so that one schedule runs all models.
    On the last stage one distributed head computes the log-probs of all models.
    """

    description: ModelDescription  # set by build_model
    attends_by_plan: bool = True  # whether attention is that of attention.py; set by build_model
    rotary_of_windows: Any  # the RoPE of windowed layers, None where they share the others'; set by build_model
    frozen: tuple[PreferenceGPT, ...] = ()  # set by carry
    divergence: bool = False  # set by carry
    received: Any = None  # set by Megatron before every forward

    def carry(self, frozen: Sequence[PreferenceGPT], *, divergence: bool = False) -> None:
        """Run frozen models of the same shape beside this model, without graph, gradient or optimizer state.

        The frozen models are kept in a tuple, outside torch's module tree, so that Megatron's data parallelism,
        optimizer and checkpoints see the policy only.

        Args:
            frozen: This chunk of each frozen model.
            divergence: Whether the last stage also returns the policy's divergence from the first frozen model.
        """
        for model in frozen:
            model.requires_grad_(False).eval()
        self.frozen = tuple(frozen)
        self.divergence = divergence

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Keep the hidden states that the previous stage sent. [t, k, H], or None on the first stage."""
        (self.received,) = input_tensor

    def forward(self, batch: Batch) -> Tensor:
        """Run this chunk of all models.

        Returns:
            Before the last stage: stacked hidden states [t, k, H] in the model's dtype. On the last stage: log-probs of
            the labelled tokens, nats, [k, R] fp32, or [k + 1, R] with the divergence as the last row. Only the policy's
            part and the divergence carry gradient.
        """
        models = (self, *self.frozen)
        states = [self.decode(batch, self._received(0))]
        with torch.no_grad(), self._frozen_time():
            states += [model.decode(batch, self._received(place)) for place, model in enumerate(self.frozen, start=1)]
        if not self.post_process:
            return torch.cat(states, dim=1) if self.frozen else states[0]
        logps = labelled_logprobs(
            [(state, model.output_weight()) for state, model in zip(states, models, strict=True)],
            batch.predictors,
            batch.labels,
            vocab_size=self.description.vocab_size,
            sequence_parallel=self.config.sequence_parallel,
            group=self.pg_collection.tp,
            softcap=self.description.logit_softcap,
            divergence=self.divergence,
            frozen_time=self._frozen_time(),
        )
        return gather_labelled(logps, batch.context_labels, self.pg_collection.cp)

    @torch.no_grad()
    def next_tokens(self, batch: Batch) -> Tensor:
        """Run this chunk of this model alone.

        Returns:
            Before the last stage: hidden states [t, 1, H]. On the last stage: the likeliest token after each of the
            batch's predictors. [R] int64.
        """
        states = self.decode(batch, self.received)
        if not self.post_process:
            return states
        tokens = likeliest_tokens(
            states,
            self.output_weight(),
            batch.predictors,
            vocab_size=self.description.vocab_size,
            sequence_parallel=self.config.sequence_parallel,
            group=self.pg_collection.tp,
        )
        return gather_labelled(tokens[None], batch.context_labels, self.pg_collection.cp)[0]

    def decode(self, batch: Batch, received: Tensor | None) -> Tensor:
        """Run the layers of this chunk for this model alone. Returns hidden states [t, 1, H]."""
        hidden = self.embedding(batch.tokens[None], batch.positions[None]) if self.pre_process else None
        if hidden is not None and self.description.embedding_scale is not None:
            hidden = hidden * float(torch.tensor(self.description.embedding_scale, dtype=hidden.dtype))
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
            weight = self.output_layer()  # returns its weight, see build.py
        return weight

    def _frozen_time(self) -> AbstractContextManager[None]:
        """Counts the time of a block as that of frozen models, where the engine has a clock."""
        clock = self.config.timers
        return clock.during(FROZEN) if self.frozen and clock is not None else nullcontext()

    def _received(self, place: int) -> Tensor | None:
        return None if self.received is None else self.received[:, place : place + 1]

    def _rotary_and_boundaries(self, batch: Batch) -> tuple[Tensor, PackedSeqParams]:
        # Megatron caches rotary tables by length. The length is rounded up so that few different tables are made.
        length = round_up(batch.plan.most_keys, 256)
        rotaries = filter(None, (self.rotary_pos_emb, self.rotary_of_windows))
        # Of a packed sequence Megatron gives the whole table, and otherwise a context-parallel rank's share of it.
        tables = [rotary(length, packed_seq=True) for rotary in rotaries]  # each [length, 1, 1, channels]
        plan = batch.plan
        if self.attends_by_plan:
            tables = [table[batch.positions] for table in tables]
            boundaries = PlanParams(plan)
        else:
            assert plan.key_rows is None, "keys are picked, and attention is not by a plan: see settle_attention"
            boundaries = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=plan.cu_seqlens_q,
                cu_seqlens_kv=plan.cu_seqlens_kv,
                max_seqlen_q=plan.most_queries,
                max_seqlen_kv=plan.most_keys,
            )
        return tables[0] if len(tables) == 1 else torch.stack(tables), boundaries
