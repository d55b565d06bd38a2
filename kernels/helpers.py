"""Functions that kernels call."""

from __future__ import annotations

from typing import TypeVar

Jitted = TypeVar("Jitted")


def hashed(helper: Jitted) -> Jitted:
    """Marks a helper that reads a constant of its module: it is hashed when it is defined.

    Triton (3.6, 3.7) mixes the constants of a helper into the hash of a kernel that calls it, but only if the helper
    was hashed before. Else a kernel's binary, and with it the verdict on it and its place in Triton's cache, would
    depend on which kernel of a process came first.
    """
    getattr(helper, "cache_key", None)  # an interpreted one has none
    return helper
