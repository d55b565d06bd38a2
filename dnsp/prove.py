"""``dnsp doctor --prove``: whether the Triton kernels compute the right numbers on this machine's GPU."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dnsp.config import Config
from dnsp.errors import UsageError
from dnsp.json_files import write_json
from dnsp.kernels import proof, verdicts
from dnsp.kernels.reference import Rule
from dnsp.kernels.signatures import AnySignature, Conv, ConvStep, DeltaStep, Norm, Post, Signature, to_json
from dnsp.kernels.triton_post import RING
from dnsp.kernels.verdicts import Verdict
from dnsp.model.decoder import Decoder
from dnsp.parallel.plan import local_plan

COMMON = ((16, 32, 128, 128), (16, 16, 128, 128), (4, 8, 128, 128))  # key heads, value heads, K, V
TAPS = 4  # of their convolutions


def run(config: Config | None, json_path: Path | None = None, console: Console | None = None) -> int:
    """Prove the launches of a configuration's model, or of common shapes, whatever was proven before, and print what
    is found. Returns the exit status: 1 when a shape has no launches that compute the right numbers."""
    if not torch.cuda.is_available():
        raise UsageError("--prove: torch sees no CUDA device ('dnsp doctor' says why); run it on a machine with a GPU")
    console = console or Console()
    device = torch.device("cuda", torch.cuda.current_device())
    found: list[Verdict] = []
    wanted = common_signatures() if config is None else signatures(config, device)
    for n, signature in enumerate(wanted, 1):
        with console.status(f"{n} of {len(wanted)}: {signature}"):
            try:
                found.append(proof.establish(device, signature, again=True))
            except proof.UnprovenError as error:
                if error.verdict is None:  # it could not be tried
                    raise
                found.append(error.verdict)
        console.print(table(found[-1]))
    good = all(verdict.table is not None for verdict in found)
    if not wanted:
        console.print("no layer of this configuration takes the Triton kernels")
    elif good:
        console.print(f"kept in {verdicts.folder()}", highlight=False)
    else:
        console.print("what is refused needs backend='torch' (DNSP_DELTA_RULE=torch, much slower) or another Triton")
    if json_path is not None:
        where = verdicts.toolchain(device)._asdict()
        shapes = [asdict(verdict) | {"signature": to_json(verdict.signature)} for verdict in found]
        write_json(json_path, {"ok": good, "where": where, "shapes": shapes})
    return 0 if good else 1


def common_signatures() -> list[AnySignature]:
    """As models mostly ask: contiguous bf16 inputs, decay, normalised queries and keys, with and without documents;
    fp32 filters and gains in training, and bf16 ones in decoding."""
    bf16, fp32, each = torch.bfloat16, torch.float32, (None, torch.int32)
    found: list[AnySignature] = [Norm(bf16, bf16, fp32, V, 1) for V in dict.fromkeys(V for *_, V in COMMON)]
    for H, HV, K, V in COMMON:
        found += [
            Signature(
                bf16, H, HV, K, V, (H * K, K), (H * K, K), (HV * V, V), (HV, 1), fp32, (HV, 1), fp32, documents, Rule(),
                True,
            )
            for documents in each
        ]  # fmt: skip
        channels = 2 * H * K + HV * V
        found += [Conv(bf16, fp32, None, None, documents, channels, TAPS, True) for documents in each]
        found.append(ConvStep(bf16, bf16, bf16, None, None, channels, TAPS, True, True))
        found.append(DeltaStep(bf16, bf16, bf16, bf16, bf16, fp32, fp32, None, H, HV, K, V, Rule(), True, True))
    return [*found, Post(RING)]


def signatures(config: Config, device: torch.device) -> list[AnySignature]:
    """What the layers of a configuration ask for, in their own words: one of each kind is run as in training and in
    decoding, and nothing launched. Beside it what only several ranks launch: halos, messages."""
    from dnsp.kernels.proof_run import Meeting

    kinds = [kind for kind in dict.fromkeys(config.model.layers) if kind != "attention"]
    if not kinds:
        return []
    few = config.model.model_copy(update={"pattern": kinds, "num_hidden_layers": len(kinds), "vocab_size": 256})
    model = Decoder(few).to(device)
    dtype = torch.bfloat16 if config.engine.dtype == "bf16" else None
    plan, meeting = local_plan([[0, 100]], 256).to(device), Meeting()
    chosen = os.environ.get("DNSP_DELTA_RULE")
    os.environ["DNSP_DELTA_RULE"] = "triton"
    try:
        with proof.mode(meeting), torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            model.hidden(torch.zeros(1, 256, dtype=torch.long, device=device), plan)
        with proof.mode(meeting):
            model.step(torch.zeros(1, dtype=torch.long, device=device), model.init_states(1))
    finally:
        os.environ.pop("DNSP_DELTA_RULE") if chosen is None else os.environ.update(DNSP_DELTA_RULE=chosen)
    met = meeting.signatures
    return [*met, *(s._replace(halo=s.dtype) for s in met if isinstance(s, Conv)), Post(RING)]


def table(verdict: Verdict) -> Table:
    """A shape's verdict and its binaries."""
    said = f"[red]refused[/] {escape(str(verdict.signature))}"
    if verdict.table is not None:
        said = f"[green]proven[/] {escape(str(verdict.signature))}: launches {verdict.table}"
    errors = ", ".join(f"{name} {error:.1e}" for name, error in verdict.errors.items())
    refused = [f"refused {launches}: {why}" for launches, why in verdict.refused.items()]
    caption = "\n".join([f"errors: {errors}"] * bool(errors) + refused)
    rows = Table(title=said, title_justify="left", caption=escape(caption), caption_justify="left", header_style="")
    rows.add_column("kernel")
    rows.add_column("constants", overflow="fold")
    for number in ("warps", "stages", "registers", "spills"):
        rows.add_column(number, justify="right")
    for binary in sorted(verdict.binaries, key=lambda binary: binary["kernel"]):
        constants = binary["constants"].items()
        shown = [f"{name}={value}" for name, value in constants if name == "BV"]
        shown += [name for name, value in constants if value is True]
        numbers = (str(binary[name]) for name in ("warps", "stages", "registers", "spills"))
        rows.add_row(binary["kernel"], escape(" ".join(shown)), *numbers)
    return rows
