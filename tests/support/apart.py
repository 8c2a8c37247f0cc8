"""Two ranks whose machines have a folder each under the name of one."""

from __future__ import annotations

from pathlib import Path

from tgdpo_megatron.errors import UserError
from tgdpo_megatron.platform.processes import Ranks
from tgdpo_megatron.run_lock import RunLock, take_together


def refused(ranks: Ranks, *, folder: str) -> list[str]:
    """What each rank says, where it sees a folder of its own, and "" where all see the same."""
    import torch.distributed as dist

    said = []
    for name in (f"of-{ranks.rank}", "of-all"):
        lock = RunLock(Path(folder) / name)
        lock.path.parent.mkdir(exist_ok=True)
        try:
            take_together(lock, ranks, lock.take)
            said.append("")
        except UserError as error:
            said.append(str(error))
    everywhere: list[list[str]] = [[]] * ranks.world_size
    dist.all_gather_object(everywhere, said)
    return [sentence for of_rank in everywhere for sentence in of_rank]
