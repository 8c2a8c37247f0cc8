"""Bad inputs that are refused before the work begins, each in its own sentence. `make faults` tries the others, too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.inputs import SUBJECTS
from tests.faults.inputs.entry import BadInput
from tests.faults.inputs.forked import ForkedPrograms
from tests.faults.inputs.parts import make_parts
from tests.faults.inputs.run import run

ENTRIES = [entry for entries in SUBJECTS.values() for entry in entries]
EARLY = [entry for entry in ENTRIES if not entry.late and not entry.fresh]


@pytest.fixture(scope="module")
def programs() -> Iterator[ForkedPrograms]:
    forked = ForkedPrograms()
    yield forked
    forked.close()


@pytest.fixture(scope="module")
def parts(programs: ForkedPrograms, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs") / "parts"
    make_parts(folder, programs)
    return folder


def test_the_list_is_long_and_names_each_mistake_once() -> None:
    assert len(ENTRIES) >= 200 and len(EARLY) >= 120
    for subject, entries in SUBJECTS.items():
        names = [entry.name for entry in entries]
        assert len(set(names)) == len(names), subject
    assert all(entry.says.endswith((".", "?")) and len(entry.says) > 10 for entry in ENTRIES)


@pytest.mark.parametrize("entry", EARLY, ids=lambda entry: entry.name)
def test_it_is_refused_in_its_own_sentence(entry: BadInput, parts: Path, programs: ForkedPrograms) -> None:
    """With exit code 2, and nothing left: no traceback, no process, no file."""
    if reason := entry.skip():
        pytest.skip(reason)
    outcome = run(entry, parts, programs)
    assert outcome.faults(entry) == [], f"{outcome.said}\nexpected: {entry.says}\n{outcome.out}{outcome.err}"
