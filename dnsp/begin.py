"""What a run is made of and what it goes on from: its folder, the checkpoint it resumes, the weights it begins with."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import date
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor

from dnsp import checkpoint, stalls, watchdog
from dnsp.checkpoint import Checkpoint
from dnsp.choices import Choices, reserve
from dnsp.config import Config, ModelConfig, parse_config
from dnsp.data.mix import Mixture
from dnsp.data.tokenizer import Tokenizer
from dnsp.errors import UsageError
from dnsp.folder import IN_USE, check_identity, check_new, compare, compare_models, write_identity
from dnsp.kernels.backend import kernels_for_program
from dnsp.model import liger
from dnsp.model.deltanet import head_dim
from dnsp.parallel.errors import CannotShare
from dnsp.parallel.grid import Grid
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import make_plan
from dnsp.schedule import Span, said_behind, spans


def check_layout(config: Config, grid: Grid, length: int) -> None:
    """Refuse sequences of ``length`` tokens that the sequence group or the segments do not divide."""
    make_plan([[0]], Layout(config.parallel.layout, grid.sequence_size, length), grid, config.parallel.segment_tokens)


def settle_transports(
    choices: Choices, config: Config, grid: Grid, batches: Sequence[tuple[int, int]]
) -> tuple[Choices, int, str | None]:
    """Reserve symmetric memory for ``batches`` of (rows, tokens a row), or go without: what the run's choices then are,
    its bytes a rank, and where it goes without, why. All ranks of the world call it together, and get the same.

    Whether ranks that see only their own GPU can share memory shows here alone. What some sequence groups have shared
    when another fails is not given back.

    Raises: UsageError on every rank, where the configuration asks for ``peer`` by name.
    """
    shared, why_not = 0, None
    with watchdog.agreed():
        try:
            shared = reserve(choices, config, grid, batches)
        except CannotShare as error:
            if "peer" in (config.parallel.transport, config.parallel.attention_transport):
                raise
            why_not = error.why
    if said := next(filter(None, watchdog.from_all(why_not)), None):
        return choices.without_peer(), 0, said
    return choices, shared, None


OWN = ("run.dir", "data.sources", "data.tokenizer")  # a host's own places for what is the same


def check_configuration(config: Config) -> None:
    """Whether all ranks have the same configuration, before they do anything together that depends on it.

    Raises: PlanError on every rank, naming the rank that differs and in what.
    """
    sections = [(name, keys) for name, keys in config.model_dump(mode="json").items() if isinstance(keys, dict)]
    fields = {f"{name}.{key}": value for name, keys in sections for key, value in keys.items()}
    watchdog.compare({name: value for name, value in fields.items() if name not in OWN}, "the run")


def check_data(identity: dict[str, Any]) -> None:
    """Whether all ranks read the same data; hosts may have it in places of their own.

    Raises: PlanError on every rank, naming the rank that differs and in what.
    """
    fields = {"the tokenizer": identity["tokenizer"]}
    for n, source in enumerate(identity["data"]["sources"]):
        fields |= {f"the {key} of data.sources[{n}]": value for key, value in source.items()}
    watchdog.compare(fields, "the data")


def identity_of(config: Config, tokenizer: Tokenizer, data: Mixture) -> dict[str, Any]:
    """What a run folder's runs have in common: another of these is another run."""
    sources = [
        {"contents": packer.source.identity, "weight": source.weight}
        for packer, source in zip(data.packers, config.data.sources, strict=True)
    ]
    return {
        "model": config.model.model_dump(mode="json"),
        "tokenizer": tokenizer.fingerprint,
        "data": {"sources": sources, "seed": config.data.seed, "holdout": config.data.holdout},
    }


def changed_stages(found: Checkpoint, stages: Sequence[Span]) -> str:
    """In words, that the steps behind a checkpoint were others than ``stages`` have there; empty where they were not,
    or a version saved it whose settings are not known here."""
    try:
        before = spans(parse_config(found.state["config"], str(found.path)))
    except UsageError:
        return ""
    was, would_be = (said_behind(part, found.step) for part in (before, stages))
    if was == would_be:
        return ""
    return (
        f"the steps behind this checkpoint were {was}, by the present settings they would be {would_be}: steps are "
        "counted on, and so are the borders of train.stages and the learning rate"
    )


def open_folder(config: Config, identity: dict[str, Any], name: str, first: bool) -> Path:
    """The run folder, made or checked by rank 0, seen by all; a new one each time unless ``run.dir`` names one."""
    mark: Any = None
    with watchdog.agreed():
        try:
            folder = _make_folder(config, identity, name) if first else None
            mark = NamedTemporaryFile(prefix=".seen-", dir=folder) if first else None  # noqa: SIM115 - closed below
        except OSError as error:
            where = config.run.dir or "runs"
            raise UsageError(f"cannot make the run folder {where}: {error.strerror}; set run.dir to another") from None
    folder, marked = watchdog.from_first((folder, mark and Path(mark.name).name))
    with mark or nullcontext(), watchdog.agreed():
        _check_shared(folder, marked)
    return folder


def _check_shared(folder: Path, mark: str) -> None:
    """Refuse a folder that is not the one in which rank 0 has put ``mark``: a checkpoint's files lie in one."""
    made = False
    with suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # NFS may remember that there was no folder, until one is to be made
        folder.mkdir()
        made = True
    if os.path.exists(folder / mark):
        return
    if made:
        with suppress(OSError):
            folder.rmdir()
    raise UsageError(
        f"on {platform.node()} {folder.absolute()} is not the run folder that rank 0 has made; set run.dir to one on a "
        "file system that all nodes share"
    )


GLANCE = 1.0  # seconds; another process that asks whether the folder is free holds the lock for an instant
_LOCKS: list[FileLock] = []  # held until the process ends


def _make_folder(config: Config, identity: dict[str, Any], name: str) -> Path:
    if config.run.dir is None:
        stem, number = f"{name}-{date.today():%Y%m%d}", 1
        Path("runs").mkdir(exist_ok=True)
        while True:
            folder = Path("runs", f"{stem}-{number}")
            try:
                folder.mkdir()
                break
            except FileExistsError:
                number += 1
    else:
        folder = Path(config.run.dir)
        check_identity(folder, identity)
        check_new(config)
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=GLANCE)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(IN_USE.format(folder=folder)) from None
    _LOCKS.append(lock)
    checkpoint.clean(folder)
    stalls.clear(folder)
    write_identity(folder, identity)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return folder


def starting_point(config: Config, identity: dict[str, Any]) -> Path | None:
    """The checkpoint to continue from, whole and of this run, or None; what is damaged is passed over with a word."""
    if config.resume == "none":
        return None
    if config.resume != "auto":
        found, words = checkpoint.find(config.resume)
        compare(found.state["identity"], identity, found.path, "resume")
    else:
        folder = Path(config.run.dir or "")  # the configuration has one
        check_identity(folder, identity)
        latest, words = checkpoint.latest(folder)
        if latest is None:
            if words:
                raise UsageError(f"{'; '.join(words)}; there is no other: choose another run.dir to begin anew")
            return None
        found = latest
    for word in words:
        print(f"{word}; going on from {found.path.name}", flush=True)
    return found.path


def initial_weights(config: Config, rope_theta: float, first: bool) -> Mapping[str, Tensor] | None:
    """The weights of another run or model (``init_from``) by name; None: as they are drawn. Only where a run begins."""
    if config.init_from is None:
        return None
    kind, _, where = config.init_from.partition(":")
    if kind == "hf":
        from dnsp.model.hf import read_weights

        return read_weights(where, config.model)
    other, words = checkpoint.find(config.init_from)
    compare_models(other.state["identity"]["model"], config, other.path)
    for word in words if first else ():
        print(f"{word}; beginning from {other.path.name}", flush=True)
    if first and other.state["rope_theta"] != rope_theta:
        was = other.state["rope_theta"]
        print(f"{other.path} was trained with rope_theta={was:g}, this run begins with {rope_theta:g}", flush=True)
    return other.weights()


def check_kernels(model: ModelConfig) -> None:
    """Refuse variables of the environment, and on a GPU heads of the model, that would fail only in the first step."""
    try:
        kernels = kernels_for_program()
    except ValueError as error:
        raise UsageError(str(error)) from None
    if kernels == "triton" and not torch.cuda.is_available():
        raise UsageError("DNSP_DELTA_RULE=triton needs a GPU, and there is none; unset it, or take torch")
    if torch.cuda.is_available() and kernels != "torch":
        _check_widths(model)
    if torch.cuda.is_available() and liger.wanted() and liger.missing():
        raise UsageError(f"{liger.missing()}, or set DNSP_LIGER=0 for torch's slower operations")


def _check_widths(model: ModelConfig) -> None:
    """Refuse heads of the delta rule's layers for which there are no kernels."""
    from dnsp.kernels.chunk_triton import WIDTHS

    options, used = model.deltanet, set(model.layers)
    widths: dict[str, int] = {}
    if "gated_delta" in used:
        widths |= {
            "linear_key_head_dim": model.linear_key_head_dim,
            "linear_value_head_dim": model.linear_value_head_dim,
        }
    if used & {"deltanet", "linear_attention"}:
        keys = "deltanet.head_dim" if options.head_dim else "hidden_size / model.deltanet.num_heads"
        widths[keys] = head_dim(model)
        if options.value_head_dim:
            widths["deltanet.value_head_dim"] = options.value_head_dim
    for key, width in widths.items():
        if width not in WIDTHS:
            raise UsageError(
                f"model.{key}={width}: on a GPU the delta rule has kernels for heads {', '.join(map(str, WIDTHS))} "
                "wide; take one of these, or DNSP_DELTA_RULE=torch in the environment for torch's (much slower) "
                "operations"
            )
