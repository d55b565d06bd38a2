"""Messages of any size between memories that several processes share, by slots of the sender's memory.

A sender copies a message into a slot of its own, writes the slot's number into the receiver's *ring* and raises its
count there; the receiver's stream waits for the count, copies from the sender's slot, and raises the slot's count of
messages taken, which the sender waits for before it fills the slot again. All counts live on the device, as in
:mod:`.triton_scan`, whose wait serves here too. A counter is 4 words apart from the next, 16 bytes.

Of a slot ``emptied <= filled <= emptied + 1``; so no more than its slots are under way from one rank to another, and an
entry of the ring, of which there are no fewer, is read before it is written again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import proof
from .signatures import Post
from .triton_scan import WAITED, Clock, wait_kernel

RING = 8  # messages between two ranks that may be under way; a power of two, no fewer than a sender's slots
BLOCK = 4096  # words that a program copies
APART = 4  # words from one counter to the next


@triton.jit(do_not_specialize=["slot"])
def post_kernel(sent, filled, ring, posted, status, slot, RING: tl.constexpr):
    alive = tl.load(status, volatile=True) == 0
    count = tl.load(sent)
    times = tl.load(filled)
    tl.store(ring + (count & (RING - 1)), slot, mask=alive)
    tl.debug_barrier()
    tl.store(sent, count + 1)
    tl.store(filled, times + 1)
    # The message was written by kernels before this one: they are done.
    tl.atomic_xchg(posted, count + 1, mask=alive, sem="release", scope="sys")


@triton.jit(do_not_specialize=["words", "slot_words"])
def take_kernel(slots, ring, taken, out, words, slot_words, RING: tl.constexpr, BLOCK: tl.constexpr):
    slot = tl.load(ring + (tl.load(taken) & (RING - 1)), volatile=True)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < words
    tl.store(out + at, tl.load(slots + slot.to(tl.int64) * slot_words + at, mask=inside), mask=inside)


@triton.jit
def taken_kernel(ring, taken, emptied, RING: tl.constexpr, APART: tl.constexpr):
    count = tl.load(taken)
    slot = tl.load(ring + (count & (RING - 1)), volatile=True)
    tl.debug_barrier()
    tl.store(taken, count + 1)
    # The copy was made by the kernel before this one: it is done.
    tl.atomic_add(emptied + slot * APART, 1, sem="release", scope="sys")


def require(device: torch.device) -> None:
    """The kernels are proven here; before the first message, since whoever waits for one has a deadline."""
    proof.require_kernels(device, Post(RING))


def wait_room(filled: Tensor, emptied: Tensor, clock: Clock, where: int, peer: int) -> None:
    """The stream goes on when a slot's last message has been taken, or when time is up."""
    _wait(filled, emptied, clock, where, peer, sends=True)


def wait_message(posted: Tensor, taken: Tensor, clock: Clock, where: int, peer: int) -> None:
    """The stream goes on when a message is here, or when time is up."""
    _wait(taken, posted, clock, where, peer, sends=False)


def _wait(mine: Tensor, other: Tensor, clock: Clock, where: int, peer: int, sends: bool) -> None:
    proof.launch(
        wait_kernel, (1,),
        other, mine, other, mine, clock.status, clock.record, clock.stamps, 0, 1, clock.limit, where, peer,
        int(not sends), int(sends), 1, BLOCK=WAITED, TIMED=clock.status.is_cuda, num_warps=1, num_stages=1,
    )  # fmt: skip


def post(sent: Tensor, filled: Tensor, ring: Tensor, posted: Tensor, clock: Clock, slot: int) -> None:
    """Says that a slot of this sender holds the next message; ``ring`` and ``posted`` are in the receiver's memory."""
    proof.launch(post_kernel, (1,), sent, filled, ring, posted, clock.status, slot, RING=RING, num_warps=1)


def take(slots: Tensor, ring: Tensor, taken: Tensor, emptied: Tensor, out: Tensor) -> None:
    """Copies the message that has come out of the sender's ``slots`` (int32 ``[slots, words]``) into ``out``, int32,
    and says so in the sender's ``emptied``."""
    words = out.numel()
    proof.launch(
        take_kernel, (triton.cdiv(words, BLOCK),),
        slots, ring, taken, out, words, slots.shape[1], RING=RING, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    proof.launch(taken_kernel, (1,), ring, taken, emptied, RING=RING, APART=APART, num_warps=1)
