"""What a user can get wrong, said in one or two lines: the value, the rule, the way out."""

from __future__ import annotations


class UsageError(ValueError):
    """The request cannot be carried out as asked; found before the first step (exit status 2)."""

    exit_status = 2


class RunError(RuntimeError):
    """A run that had begun cannot go on (exit status 1)."""

    exit_status = 1
