"""A folder that only the first rank's machine has is noticed at once, by all ranks, and not when a save fails."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.program import run_ranks


def test_all_ranks_refuse_a_folder_that_one_of_them_does_not_share(tmp_path: Path) -> None:
    said = run_ranks("tests.support.apart", "refused", 2, folder=str(tmp_path))
    words = r": rank 1 \(on \S+\) does not see there what rank 0 wrote; the folder must be on a file system that all"
    for rank in (0, 1):
        apart, together = said[2 * rank : 2 * rank + 2]
        assert re.match(re.escape(f"{tmp_path}/of-{rank}") + words, apart)
        assert together == ""
