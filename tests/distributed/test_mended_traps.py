"""What gives wrong numbers under some megatron-cores is refused there. Where it is allowed, it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.program import run_ranks
from tgdpo_megatron.platform.versions import MARKS_EVERY_WEIGHT, REDUCES_ANY_TENSOR, SENDS_BEFORE_FREEING


@pytest.mark.skipif(
    not SENDS_BEFORE_FREEING.holds, reason="this megatron-core has the trap, and the setting is refused"
)
def test_outputs_that_are_freed_once_they_are_sent_leave_the_gradient_as_it_is(checkpoint: Path) -> None:
    kept, freed = run_ranks("tests.support.traps", "gradient_norms", 2, folder=str(checkpoint))
    assert kept == freed > 0


def test_weights_that_are_not_initialised_are_marked_as_the_version_says(checkpoint: Path) -> None:
    """A megatron-core where this fails has mended the trap, or has it again."""
    initialised, left = run_ranks("tests.support.traps", "marked_weights", 2, folder=str(checkpoint))
    split = {name for name, marked in initialised.items() if marked}
    assert {"decoder.layers.0.mlp.linear_fc1.weight", "embedding.word_embeddings.weight"} <= split
    assert {name for name, marked in left.items() if marked} == (split if MARKS_EVERY_WEIGHT.holds else set())


def test_a_gradient_that_megatron_might_not_reduce_never_reaches_it() -> None:
    """Where the third line fails, the version has mended the trap, or has it again."""
    found = run_ranks("tests.support.traps", "reduced_gradients", 2)
    assert found["Megatron's, contiguous"] == found["ours, contiguous"] == 2
    assert found["Megatron's"] == (2 if REDUCES_ANY_TENSOR.holds else 1)
    assert found["ours"] == "refused"
