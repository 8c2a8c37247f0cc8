"""Within a micro-batch, forward and backward, the host never waits for the GPU; in a whole step it does twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.test_syncs import LOSSES
from tests.support.gpu_where import LOCAL, REHEARSAL, on_gpu


def test_no_micro_batch_of_any_method_waits(arithmetic: tuple[str, str], checkpoint: Path) -> None:
    """By torch's own sync debug mode, libraries' calls included, and by the operators our lines call."""
    layers, precision = arithmetic
    found = on_gpu(
        "record",
        layers=layers,
        module="tests.support.syncs",
        folder=str(checkpoint),
        losses=LOSSES,
        precision=precision,
    )
    assert found == {name: [] for name in LOSSES}


MOST_WAITS = 2
"""Of the host in a step without pipeline: for the sums that the ranks report, and for the gradient's norm."""


@pytest.mark.parametrize("shared_prompts", [True, False], ids=["prompts shared", "prompts apart"])
def test_a_whole_step_waits_twice_at_most(arithmetic: tuple[str, str], checkpoint: Path, shared_prompts: bool) -> None:
    layers, precision = arithmetic
    found = on_gpu(
        "whole_step",
        layers=layers,
        module="tests.support.syncs",
        folder=str(checkpoint),
        precision=precision,
        shared_prompts=shared_prompts,
    )
    assert len(found) <= MOST_WAITS, found
    assert REHEARSAL or len(found) >= 1, "the sums are read, so an empty list would mean that nothing was watched"


def test_a_wait_would_be_recorded() -> None:
    found = on_gpu("planted_on_device", layers=LOCAL, module="tests.support.syncs")
    assert REHEARSAL or len(found) >= 1
