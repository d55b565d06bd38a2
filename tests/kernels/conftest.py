"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from dnsp.kernels import proof, proof_run
from dnsp.kernels.launches import candidates
from tests.kernels.interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    started = Interpreter()
    yield started
    started.close()


@pytest.fixture
def unasked() -> Iterator[None]:
    """Kernels are launched without being asked whether they are proven: the tests prove them themselves, of far more
    shapes than are worth a process each."""
    with proof.mode(proof_run.Recording(candidates()["as tuned"])):
        yield


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Nothing is known; called, it makes this process forget, as another one would know nothing."""

    def forget() -> None:
        monkeypatch.setattr(proof, "_proven", set())
        monkeypatch.setattr(proof, "_tables", {})

    forget()
    return forget
