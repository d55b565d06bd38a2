"""What can go wrong between ranks, said as: the value, the rule, the way out."""

from __future__ import annotations

import re


class LayoutError(ValueError):
    """A sequence cannot be cut over the ranks as asked."""


class PlanError(ValueError):
    """Documents, segments or transports do not fit the layout."""


class CannotShare(PlanError):
    """The ranks of a group cannot share memory, the same on all of them; ``why``, in words without the way out."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(
            f"transport peer: {why}; use p2p and ring (parallel.transport, parallel.attention_transport)"
        )


class PeerLost(RuntimeError):
    """A rank of the group did not deliver: it died, or it stayed away longer than the group's timeout.

    ``rank`` is who noticed, ``peer`` who is missing (global ranks; None where a collective cannot tell),
    ``operation`` what was under way.
    """

    def __init__(self, rank: int, peer: int | None, operation: str, reason: str) -> None:
        self.rank, self.peer, self.operation = rank, peer, operation
        who = "a rank of its group" if peer is None else f"rank {peer}"
        super().__init__(f"rank {rank} lost {who} during {operation}: {reason}")

    def __reduce__(self) -> tuple[type[PeerLost], tuple[int, int | None, str, str]]:
        return PeerLost, (self.rank, self.peer, self.operation, str(self).split(": ", 1)[1])


def first_line(error: BaseException) -> str:
    """What a library says of a failure, in one line: without its source file's name and its advice."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = re.sub(r"^\[.*?\]:?\s*|\[[^]]*\.(cc|cpp|h):\d+\]\s*", "", line)
    return line.partition(" This is typically")[0].rstrip(".")[:300] or type(error).__name__
