"""``dnsp train``: one run, top to bottom."""

from __future__ import annotations

import math
import os
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor

from dnsp import checkpoint, watchdog
from dnsp.choices import Choices, make_choices
from dnsp.config import Config
from dnsp.data.batch import batch, micro_batches
from dnsp.data.mix import Cursor, Mixture, open_data
from dnsp.data.tokenizer import Tokenizer, load_tokenizer
from dnsp.engine import Engine
from dnsp.errors import Echo, RunError, UsageError
from dnsp.evaluate import evaluate, table
from dnsp.generate import generate_text
from dnsp.kernels.segments import kernels_for_program
from dnsp.launch.environment import Environment
from dnsp.launch.local import cores
from dnsp.model import liger
from dnsp.model.decoder import Decoder
from dnsp.parallel.grid import Grid, make_grid
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import make_plan
from dnsp.probe import probe
from dnsp.saving import Saver
from dnsp.schedule import Span, learning_rate, spans
from dnsp.telemetry import Telemetry, peak_memory


def train(config: Config, environment: Environment, name: str) -> dict[str, Any]:
    """Train as one rank of a run; every rank calls it.

    Args:
        config: of the run.
        environment: this process's place among the ranks.
        name: of the configuration, for the run folder's.

    Returns:
        ``run_dir, step, loss, tokens`` and the held-out ``loss, bits_per_byte, by_position`` under ``heldout``.

    Raises:
        UsageError: what cannot be carried out, before the first step, on every rank.
        RunError: what ends the run later: a loss that is not finite, a full disk, a lost rank.
    """
    began = time.monotonic()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // environment.local_world_size))
    if torch.cuda.is_available():
        torch.cuda.set_device(environment.local_rank)
    watchdog.join(environment)
    with watchdog.Watch(environment) as watch:
        return _train(config, environment, name, watch, began)


def _train(config: Config, environment: Environment, name: str, watch: watchdog.Watch, began: float) -> dict[str, Any]:
    rank, first = environment.rank, environment.rank == 0

    # What can be refused is refused here, on every rank, before anything is written.
    grid = make_grid(config.parallel.sequence, config.run.timeout)
    with watchdog.agreed():
        tokenizer = load_tokenizer(config.data.tokenizer)
        data = open_data(config.data, vocab_size=config.model.vocab_size)
        heldout = open_data(config.data, vocab_size=config.model.vocab_size, split="heldout")
        accumulation = micro_batches(config.train.global_batch, config.train.micro_batch, grid.data_size)
        stages = spans(config)
        for stage in stages:
            data.check_length(stage.sequence_length)
            heldout.check_length(stage.sequence_length)
            check_layout(config, grid, stage.sequence_length)
        identity = identity_of(config, tokenizer, data)
        first_step = data.step(data.start, stages[0].sequence_length, config.train.global_batch)
        _micro_batch(config, grid, first_step, 0, stages[0])
        torch.manual_seed(config.train.seed)
        check_settings(config)
        model = Decoder(
            config.model,
            config.engine.activation_checkpointing,
            activation_offloading=config.engine.activation_offloading,
            mlp_tile=config.engine.mlp_tile or None,
        )
        begin = starting_point(config, identity) if first else None
    begin = watchdog.from_first(begin)  # rank 0 has read every byte of it against the checksums
    with watchdog.agreed():
        found = checkpoint.open_checked(begin) if begin else None
        if found:
            checkpoint.load_weights(model, found.weights(), str(found.path))
            if found.step > stages[-1].stop:
                raise UsageError(
                    f"{found.path} is past train.steps={stages[-1].stop}; raise it to go on, or see dnsp eval"
                )
        else:
            initial_weights(model, config, stages[0].rope_theta, first)
    if torch.cuda.is_available():
        model.cuda()
    with watchdog.agreed():
        chosen = make_choices(config, found.state.get("choices") if found else None) if first else None
    choices, why = watchdog.from_first(chosen)
    folder = open_folder(config, identity, name, first)
    watch.folder = folder
    engine = Engine(model, config, grid, accumulation, found)
    if found:
        checkpoint.set_random_state(found.random(rank), engine.device)
    if config.engine.probe:
        proven = probe(engine, config, choices.attention_backend)
    saver = Saver(folder, engine, config.checkpoint)

    steps = stages[-1].stop
    start = found.step if found else 0
    aside = checkpoint.set_aside(folder, start) if found and first else []
    cursor = Cursor.from_dict(found.state["cursor"]) if found else data.start
    tokens = found.state["tokens"] if found else 0
    loss = float("nan")
    telemetry = Telemetry(folder if first else None, steps, start)
    watch.at_end = telemetry.stop
    count = sum(math.prod(shape) for shape in engine.shapes().values())
    telemetry.say(
        f"{count:,} parameters, {grid.data_size} x {grid.sequence_size} ranks (data x sequence), "
        f"{accumulation} micro-batches a step, {steps} steps; {folder}"
    )

    if "attention" in config.model.layers:
        telemetry.say(f"attention: {choices.attention_backend}" + (f" ({why})" if why else ""))
    if engine.device.type == "cuda":
        telemetry.say(f"norms, SwiGLU, rotary positions, cross entropy: {liger.described()}")

    if config.engine.probe:
        telemetry.say(f"gradients are the ranks' sum after the reduction, within {proven.error:.0e}")

    for path in aside:
        telemetry.say(f"this run goes on from step {start}: a later checkpoint of the folder is now {path.name}")

    for stage in stages:
        model.set_rope_theta(stage.rope_theta)
        if len(stages) > 1 and stage.start <= start < stage.stop:
            telemetry.say(f"context of {stage.sequence_length:,} tokens from step {stage.start + 1}")
        for step in range(max(start, stage.start), stage.stop):
            step_began = time.perf_counter()
            work = data.step(cursor, stage.sequence_length, config.train.global_batch)
            local_loss = torch.zeros((), dtype=torch.float64, device=engine.device)
            for micro in range(accumulation):
                rows, plan = _micro_batch(config, grid, work, micro, stage, choices)
                tokens_BT, targets_BT = rows.to(engine.device)
                local_loss += engine.backward(tokens_BT, targets_BT, plan.to(engine.device), work.targets)
                if micro + 1 < accumulation:
                    engine.advance()
            loss, stopping = agree_on_step(local_loss, work.targets, watch.stop, step + 1, grid, folder)
            lr = learning_rate(step, steps, config.train)
            grad_norm = engine.step(lr)
            if not grad_norm < float("inf"):
                raise both_see(first, f"the gradient norm is {grad_norm} at step {step + 1}; {cure(folder)}")

            cursor, done = work.cursor, step + 1
            tokens += stage.sequence_length * config.train.global_batch
            seconds = time.perf_counter() - step_began
            telemetry.step(
                {
                    "step": done,
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "lr": lr,
                    "tokens_per_s": stage.sequence_length * config.train.global_batch / seconds,
                    "tokens": tokens,
                    "sequence_length": stage.sequence_length,
                    "step_s": seconds,
                    "time": time.time(),
                    **peak_memory(engine.device),
                }
            )
            if stopping or done == steps or (config.checkpoint.every and done % config.checkpoint.every == 0):
                saver.save(
                    done,
                    {
                        "tokens": tokens,
                        "cursor": cursor.to_dict(),
                        "rope_theta": stage.rope_theta,
                        "sequence_length": stage.sequence_length,
                        "choices": choices.to_dict(),
                        "identity": identity,
                        "config": config.model_dump(mode="json"),
                    },
                )
            for news in saver.news():
                telemetry.say(news)
            if stopping and done < steps:
                end_saved(saver, telemetry, grid)
                telemetry.say(f"stopped after step {done} as asked; resume=auto continues {folder}")
                telemetry.close()
                watchdog.leave()
                return {"run_dir": str(folder), "step": done, "loss": loss, "tokens": tokens, "stopped": True}
            if config.eval.every and done % config.eval.every == 0 and done < steps:
                figures = evaluate(engine.deepspeed, heldout, tokenizer, config, grid, stage.sequence_length)
                telemetry.evaluation(done, figures)

    figures = evaluate(engine.deepspeed, heldout, tokenizer, config, grid, stages[-1].sequence_length)
    telemetry.evaluation(steps, figures)
    if engine.stage == 3 and config.generate.tokens:
        model = whole_model(engine, config, stages[-1].rope_theta)
    end_saved(saver, telemetry, grid)
    watchdog.leave()  # what is left concerns rank 0 alone
    if first:
        telemetry.stop()
        telemetry.console.print(table(figures))
        if config.generate.tokens:
            telemetry.console.print(sample(model, tokenizer, config), markup=False, style="cyan")
        telemetry.say(f"held-out bits per byte {figures['bits_per_byte']:.3f} after {time.monotonic() - began:.0f} s")
        telemetry.say(f"run folder: {folder}")
    telemetry.close()
    last = loss if steps > start else None  # nothing was left to train
    return {"run_dir": str(folder), "step": steps, "loss": last, "tokens": tokens, "heldout": figures}


def cure(folder: Path) -> str:
    """What to do about a loss that is not finite."""
    return f"nothing was saved after it: lower train.lr or train.clip; {checkpoint.way_on(folder)}"


def check_layout(config: Config, grid: Grid, length: int) -> None:
    """Refuse sequences of ``length`` tokens that the sequence group or the segments do not divide."""
    make_plan([[0]], Layout(config.parallel.layout, grid.sequence_size, length), grid, config.parallel.segment_tokens)


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


def open_folder(config: Config, identity: dict[str, Any], name: str, first: bool) -> Path:
    """The run folder, made or checked by rank 0; a new one each time unless ``run.dir`` names one."""
    with watchdog.agreed():
        try:
            folder = _make_folder(config, identity, name) if first else None
        except OSError as error:
            where = config.run.dir or "runs"
            raise UsageError(f"cannot make the run folder {where}: {error.strerror}; set run.dir to another") from None
    return watchdog.from_first(folder)


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
        checkpoint.check_identity(folder, identity)
        if config.resume == "none" and (folder / "metrics.jsonl").exists():
            raise UsageError(f"{folder} holds a run already; resume=auto continues it, or choose another run.dir")
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f"{folder} is in use by a running run; wait for it, or choose another run.dir") from None
    _LOCKS.append(lock)
    checkpoint.clean(folder)
    watchdog.clear_claim(folder)
    checkpoint.write_identity(folder, identity)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return folder


def starting_point(config: Config, identity: dict[str, Any]) -> Path | None:
    """The checkpoint to continue from, whole and of this run, or None; what is damaged is passed over with a word."""
    if config.resume == "none":
        return None
    if config.resume != "auto":
        found, words = checkpoint.find(config.resume)
        checkpoint.compare(found.state["identity"], identity, found.path)
    elif config.run.dir is None:
        raise UsageError("resume=auto needs run.dir: name the run folder to continue")
    else:
        checkpoint.check_identity(Path(config.run.dir), identity)
        latest, words = checkpoint.latest(Path(config.run.dir))
        if latest is None:
            if words:
                raise UsageError(f"{'; '.join(words)}; there is no other: choose another run.dir to begin anew")
            return None
        found = latest
    for word in words:
        print(f"{word}; going on from {found.path.name}", flush=True)
    return found.path


def initial_weights(model: Decoder, config: Config, rope_theta: float, first: bool) -> None:
    """The weights of another run (``init_from``), or as they were drawn. Only where a run begins."""
    if config.init_from is None:
        return
    if not config.init_from.startswith("run:"):
        raise UsageError(f"init_from={config.init_from!r} is not known; write run:PATH of a run or checkpoint folder")
    other, _ = checkpoint.find(config.init_from)
    checkpoint.load_weights(model, other.weights(), str(other.path))
    if first and other.state["rope_theta"] != rope_theta:
        was = other.state["rope_theta"]
        print(f"{other.path} was trained with rope_theta={was:g}, this run begins with {rope_theta:g}", flush=True)


def check_settings(config: Config) -> None:
    """Refuse what would fail only in or behind the first step."""
    if config.generate.tokens and not config.generate.prompt:
        raise UsageError("generate.prompt is empty: give it some text, or generate.tokens=0 for no sample")
    kernels = kernels_for_program()
    if kernels not in (None, "torch", "triton"):
        raise UsageError(f"DNSP_DELTA_RULE={kernels}: the delta rule has the backends torch and triton; take one")
    if kernels == "triton" and not torch.cuda.is_available():
        raise UsageError("DNSP_DELTA_RULE=triton needs a GPU, and there is none; unset it, or take torch")
    if torch.cuda.is_available() and liger.wanted() and liger.missing():
        raise UsageError(f"{liger.missing()}, or set DNSP_LIGER=0 for torch's slower operations")


def _micro_batch(config: Config, grid: Grid, work: Any, micro: int, stage: Span, choices: Choices = Choices()) -> Any:  # noqa: B008 (frozen)
    """This rank's part of a micro-batch, and its plan."""
    layout = Layout(config.parallel.layout, grid.sequence_size, stage.sequence_length)
    rows = batch(
        work,
        micro,
        micro_batch=config.train.micro_batch,
        data_rank=grid.data_rank,
        data_size=grid.data_size,
        intervals=layout.intervals(grid.sequence_rank),
        vocab_size=config.model.vocab_size,
    )
    plan = make_plan(
        rows.doc_starts,
        layout,
        grid,
        choices.segment_tokens(config, layout),
        transport=config.parallel.transport,
        attention_transport=config.parallel.attention_transport,
        attention_backend=choices.attention_backend,
    )
    return rows, plan


def agree_on_step(
    local_loss: Tensor, targets: int, stopping: bool, step: int, grid: Grid, folder: Path
) -> tuple[float, bool]:
    """The step's mean loss over all its targets, and whether any rank was asked to stop.

    Raises:
        RunError: on every rank, naming those whose loss is not finite.
    """
    shared = torch.zeros(2 + grid.world, dtype=torch.float64, device=local_loss.device)
    finite = torch.isfinite(local_loss)
    shared[0] = torch.where(finite, local_loss, 0.0)
    shared[1] = float(stopping)
    shared[2 + grid.rank] = (~finite).double()
    total, asked, *broken = watchdog.total(shared, grid).tolist()
    if any(broken):
        ranks = ", ".join(str(rank) for rank, flag in enumerate(broken) if flag)
        raise both_see(grid.rank == 0, f"the loss is not finite at step {step} on rank {ranks}; {cure(folder)}")
    return total / targets, asked > 0


def both_see(first: bool, message: str) -> RunError:
    """A failure that every rank meets alike: rank 0 says it."""
    return RunError(message) if first else Echo(message)


def end_saved(saver: Saver, telemetry: Telemetry, grid: Grid) -> None:
    """Wait for the last checkpoint.

    Raises:
        RunError: it could not be written, on every rank.
    """
    saved = saver.wait()
    for news in saver.news():
        telemetry.say(news)
    error = watchdog.from_first(saved.error if saved else "")
    if error and saved:
        raise both_see(
            grid.rank == 0,
            f"the last checkpoint, of step {saved.step}, is not saved: {error}; {checkpoint.way_on(saver.folder)}. "
            "Make room in run.dir first",
        )


def whole_model(engine: Engine, config: Config, rope_theta: float) -> Decoder:
    """On rank 0 a model of its own, with the weights that ZeRO 3 keeps in shards."""
    weights = engine.whole_weights()
    model = Decoder(config.model)
    if weights:
        checkpoint.load_weights(model, weights, "the engine")
    model.set_rope_theta(rope_theta)
    return model.to(engine.device)


def sample(model: Decoder, tokenizer: Tokenizer, config: Config) -> str:
    """Text by the recurrent decoder."""
    settings = config.generate
    model.eval()
    pieces = generate_text(model, tokenizer, settings.prompt, settings.tokens, temperature=settings.temperature)
    return settings.prompt + "".join(pieces)
