"""Rows of `make roundtrip`: every family in bf16 with tied embeddings, which share the most code."""

from __future__ import annotations

import pytest

from tests.parity.models import FAMILIES
from tests.roundtrip.table import LIMIT, Result, run


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    found = run(tmp_path_factory.mktemp("roundtrip"), ", tied, bf16", ["TP2×PP2"])
    return {result.model.split(",")[0]: result for result in found}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_come_back_bit_for_bit(results: dict[str, Result], family: str) -> None:
    assert results[family].bit_equal


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_huggingfaces_at_another_layout(results: dict[str, Result], family: str) -> None:
    assert results[family].differences["TP2×PP2"] <= LIMIT


@pytest.mark.parametrize("family", FAMILIES)
def test_the_certificate_is_valid_and_refused_once_tampered_with(results: dict[str, Result], family: str) -> None:
    assert results[family].certified
