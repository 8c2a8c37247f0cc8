"""How the demo ends when one of its programs does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tgdpo_megatron.errors import UserError
from tools.demo.journal import Journal


def test_a_program_that_refused_its_input_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(
        UserError, match="ended with exit code 2; its whole output is in .*01-tools.convert_hf_to_megatron"
    ):
        Journal(tmp_path, seed=0).run("tools.convert_hf_to_megatron", "one-folder-only")


def test_a_program_that_failed_otherwise_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its traceback is shown, and the demo's exit code is not that of a refused input."""
    (tmp_path / "logs").mkdir()
    with pytest.raises(
        SystemExit, match="error: tools.no_such_program ended with exit code 1; its whole output is in "
    ):
        Journal(tmp_path, seed=0).run("tools.no_such_program")
    assert "No module named tools.no_such_program" in capfd.readouterr().err
