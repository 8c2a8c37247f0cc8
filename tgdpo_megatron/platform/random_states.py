"""Random numbers of a step: they follow from the seed and the step alone, so that a run continues as it would have."""

from __future__ import annotations

import random

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel


def set_for_step(seed: int, step: int) -> None:
    """Set every generator that a step may draw from: torch's, Megatron's, NumPy's and Python's.

    Ranks that hold parts of the same pairs draw the same numbers; data-parallel ranks draw others. Megatron's own
    generator for what tensor-parallel ranks do not share differs between them, as it should.
    """
    state = np.random.SeedSequence([seed, step, parallel_state.get_data_parallel_rank()]).generate_state(1)
    number = int(state[0])
    tensor_parallel.model_parallel_cuda_manual_seed(number)
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
