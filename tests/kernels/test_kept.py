"""Results kept across recomputation: what passed through ``once`` is not made again, everything else is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dnsp.kernels import kept


class Counted(torch.autograd.Function):
    """y = x * c, where c is dear: made through ``once``, and new each time it is made."""

    made = 0

    @staticmethod
    def forward(ctx, x):
        def make() -> Tensor:
            Counted.made += 1
            return torch.full((), float(Counted.made))

        c = kept.once(make)
        ctx.save_for_backward(c)
        return x * c

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0]


@pytest.fixture(autouse=True)
def start() -> None:
    Counted.made = 0


def layer(x: Tensor) -> Tensor:
    return Counted.apply(Counted.apply(x).sin()).cos()


def expected(x: Tensor, c1: float, c2: float) -> Tensor:
    return ((x * c1).sin() * c2).cos()


def test_each_result_is_made_once_and_in_order():
    x = torch.randn(5, requires_grad=True)
    y = kept.checkpoint(layer, x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert Counted.made == 2
    assert torch.equal(grad, torch.autograd.grad(expected(x, 1, 2).sum(), x)[0])


def test_layers_and_layers_of_layers():
    x = torch.randn(5, requires_grad=True)
    y = kept.checkpoint(lambda x: kept.checkpoint(layer, kept.checkpoint(layer, x)), x)
    y = kept.checkpoint(layer, y)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert Counted.made == 6
    truth = expected(expected(expected(x, 1, 2), 3, 4), 5, 6)
    assert torch.equal(grad, torch.autograd.grad(truth.sum(), x)[0])


def test_a_second_backward_pass():
    x = torch.randn(5, requires_grad=True)
    y = kept.checkpoint(layer, x).sum()
    first, second = torch.autograd.grad(y, x, retain_graph=True), torch.autograd.grad(y, x)
    assert Counted.made == 2 and torch.equal(first[0], second[0])


def test_outside_a_checkpoint_it_is_the_function():
    x = torch.randn(5, requires_grad=True)
    layer(x).sum().backward()
    assert Counted.made == 2
    assert kept.once(lambda: 7) == 7


def test_refusals():
    with kept.recording([]), pytest.raises(RuntimeError, match="no_grad"):
        kept.once(lambda: 1)
    with kept.replaying([]), torch.no_grad(), pytest.raises(RuntimeError, match="asks for result 0"):
        kept.once(lambda: 1)


def test_a_tape_that_keeps_its_entries_elsewhere():
    class Away(list):
        """Entries are packed; each is unpacked only in the recomputation."""

        unpacked = 0

        def append(self, value):
            super().append(("packed", value))

        def __getitem__(self, at):
            self.unpacked += 1
            return super().__getitem__(at)[1]

    x, tape = torch.randn(5, requires_grad=True), Away()
    y = kept.checkpoint(layer, x, tape=tape)
    assert len(tape) == 2 and tape.unpacked == 0
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert tape.unpacked == Counted.made == 2
    assert torch.equal(grad, torch.autograd.grad(expected(x, 1, 2).sum(), x)[0])
