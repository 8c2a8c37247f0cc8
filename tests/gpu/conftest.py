"""These tests need an NVIDIA GPU; elsewhere they are skipped, and say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.gpu_where import HAVE_GPU, HAVE_TRANSFORMER_ENGINE, LOCAL, REHEARSAL, TRANSFORMER_ENGINE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="torch sees no GPU here")
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)
            if not (HAVE_GPU or REHEARSAL):
                item.add_marker(skip)


@pytest.fixture(scope="session", params=[LOCAL, TRANSFORMER_ENGINE])
def layers(request: Any) -> str:
    """Whose layers a model is made of."""
    if request.param == TRANSFORMER_ENGINE and not HAVE_TRANSFORMER_ENGINE:
        pytest.skip("Transformer Engine is not installed")
    found: str = request.param
    return found


@pytest.fixture(scope="session", params=[(LOCAL, "fp32"), (LOCAL, "bf16"), (TRANSFORMER_ENGINE, "bf16")], ids=", ".join)
def arithmetic(request: Any) -> tuple[str, str]:
    """Whose layers, and the precision they compute in. Transformer Engine's keep packs apart in bf16 alone."""
    if request.param[0] == TRANSFORMER_ENGINE and not HAVE_TRANSFORMER_ENGINE:
        pytest.skip("Transformer Engine is not installed")
    found: tuple[str, str] = request.param
    return found
