"""``dnsp doctor --prove``: what it proves, what it prints and keeps, and its exit status."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dnsp import prove
from dnsp.config import load_config
from dnsp.errors import UsageError
from dnsp.kernels import proof, verdicts
from dnsp.kernels.signatures import AnySignature, Conv, ConvStep, DeltaStep, Norm, Post, Signature
from dnsp.kernels.verdicts import Toolchain, Verdict

H200 = Toolchain("NVIDIA H200", (9, 0), "3.6.0", "12.8.93", "of the tests")
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
BINARY = {"hash": "a", "kernel": "conv_kernel", "constants": {}, "warps": 2, "stages": 1, "registers": 40, "spills": 0}


@pytest.mark.parametrize("refused", [None, Conv])
def test_every_kind_is_proven_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: type | None) -> None:
    def establish(device: torch.device, signature: AnySignature, again: bool = False) -> Verdict:
        assert again
        if refused is not None and isinstance(signature, refused):
            raise proof.UnprovenError("wrong", Verdict(signature, None, refused={"as tuned": "y is off by 1.0e+00"}))
        return Verdict(signature, "as tuned", {"y": 1e-3}, [BINARY])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(proof, "establish", establish)
    monkeypatch.setattr(verdicts, "toolchain", lambda device: H200)
    console = Console(width=200, record=True, file=io.StringIO())
    status = prove.run(None, tmp_path / "proven.json", console)
    said = console.export_text()
    for what in ("convolution", "gated norm", "16 key and 32 value heads", "decode, convolution", "messages"):
        assert what in said
    kept = json.loads((tmp_path / "proven.json").read_text())
    kinds = {shape["signature"]["kind"] for shape in kept["shapes"]}
    assert kinds == {"Signature", "Conv", "Norm", "ConvStep", "DeltaStep", "Post"}
    assert (status, kept["ok"]) == ((0, True) if refused is None else (1, False))
    assert ("refused as tuned: y is off by 1.0e+00" in said) == (refused is not None)


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device.*dnsp doctor"):
        prove.run(None)


@pytest.mark.gpu
def test_what_a_configuration_asks_for_on_gpu() -> None:
    """Training's kernels, with and without a halo, and decoding's."""
    found: list[Any] = prove.signatures(load_config(QUICKSTART), torch.device("cuda:0"))
    assert {type(s) for s in found} == {Conv, Signature, Norm, ConvStep, DeltaStep, Post}
    convolutions = [s for s in found if isinstance(s, Conv)]
    assert [s.halo for s in convolutions] == [None, convolutions[0].dtype]
