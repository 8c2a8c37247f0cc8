"""A port for a job, which nobody takes between the look at it and its use."""

from __future__ import annotations

import itertools
import os
import socket

_FIRST, _PORTS = 15_000, 15_000
"""They end below 32768, from where on the system gives ports to connections, and to whoever asks for any port."""
_APART = 101
"""Places between the first ports of two processes with consecutive numbers."""
_asked = itertools.count()


def free_port() -> int:
    """A port at which nobody listens. Other processes look at other ports, and this one at the next each time."""
    for asked in itertools.islice(_asked, _PORTS):
        port = _FIRST + (_APART * os.getpid() + asked) % _PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port from {_FIRST} on is free")
