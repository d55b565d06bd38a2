"""The packages that dnsp is measured against, where they are installed, each called as it documents."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dnsp.bench.common import package_version, reason
from dnsp.errors import UsageError

PEERS = {
    "flash-qla": ("flash-qla", "flash_qla"),
    "fla": ("flash-linear-attention", "fla.ops.gated_delta_rule"),
}  # name: (distribution, module)

PACKAGES = ("dnsp", "torch", "triton", "flash-linear-attention", "fla-core", "flash-qla", "tilelang")


@dataclass(frozen=True)
class Peer:
    """A package that was asked for; ``module`` None says that it cannot be used, and ``missing`` why."""

    name: str
    module: Any = None
    missing: str = ""

    @property
    def version(self) -> str:
        """``not installed`` where there is none."""
        return "not installed" if "not installed" in self.missing else package_version(PEERS[self.name][0])

    def op(self, name: str) -> Callable[..., Any] | None:
        return getattr(self.module, name, None)


def find_peers(names: str, device: torch.device, among: Sequence[str] = tuple(PEERS)) -> list[Peer]:
    """The peers named, comma between; ``all`` of them or ``none``.

    Raises: UsageError for a name that is not known.
    """
    wanted = {"all": list(among), "none": []}.get(names, names.split(","))
    for name in wanted:
        if name not in among:
            raise UsageError(f"--peers {names}: {name!r} is not known; name any of {', '.join(among)}, or all, or none")
    return [_find(name, device) for name in wanted]


def _find(name: str, device: torch.device) -> Peer:
    distribution, module = PEERS[name]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return Peer(name, missing=f"{distribution} is not installed")
    if device.type != "cuda":
        return Peer(name, missing="it needs a GPU")
    os.environ["FLA_FLASH_QLA"] = "0"  # where flash-qla is installed, fla's op would hand its calls to it
    try:
        return Peer(name, importlib.import_module(module))
    except Exception as error:  # half an installation, a GPU that it does not know
        return Peer(name, missing=f"cannot be imported: {reason(error)}")
