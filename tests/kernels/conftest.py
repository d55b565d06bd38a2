"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dnsp.kernels import proof, proof_run


@pytest.fixture
def unasked() -> Iterator[None]:
    """Kernels are launched without being asked whether they are proven: the tests prove them themselves, of far more
    shapes than are worth a process each."""
    with proof.mode(proof_run.Recording(proof.candidates()["as tuned"])):
        yield
