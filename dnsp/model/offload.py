"""What is kept for the backward pass waits in the host's memory, copied out and back on a stream of its own.

    offload = Offload()
    with offload.saving():                      # what autograd saves here, and what goes onto offload.tape()
        x = kept.checkpoint(layer, x, tape=offload.tape())

The copy out of one layer runs beside the next layer's work; in the backward pass the copies back of what was kept just
before are started as soon as something is asked for. Pinned memory is torch's cached one, the same every step.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 2**20  # bytes; less is not worth a copy
AHEAD = 4  # copies under way before they are asked for


class Offload:
    """One forward and backward pass's store."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._stream: torch.cuda.Stream | None = None

    def saving(self) -> AbstractContextManager[Any]:
        """A context in which what autograd saves goes to the host: large tensors on a GPU, parameters left alone."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def tape(self) -> Tape:
        """A list for :func:`dnsp.kernels.kept.checkpoint` whose entries go to the host."""
        return Tape(self)

    @property
    def bytes(self) -> int:
        """In the host's memory."""
        return sum(entry.host.numel() * entry.host.element_size() for entry in self._entries)

    def _pack(self, tensor: Tensor) -> Tensor | _Entry:
        large = tensor.numel() * tensor.element_size() >= SMALL
        if not (tensor.is_cuda and large) or isinstance(tensor, nn.Parameter):
            return tensor
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        entry = _Entry(tensor, self._stream, len(self._entries))
        self._entries.append(entry)
        return entry

    def _unpack(self, packed: Tensor | _Entry) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        for entry in self._entries[max(0, packed.index - AHEAD) : packed.index + 1][::-1]:
            entry.start_back()
        return packed.wait_back()


class _Entry:
    """One tensor in pinned memory."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream, index: int) -> None:
        self.index, self._stream = index, stream
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._device, self._used = tensor.device, False
        self._back: Tensor | None = None
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not given to another before it is copied

    def start_back(self) -> None:
        """The copy back to the device, unless it is under way or has been asked for."""
        if self._back is None and not self._used:
            with torch.cuda.stream(self._stream):
                self._back = self.host.to(self._device, non_blocking=True)

    def wait_back(self) -> Tensor:
        """The tensor on the device, for work queued from here on."""
        self._used = False  # a graph kept for a second backward pass asks again
        self.start_back()
        assert self._back is not None
        current, tensor = torch.cuda.current_stream(self._device), self._back
        current.wait_stream(self._stream)
        tensor.record_stream(current)
        self._back, self._used = None, True
        return tensor


class Tape(list[Any]):
    """Results, nested in tuples and lists, whose tensors are in the host's memory."""

    def __init__(self, offload: Offload) -> None:
        super().__init__()
        self._offload = offload

    def append(self, value: Any) -> None:
        super().append(_each(value, self._offload._pack))

    def __getitem__(self, at: Any) -> Any:
        return _each(super().__getitem__(at), self._offload._unpack)


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_each(part, change) for part in value)
    return change(value) if isinstance(value, Tensor | _Entry) else value
