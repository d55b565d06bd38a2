"""A step's figures beyond the loss: speed, model FLOP/s, where the time went, and what each rank's GPU says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dnsp.config import Config
from dnsp.data.mix import Step
from dnsp.flops import document_lengths, matmul_ceiling, step_flops
from dnsp.nvml import Sampler, throttles
from dnsp.parallel.grid import Grid
from dnsp.parallel.waits import gather_rows
from dnsp.placement import describe
from dnsp.slow import Sample, SlowRanks
from dnsp.timing import PHASES, StepClock

if TYPE_CHECKING:
    from dnsp.telemetry import Telemetry

# of each rank in each step, in this order; not a number where it is not known
GPU = (
    *("power_w", "sm_clock_mhz", "memory_clock_mhz", "throttle", "temperature_c", "memory_gib"),
    *("nvlink_tx_gb_s", "nvlink_rx_gb_s", "ecc_corrected", "ecc_uncorrected", "xid"),
)
# of a step, in the metrics beside the loss, where they are known
FIGURES = (
    *("tokens_per_s_per_gpu", "tflops", "tflops_per_gpu", "mfu", *(f"{phase}_s" for phase in PHASES)),
    *("power_w", "sm_clock_mhz", "temperature_c", "memory_gib", "nvlink_tx_gb_s", "nvlink_rx_gb_s"),
    *("ecc_corrected", "ecc_uncorrected", "throttled_gpus"),
)
RANK = ("work_s", *(f"{phase}_s" for phase in PHASES), *GPU)


class Figures:
    """Gathers the ranks' figures after each step and says what is wrong with one of them.

    Args:
        config, grid, device: of the run, this rank's.
        model: whose forward pass is timed.
        places: of each rank, its node's number and name and its local rank.
        telemetry: of the run; where the ranks are, and what can be measured, is said at once.
    """

    def __init__(
        self,
        config: Config,
        grid: Grid,
        model: nn.Module,
        device: torch.device,
        places: Sequence[tuple[int, str, int]],
        telemetry: Telemetry,
    ) -> None:
        self.config, self.grid, self.device, self.telemetry = config.model, grid, device, telemetry
        self.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())  # ZeRO 3 holds shards
        self.clock = StepClock(model, device)
        self.begin, self.mark, self.end = self.clock.begin, self.clock.mark, self.clock.end
        self.sampler = Sampler(device).start()
        # what this device's matrix products reach, measured once
        self.ceiling = matmul_ceiling(device) if device.type == "cuda" else None
        what = "GPU" if device.type == "cuda" else "local rank"
        self.names = [f"{host}, {what} {local}" for _, host, local in places]
        # under a contiguous layout causal attention is more work in the later ranks of a sequence group
        uneven = config.parallel.layout == "contiguous" and "attention" in config.model.layers
        self.slow = SlowRanks(self.names, [rank % grid.sequence_size if uneven else 0 for rank in range(grid.world)])
        self._faults: list[tuple[float, float]] | None = None
        for line in [*describe([place[:2] for place in places], grid.sequence_size), *self._about()]:
            telemetry.say(line)

    def _about(self) -> list[str]:
        if self.sampler.absent:
            return [f"no figures of GPUs: {self.sampler.absent}"]
        lines = [f"matrix products reach {(self.ceiling or 0.0) / 1e12:,.0f} TFLOP/s here, what MFU is of"]
        if self.sampler.unsupported:
            lines.append(f"the GPU does not report {', '.join(self.sampler.unsupported)}")
        return lines

    def step(self, step: int, seconds: float, work: Step, phases: dict[str, float]) -> dict[str, float]:
        """After a step of ``seconds`` over the sequences of ``work``; ``phases`` as :meth:`end` gave them.

        Every rank calls it. What each rank measured is written, what is wrong with one is said. Returns the step's
        figures, every one finite.
        """
        documents = [n for row in work.sequences for n in document_lengths(row.doc_starts, row.length)]
        tokens, flops = sum(documents), step_flops(self.config, self.parameters, documents)
        sampled = self.sampler.latest()
        own = phases["data"] + phases["forward"] + phases["backward"]
        row = [own, *(phases[phase] for phase in PHASES), *(sampled.get(name, math.nan) for name in GPU)]
        rows = gather_rows(row, self.grid.everyone)
        ranks = {name: [_known(row[n]) for row in rows] for n, name in enumerate(RANK)}
        ranks = {name: values for name, values in ranks.items() if any(value is not None for value in values)}
        world = self.grid.world
        figures = {
            "tokens_per_s_per_gpu": tokens / seconds / world,
            "tflops": flops / seconds / 1e12,
            "tflops_per_gpu": flops / seconds / 1e12 / world,
            **{f"{phase}_s": phases[phase] for phase in PHASES},
        }
        if self.ceiling is not None:
            figures["mfu"] = flops / seconds / world / self.ceiling
        self.telemetry.ranks({"step": step, **ranks})
        for line in [*self.slow.update(step, _samples(ranks)), *self._new_faults(ranks)]:
            self.telemetry.say(line)
        return figures | _summary(ranks) | self._peak()

    def stop(self) -> None:
        """End what goes on beside the run, its progress line too."""
        self.telemetry.stop()
        self.sampler.stop()

    def _peak(self) -> dict[str, float]:
        """The most that tensors have taken on a GPU so far, GiB; nothing of a CPU."""
        cuda = self.device.type == "cuda"
        return {"peak_gib": torch.cuda.max_memory_allocated(self.device) / 2**30} if cuda else {}

    def _new_faults(self, ranks: dict[str, list[float | None]]) -> list[str]:
        """Xid and uncorrected memory errors that were not there a step ago."""
        world = self.grid.world
        xids, errors = (ranks.get(name, [None] * world) for name in ("xid", "ecc_uncorrected"))
        now = [(xid or 0.0, error or 0.0) for xid, error in zip(xids, errors, strict=True)]
        before, self._faults = self._faults or [(0.0, error) for _, error in now], now
        lines = []
        for rank, ((xid, error), (xid_before, error_before)) in enumerate(zip(now, before, strict=True)):
            who = f"rank {rank} ({self.names[rank]})"
            if xid and xid != xid_before:
                lines.append(f"{who}: the driver reports Xid {xid:.0f}; NVIDIA's list of Xid errors says what to do")
            if error > error_before:
                lines.append(f"{who}: {error - error_before:.0f} uncorrected memory errors (ECC); replace this GPU")
        return lines


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _summary(ranks: dict[str, list[float | None]]) -> dict[str, float]:
    """Of all GPUs: power in sum, the lowest clock, the highest temperature and memory, traffic and errors in sum."""
    found = {}
    for name, of in (("power_w", sum), ("sm_clock_mhz", min), ("temperature_c", max), ("memory_gib", max),
                     ("nvlink_tx_gb_s", sum), ("nvlink_rx_gb_s", sum), ("ecc_corrected", sum),
                     ("ecc_uncorrected", sum)):  # fmt: skip
        values = [value for value in ranks.get(name, []) if value is not None]
        if values:
            found[name] = float(of(values))
    throttled = [value for value in ranks.get("throttle", []) if value is not None]
    if throttled:
        found["throttled_gpus"] = float(sum(bool(throttles(int(value))) for value in throttled))
    return found


def _samples(ranks: dict[str, list[float | None]]) -> list[Sample]:
    works = ranks["work_s"]
    clocks = ranks.get("sm_clock_mhz", [None] * len(works))
    masks = ranks.get("throttle", [None] * len(works))
    return [Sample(work or 0.0, clock, int(mask or 0)) for work, clock, mask in zip(works, clocks, masks, strict=True)]


def shares(record: dict[str, Any]) -> str:
    """Where a step's time went, for the live line."""
    known = {phase: record[f"{phase}_s"] / record["step_s"] for phase in PHASES if f"{phase}_s" in record}
    short = {"communication": "waiting"}
    parts = [f"{short.get(phase, phase)} {100 * share:.0f}" for phase, share in known.items() if share >= 0.005]
    text = f"% of it: {', '.join(parts)}" if parts else ""
    return f"MFU {record['mfu']:.3f} {text}" if "mfu" in record else text
