"""Token scores of a data set: one number for every response token, by the name of the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tgdpo_megatron.data.mapped import Scattered
from tgdpo_megatron.data.prepare import PreparedPairs

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
"""Version of the files that scores/store.py writes."""


@dataclass(frozen=True)
class ScoresManifest:
    """What token scores depend on. A field is None where its scores are absent or not needed."""

    tokenizer: str
    template: str
    max_length: int
    precision: str
    reference: str | None = None
    """Fingerprint of the reference weights."""
    guidance: str | None = None
    """Fingerprint of the guidance weights."""
    chat_template_kwargs: dict[str, Any] | None = None
    """What the chat template was given; None for scores of an earlier version. The hash `template` holds it too."""
    prompts: str | None = None
    """Hash of the contrastive prompts."""
    format: int = FORMAT


@dataclass(frozen=True)
class TokenScores:
    """Scores of all pairs of a data set.

    Attributes:
        values: Name -> scores of all responses, in the order of the data, chosen before rejected. fp32. They are in
            memory, or in files of which a batch reads the scores of its own pairs.
        starts: Response 2 · pair + side has values[starts[r]:starts[r + 1]]. [2N+1] int64.
        manifest: How the scores were made; None for scores that were not read from a folder of scores.
    """

    values: Mapping[str, np.ndarray | Scattered]
    starts: np.ndarray
    manifest: ScoresManifest | None = None

    @classmethod
    def of(
        cls, data: PreparedPairs, values: Mapping[str, np.ndarray | Scattered], manifest: ScoresManifest | None = None
    ) -> TokenScores:
        """Scores in the order of `data`."""
        return cls(values, response_starts(data), manifest)

    def join(self, samples: Sequence[int], sides: Sequence[int]) -> dict[str, Tensor]:
        """Scores of the labelled tokens of some pairs, in batch order. Name -> [R] fp32."""
        import torch  # late, since the files of scores are also checked before torch is loaded

        responses = [2 * sample + side for sample in samples for side in sides]
        pieces = [slice(self.starts[response], self.starts[response + 1]) for response in responses]
        return {
            name: torch.from_numpy(np.concatenate([np.empty(0, np.float32), *(values[piece] for piece in pieces)]))
            for name, values in self.values.items()
        }


def response_starts(data: PreparedPairs) -> np.ndarray:
    """Where each response begins when all responses are put one after another. [2N+1] int64."""
    lengths = np.diff(data.starts) - np.repeat(data.prompt_lengths, 2)
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
