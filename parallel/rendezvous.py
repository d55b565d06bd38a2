"""Where the ranks meet under torchrun, in every attempt anew.

torchrun's agent keeps one store for all restarts of its ranks, and with it the addresses that the ranks of the last
attempt left there: a restarted rank then waits for a process that is gone (pytorch issue 135712). How many restarts
there were does not help, for agents of different nodes count them differently. So rank 0 opens a store of its own, and
says in the agent's where it is; what an earlier rank 0 said is known by nobody answering there.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch.distributed as dist

_WHERE = "dnsp/store"
_TRY = timedelta(seconds=5)


def own_store(rank: int, world: int, address: str, port: int, timeout: timedelta) -> dist.Store | None:
    """The store of this attempt; None where no agent of torchrun keeps one, and ``address:port`` is rank 0's to open.

    Args:
        rank, world: this process's place; rank 0 runs on the host ``address``.
        address, port: of the agent's store.
        timeout: until the ranks have to have met.

    Raises:
        RuntimeError: they have not.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    agent = dist.TCPStore(address, port, world, is_master=False, timeout=timeout)
    if rank == 0:
        store = dist.TCPStore(address, 0, world, is_master=True, timeout=timeout, wait_for_workers=False)
        agent.set(_WHERE, str(store.port))
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        where = int(agent.get(_WHERE))
        try:
            store = dist.TCPStore(address, where, world, is_master=False, timeout=_TRY, wait_for_workers=False)
        except (RuntimeError, ValueError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nobody answers at {address}:{where}: {error}") from None
            time.sleep(0.2)
            continue
        store.set_timeout(timeout)
        return store
