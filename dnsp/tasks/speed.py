"""Tokens a second at batch 1 behind a real prefill of a context, with the bytes that a model remembers.

The context goes through the chunked pass (``Decoder.prefill``), then tokens are made one by one, each the likeliest, by
the step that ``dnsp generate`` uses: on a GPU a CUDA graph. Right behind a long prefill steps may be slower than a
second later, whose pace is the one that counts; both are kept, with the GPU's clock at either time.

Over ranks the context is spread zigzag over a sequence group; the rank that holds the last interval has the delta
rule's states, is given the others' attention caches, and goes on alone; what it then says is held against a prefill of
its own.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dnsp import watchdog
from dnsp.choices import make_choices
from dnsp.config import Config, parse_config
from dnsp.errors import RunError
from dnsp.generate import Step
from dnsp.launch.environment import find_environment
from dnsp.launch.local import start_ranks
from dnsp.model.decoder import Decoder
from dnsp.model.state import LayerState
from dnsp.nvml import Sampler, throttles
from dnsp.parallel.grid import Grid, make_grid
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import Plan, make_plan

PATIENCE = 120.0  # seconds that a rank may wait for another, which compiles what it needs
WARM_UP = 4  # tokens before the clock runs: compiling, capturing
SETTLE = 1.0  # seconds of tokens on a GPU before those that count
ROUNDS = 4  # of the tokens asked for, that count


def speed(model: dict[str, Any], context: int, tokens: int, name: str, ranks: int = 1) -> dict[str, Any]:
    """Figures of one model behind one context. Ranks share GPUs where there are fewer: what is handed over is the same
    then, and the prefill no faster."""
    asked = {"model": model, "context": context, "tokens": tokens, "name": name}
    found = {"name": name, "context": context, "layers": model["num_hidden_layers"], "width": model["hidden_size"]}
    if ranks == 1:
        return found | alone(asked)
    found |= {"ranks": ranks, "sharing": watchdog.sharing(ranks)}
    with tempfile.TemporaryDirectory(prefix="dnsp-speed-") as folder, watchdog.room_for(ranks):
        Path(folder, "asked.json").write_text(json.dumps(asked))
        status = start_ranks(["tasks", "prefill-rank", folder], ranks)
        if status:
            raise RunError(f"the prefill over {ranks} ranks ended with status {status}")
        return found | json.loads(Path(folder, "figures.json").read_text())


@torch.no_grad()
def alone(asked: dict[str, Any]) -> dict[str, Any]:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    config, decoder, device = _model(asked)
    context = asked["context"]
    prompt = _prompt(config, context, device)
    plan = _plan(config, Layout("contiguous", 1, context), Grid(1, 0, 1), device)
    decoder.prefill(prompt, plan)  # compiles what it needs
    _wait(device)
    began = time.perf_counter()
    hidden, states = decoder.prefill(prompt, plan)
    _wait(device)
    prefill_s = time.perf_counter() - began
    figures = memory(decoder, states) | decode(decoder, states, hidden[:, -1], context, asked["tokens"])
    del figures["said"]
    if device.type == "cuda":
        figures["copy_bytes_per_s"] = copy_speed(device)
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    return figures | {"prefill_s": prefill_s, "prefill_tokens_per_s": context / prefill_s}


def decode(decoder: Decoder, states: list[LayerState], last: Tensor, context: int, tokens: int) -> dict[str, Any]:
    """The median step behind a context, once the pace has settled, and what was said.

    The same ``tokens`` tokens are made in rounds, the states taken back in between, so that the context does not grow.
    The first round stands right behind the prefill (``first_tokens_per_s``); on a GPU more follow for ``SETTLE``
    seconds; of the ``ROUNDS`` behind them is the median. ``by_round`` has tokens/s of every round. Where the driver
    says so: the clock in MHz behind the first round and behind the last, and what holds it down (empty: nothing).
    """
    device = last.device
    step = Step(decoder, states, context + WARM_UP + tokens)
    rewind = _rewinding(states)

    def make() -> tuple[list[int], list[float]]:
        logits = decoder.logits(last)
        said, seconds = [], []
        for _ in range(WARM_UP + tokens):
            token = int(logits.argmax())  # waits for the device
            said.append(token)
            began = time.perf_counter()
            logits = step(token)
            _wait(device)
            seconds.append(time.perf_counter() - began)
        return said, seconds[WARM_UP:]

    sampler = Sampler(device).start()
    try:
        rounds = [make()]
        clock = {f"first_{name}": value for name, value in _clock(sampler).items()}
        settled = time.perf_counter() + (SETTLE if device.type == "cuda" else 0.0)
        ahead = ROUNDS
        while ahead:
            ahead -= time.perf_counter() >= settled
            rewind()
            rounds.append(make())
        clock |= _clock(sampler)
    finally:
        sampler.stop()
    typical = median(second for _, seconds in rounds[-ROUNDS:] for second in seconds)
    by_round = [1 / median(seconds) for _, seconds in rounds]
    figures = {"tokens_per_s": 1 / typical, "step_s": typical, "first_tokens_per_s": by_round[0], "by_round": by_round}
    return figures | clock | {"said": rounds[-1][0]}


def _rewinding(states: list[LayerState]) -> Callable[[], None]:
    """What takes the states back to where they are now. Keys and values behind an attention cache's end are nobody's:
    the end is all that goes back."""
    changed = [
        x
        for state in states
        for x in (state.position_B, state.end_1, state.S_BHKV, state.conv_tail_BWD, state.key_sum_BHK)
        if x is not None
    ]
    kept, lengths = [x.clone() for x in changed], [state.length for state in states]

    def rewind() -> None:
        for x, value in zip(changed, kept, strict=True):
            x.copy_(value)
        for state, length in zip(states, lengths, strict=True):
            state.length = length

    return rewind


def _clock(sampler: Sampler) -> dict[str, Any]:
    found: dict[str, Any] = {}
    now = sampler.sample()
    if "sm_clock_mhz" in now:
        found["sm_clock_mhz"] = now["sm_clock_mhz"]
    if "throttle" in now:
        found["throttle"] = throttles(int(now["throttle"]))
    return found


def memory(decoder: Decoder, states: list[LayerState]) -> dict[str, Any]:
    """Bytes of weights that a step reads, of recurrent states, and of keys and values of the tokens so far."""

    def size(x: Tensor | None) -> int:
        return 0 if x is None else x.numel() * x.element_size()

    cache = sum(
        size(x if x is None else x[:, :, : state.length])
        for state in states
        for x in (state.keys_BGTK, state.values_BGTK)
    )
    recurrent = sum(size(x) for state in states for x in (state.S_BHKV, state.conv_tail_BWD, state.key_sum_BHK))
    parameters = list(decoder.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "parameter_bytes": sum(size(p) for p in parameters),
        "state_bytes": recurrent,
        "cache_bytes": cache,
    }


def copy_speed(device: torch.device) -> float:
    """Bytes a second that this device reads and writes in a copy of 1 GiB: the bound of what is memory-bound."""
    a = torch.empty(2**30, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    best = float("inf")
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return 2 * a.numel() / best


@torch.no_grad()
def prefill_rank(folder: Path) -> None:
    """One rank of a prefill over ranks; the one that goes on writes ``figures.json``."""
    asked = json.loads((folder / "asked.json").read_text())
    environment = find_environment()
    watchdog.take_device(environment)
    watchdog.join(environment)
    config, decoder, device = _model(asked)
    grid = make_grid(None, PATIENCE)
    context = asked["context"]
    layout = Layout("zigzag", grid.sequence_size, context)
    prompt = _prompt(config, context, device)
    plan = _plan(config, layout, grid, device)
    local = plan.local(prompt)
    for _ in range(2):  # the first one compiles
        states = decoder.init_states(1, device)
        watchdog.from_all(None, grid)
        _wait(device)
        began = time.perf_counter()
        hidden = decoder.hidden(local, plan, states)
        _wait(device)
        watchdog.from_all(None, grid)
        prefill_s = time.perf_counter() - began
    hand_over(states, plan, grid)
    holds = plan.holds_last
    watchdog.leave()
    if not holds:
        return
    figures = memory(decoder, states) | decode(decoder, states, hidden[:, -1], context, asked["tokens"])
    # With segments of the same length, which fix the delta rule's bits.
    by_one = _plan(config, Layout("contiguous", 1, context), Grid(1, 0, 1), device, plan.segments.tokens)
    whole, own = decoder.prefill(prompt, by_one)
    figures["error"] = float((hidden[:, -1] - whole[:, -1]).double().norm() / whole[:, -1].double().norm())
    said = decode(decoder, own, whole[:, -1], context, asked["tokens"])["said"]
    pairs = list(zip(figures.pop("said"), said, strict=True))
    figures["same_tokens"] = sum(a == b for a, b in pairs) / len(pairs)
    figures |= {"prefill_s": prefill_s, "prefill_tokens_per_s": context / prefill_s}
    (folder / "figures.json").write_text(json.dumps(figures))


def hand_over(states: list[LayerState], plan: Plan, grid: Grid) -> None:
    """Attention's keys and values of all ranks, in the order of the sequence, to the rank that holds its end. The delta
    rule's states and the convolutions' tails are there already: they are the last interval's."""
    for state in states:
        if state.keys_BGTK is None or state.values_BGTK is None:
            continue
        # the first tokens of the cache's room are the rank's own
        own = [x[:, :, : state.length].cpu() for x in (state.keys_BGTK, state.values_BGTK)]
        everyone = watchdog.from_all(own, grid)
        if not plan.holds_last:
            continue
        device, size = state.keys_BGTK.device, plan.layout.interval_tokens
        parts: list[tuple[int, Tensor, Tensor]] = []
        for rank, (keys, values) in enumerate(everyone):
            for n, interval in enumerate(plan.layout.indices(rank)):
                at = slice(n * size, (n + 1) * size)
                parts.append((interval, keys[:, :, at], values[:, :, at]))
        parts.sort(key=lambda part: part[0])
        state.keys_BGTK = torch.cat([keys for _, keys, _ in parts], dim=2).to(device)
        state.values_BGTK = torch.cat([values for _, _, values in parts], dim=2).to(device)
        state.length = plan.tokens


def _model(asked: dict[str, Any]) -> tuple[Config, Decoder, torch.device]:
    """The decoder with random weights, the same everywhere: in bf16 on a GPU, in fp32 on a CPU."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    tree = {
        "model": asked["model"],
        "data": {"sequence_length": asked["context"]},
        "engine": {"dtype": "bf16" if on_gpu else "fp32"},
    }
    config = parse_config(tree, "dnsp tasks run speed")
    torch.manual_seed(0)
    with device:
        decoder = Decoder(config.model)
    return config, decoder.to(torch.bfloat16 if on_gpu else torch.float32).eval(), device


def _plan(
    config: Config, layout: Layout, grid: Grid, device: torch.device, segment_tokens: int | None = None
) -> Plan:
    """``segment_tokens`` None: for speed alone."""
    choices, _ = make_choices(config)
    tokens = segment_tokens or choices.segment_tokens(config, layout)
    return make_plan([[0]], layout, grid, tokens, attention_backend=choices.attention_backend).to(device)


def _prompt(config: Config, context: int, device: torch.device) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randint(config.model.vocab_size, (1, context), generator=random).to(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
