"""Within a micro-batch, forward and backward, the host never waits for the GPU."""

from __future__ import annotations

from pathlib import Path

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


def test_a_wait_would_be_recorded() -> None:
    found = on_gpu("planted_on_device", layers=LOCAL, module="tests.support.syncs")
    assert REHEARSAL or len(found) >= 1
