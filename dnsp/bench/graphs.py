"""Steps of several ranks as CUDA graphs: a launch of the host's for all kernels of a step, so that the host's time for
each of them does not count. A scan by peer, in which the host takes no part, is captured with it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from dnsp.bench.ranks import WARM, Ranks, Work


def as_graphs(steps: Mapping[str, Work | None], ranks: Ranks) -> tuple[dict[str, Work | None], dict[str, str]]:
    """Each step as a graph, and in words why there is none of some: what fails on one rank is left out on all, so that
    all replay the same. None: this rank only waits. Nobody may read what a step leaves.

    Raises: what a step itself does, which runs before it is captured.
    """
    # Graphs that run one after another, and leave nothing, take one memory.
    side, pool = torch.cuda.Stream(ranks.device), torch.cuda.graph_pool_handle()
    graphs: dict[str, Work | None] = {}

    def capture(name: str) -> None:
        step = steps[name]
        graphs[name] = None if step is None else _captured(step, side, pool)

    with torch.cuda.stream(side):  # and back, whatever stream a capture that fails leaves
        for step in steps.values():
            ranks.turn(step, WARM)  # nothing is compiled, proven or shared out in a capture
        captured, failures = ranks.willing({name: partial(capture, name) for name in steps})
    return {name: graphs[name] for name in captured}, failures


def _captured(step: Work, side: torch.cuda.Stream, pool: Any) -> Work:
    """A step that has run on this stream before."""
    graph = torch.cuda.CUDAGraph()
    said: Exception | None = None
    try:
        # By default what any thread asks of CUDA meanwhile, as NCCL's do, would end the capture.
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            try:
                step()
            except Exception as error:
                said = error
                raise
    except Exception as error:  # of a step that fails the end of its capture says only that it failed
        raise said or error from None

    def replay() -> Work:
        graph.replay()
        return step  # what the graph reads lives as long as it does

    return replay
