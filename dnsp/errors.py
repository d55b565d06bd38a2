"""What a user can get wrong, said in one or two lines: the value, the rule, the way out."""

from __future__ import annotations


class UsageError(ValueError):
    """The request cannot be carried out as asked; found before the first step (exit status 2)."""

    exit_status = 2


class RunError(RuntimeError):
    """A run that had begun cannot go on (exit status 1)."""

    exit_status = 1


class Echo(RunError):
    """This rank ends because of what another rank reports itself: nothing more to say where that one is heard."""


class PeerFailed(Echo):
    """This rank ends because a peer is gone; said only if the peer could not speak for itself."""
