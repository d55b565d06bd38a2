"""Real ranks for tests: processes of their own, gloo between them, results handed back through files.

    results = run_ranks(work, 4, "argument")      # work(*args) runs on every rank; results[r] is rank r's value

``work`` is a function of a module's top level; it may use torch.distributed, which is initialised. What it returns is
written by torch.save. A rank that raises makes ``run_ranks`` raise with its traceback; with ``check=False`` it comes
back as a ``RankFailure`` in its place, as does a rank that died.

Ranks are forked from a process that has imported torch and DeepSpeed, and nothing of ours: it takes seconds of a core's
time, more than most ranks then work.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ["pytest", "torch", "torch._dynamo", "deepspeed"]  # what forked ranks find imported


def python_path() -> str:
    """A child's PYTHONPATH: this checkout, before what is there already."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@dataclass
class RankFailure:
    rank: int
    exit_code: int | None  # None: had to be stopped at the timeout
    text: str  # the traceback, where there is one


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120,
    collective_timeout: float = 60,
    check: bool = True,
    fresh: bool = False,
) -> list[Any]:
    """``fn(*args)`` on ``world_size`` gloo ranks; seconds. Returns one result a rank; leaves no process behind.

    ``fresh``: import everything anew, under variables that count when that happens or when a process starts.
    """
    from torch.distributed import TCPStore

    context = _starting(fresh)
    # A group is made in 2 ms; by a store in a file it takes 8.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        where = (str(Path(sys.modules[fn.__module__].__file__ or "").resolve()), fn.__module__, fn.__qualname__)
        processes = [
            context.Process(
                target=_rank_main,
                args=(where, args, rank, world_size, folder, store.port, collective_timeout, dict(os.environ)),
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        stopped: set[int] = set()
        try:
            _wait(processes, deadline, stop_early=check)
        finally:
            for rank, process in enumerate(processes):
                if process.is_alive():
                    stopped.add(rank)
                    process.kill()
                process.join()
        results = [_result(Path(folder), rank, p.exitcode, rank in stopped) for rank, p in enumerate(processes)]
    failures = [r for r in results if isinstance(r, RankFailure)]
    if check and failures:
        first = min(failures, key=lambda f: f.exit_code is None)  # one that failed by itself, before those we stopped
        raise RuntimeError(f"rank {first.rank} of {world_size} failed (exit code {first.exit_code})\n{first.text}")
    return results


def _starting(fresh: bool) -> Any:
    import torch

    if fresh or torch.cuda.is_available():  # CUDA does not survive a fork
        return multiprocessing.get_context("spawn")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as dnsp/engine.py, which DeepSpeed is imported before here
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def _wait(processes: list[Any], deadline: float, stop_early: bool) -> None:
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in processes]
        if None not in codes:
            return
        if stop_early and any(codes):
            time.sleep(1.0)  # the others may be about to say something more useful
            return
        time.sleep(0.02)


def _result(folder: Path, rank: int, exit_code: int | None, stopped: bool) -> Any:
    import torch

    done, failed = folder / f"{rank}.pt", folder / f"{rank}.txt"
    if exit_code == 0 and done.exists() and not stopped:
        return torch.load(done, weights_only=False)
    return RankFailure(rank, None if stopped else exit_code, failed.read_text() if failed.exists() else "no traceback")


def _rank_main(
    where: tuple[str, str, str],
    args: tuple[Any, ...],
    rank: int,
    world: int,
    folder: str,
    port: int,
    collective_timeout: float,
    environment: dict[str, str],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            store=dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=collective_timeout),
        )
        result = _load(*where)(*args)
        torch.save(result, Path(folder) / f"{rank}.pt")
        with contextlib.suppress(RuntimeError):  # nobody leaves while another may still be reading from it
            dist.barrier()
    except BaseException:
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # no destructors: a process group waits for peers in its own
    os._exit(0)


def _load(path: str, module_name: str, qualified_name: str) -> Callable[..., Any]:
    """The function by its file: pytest's importlib mode gives modules names that a child cannot import."""
    module = sys.modules.get(module_name)
    if module is None or getattr(module, "__file__", None) != path:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    value: Any = module
    for part in qualified_name.split("."):
        value = getattr(value, part)
    return value


LATE, MOST = 0.25, 0.02  # how often a rank dawdles, and seconds


@contextlib.contextmanager
def dawdling(draw: random.Random) -> Iterator[None]:
    """This rank is late now and then: with a message, with looking for one, with a scan, with a fold."""
    from dnsp.parallel.scan import _Chain
    from dnsp.parallel.transport import Exchange, Transport

    def late(call: Callable[..., Any]) -> Callable[..., Any]:
        def later(*given: Any, **options: Any) -> Any:
            if draw.random() < LATE:
                time.sleep(MOST * draw.random() ** 3)  # mostly a little, seldom for many messages
            return call(*given, **options)

        return later

    places = (Transport, "exchange"), (Transport, "all_gather"), (Exchange, "arrived"), (_Chain, "_fold")
    with contextlib.ExitStack() as stack:
        for owner, name in (*places, (_Chain, "start")):
            stack.enter_context(patch.object(owner, name, late(getattr(owner, name))))
        yield
