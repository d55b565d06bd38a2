"""Times of the decode kernel's launch by other shapes, each beside its error, to choose among on a GPU:

    python -m tests.kernels.time_decode [BATCH ...]

A shape is the state's columns of a program and its numbers of a warp (``COLUMNS`` and ``NUMBERS`` of
:mod:`dnsp.kernels.triton_decode`), and how the state is read and written (``READ``, ``WRITE``). As ``dnsp bench
decode`` does it: CUDA graphs of a step of each of so many states that none is in the L2 cache, by turns, medians.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from dnsp.bench.common import copies_beyond_cache, copy_ceiling, device_seconds
from dnsp.bench.decode_shapes import Shape, make_inputs
from dnsp.kernels import proof, proof_run, triton_decode
from dnsp.kernels.decode import delta_step
from dnsp.kernels.verdicts import candidates

# Columns, numbers of a warp, read, write. A row of 16 columns is half of a cache line of 128 bytes, of 32 a whole one;
# with one warp no sum leaves it; more warps of a program sum over K through shared memory.
SHAPES = {
    "16 columns, 1 warp (as it is)": (16, 2048, "", ""),
    "16 columns, 1 warp, streaming": (16, 2048, "evict_first", ".cs"),
    "32 columns, 1 warp": (32, 4096, "", ""),
    "32 columns, 1 warp, streaming": (32, 4096, "evict_first", ".cs"),
    "32 columns, 2 warps": (32, 2048, "", ""),
    "64 columns, 4 warps": (64, 2048, "", ""),
    "128 columns, 8 warps": (128, 2048, "", ""),
    "8 columns, 1 warp": (8, 2048, "", ""),
}
RUNS, STEPS = 40, 8


def graph_of(shape: Shape, steps: int, device: torch.device) -> tuple[Callable[[], Any], dict[str, float]]:
    """A round of steps, and the errors of one against fp64."""
    x, generator = make_inputs(shape, device), torch.Generator(device).manual_seed(1)
    size = shape.batch, shape.value_heads, shape.K, shape.V
    states = [torch.randn(size, generator=generator, device=device) for _ in range(steps)]
    exact_state, exact = states[0].double(), x.double()
    o = delta_step(exact.q, exact.k, exact.v, exact.g, exact.beta, exact_state, l2norm=True, backend="torch")
    found = delta_step(x.q, x.k, x.v, x.g, x.beta, states[0], l2norm=True, backend="triton")
    pairs = {"o": (found, o), "state": (states[0], exact_state)}
    errors = {name: float((a.double() - b).norm() / b.norm()) for name, (a, b) in pairs.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [delta_step(x.q, x.k, x.v, x.g, x.beta, state, l2norm=True, backend="triton") for state in states]
    return lambda: (graph.replay(), kept, states), errors


def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    ceiling = copy_ceiling(device)
    print(f"{torch.cuda.get_device_name(device)}, copies at {ceiling / 1e12:.2f} TB/s")
    for batch in map(int, sys.argv[1:] or ("1", "4", "16", "64")):
        shape = Shape(batch=batch)
        steps = copies_beyond_cache(shape.state_bytes, device, STEPS)
        rounds: dict[str, Callable[[], Any]] = {}
        said: dict[str, str] = {}
        for name, values in SHAPES.items():
            triton_decode.COLUMNS, triton_decode.NUMBERS, triton_decode.READ, triton_decode.WRITE = values
            recording = proof_run.Recording(candidates()["as tuned"])
            with proof.mode(recording):
                rounds[name], errors = graph_of(shape, steps, device)
            (binary,) = recording.binaries.values()
            said[name] = f"{binary['registers']:4d} {binary['spills']:3d}   {errors['o']:.1e} {errors['state']:.1e}"
        times: dict[str, list[float]] = {name: [] for name in SHAPES}
        for run in range(RUNS + 3):
            for name, play in rounds.items():
                seconds = device_seconds(play) / steps
                if run >= 3:
                    times[name].append(seconds)
        print(f"\n{shape}: {steps} states\n{'':32}      us   copy  regs spl      o   state")
        for name in SHAPES:
            middle = statistics.median(times[name])
            print(f"{name:32} {1e6 * middle:7.2f} {shape.bytes('delta') / middle / ceiling:6.1%}  {said[name]}")
        del rounds
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
