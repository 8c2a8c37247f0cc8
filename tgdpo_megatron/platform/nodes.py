"""The nodes of a job: a launcher runs on each of them, and is told its place on its command line."""

from __future__ import annotations

from dataclasses import dataclass

from tgdpo_megatron.errors import UserError

SECONDS_TO_ANSWER = 30
"""A store that can be reached and does not answer for so long is none of ours."""


@dataclass(frozen=True)
class Nodes:
    """A launcher's place among those of its job.

    Attributes:
        count: Number of nodes. Each starts the same number of ranks.
        rank: Number of this node, from 0.
        host, port: Where the launcher of node 0 listens. Port 0: any that is free, for a job of one node.
        job: A name that tells this job from others that may have listened there.
    """

    count: int = 1
    rank: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    job: str = "job"

    @property
    def endpoint(self) -> str:
        """Where the launcher of node 0 listens, as on the command line."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


ALONE = Nodes()
"""The place of a launcher whose node is the only one."""


def nodes_of(count: int, rank: int | None, endpoint: str | None, job: str | None) -> Nodes:
    """The place that the options --nnodes, --node-rank, --rdzv-endpoint and --rdzv-id describe.

    Raises:
        UserError: One of them is missing, or they contradict each other.
    """
    if count < 1:
        raise UserError(f"--nnodes must be at least 1, not {count}.")
    if count == 1 and rank in (None, 0) and endpoint is None:
        return ALONE
    if rank is None or not 0 <= rank < count:
        given = "is not given" if rank is None else f"is {rank}"
        raise UserError(
            f"--nnodes is {count}, and --node-rank {given}; give each node its own number, 0 to {count - 1}."
        )
    if endpoint is None:
        raise UserError(
            f"--nnodes is {count}, so --rdzv-endpoint HOST:PORT is needed: the host of node 0, a free port."
        )
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--rdzv-endpoint {endpoint}: expected HOST:PORT, such as node-1:29400.")
    return Nodes(count, rank, host.strip("[]"), int(port), job or Nodes.job)
