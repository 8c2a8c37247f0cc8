"""Where the time of a step goes, measured by the GPU itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.gpu_where import on_gpu


def test_every_moment_counts_once_and_a_planted_delay_is_found(arithmetic: tuple[str, str], checkpoint: Path) -> None:
    """The host sleeps while it reads, when the GPU has nothing else to do. Nothing is planted in the reference."""
    layers, _ = arithmetic
    delays = {"steps": 3, "in_reading": 0.5, "in_reference": 0.0}
    found = on_gpu("spent", layers=layers, module="tests.support.planted_delays", folder=str(checkpoint), **delays)
    assert sum(found["seconds"].values()) == pytest.approx(found["whole"], rel=0.02, abs=0.02)
    assert found["seconds"]["reading"] == pytest.approx(1.5, rel=0.2)
    assert found["seconds"]["frozen"] > 0 and found["barriers"] == 0
